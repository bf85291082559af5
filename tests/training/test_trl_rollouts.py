"""TRL's GRPO and RLOO, which generate what they train on: completions, log-probabilities before the update and of the
reference come from the whole model, and the gradient is the trainer's own on the completions that run."""

import copy
import importlib
import re
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import use_adapter

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainerMixin
from d2ft_peft.training.generating import check_generation
from tests.models import TINY
from tests.test_trainer import assert_equal, trained
from tests.training.test_trl import LORA, TARGETS, Gradients, config, gradients, moved, same_place, wrapped
from tests.training.trl_cases import GENERATING, KINDS, PROMPTS, base_of, make, reward, tokenizer, words


pytestmark = pytest.mark.filterwarnings("ignore")

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # TRL's log-probabilities are float32, whatever the model's weights are
LONG = {"num_generations": 4, "max_completion_length": 6, "per_device_train_batch_size": 4}


def watching(kind: str) -> type:
    """A trainer whose completions differ in length, which keeps what it made and what its loss was computed on."""

    class Watching(KINDS[kind][0]):
        made, seen = (), ()

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            result = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            completions = result if kind == "rloo" else result[0]
            completions = [ids[: 1 + sum(ids) % len(ids)] for ids in completions]
            return completions if kind == "rloo" else (completions, *result[1:])

        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            if self.model.training:
                self.made = [*self.made, made]
            return made

        def compute_loss(self, model, inputs, *args, **kwargs):
            if model.training:
                self.seen = [*self.seen, inputs]
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Watching


def tokens(inputs: dict, row: int) -> tuple[int, ...]:
    """A prompt and its completion without padding; masked completions, too, since they are a row's name here."""
    prompt = inputs["prompt_ids"][row][inputs["prompt_mask"][row].bool()]
    return (*prompt.tolist(), -1, *inputs["completion_ids"][row][inputs["completion_mask"][row].bool()].tolist())


def rows_that_ran(run) -> dict:
    """As the trainer made them, with all their padding: found again by their tokens."""
    [made] = run.made
    names = [tokens(made, row) for row in range(len(made["prompt_ids"]))]
    ran = [tokens(inputs, row) for inputs in run.seen for row in range(len(inputs["prompt_ids"]))]
    assert len(set(ran)) == len(ran) and set(ran) <= set(names)
    rows = [names.index(name) for name in ran]
    return {name: value if value.ndim == 0 else value[rows] for name, value in made.items()}


def plain_twin(kind: str, folder, run, variant="lora", **settings):
    """The trainer without D2FT, with the weights of another one."""
    base = base_of(kind).double()
    if variant == "lora":
        peft_config = {"peft_config": LoraConfig(**LORA, target_modules=TARGETS)}
    else:
        peft_config = {}
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(name.split(".")[-2] in TARGETS)
    beta = settings.pop("beta", 0.0)
    alone = make(kind, folder, base, **peft_config, **LONG, beta=0.0, **settings)
    alone.beta = beta  # of which the inputs hold the reference
    there = dict(alone.model.named_parameters())
    for name, parameter in run.model.named_parameters():
        if parameter.requires_grad:
            there[same_place(name, variant)].data.copy_(parameter.data)
    return alone


def step_of(kind: str, folder, variant="lora", policy="fewer_samples", rewarding=None, own=None, **settings):
    """One step in float64 from an adapter that is not zero; returns the trainer and its gradients."""
    watch = Gradients()
    given = {} if rewarding is None else {"reward_funcs": rewarding}
    run = make(
        kind, folder, base_of(kind).double(), watching(kind), [watch, D2FTCallback()], max_steps=1, learning_rate=0.0,
        peft_config=config(variant, policy=policy, **(own or {})), **LONG, **given, **settings,
    )  # fmt: skip
    moved(run.model)
    run.train()
    return run, watch.gradients


