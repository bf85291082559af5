"""TRL's trainers: what they compute on the samples that run is what they would compute without D2FT, or they are
refused with a reason."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import TrainerCallback

from d2ft_peft import D2FTCallback, D2FTConfig, partition_model
from tests.models import TINY
from tests.test_trainer import assert_equal, trained
from tests.training.trl_cases import GENERATING, KINDS, base_of, make


pytestmark = pytest.mark.filterwarnings("ignore")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "init_lora_weights": "gaussian"}
OFFLINE = [kind for kind in KINDS if kind not in GENERATING]  # whose samples lie in a data set


def wrapped(kind, folder, config, checkpointing=True, **kwargs):
    """A trainer of a model that was wrapped before: plain LoRA, or D2FT with a callback."""
    base = TINY["llama"].build()
    torch.manual_seed(5)
    adapter = LoraConfig(**LORA, target_modules=TARGETS) if config is None else D2FTConfig(**LORA, **config)
    callbacks = [] if config is None else [D2FTCallback()]
    model = get_peft_model(base, adapter)
    return make(kind, folder, model, callbacks=callbacks, gradient_checkpointing=checkpointing, **kwargs)


@pytest.mark.quick(1)
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_all_full_is_bit_identical_to_the_trainer_alone(tmp_path, kind, checkpointing):
    """The reference passes of DPO, by a copy of the adapter, included."""
    weights = []
    for config in (None, {"policy": "all_full", "compute_budget": 1.0}):
        run = wrapped(kind, tmp_path, config, checkpointing)
        run.train()
        weights.append(trained(run.model))
    assert_equal(*weights)


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", ["bilevel", "random", "fewer_samples"])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_a_part_of_the_model_trains(tmp_path, kind, policy):
    run = wrapped(kind, tmp_path, {"policy": policy, "compute_budget": 0.5})
    before = {name: value.clone() for name, value in trained(run.model).items()}
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["compute_ratio"] for entry in entries] == pytest.approx([0.5] * 2)
    assert any(not torch.equal(before[name], value) for name, value in trained(run.model).items())


# --- what ran, against the trainer without D2FT on the same samples


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients = gradients(model)


def gradients(model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def seeing(cls: type) -> type:
    """A trainer that keeps what its loss was computed on."""

    class Seeing(cls):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.seen = [*getattr(self, "seen", ()), (dict(inputs), kwargs)]
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Seeing


def config(variant: str, **kwargs) -> D2FTConfig:
    lora = {**LORA, "target_modules": TARGETS} if variant == "lora" else {}
    return D2FTConfig(**{"compute_budget": 0.5, **lora, **kwargs})


def plain_trainer(kind, folder, variant, base):
    """The same trainer without D2FT: plain LoRA, or fine-tuning of all projections."""
    if variant == "lora":
        return make(kind, folder, base, peft_config=LoraConfig(**LORA, target_modules=TARGETS))
    for name, parameter in base.named_parameters():
        parameter.requires_grad_(name.split(".")[-2] in TARGETS)
    reference = {"ref_model": copy.deepcopy(base)} if kind.startswith(("dpo", "kto")) else {}
    return make(kind, folder, base, **reference)


def same_place(name: str, variant: str) -> str:
    return name if variant == "lora" else name.removeprefix("base_model.model.").replace(".d2ft_layers.default.", ".")


def moved(model) -> None:
    """Move the adapter, so that it matters."""
    for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
        noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i), dtype=parameter.dtype)
        parameter.data.add_(0.1 * noise)


WAYS = [("lora", "bilevel"), ("lora", "fewer_samples"), ("lora", "exact_first"), ("full", "fewer_samples")]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("kind", "variant", "policy"), [(kind, *way) for kind in OFFLINE for way in WAYS])
def test_a_step_is_the_trainers_own_on_the_samples_that_run(tmp_path, kind, variant, policy):
    """In float64, from an adapter that is not zero. A loss that is a mean is weighted by the samples of its part."""
    watch = Gradients()
    base = base_of(kind).double()
    run = make(
        kind, tmp_path, copy.deepcopy(base), seeing(KINDS[kind][0]), [watch, D2FTCallback()],
        peft_config=config(variant, policy=policy), max_steps=1, learning_rate=0.0,
    )  # fmt: skip
    moved(run.model)
    run.train()

    alone = plain_trainer(kind, tmp_path, variant, base)
    there = dict(alone.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            there[same_place(name, variant)].data.copy_(parameter.data)
    samples = [len(next(value for value in inputs.values() if isinstance(value, Tensor))) for inputs, _ in run.seen]
    assert sum(samples) > 0
    for (inputs, arguments), count in zip(run.seen, samples, strict=True):
        items = arguments["num_items_in_batch"]
        items = None if items is None else items.as_subclass(Tensor)
        loss = alone.compute_loss(alone.model.train(), dict(inputs), num_items_in_batch=items)
        (loss if kind.startswith(("sft", "gkd")) else loss * count / sum(samples)).backward()
    expected = gradients(alone.model)
    assert {same_place(name, variant) for name in watch.gradients} == set(expected)
    for name, gradient in watch.gradients.items():
        torch.testing.assert_close(gradient, expected[same_place(name, variant)])


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_the_two_of_a_pair_run_together(tmp_path, kind):
    run = make(
        kind, tmp_path, None, seeing(KINDS[kind][0]), [D2FTCallback()], peft_config=config("lora"), max_steps=1
    )  # fmt: skip
    run.train()
    rows = [inputs["input_ids"] for inputs, _ in run.seen]
    assert sum(map(len, rows)) == 8  # two for each of four pairs of eight
    for ids in rows:
        chosen, rejected = ids.chunk(2)
        assert torch.equal(chosen[:, :4], rejected[:, :4])  # the prompt
        assert not torch.equal(chosen, rejected)


@pytest.mark.quick(1)
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_reference_passes_run_the_whole_base(tmp_path, kind, variant, checkpointing):
    """Under a policy that cuts every block in another way: no adapter, no plan."""
    settings = {} if checkpointing is None else {
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": checkpointing},
    }  # fmt: skip
    peft_config = config(variant, policy="random")
    run = make(kind, tmp_path, callbacks=[D2FTCallback()], peft_config=peft_config, max_steps=1, **settings)
    moved(run.model)
    base, differences = base_of(kind).eval(), []

    def compare(module, args, kwargs, outputs):
        if run.model.get_model_status().enabled is False:
            inputs = {name: kwargs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in kwargs}
            with torch.no_grad():
                expected = base.model(**inputs, use_cache=False).last_hidden_state
            differences.append((outputs.last_hidden_state - expected).abs().max().item())

    run.model.get_base_model().model.register_forward_hook(compare, with_kwargs=True)
    run.train()
    assert len(differences) >= 2 and max(differences) < 1e-5


def test_an_adapter_trained_on_preferences_is_plain_lora_on_disk(tmp_path):
    run = make("dpo", tmp_path, callbacks=[D2FTCallback()], peft_config=config("lora"), eval_strategy="no")
    run.train()
    run.save_model(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base_of("dpo"), tmp_path / "adapter")
    assert type(loaded.peft_config["default"]) is LoraConfig
    inputs = {"input_ids": TINY["llama"].batch()["input_ids"]}
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**inputs).logits, run.model.eval()(**inputs).logits)


def test_without_the_callback_the_adapter_trains_whole_and_says_so(tmp_path):
    run = make("sft", tmp_path, peft_config=config("lora"), max_steps=1)
    with pytest.warns(UserWarning, match="training forward without a schedule"):
        run.train()


# --- what cannot be scheduled


def test_a_loss_without_logits_gives_no_scores(tmp_path):
    """SFTTrainer computes it in a fused kernel, and another forward pass for scores would cost what they save."""
    with pytest.raises(ValueError, match="one forward pass, .* 1 of them with logits .None..*has its loss without"):
        wrapped("sft", tmp_path, {"policy": "importance", "compute_budget": 0.5}).train()


@pytest.mark.quick(2)
@pytest.mark.parametrize("kind", ["dpo", "kto", "reward", "orpo"])
def test_a_loss_of_the_trainers_own_gives_no_gradient_scores(tmp_path, kind):
    peft_config = config("lora", policy="bilevel", backward_score="gradient_magnitude")
    run = make(kind, tmp_path, callbacks=[D2FTCallback()], peft_config=peft_config)
    with pytest.raises(ValueError, match="gradients of the model's own loss, and a batch has .* none of .'labels'"):
        run.train()


def test_without_the_base_there_is_no_reference(tmp_path):
    run = make("dpo", tmp_path, callbacks=[D2FTCallback()], peft_config=config("full", keep_base=False))
    with pytest.raises(ValueError, match="cannot be disabled: keep_base=False trained the model's own weights"):
        run.train()


@pytest.mark.parametrize("kind", GENERATING)
def test_generating_trainers_train_the_whole_adapter(tmp_path, kind):
    run = make(kind, tmp_path, peft_config=config("lora"), max_steps=1)
    with pytest.warns(UserWarning, match="training forward without a schedule"):
        run.train()
    assert partition_model(run.model.get_base_model()) and run.state.global_step == 1
