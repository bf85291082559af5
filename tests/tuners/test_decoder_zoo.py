"""Decoders with fused projections, tensors per head, latents and experts: the fast execution equals its slow twin."""

import copy

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.plan import Heads
from tests.reference import reference_forward
from tests.tuners.cases import mixed_row, same
from tests.tuners.test_equality import LORA, assert_same_gradients, enable_checkpointing, plain_twin, random_rows, step
from tests.zoo_decoders import DECODERS


QUICK = {
    "bloom", "codegen", "deepseek_v3", "falcon, alibi", "gpt_neox", "gpt_oss", "mpt", "olmo2", "phi3", "qwen3_next",
    "stablelm",
}  # fmt: skip
PARAMS = {name: name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in DECODERS}
each_decoder = pytest.mark.parametrize("name", PARAMS.values())
each_that_checkpoints = pytest.mark.parametrize(
    "name", [param for name, param in PARAMS.items() if DECODERS[name].model.supports_gradient_checkpointing]
)
ignore_targets_left_out = pytest.mark.filterwarnings("ignore:LoRA leaves")
IN_FLOAT32 = {"xglm"}  # its own code overflows in float64
TOLERANCE = {torch.float64: {"rtol": 1e-6, "atol": 1e-7}, torch.float32: {"rtol": 1e-4, "atol": 1e-5}}


def built(name):
    """The model with all of its sinks trained, and a batch of ragged samples."""
    model = DECODERS[name].build()
    model.set_experts_implementation("eager")  # products of groups know no float64
    model = model.to(torch.float32 if name in IN_FLOAT32 else torch.float64)
    batch = DECODERS[name].batch()
    if name not in ("mpt",):  # with ALiBi and padding its own masks overflow
        batch["attention_mask"][0, 4:] = 0
        batch["labels"][0, 4:] = -100
    return model, batch


def pair(model, mode):
    """(D2FT model, plain twin, the twin's base)."""
    config = D2FTConfig(**LORA) if mode == "lora" else D2FTConfig()
    torch.manual_seed(7)
    ours = get_peft_model(copy.deepcopy(model), config).train()
    if mode == "lora":
        twin = plain_twin(model, mode, False, ours.peft_config["default"].target_modules).train()
        return ours, twin, twin.base_model.model
    twin = plain_twin(model, mode, False).train()
    for each in (ours, twin):
        for parameter_name, parameter in each.named_parameters():
            if parameter_name.endswith(".sinks"):
                parameter.requires_grad_(True)
    return ours, twin, twin


@pytest.mark.quick(8)
@ignore_targets_left_out
@pytest.mark.parametrize("mode", ["full", "lora"])
@each_decoder
def test_random_schedules_equal_the_reference(name, mode):
    model, batch = built(name)
    ours, twin, base = pair(model, mode)
    partition, tolerance = partition_model(base), TOLERANCE[model.dtype]
    for index, row in enumerate(random_rows(partition, seed=1, n=1)[:-1]):
        accumulate = index % 2 == 1
        with reference_forward(base, partition, row):
            expected = step(twin, batch, accumulate)
        with get_runtime(ours).use(compile_plan(partition, row)):
            outputs = step(ours, batch, accumulate)
        torch.testing.assert_close(outputs.logits, expected.logits, **tolerance)
        assert_same_gradients(ours, twin, mode, **tolerance)


@pytest.mark.quick(4)
@pytest.mark.parametrize("checkpointing", ["non-reentrant", pytest.param("reentrant", marks=pytest.mark.slow)])
@each_that_checkpoints
def test_gradient_checkpointing_equals_the_reference(name, checkpointing):
    model, batch = built(name)
    ours, twin, _ = pair(model, "full")
    enable_checkpointing(ours, checkpointing)
    partition = partition_model(twin)
    row = random_rows(partition, seed=2)[0]
    with reference_forward(twin, partition, row):
        step(twin, batch)
    with get_runtime(ours).use(compile_plan(partition, row)):
        step(ours, batch)
    assert_same_gradients(ours, twin, "full", **TOLERANCE[model.dtype])