def assert_gradient_on(alone, inputs: dict, found: dict, variant="lora", items=None) -> None:
    """The gradient of one pass of the trainer's own loss over some rows, as one micro-batch that is the whole step."""
    alone.current_gradient_accumulation_steps = alone.args.steps_per_generation = 1
    if "num_items_in_batch" in inputs:
        inputs = {**inputs, "num_items_in_batch": inputs["completion_mask"].sum() if items is None else items}
    alone.compute_loss(alone.model.train(), inputs).backward()
    expected = gradients(alone.model)
    assert {same_place(name, variant) for name in found} == set(expected)
    assert any(gradient.abs().max() > 1e-6 for gradient in expected.values())
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[same_place(name, variant)], **CLOSE)


# --- everything FULL


SCHEDULES_OF_GENERATION = [
    {},
    {"steps_per_generation": 2},
    {"num_iterations": 2, "beta": 0.1},
    {"steps_per_generation": 8, "loss_type": "grpo"},
]


@pytest.mark.quick(1)
@pytest.mark.parametrize("settings", SCHEDULES_OF_GENERATION)
@pytest.mark.parametrize("kind", GENERATING)
def test_all_full_is_bit_identical_to_the_trainer_alone(tmp_path, kind, settings):
    """However often it generates: within a step, for one, or for several, and with a reference."""
    settings = {name: value for name, value in settings.items() if kind != "rloo" or name != "loss_type"}
    weights, logs = [], []
    for d2ft in (None, {"policy": "all_full", "compute_budget": 1.0}):
        run = wrapped(kind, tmp_path, d2ft, False, learning_rate=1e-2, max_steps=4, **settings)
        run.train()
        weights.append(trained(run.model))
        logs.append([{name: entry.get(name) for name in ("loss", "reward", "entropy", "kl", "num_tokens")}
                     for entry in run.state.log_history])  # fmt: skip
    assert_equal(*weights)
    assert logs[0] == logs[1]


# --- what ran, against the trainer without D2FT on the same completions


LOSSES = ["dapo", "grpo", "dr_grpo", "cispo", "sapo", "vespo", "luspo"]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("kind", "loss"), [*[("grpo", loss) for loss in LOSSES], ("gmpo", None), ("rloo", None)])
def test_a_steps_gradient_is_the_mean_over_the_completions_that_run(tmp_path, kind, loss):
    """Whatever they are divided by, in micro-batches composed by length whose padding is cut off."""
    settings = {"beta": 0.1} | ({"loss_type": loss} if loss else {})
    run, found = step_of(kind, tmp_path, **settings)
    ran = rows_that_ran(run)
    assert 0 < len(ran["advantages"]) < len(run.made[0]["advantages"])
    widths = [inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1] for inputs in run.seen]
    assert min(widths) < ran["prompt_ids"].shape[1] + ran["completion_ids"].shape[1]
    assert_gradient_on(plain_twin(kind, tmp_path, run, **settings), ran, found)


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["exact_first", "bilevel"])
@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("kind", GENERATING)
def test_so_it_is_in_full_fine_tuning_and_of_whole_micro_batches(tmp_path, kind, variant, policy):
    run, found = step_of(kind, tmp_path, variant, policy, beta=0.1)  # so that none is without a gradient
    assert_gradient_on(plain_twin(kind, tmp_path, run, variant, beta=0.1), rows_that_ran(run), found, variant)


@pytest.mark.thorough
def test_terms_beside_the_loss_count_like_it(tmp_path):
    """An entropy bonus, which is a mean over a micro-batch, counts by the completions of each."""
    settings = {"loss_type": "dapo", "entropy_coef": 0.5}
    run, found = step_of("grpo", tmp_path, **settings)
    sizes = [len(inputs["advantages"]) for inputs in run.seen]
    everyone = sum(int(one["completion_mask"].sum()) for one in run.seen)
    alone = plain_twin("grpo", tmp_path, run, **settings)
    alone.args.steps_per_generation = 1
    for inputs, size in zip(run.seen, sizes, strict=True):
        alone.current_gradient_accumulation_steps = sum(sizes) / size
        items = torch.tensor(everyone) * size / sum(sizes)
        alone.compute_loss(alone.model.train(), {**inputs, "num_items_in_batch": items}).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients(alone.model)[name], **CLOSE)


