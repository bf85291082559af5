"""What execution saves and what it leaves alone: memory, graphs, shortcut modes, autocast, recomputation."""

import contextlib
import gc
import weakref

import numpy as np
import pytest
import torch

from d2ft_peft import Operation, partition_model
from d2ft_peft.engine import compile_plan, get_runtime, projection
from d2ft_peft.engine.plan import Heads
from d2ft_peft.engine.runtime import Run
from d2ft_peft.tuners import D2FTLayer
from tests.models import TINY
from tests.reference import reference_forward
from tests.tuners.test_equality import (
    assert_same_gradients,
    d2ft_model,
    enable_checkpointing,
    gradients,
    plain_twin,
    random_rows,
    step,
)


def build(name, mode="full", dtype=torch.float64, **kwargs):
    """(D2FT model, plain twin, its base, partition, batch), in training."""
    model = TINY[name].build().to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    twin = plain_twin(model, mode, train_boundary=False).train()
    base = twin.base_model.model if mode == "lora" else twin
    return d2ft_model(model, mode, **kwargs).train(), twin, base, partition_model(base), batch


def saved_bytes(model, batch, plan):
    """Bytes that autograd keeps for backward, weights and inputs aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()} | {
        value.untyped_storage().data_ptr() for value in batch.values()
    }
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with get_runtime(model).use(plan), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(**batch).loss.backward()
    return sum(storages.values())


@pytest.mark.quick(4)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_only_full_heads_are_kept_for_backward(name, mode):
    """FORWARD_ONLY enters no graph: it keeps what SHORTCUT keeps; half of the heads FULL keeps about half."""
    model, _, _, partition, batch = build(name, mode)
    kept = {}
    for label, operations in {
        "all": (2, 2), "half": (2, 0), "half, rest forward": (2, 1), "forward": (1, 1), "nothing": (0, 0),
    }.items():  # fmt: skip
        row = np.resize(np.array(operations), partition.num_scheduled)
        kept[label] = saved_bytes(model, batch, compile_plan(partition, row))
    blocks = kept["all"] - kept["nothing"]
    assert kept["forward"] <= kept["nothing"] + 0.02 * blocks
    assert kept["half"] - kept["nothing"] < 0.8 * blocks
    assert kept["half, rest forward"] == pytest.approx(kept["half"], rel=0.1)


@pytest.mark.quick(3)
@pytest.mark.parametrize("shortcut", ["mean", "rescale"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2"])
def test_shortcut_modes_equal_the_reference(name, mode, shortcut):
    model, twin, base, partition, batch = build(name, mode, shortcut=shortcut)
    runtime = get_runtime(model)
    full = np.full(partition.num_scheduled, Operation.FULL)
    with runtime.use(compile_plan(partition, full)):
        step(model, batch)
    for row in random_rows(partition, seed=1, n=3):
        with runtime.use(compile_plan(partition, row)):
            means = {branch: mean.value.flatten().clone() for branch, mean in runtime.means.items()}
            outputs = step(model, batch)
        with reference_forward(base, partition, row, shortcut, means):
            expected = step(twin, batch)
        torch.testing.assert_close(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)
        assert_same_gradients(model, twin, mode, rtol=1e-4, atol=1e-6)
    if shortcut == "mean":
        assert all(value.abs().sum() > 0 for value in means.values())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TINY)
def test_both_attention_kernels_run_on_some_heads(name, attention):
    model, twin, base, partition, batch = build(name)
    base.set_attn_implementation(attention)
    model.get_base_model().set_attn_implementation(attention)
    row = random_rows(partition, seed=3)[0]
    with reference_forward(base, partition, row):
        expected = step(twin, batch)
    with get_runtime(model).use(compile_plan(partition, row)):
        outputs = step(model, batch)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert_same_gradients(model, twin, "full")


@pytest.mark.quick(4)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_autocast_to_bfloat16(name, mode):
    """As near to the reference under autocast as rounding to eight bits allows; gradients come in float32."""
    model, twin, base, partition, batch = build(name, mode, dtype=torch.float32)
    row = random_rows(partition, seed=5)[0]
    with torch.autocast("cpu", torch.bfloat16):
        with reference_forward(base, partition, row):
            expected = step(twin, batch)
        with get_runtime(model).use(compile_plan(partition, row)):
            outputs = step(model, batch)
    torch.testing.assert_close(outputs.logits.float(), expected.logits.float(), rtol=0.1, atol=0.1)
    ours, theirs = gradients(model, mode), gradients(twin, mode)
    norm = torch.stack([g.norm() for g in theirs.values()]).norm()
    difference = torch.stack([(ours[name] - g).norm() for name, g in theirs.items()]).norm()
    assert difference < 0.05 * norm
    assert all(gradient.dtype == torch.float32 for gradient in ours.values())


@pytest.mark.parametrize("checkpointing", ["non-reentrant", "reentrant"])
def test_recomputation_uses_the_plan_of_its_own_forward_pass(checkpointing):
    """Backward after the context, and two forwards before one backward: each block recomputes what it ran."""
    model, twin, base, partition, batch = build("vit")
    enable_checkpointing(model, checkpointing)
    rows = random_rows(partition, seed=2)[:2]
    losses = []
    for row in rows:
        with get_runtime(model).use(compile_plan(partition, row)):
            losses.append(model(**batch).loss)
    model.zero_grad()
    sum(losses).backward()
    twin.zero_grad()
    for row in rows:
        with reference_forward(base, partition, row):
            twin(**batch).loss.backward()
    assert_same_gradients(model, twin, "full")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_whoever_looks_at_a_gradient_on_its_way_sees_it(mode):
    """Gradients of later micro-batches are summed in place, but never past a hook or `torch.autograd.grad`."""
    model, _, _, partition, batch = build("vit", mode)
    plan = compile_plan(partition, np.resize([2, 1, 0], partition.num_scheduled))
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def backward():
        with get_runtime(model).use(plan):
            step(model, batch, accumulate=True)
        return {name: p.grad.clone() for name, p in trainable.items()}

    once, twice = backward(), backward()
    seen, after = {}, {}
    with contextlib.ExitStack() as hooks:
        for name, p in trainable.items():
            hooks.enter_context(p.register_hook(lambda gradient, name=name: seen.update({name: gradient})))
        backward()
    with contextlib.ExitStack() as hooks:
        for name, p in trainable.items():
            hook = p.register_post_accumulate_grad_hook(lambda p, name=name: after.update({name: p.grad.clone()}))
            hooks.enter_context(hook)
        backward()
    with get_runtime(model).use(plan):
        captured = torch.autograd.grad(model(**batch).loss, list(trainable.values()), materialize_grads=True)
    for (name, parameter), gradient in zip(trainable.items(), captured, strict=True):
        torch.testing.assert_close(twice[name], 2 * once[name])
        torch.testing.assert_close(after[name], 4 * once[name])
        torch.testing.assert_close(seen[name], once[name])
        torch.testing.assert_close(gradient, once[name])
        torch.testing.assert_close(parameter.grad, 4 * once[name])


def test_evaluation_runs_every_head_whatever_the_plan():
    model, twin, _, partition, batch = build("vit")
    model.eval(), twin.eval()
    with get_runtime(model).use(compile_plan(partition, np.zeros(partition.num_scheduled, dtype=int))):
        assert torch.equal(model(**batch).logits, twin(**batch).logits)


def test_a_cache_that_a_training_forward_fills_does_no_harm():
    model, twin, base, partition, batch = build("llama")
    row = random_rows(partition, seed=4)[0]
    with reference_forward(base, partition, row):
        expected = step(twin, {**batch, "use_cache": False})
    with get_runtime(model).use(compile_plan(partition, row)):
        outputs = step(model, {**batch, "use_cache": True})
    torch.testing.assert_close(outputs.logits, expected.logits)


def test_a_row_of_another_partition_is_refused():
    _, _, _, partition, _ = build("vit")
    with pytest.raises(ValueError, match=r"operations has shape \[3\]; the partition has 12 scheduled subnets"):
        compile_plan(partition, np.zeros(3))


def test_projections_that_share_their_input_run_together(monkeypatch):
    """Query, key and value are one call, and so are gate and up."""
    model, _, _, partition, batch = build("llama")
    calls, together = [], projection.subset_linears

    def note(x, layers, heads):
        calls.append(len(layers))
        return together(x, layers, heads)

    monkeypatch.setattr(projection, "subset_linears", note)
    row = np.resize([2, 0], partition.num_scheduled)
    with get_runtime(model).use(compile_plan(partition, row)):
        model(**batch)
    assert calls == [3, 1, 2, 1] * len(partition.blocks)


def test_a_projection_with_an_input_of_its_own_computes_it():
    model, _, _, partition, _ = build("llama")
    base, runtime = model.get_base_model(), get_runtime(model)
    query, key = (base.get_submodule(column.name) for column in partition.branches[0].columns[:2])
    x, y = torch.randn(2, 3, query.weight.shape[1], dtype=torch.float64)
    runtime.run = Run(Heads((0,)))
    first, own, again = query(x), key(y), query(x)
    runtime.run = None
    own.sum().backward()
    width = partition.branches[0].columns[1].layout.width
    torch.testing.assert_close(own, y @ key.weight[:width].t())
    torch.testing.assert_close(first, again)


def test_a_loss_that_leaves_out_the_last_of_the_projections_has_its_gradients():
    """As one on attention weights does, which values have no part in."""
    model, _, _, partition, _ = build("vit")
    columns = [model.get_base_model().get_submodule(column.name) for column in partition.branches[0].columns]
    x = torch.randn(2, 3, columns[0].weight.shape[1], dtype=torch.float64, requires_grad=True)
    get_runtime(model).run = Run(Heads((0,)))
    query, key, _ = (column(x) for column in columns)
    get_runtime(model).run = None
    (query * key).sum().backward()
    width = partition.branches[0].columns[0].layout.width
    twin = x.detach().requires_grad_()
    plain = [torch.nn.functional.linear(twin, c.weight[:width].detach(), c.bias[:width].detach()) for c in columns]
    (plain[0] * plain[1]).sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)


def test_outputs_of_every_operation_stay_as_a_hook_saw_them():
    model, _, _, partition, batch = build("vit")
    seen = []
    row = model.get_base_model().get_submodule(partition.branches[0].row.name)
    row.register_forward_hook(lambda module, args, out: seen.append((out, out.detach().clone())))
    plan = compile_plan(partition, np.resize([2, 1], partition.num_scheduled))
    with get_runtime(model).use(plan):
        model(**batch)
    assert len(seen) == 2
    for out, as_seen in seen:
        torch.testing.assert_close(out, as_seen, rtol=0, atol=0)


def test_a_model_that_returns_tuples_trains():
    model, _, _, partition, batch = build("vit")
    for row in ([2, 0], [1, 0]):
        with get_runtime(model).use(compile_plan(partition, np.resize(row, partition.num_scheduled))):
            model(**batch, return_dict=False)[0].backward()
    assert model.get_base_model().get_submodule(partition.branches[0].row.name).weight.grad is not None


def test_an_unloaded_model_holds_no_weights_of_the_adapter():
    model = build("vit")[0]
    copies = [weakref.ref(module) for module in model.modules() if isinstance(module, D2FTLayer)]
    gc.collect()
    gc.disable()
    try:
        model = model.merge_and_unload()
        assert copies and not any(copy() for copy in copies)
    finally:
        gc.enable()


def test_dropout_of_lora_draws_for_every_projection_apart():
    """One product with the factors A of all of them would give them the same mask."""
    model, _, _, partition, _ = build("vit", "lora", lora_dropout=0.5)
    base = model.get_base_model()
    columns = partition.branches[0].columns
    query, key = (base.get_submodule(column.name) for column in columns[:2])
    for module in (query, key):
        for factors in (module.lora_A, module.lora_B):
            torch.nn.init.constant_(factors["default"].weight, 0.1)
    x, width = torch.randn(1, 4, query.in_features, dtype=torch.float64), columns[0].layout.width
    get_runtime(model).run = Run(Heads((0,)))
    added = [
        module(x) - torch.nn.functional.linear(x, module.weight[:width], module.bias[:width]) for module in (query, key)
    ]
    get_runtime(model).run = None
    assert (added[0] - added[1]).abs().max() > 1e-3