@pytest.mark.quick(4)
@ignore_targets_left_out
@pytest.mark.parametrize("mode", ["lora", pytest.param("full", marks=pytest.mark.slow)])
@each_decoder
def test_a_trained_adapter_is_saved_loaded_and_merged(name, mode, tmp_path):
    model, batch = built(name)
    ours = get_peft_model(copy.deepcopy(model), D2FTConfig(r=4) if mode == "lora" else D2FTConfig()).train()
    partition = get_runtime(ours).partitions["default"]
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], lr=0.02)
    for seed in range(2):  # A of LoRA moves from the second step on
        optimizer.zero_grad()
        with get_runtime(ours).use(compile_plan(partition, mixed_row(partition, seed))):
            step(ours, batch, accumulate=True)
        optimizer.step()
    with torch.no_grad():
        before, expected = model.eval()(**batch).logits, ours.eval()(**batch).logits
        assert (before - expected).abs().max() > 1e-4
        ours.save_pretrained(tmp_path)
        same(PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()(**batch).logits, expected)
        torch.testing.assert_close(ours.merge_and_unload()(**batch).logits, expected)


@pytest.mark.quick(4)
@each_decoder
def test_every_head_full_is_the_plain_model_to_the_bit(name):
    model, batch = built(name)
    ours, twin, _ = pair(model, "full")
    partition = partition_model(model)
    with get_runtime(ours).use(compile_plan(partition, np.full(partition.num_scheduled, 2))):
        same(step(ours, batch).logits, step(twin, batch).logits)


@pytest.mark.parametrize("name, shortcut", [("codegen", "mean"), ("bloom", "rescale"), ("olmo2", "mean")])
def test_what_stands_in_for_skipped_heads_equals_the_reference(name, shortcut):
    """Also where a head's features lie in several places, and where the region adds the residual."""
    model, batch = built(name)
    torch.manual_seed(7)
    ours = get_peft_model(copy.deepcopy(model), D2FTConfig(shortcut=shortcut)).train()
    twin, runtime = plain_twin(model, "full", False).train(), get_runtime(ours)
    partition = partition_model(twin)
    with runtime.use(compile_plan(partition, np.full(partition.num_scheduled, 2))):
        step(ours, batch)
    for row in random_rows(partition, seed=1, n=2)[:2]:
        with runtime.use(compile_plan(partition, row)):
            every = Heads(tuple(range(partition.branches[0].heads)))
            means = {branch: mean.features(every).clone() for branch, mean in runtime.means.items()}
            outputs = step(ours, batch)
        with reference_forward(twin, partition, row, shortcut, means):
            expected = step(twin, batch)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)
        assert_same_gradients(ours, twin, "full", rtol=1e-4, atol=1e-6)


def test_sinks_learn_from_the_heads_that_are_full_only():
    model, batch = built("gpt_oss")
    ours, _, _ = pair(model, "full")
    partition = partition_model(model)
    with get_runtime(ours).use(compile_plan(partition, [2, 1, 2, 0])):
        step(ours, batch)
    for block in range(2):
        gradient = ours.get_base_model().model.layers[block].self_attn.sinks.grad
        assert gradient[:2].all() and not gradient[2:].any()


def test_what_covers_a_region_s_own_is_gone_after_a_pass():
    for name in ("gpt_oss", "phi3", "stablelm", "bloom"):
        model, batch = built(name)
        ours, _, _ = pair(model, "full")
        before = {module: set(module.__dict__) for module in ours.modules()}
        partition = partition_model(model)
        with get_runtime(ours).use(compile_plan(partition, np.resize([2, 1, 0], partition.num_scheduled))):
            step(ours, batch)
        assert {module: set(module.__dict__) for module in ours.modules()} == before
        assert ours.get_base_model().config.num_attention_heads == 4


def test_the_boundary_around_sinks_trains_and_they_are_said_to_be_left_alone():
    model, batch = built("gpt_oss")
    with pytest.warns(UserWarning, match="train_boundary=True leaves sinks of model.layers.0.self_attn and others alo"):
        ours = get_peft_model(model, D2FTConfig(train_boundary=True)).train()
    partition = get_runtime(ours).partitions["default"]
    with get_runtime(ours).use(compile_plan(partition, [2, 1, 2, 0])):
        step(ours, batch)
    trained = {name for name, p in ours.named_parameters() if p.grad is not None}
    assert any("embed_tokens" in name for name in trained) and not any("sinks" in name for name in trained)