@pytest.mark.thorough
def test_completions_that_were_generated_apart_run_together(tmp_path):
    """Two generations within a step, padded to different widths."""
    run, found = step_of("grpo", tmp_path, own={"compute_budget": 1.0}, steps_per_generation=2, loss_type="grpo")
    alone = plain_twin("grpo", tmp_path, run, loss_type="grpo", steps_per_generation=2)
    assert len(run.made) == 2
    for made in run.made:
        alone.current_gradient_accumulation_steps = 2
        alone.compute_loss(alone.model.train(), made).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients(alone.model)[name], **CLOSE)


def answers(prompts, trainer):
    """Completions of which every other token is what a tool said."""
    ids = [[int(word[1:]) for word in prompt.split()] for prompt in prompts]
    completions = [[3 + (7 * i + sum(one) + k) % 60 for k in range(2 + i % 5)] for i, one in enumerate(ids)]
    return {
        "prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(one) for one in completions],
        "env_mask": [[k % 2 for k in range(len(one))] for one in completions],
    }  # fmt: skip


@pytest.mark.thorough
def test_completions_of_tools_carry_loss_where_the_model_wrote_them(tmp_path):
    run, found = step_of("grpo", tmp_path, beta=0.1, rollout_func=answers)
    ran = rows_that_ran(run)
    items = (ran["completion_mask"] * ran["tool_mask"]).sum()
    assert 0 < items < ran["completion_mask"].sum()
    assert_gradient_on(plain_twin("grpo", tmp_path, run, beta=0.1), ran, found, items=items)


# --- the whole model


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["random", "fewer_samples"])
@pytest.mark.parametrize("variant", ["lora", "full"])
@pytest.mark.parametrize("kind", GENERATING)
def test_what_comes_before_the_loss_comes_from_the_whole_model(tmp_path, kind, variant, policy):
    """Under a policy that cuts every block in another way: completions, and log-probabilities before the update and of
    the reference, in every step of a run that moves the adapter."""
    differences = []

    class Checking(watching(kind)):
        def _generate_and_score_completions(self, inputs):
            made = super()._generate_and_score_completions(inputs)
            with torch.no_grad():
                model = self.model.eval()
                arguments = (
                    torch.cat([made["prompt_ids"], made["completion_ids"]], dim=1),
                    torch.cat([made["prompt_mask"], made["completion_mask"]], dim=1),
                    made["completion_ids"].shape[1],
                )
                now = self._get_per_token_logps_and_entropies(model, *arguments)[0]
                with use_adapter(model, None):
                    before = self._get_per_token_logps_and_entropies(model, *arguments)[0]
                model.train()
            mask = made["completion_mask"]
            if kind != "rloo":
                differences.append((mask * (made["old_per_token_logps"] - now)).abs().max())
                differences.append((mask * (made["ref_per_token_logps"] - before)).abs().max())
            else:
                differences.append((made["old_logps"] - (mask * now).sum(1)).abs().max())
            assert (mask * (now - before)).abs().max() > 1e-3
            return made

    run = make(
        kind, tmp_path, base_of(kind).double(), Checking, [D2FTCallback()], learning_rate=1e-2, max_steps=3, beta=0.1,
        num_iterations=2, peft_config=config(variant, policy=policy), **LONG,
    )  # fmt: skip
    moved(run.model)
    run.train()
    assert len(differences) >= 2 and max(differences) < 1e-10


@pytest.mark.thorough
@pytest.mark.parametrize("variant", ["lora", "full"])
def test_what_is_handed_to_vllm_is_the_merged_model(tmp_path, variant):
    """By the trainer's own code, which names the weights for a server; and the adapter is what it was."""
    run = make("grpo", tmp_path, base_of("grpo").double(), callbacks=[D2FTCallback()],
               peft_config=config(variant, policy="fewer_samples"))  # fmt: skip
    moved(run.model)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    handing = VLLMGeneration.__new__(VLLMGeneration)
    handing.model, handing.accelerator, handing._dist = run.model, run.accelerator, run._dist
    handed = {name: value.clone() for name, value in handing._iter_named_params()}
    expected = dict(copy.deepcopy(run.model).merge_and_unload().named_parameters())
    assert set(handed) == set(expected)
    for name, value in handed.items():
        torch.testing.assert_close(value, expected[name].detach())
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, before[name])


