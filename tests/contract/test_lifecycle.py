"""An adapter's life through transformers, PEFT and Accelerate: wrapped, trained, resumed, saved, loaded, merged."""

import copy

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer
from tests.models import TINY


# Which samples are scheduled is drawn, so a resumed run needs the random state and the planner's state as well.
BUDGET = {"policy": "random", "num_full": 1, "num_forward_only": 1}
CONFIGS = {
    "full": {"modules_to_save": ["classifier"], **BUDGET},
    "LoRA": {"r": 4, "modules_to_save": ["classifier"], **BUDGET},
}


def samples() -> list[dict]:
    batch = TINY["vit"].batch(24)
    return [{key: value[i] for key, value in batch.items()} for i in range(24)]


def make_trainer(model, folder, cls=D2FTTrainer, **options) -> Trainer:
    args = TrainingArguments(
        str(folder), max_steps=2, save_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3,
        learning_rate=1e-2, logging_steps=1, use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    return cls(model=model, args=args, train_dataset=samples(), eval_dataset=samples()[:4], **options)


def adapted(kind: str, seed: int = 0):
    base = TINY["vit"].build(seed=0)
    torch.manual_seed(seed)
    return get_peft_model(base, D2FTConfig(**CONFIGS[kind]))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=TINY["vit"].batch(4, seed=9)["pixel_values"]).logits


@pytest.fixture(scope="module", params=list(CONFIGS))
def run(request, tmp_path_factory):
    """Two steps of one variant: its name, the Trainer afterwards, and its folder."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(adapted(request.param), folder)
    trainer.train()
    return request.param, trainer, folder


def test_steps_are_trained_and_logged(run):
    kind, trainer, _ = run
    assert trainer.state.global_step == 2
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    # One micro-batch of three FULL, one FORWARD_ONLY: a third of the work in full fine-tuning, half of it under LoRA.
    assert [entry["compute_ratio"] for entry in steps] == pytest.approx(
        [4 / 9 if kind == "full" else 1 / 2] * 2, abs=0.1
    )
    assert trainer.state.total_flos > 0 and trainer.evaluate()["eval_loss"] > 0
    assert not torch.equal(logits(trainer.model), logits(adapted(kind)))


def test_a_resumed_run_has_the_same_bits(run, tmp_path):
    kind, trainer, folder = run
    again = make_trainer(adapted(kind, seed=1), tmp_path)
    again.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    for (name, one), two in zip(trainer.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_what_is_saved_loads_and_merges(run, tmp_path):
    kind, trainer, _ = run
    expected = logits(trainer.model)
    trainer.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(TINY["vit"].build(seed=0), tmp_path / "adapter")
    stock = (
        type(loaded.base_model) is LoraModel and PeftConfig.from_pretrained(tmp_path / "adapter").peft_type == "LORA"
    )
    assert stock == (kind == "LoRA"), "a LoRA adapter is PEFT's own"
    torch.testing.assert_close(logits(loaded), expected)
    merged = copy.deepcopy(loaded).merge_and_unload()
    assert type(merged) is type(TINY["vit"].build())
    torch.testing.assert_close(logits(merged), expected)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForImageClassification.from_pretrained(tmp_path / "merged")), expected)


@pytest.mark.parametrize("run", ["LoRA"], indirect=True)
def test_transformers_loads_the_adapter_by_itself(run, tmp_path):
    _, trainer, _ = run
    trainer.model.save_pretrained(tmp_path)
    model = TINY["vit"].build(seed=0)
    model.load_adapter(str(tmp_path))
    assert model.active_adapters() == ["default"]
    torch.testing.assert_close(logits(model), logits(trainer.model))
    model.disable_adapters()
    torch.testing.assert_close(logits(model), logits(TINY["vit"].build(seed=0)))


def test_a_callback_does_in_a_plain_trainer_what_the_trainer_does(run, tmp_path):
    kind, trainer, _ = run
    plain = make_trainer(adapted(kind), tmp_path, cls=Trainer, callbacks=[D2FTCallback()])
    plain.train()
    torch.testing.assert_close(logits(plain.model), logits(trainer.model))


@pytest.mark.quick(1)
def test_checkpointed_activations_change_no_gradient(run):
    kind, *_ = run
    gradients = []
    for enabled in (False, True):
        trainer = make_trainer(adapted(kind), "unused")
        trainer.args.save_strategy = "no"
        trainer.args.max_steps = 1
        trainer.args.gradient_checkpointing = enabled
        trainer.train()
        gradients.append({name: p.detach() for name, p in trainer.model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(gradients[0], gradients[1])
