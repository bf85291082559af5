"""Scores against plain autograd, one sample at a time."""

import numpy as np
import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig
from d2ft_peft.engine import get_runtime
from d2ft_peft.engine.subset_linear import HeadAxis
from d2ft_peft.partition import FeatureLayout
from d2ft_peft.scores import GRADIENT_SCORES, contribution, gradient_scores, weight_magnitude
from tests.models import TINY
from tests.zoo_decoders import DECODERS


def adapted(name, mode, heads_per_subnet=1):
    lora = {"r": 4, "init_lora_weights": False} if mode == "lora" else {}
    torch.manual_seed(2)
    model = (TINY | DECODERS)[name].build().double()
    model.set_experts_implementation("eager")  # products of groups know no float64
    model = get_peft_model(model, D2FTConfig(heads_per_subnet=heads_per_subnet, **lora))
    return model.train(), get_runtime(model).partitions["default"]


def doubles(batch):
    return {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def owned(model, projection, mode):
    """(name of parameter, axis that belongs to heads) of what a head owns and trains in a projection."""
    if mode == "lora":
        factor, axis = ("lora_B", 0) if projection.kind == "column" else ("lora_A", 1)
        return [(f"base_model.model.{projection.name}.{factor}.default.weight", axis)]
    prefix = f"base_model.model.{projection.name}.d2ft_layers.default"
    parameters = [(f"{prefix}.weight", projection.head_axis)]
    if projection.kind == "column" and projection.has_bias:
        parameters.append((f"{prefix}.bias", 0))
    return parameters


def by_subnet(model, partition, mode, values):
    """Sum values (by parameter name) over what every subnet owns: element by element, no reshaping."""
    totals = np.zeros(partition.num_scheduled)
    for subnet in partition.subnets:
        for branch in (b for b in partition.branches if b.block == subnet.block):
            for projection in branch.projections:
                layout = projection.layout
                features, start = [], 0
                for width in layout.part_widths:
                    features += [start + head * width + i for head in subnet.heads for i in range(width)]
                    start += layout.heads * width
                for name, axis in owned(model, projection, mode):
                    totals[subnet.index] += values[name].index_select(axis, torch.tensor(features)).sum().item()
    return totals


MEASURES = {
    "fisher": lambda gradient, weight: gradient.square(),
    "gradient_magnitude": lambda gradient, weight: gradient.abs(),
    "taylor": lambda gradient, weight: (gradient * weight).abs(),
}


def autograd_scores(model, partition, mode, batch, score):
    model.eval()
    model.zero_grad()
    model(**batch).loss.backward()
    values = {name: MEASURES[score](p.grad, p.detach()) for name, p in model.named_parameters() if p.grad is not None}
    model.train()
    model.zero_grad()
    return by_subnet(model, partition, mode, values)


# Layouts of several parts, and rows that come as [samples * tokens] or with an axis between.
LAYOUTS = ("codegen", "deepseek_v3", "opt", "phi3")


CASES = [(name, mode) for name in (*TINY, *LAYOUTS) for mode in ("full", "lora")]
CASES.remove(("deepseek_v3", "lora"))  # its dense FFN carries no LoRA


@pytest.mark.quick(6)
@pytest.mark.parametrize("name, mode", CASES)
def test_sample_scores_equal_autograd_on_each_sample_alone(name, mode):
    model, partition = adapted(name, mode)
    recipe = (TINY | DECODERS)[name]
    batch = doubles(recipe.batch(3))
    rtol = 1e-3 if recipe.kind == "causal" else 1e-9  # causal models compute their loss in float32
    for score in GRADIENT_SCORES:
        scores = gradient_scores(model, partition, batch, score)
        for i in range(3):
            alone = {key: value[i : i + 1] for key, value in batch.items()}
            np.testing.assert_allclose(
                scores[i], autograd_scores(model, partition, mode, alone, score), rtol=rtol, err_msg=score
            )


@pytest.mark.parametrize("name", ["vit", "gpt2"])
def test_a_micro_batch_is_scored_by_the_gradient_of_its_loss(name):
    model, partition = adapted(name, "full", heads_per_subnet=2)
    batch = doubles(TINY[name].batch(3))
    scores = gradient_scores(model, partition, batch, "fisher", per_sample=False)
    assert scores.shape == (1, partition.num_scheduled)
    np.testing.assert_allclose(scores[0], autograd_scores(model, partition, "full", batch, "fisher"), rtol=1e-9)


@pytest.mark.parametrize("name", [*TINY, *LAYOUTS])
def test_weight_magnitude_sums_what_each_subnet_owns(name):
    model, partition = adapted(name, "full")
    values = {parameter_name: p.detach().abs() for parameter_name, p in model.named_parameters()}
    np.testing.assert_allclose(
        weight_magnitude(model, partition), by_subnet(model, partition, "full", values), rtol=1e-9
    )


def test_scoring_leaves_the_model_as_it_was():
    model, partition = adapted("vit", "lora")
    batch = doubles(TINY["vit"].batch(3))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    gradient_scores(model, partition, batch, "fisher")
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters() if p.requires_grad)


def test_bad_requests_are_refused():
    model, partition = adapted("vit", "full")
    batch = doubles(TINY["vit"].batch(2))
    with pytest.raises(ValueError, match="score='weight_magnitude' is not a gradient score"):
        gradient_scores(model, partition, batch, "weight_magnitude")
    with pytest.raises(ValueError, match="give labels"):
        gradient_scores(model, partition, {"pixel_values": batch["pixel_values"]}, "fisher")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no projection of the subnets trains"):
        gradient_scores(model, partition, batch, "fisher")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_added_up_in_float32(dtype):
    """Sums leave the range of float16 and the resolution of bfloat16; squares of gradients underflow."""
    model, partition = adapted("vit", "full")
    halves, _ = adapted("vit", "full")
    for wide, narrow in zip(model.parameters(), halves.parameters(), strict=True):
        narrow.data = (3000 * narrow.data).to(dtype)
        wide.data = narrow.data.double()
    expected = weight_magnitude(model, partition)
    assert dtype != torch.float16 or expected.max() > torch.finfo(dtype).max
    np.testing.assert_allclose(weight_magnitude(halves, partition), expected, rtol=1e-5)


def test_small_gradients_of_half_precision_leave_a_score():
    linear = torch.nn.Linear(2, 2, bias=False).half()
    axis = HeadAxis("column", FeatureLayout(heads=2, width=1, parts=1))
    x, gradient = torch.full((1, 3, 2), 1e-3).half(), torch.full((1, 3, 2), 1e-3).half()
    sums = contribution._HeadSums(None)
    sums.add_gradients(0, linear, axis, x, contribution.wide(gradient), "fisher")
    np.testing.assert_allclose(sums.sums[0], [[2 * 9e-12] * 2], rtol=1e-2)