@pytest.mark.thorough
def test_completions_are_those_of_the_trainer_alone(tmp_path):
    """In a run whose weights stay: leaving completions out draws nothing."""
    made = []
    for d2ft in (None, {"policy": "random", "compute_budget": 0.5}):
        run = wrapped("grpo", tmp_path, d2ft, False, trainer_class=watching("grpo"), learning_rate=0.0, max_steps=3)
        run.train()
        made.append([one["completion_ids"] for one in run.made])
    for one, other in zip(*made, strict=True):
        assert torch.equal(one, other)


@pytest.mark.thorough
def test_evaluation_generates_as_ever(tmp_path):
    """In the middle of a run, after which the next step is trained on again."""
    run = make("grpo", tmp_path, callbacks=[D2FTCallback()], peft_config=config("lora"), eval_strategy="steps",
               eval_steps=1, per_device_eval_batch_size=2, eval_dataset=Dataset.from_list(PROMPTS[:2]))  # fmt: skip
    modes, generate = [], run._generate_and_score_completions
    run._generate_and_score_completions = lambda inputs: (modes.append(run.model.training), generate(inputs))[1]
    run.train()
    assert modes == [True, False, False, True, False, False]
    assert sum("eval_loss" in entry for entry in run.state.log_history) == 2


# --- what has no gradient


def alike_in_half(prompts, completions, **_):
    """The completions of every other prompt have the same reward."""
    return [
        float(sum(map(ord, completion)) % 7) if sum(map(ord, prompt)) % 2 else 1.0
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("kind", "loss"), [("grpo", "dapo"), ("grpo", "grpo"), ("grpo", "dr_grpo"), ("rloo", None)])
def test_completions_without_an_advantage_are_left_out_exactly(tmp_path, kind, loss):
    """By the default policy: the gradient is that of all completions, of which fewer ran."""
    settings = {"loss_type": loss} if loss else {"beta": 0.0}
    run, found = step_of(kind, tmp_path, policy="exact_first", rewarding=alike_in_half, own={"compute_budget": 0.9},
                         **settings)  # fmt: skip
    [made] = run.made
    zero = made["advantages"] == 0
    assert 0 < zero.sum() < len(zero)
    assert sum(len(inputs["advantages"]) for inputs in run.seen) == (~zero).sum()
    assert all((inputs["advantages"] != 0).all() for inputs in run.seen)
    assert_gradient_on(plain_twin(kind, tmp_path, run, **settings), made, found)
    assert run.state.log_history[0]["flops_ratio"] < 0.9


@pytest.mark.thorough
def test_masked_completions_are_left_out_exactly(tmp_path):
    """Those that were cut off count in no term, a reference or not."""
    settings = {"mask_truncated_completions": True, "beta": 0.1, "loss_type": "grpo"}
    run, found = step_of("grpo", tmp_path, policy="exact_first", own={"compute_budget": 1.0}, **settings)
    [made] = run.made
    masked = made["completion_mask"].sum(1) == 0
    assert 0 < masked.sum() < len(masked)
    assert sum(len(inputs["advantages"]) for inputs in run.seen) == (~masked).sum()
    assert_gradient_on(plain_twin("grpo", tmp_path, run, **settings), made, found)


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_what_other_terms_look_at_runs(tmp_path, settings):
    run, _ = step_of("grpo", tmp_path, policy="exact_first", rewarding=alike_in_half, own={"compute_budget": 1.0},
                     **settings)  # fmt: skip
    assert sum(len(inputs["advantages"]) for inputs in run.seen) == len(run.made[0]["advantages"])


