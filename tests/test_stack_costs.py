"""The cost of models with several stacks against counted FLOPs of real steps, each stack at its own tokens."""

import numpy as np
import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, Operation
from d2ft_peft.costs.flops import cost_model
from d2ft_peft.costs.probe import probe_model
from d2ft_peft.costs.seen import Probe
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.planning.model_costs import ModelCosts, separated
from tests.test_cost_model import counted, rows
from tests.zoo_stacks import PAIRS, TOWERS, ZOO


WIDER = {"d_model": 64, "encoder_ffn_dim": 192, "decoder_ffn_dim": 256, "d_ff": 192}
# Cross attention that runs whole is known by the FLOPs of its forward pass alone: whether gradients reach what it reads
# is not; nor is it known that an FFN beside attention, rather than behind it, reads the block's input.
WITHIN = dict.fromkeys(PAIRS, 0.07) | {
    "vision-encoder-decoder (ViT, BERT)": 0.11, "mllama": 0.01, "aya_vision": 0.09, "llava, tower": 0.05,
}  # fmt: skip
# Their `model` holds parameters of its own beside its subnets, which train_boundary refuses to copy.
REFUSES_BOUNDARY = {*TOWERS, "llava_next", "llava_onevision", "mllama"}
QUICK = {("t5", "full"), ("bart", "lora"), ("qwen2_5_vl, both stacks", "lora"), ("clip", "full")}
CASES = [
    pytest.param(name, mode, marks=() if (name, mode) in QUICK else pytest.mark.slow)
    for name in ZOO
    for mode in ("full", "lora", "full with boundary")
    if "boundary" not in mode or name not in REFUSES_BOUNDARY
]


def adapted(name, mode="full", **kwargs):
    recipe = ZOO[name]
    wider = {key: value for key, value in WIDER.items() if key in recipe.kwargs}
    if "llava" in name:
        wider["vision_feature_layer"] = -1  # else the last block of the tower runs for nobody
    config = D2FTConfig(
        r=4 if mode == "lora" else None, train_boundary="boundary" in mode, stacks=recipe.stacks, **kwargs
    )
    model = get_peft_model(recipe.build(**wider), config).train()
    return model, get_runtime(model).partitions["default"]


def of_upper_blocks(partition):
    return [
        np.where(partition.subnet_blocks >= block, Operation.FULL, Operation.FORWARD_ONLY)
        for block in range(1, len(partition.blocks))
    ]


@pytest.mark.quick(2)
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")
@pytest.mark.parametrize("name, mode", CASES)
def test_predicted_flops_are_the_counted_ones(name, mode):
    model, partition = adapted(name, mode)
    batch = ZOO[name].batch(2)
    costs = cost_model(model, partition, probe_model(model, partition, batch, whole=True))
    # What trains though it runs whole, a tower, is known by the FLOPs of its forward pass alone.
    whole = "boundary" in mode and not partition.several
    tolerance = max(WITHIN.get(name, 0.005), 0.05 if whole else 0.0)
    mixed = np.resize([Operation.FULL, Operation.FORWARD_ONLY], partition.num_scheduled)
    counted(model, batch, compile_plan(partition, mixed))  # what regions return is learned once
    for row in [*rows(partition, seed=len(name))[:4:2], *of_upper_blocks(partition)[1:]]:
        if row.any():  # else it does not run at all
            predicted = costs.step_flops(row[None], np.array([2]))
            assert predicted == pytest.approx(counted(model, batch, compile_plan(partition, row)), rel=tolerance)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["t5", "whisper", "qwen2_5_vl, both stacks"])
def test_what_ran_is_counted_at_the_tokens_of_each_stack(name):
    """Costs are learned from one batch, and another one has longer targets, or more text."""
    model, partition = adapted(name)
    runtime, costs, batch = get_runtime(model), ModelCosts(model, partition), ZOO[name].batch(2)
    costs.learn(batch, lambda values: values)
    longer = {**batch, "labels": torch.cat([batch["labels"]] * 2, 1)}
    if "qwen" in name:
        more = {key: torch.cat([batch[key], batch[key][:, -2:]], 1) for key in ("labels", "input_ids")}
        kinds = {key: torch.nn.functional.pad(batch[key], (0, 2)) for key in ("attention_mask", "mm_token_type_ids")}
        longer = {**batch, **more, **kinds}
    row = of_upper_blocks(partition)[0]
    for given in (longer, batch):
        flops = counted(model, given, compile_plan(partition, row))
        (one,) = separated(runtime.passes, None, model)
        assert one[0] == 2
        assert costs.flops(row, [one]) == pytest.approx(flops, rel=0.005)


def test_towers_do_not_follow_the_length_of_the_text():
    model, partition = adapted("whisper")
    probe = probe_model(model, partition, ZOO["whisper"].batch(2))
    assert (probe.sequence_length, probe.follows) == (5, (False, True, False))
    assert probe.at(10).lengths == ((1.0, 6.0), (1.0, 10.0), (1.0, 6.0))
    assert Probe.from_state(probe.state()) == Probe(
        5, probe.below, probe.inside, probe.above, (), probe.lengths, probe.follows
    )


def test_a_pass_without_images_costs_no_tower():
    name = "qwen2_5_vl, both stacks"
    model, partition = adapted(name)
    runtime, costs, batch = get_runtime(model), ModelCosts(model, partition), ZOO[name].batch(2)
    costs.learn(batch, lambda values: values)
    ids = batch["input_ids"].clamp(min=9)
    text = {"input_ids": ids, "attention_mask": batch["attention_mask"], "labels": ids}
    row = np.full(partition.num_scheduled, Operation.FULL)
    flops = counted(model, text, compile_plan(partition, row))
    (one,) = separated(runtime.passes, None, model)
    assert one == (2, ((0.0, 0.0), (1.0, 9.0)))
    assert costs.flops(row, [one]) == pytest.approx(flops, rel=0.05)
