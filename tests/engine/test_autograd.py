"""What autograd asks of the engine: reachable parameters, gradients in place, no synchronization, clear refusals."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.plan import Heads
from d2ft_peft.engine.subset_linear import HeadAxis, SubsetLayer, select, subset_linears
from d2ft_peft.engine.touch_loss import touch
from d2ft_peft.partition import FeatureLayout
from tests.distributed.launch import run
from tests.models import TINY
from tests.tuners.test_equality import d2ft_model, enable_checkpointing
from tests.tuners.test_execution import build


def plan_of(partition, *operations):
    return compile_plan(partition, np.resize(operations, partition.num_scheduled))


def test_touch_reaches_parameters_and_allocates_nothing():
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    met = []
    for parameter in (used, unused):
        node = parameter.view_as(parameter).grad_fn.next_functions[0][0]
        node.register_hook(lambda *args, node=node: met.append(node))
    loss = touch(used.sum(), [used, unused])
    loss *= 3  # as the Trainer scales losses
    loss.backward()
    assert len(met) == len(set(met)) == 2
    assert used.grad.tolist() == [3, 3] and unused.grad is None


def test_touch_does_not_hide_that_nothing_trains():
    frozen = torch.nn.Parameter(torch.ones(2), requires_grad=False)
    loss = torch.ones(())
    assert touch(loss, [frozen]) is loss
    model, _, _, partition, batch = build("vit", "lora")
    with get_runtime(model).use(plan_of(partition, 1)):
        model(**batch).loss.backward()
        with model.disable_adapter(), pytest.raises(RuntimeError, match="does not require grad"):
            model(**batch).loss.backward()


def test_a_loss_of_any_output_has_a_backward_pass():
    model, _, _, partition, batch = build("llama")
    with get_runtime(model).use(plan_of(partition, 1, 0)):
        model(**batch).logits.square().mean().backward()


def test_second_derivatives_under_a_plan_are_refused():
    model, _, _, partition, batch = build("vit")
    with get_runtime(model).use(plan_of(partition, 2, 0)):
        loss = model(**batch).loss
        with pytest.raises(RuntimeError, match="create_graph=True asks for second derivatives"):
            loss.backward(create_graph=True)


def _transposed(gradient):
    return gradient.t().contiguous().t() if gradient.ndim == 2 else gradient


def _in_a_bucket(gradient):
    bucket = gradient.new_zeros(9 + gradient.numel())
    return bucket[9:].view(gradient.shape).copy_(gradient)


@pytest.mark.filterwarnings("ignore:grad and param do not obey")
@pytest.mark.parametrize("lay_out", [_transposed, _in_a_bucket])
def test_gradients_of_any_layout_are_summed(lay_out):
    model, _, _, partition, batch = build("vit")
    plan = plan_of(partition, 2, 0)
    trainable = [p for p in model.parameters() if p.requires_grad]

    def backward():
        with get_runtime(model).use(plan):
            model(**batch).loss.backward()

    backward()
    once = [p.grad.clone() for p in trainable]
    for p in trainable:
        p.grad = lay_out(p.grad)
    backward()
    for p, gradient in zip(trainable, once, strict=True):
        torch.testing.assert_close(p.grad, 2 * gradient)


class _Synchronizations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.found.append(function)
        return function(*args, **(kwargs or {}))


@pytest.mark.quick(2)
@pytest.mark.parametrize("shortcut", ["zero", "mean", "rescale"])
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_nothing_waits_for_the_device(name, mode, shortcut):
    """A plan reads no more values than the plain model does."""
    model, twin, _, partition, batch = build(name, mode, shortcut=shortcut)
    plan = plan_of(partition, 2, 1, 0)
    with _Synchronizations() as ours:
        for _ in range(2):
            with get_runtime(model).use(plan):
                model(**batch).loss.backward()
    with _Synchronizations() as plain:
        for _ in range(2):
            twin(**batch).loss.backward()
    assert len(ours.found) <= len(plain.found)


def test_what_inference_gathers_first_trains_later():
    weight = torch.nn.Parameter(torch.ones(5, 3))
    selection = select(FeatureLayout(heads=5, width=1), Heads((0, 2, 4)))
    with torch.inference_mode():
        selection.take(weight, axis=0)
    selection.take(weight, axis=0).sum().backward()
    assert weight.grad.sum(1).tolist() == [3, 0, 3, 0, 3]


def test_packed_weights_are_refused():
    class Packed(torch.Tensor):
        def __tensor_flatten__(self):
            raise NotImplementedError

    weight = torch.randn(4, 4).as_subclass(Packed)
    layer = SubsetLayer(weight, None, HeadAxis("column", FeatureLayout(heads=2, width=2)))
    with pytest.raises(ValueError, match="weight is a Packed"):
        subset_linears(torch.randn(3, 4), [layer], Heads((0,)))


def train_data_parallel() -> list[torch.Tensor]:
    """Weights after three steps of three micro-batches: as usual, with buckets as gradients, with a needless search."""
    torch.distributed.init_process_group("gloo")
    rank, found = torch.distributed.get_rank(), []
    for settings in ({}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}):
        model = d2ft_model(TINY["llama"].build().double(), "full").train()
        runtime = get_runtime(model)
        runtime.touch_gradients = True
        wrapped = DistributedDataParallel(model, **settings)
        found.append(_train(model, wrapped, wrapped.no_sync, [rank]))
    return [weight for weights in found for weight in weights]


def _train(model, forward, no_sync, ranks):
    partition, optimizer = get_runtime(model).partitions["default"], torch.optim.SGD(model.parameters(), 0.5)
    for index in range(9):
        plan = plan_of(partition, *([2, 0], [1], [0, 1, 2])[(index + index // 3) % 3])
        for rank in ranks:
            batch = TINY["llama"].batch(2, seed=10 * index + rank)
            with get_runtime(model).use(plan):
                # Not the first output: a loss made elsewhere reaches the parameters, too.
                if index % 3 < 2:
                    with no_sync():
                        (forward(**batch).logits.square().mean() / len(ranks)).backward()
                else:
                    (forward(**batch).logits.square().mean() / len(ranks)).backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad(set_to_none=index < 5)
    return [p.detach() for p in model.parameters() if p.requires_grad]


@pytest.mark.thorough
@pytest.mark.distributed
def test_data_parallel_processes_equal_one(tmp_path):
    model = d2ft_model(TINY["llama"].build().double(), "full").train()
    expected = _train(model, model, nullcontext, [0, 1])
    for weights in run(__name__, "train_data_parallel", tmp_path):
        for weight, reference in zip(weights, 3 * expected, strict=True):
            torch.testing.assert_close(weight, reference)


def test_reentrant_checkpointing_is_refused_where_every_parameter_is_met():
    model, _, _, partition, batch = build("llama")
    enable_checkpointing(model, "reentrant")
    runtime = get_runtime(model)
    runtime.touch_gradients = True
    with runtime.use(plan_of(partition, 2, 1)), pytest.raises(ValueError, match="use_reentrant=True runs a backward"):
        model(**batch)