@pytest.mark.thorough
def test_a_step_without_any_gradient_is_a_step(tmp_path):
    """Momentum and weight decay go on, as in the trainer alone."""
    weights = []
    for d2ft in (None, {"policy": "exact_first", "compute_budget": 1.0}):
        counts = []

        def same_at_last(completions, counts=counts, **_):
            counts.append(None)
            return [float(len(one)) if len(counts) < 3 else 1.0 for one in completions]

        run = wrapped("grpo", tmp_path, d2ft, False, trainer_class=watching("grpo"), reward_funcs=same_at_last,
                      max_steps=4, learning_rate=1e-2, weight_decay=0.1, **LONG)  # fmt: skip
        run.train()
        weights.append(trained(run.model))
    assert len(run.seen[-1]["advantages"]) == 1 and run.state.log_history[-2]["grad_norm"] == 0
    for one, other in zip(weights[0].values(), weights[1].values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


# --- a run


@pytest.mark.thorough
@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("kind", GENERATING)
def test_the_mixin_and_the_callback_are_one(tmp_path, kind, mixed):
    cls = type("Mixed", (D2FTTrainerMixin, KINDS[kind][0]), {}) if mixed else KINDS[kind][0]
    peft_config = D2FTConfig(**LORA, target_modules=TARGETS, policy="fewer_samples", compute_budget=0.5)
    run = make(kind, tmp_path, None, cls, [] if mixed else [D2FTCallback()], peft_config=peft_config)
    run.train()
    entries = [entry for entry in run.state.log_history if "loss" in entry]
    assert [entry["compute_ratio"] for entry in entries] == pytest.approx([0.5] * 2)
    assert run._step == 8 and all(entry["step_time"] > 0 for entry in entries)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", GENERATING)
def test_a_run_without_accumulation_leaves_completions_out(tmp_path, kind):
    """As the trainer's own defaults have it; and what is generated for several steps is generated once."""
    run = make(
        kind, tmp_path, None, watching(kind), [D2FTCallback()], peft_config=config("lora"), max_steps=4,
        gradient_accumulation_steps=1, steps_per_generation=2, per_device_train_batch_size=4,
    )  # fmt: skip
    run.train()
    assert len(run.made) == 2 and len(run.seen) >= 4
    assert sum(len(inputs["advantages"]) for inputs in run.seen) < 16


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["fewer_samples", "bilevel"])
@pytest.mark.parametrize("kind", GENERATING)
def test_a_resumed_run_is_the_run(tmp_path, kind, policy):
    """Within an epoch: the completions are drawn from the random state of the checkpoint, once."""
    ends = []
    for folder, steps, start in (("whole", 3, None), ("parts", 1, None), ("parts", 3, "parts/checkpoint-1")):
        run = make(
            kind, tmp_path / folder, callbacks=[D2FTCallback()], peft_config=config("lora", policy=policy),
            max_steps=steps, save_strategy="steps", save_steps=1, learning_rate=1e-2, lr_scheduler_type="constant",
            gradient_accumulation_steps=2,
        )  # fmt: skip
        run.train(resume_from_checkpoint=start and str(tmp_path / start))
        ends.append(trained(run.model))
    assert_equal(ends[0], ends[2])
    assert any(not torch.equal(ends[1][name], value) for name, value in ends[0].items())


# --- columns


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "cut"), [("llama", True), ("gpt2", False)])
def test_prompts_keep_their_padding_where_positions_are_absolute(tmp_path, name, cut):
    """The padding before a prompt shifts the positions of such a model, and TRL's other passes have it."""
    run = make(
        "grpo", tmp_path, TINY[name].build().double(), watching("grpo"), [D2FTCallback()], max_steps=1,
        peft_config=D2FTConfig(policy="fewer_samples", compute_budget=0.8),
        **LONG | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    )  # fmt: skip
    run.train_dataset = Dataset.from_list([{"prompt": words(1 + i, i)} for i in range(8)])
    run.train()
    widths = {inputs["prompt_ids"].shape[1] for inputs in run.seen}
    assert len(run.seen) > 4 and (len(widths) > 1 if cut else widths == {run.made[0]["prompt_ids"].shape[1]})


@pytest.mark.thorough
def test_padding_that_is_kept_is_kept(tmp_path):
    run, found = step_of("grpo", tmp_path, own={"padding": "keep"})
    assert {inputs["completion_ids"].shape[1] for inputs in run.seen} == {run.made[0]["completion_ids"].shape[1]}
    assert_gradient_on(plain_twin("grpo", tmp_path, run), rows_that_ran(run), found)


