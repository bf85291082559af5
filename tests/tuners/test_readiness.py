"""What training refuses to begin with: adapters that learn nothing, and modules that D2FT no longer stands before."""

import functools
import types

import pytest
import torch
from torch import nn

from d2ft_peft.costs import probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.tuners import check_intercepted, check_trains
from tests.models import TINY
from tests.tuners.cases import adapted, each_mode, interceptions, logits, mixed_row, same


def outputs_under_a_plan(model):
    runtime = get_runtime(model)
    plan = compile_plan(runtime.partitions["default"], mixed_row(runtime.partitions["default"]))
    with runtime.use(plan):
        return model.train()(**TINY["llama"].batch()).logits.detach()


@each_mode
def test_an_adapter_that_learns_nothing_is_refused(mode):
    model = adapted("llama", mode)
    check_trains(model)
    with model.disable_adapter(), pytest.raises(ValueError, match="the adapter is disabled, so nothing trains"):
        check_trains(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapter default is merged, so nothing.* call model.unmerge_adapter\(\)"):
        check_trains(model)
    model.unmerge_adapter()
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter requires a gradient, so nothing.* is_trainable=True"):
        check_trains(model)


@each_mode
def test_a_forward_patched_in_after_wrapping_is_intercepted_again(mode):
    model = adapted("llama", mode)
    expected, count = outputs_under_a_plan(model), len(interceptions(model))
    for block in model.base_model.model.model.layers:
        block.mlp.forward = types.MethodType(type(block.mlp).forward, block.mlp)
    assert not torch.equal(outputs_under_a_plan(model), expected)
    check_intercepted(model)
    assert len(interceptions(model)) == count
    same(outputs_under_a_plan(model), expected)


def test_a_forward_wrapped_around_the_interception_stays():
    model = adapted("llama", "lora")
    expected = outputs_under_a_plan(model)
    for block in model.base_model.model.model.layers:
        inner = block.mlp.forward
        block.mlp.forward = functools.update_wrapper(functools.partial(inner), inner)
    wrapped = [block.mlp.forward for block in model.base_model.model.model.layers]
    check_intercepted(model)
    assert [block.mlp.forward for block in model.base_model.model.model.layers] == wrapped
    same(outputs_under_a_plan(model), expected)


def test_exchanged_modules_are_refused():
    model = adapted("llama", "full")
    model.base_model.model.model.layers[1].mlp.up_proj = nn.Linear(32, 48, bias=False)
    with pytest.raises(ValueError, match=r"1 modules \(e.g. model.layers.1.mlp.up_proj\) are no layers of the adapter"):
        check_intercepted(model)


def test_a_fused_forward_that_goes_past_the_projections_is_refused():
    model = adapted("llama", "full")

    def fused(self, x):
        gate, up, down = (layer.active_layer().weight for layer in (self.gate_proj, self.up_proj, self.down_proj))
        return nn.functional.linear(self.act_fn(x @ gate.T) * (x @ up.T), down)

    mlp = model.base_model.model.model.layers[0].mlp
    expected = logits(model, "llama")
    mlp.forward = types.MethodType(fused, mlp)
    check_intercepted(model)
    torch.testing.assert_close(logits(model, "llama"), expected)
    with pytest.raises(ValueError, match="goes past 3 projections of the subnets .*layers.0.mlp.gate_proj"):
        probe_model(model, get_runtime(model).partitions["default"], TINY["llama"].batch())