# --- what is refused


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("own", "settings", "match"),
    [
        ({"policy": "importance"}, {}, "reads the score 'loss' of every sample, and GRPOTrainer generates new ones"),
        ({"policy": "bilevel", "backward_score": "fisher"}, {}, "reads the score 'fisher' of every sample"),
        ({"policy": "fewer_tokens"}, {}, "policy='fewer_tokens' leaves out tokens"),
        ({"head_parallel": True}, {}, "head_parallel=True does not run in GRPOTrainer"),
        ({"device_capacities": "auto"}, {}, "device_capacities='auto' gives processes different numbers"),
        ({"head_start": True}, {}, "head_start=True fits a new head .* GRPOTrainer has none"),
        ({"padding": "flatten"}, {}, "padding='flatten' lays .* GRPOTrainer generates its own"),
        ({"cache_frozen": "cache"}, {}, "cache_frozen='cache' keeps .* GRPOTrainer generates new ones"),
        ({"policy": "bilevel"}, {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4},
         "gradient_accumulation_steps=1 GRPOTrainer generates each with another model"),
    ],
)  # fmt: skip
def test_what_there_is_not_for_new_completions_is_refused(tmp_path, own, settings, match):
    run = make("grpo", tmp_path, callbacks=[D2FTCallback()], peft_config=config("lora", **own), **settings)
    with pytest.raises(ValueError, match=match):
        run.train()


# --- trainers that generate in another way, by their module in TRL


REFUSED = {
    "trl": ["DistillationTrainer"],
    "trl.experimental.a2po": ["A2POTrainer"],
    "trl.experimental.async_distillation": ["AsyncDistillationTrainer"],
    "trl.experimental.async_grpo": ["AsyncGRPOTrainer"],
    "trl.experimental.gold": ["GOLDTrainer"],
    "trl.experimental.iw_opd": ["IWOPDTrainer"],
    "trl.experimental.online_dpo": ["OnlineDPOTrainer"],
    "trl.experimental.sdft": ["SDFTTrainer"],
    "trl.experimental.sdpo": ["SDPOTrainer"],
    "trl.experimental.server_distillation": ["ServerDistillationTrainer"],
}


@pytest.mark.thorough
@pytest.mark.parametrize(("module", "name"), [(module, name) for module, names in REFUSED.items() for name in names])
def test_other_ways_of_generating_are_refused(module, name):
    cls = getattr(importlib.import_module(module), name)
    with pytest.raises(ValueError, match="Trainer generates what it trains on in the middle of a step.* leave D2FT's"):
        check_generation(cls.__new__(cls))


@pytest.mark.thorough
@pytest.mark.parametrize("mixed", [True, False])
def test_they_are_refused_when_training_begins(tmp_path, mixed):
    online_dpo = importlib.import_module("trl.experimental.online_dpo")
    cls = online_dpo.OnlineDPOTrainer
    run = (type("Mixed", (D2FTTrainerMixin, cls), {}) if mixed else cls)(
        model=base_of("grpo"), reward_funcs=reward, processing_class=tokenizer(), peft_config=config("lora"),
        args=online_dpo.OnlineDPOConfig(
            str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_new_tokens=4, max_length=32
        ),
        train_dataset=Dataset.from_list(PROMPTS), callbacks=[] if mixed else [D2FTCallback()],
    )  # fmt: skip
    with pytest.raises(ValueError, match="OnlineDPOTrainer generates what it trains on"):
        run.train()


@pytest.mark.thorough
@pytest.mark.parametrize("settings", [{"lmbda": 0.5}, {"lmbda": 0.0, "seq_kd": True}])
def test_distillation_on_what_is_generated_within_a_step_is_refused(tmp_path, settings):
    run = make("gkd", tmp_path, callbacks=[D2FTCallback()], peft_config=config("lora"), **settings)
    with pytest.raises(ValueError, match="GKDTrainer with lmbda=.* exchanges completions.* set lmbda=0"):
        run.train()


@pytest.mark.thorough
def test_every_trainer_of_trl_is_in_the_documentation():
    """By name; one that a new version brings is missing here first."""
    files = Path(trl.__file__).parent.glob("**/*_trainer.py")
    names = {name for file in files for name in re.findall(r"^class (\w+)Trainer\(", file.read_text(), re.MULTILINE)}
    page = (Path(__file__).parents[2] / "docs" / "trl.md").read_text()
    table = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| "))
    assert len(names) > 15 and {name for name in names if not name.startswith("_") and name not in table} == set()
