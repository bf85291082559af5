"""How many kernels a device launches for a block under a plan, beside those of the plain model: counted on the CPU."""

from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.tuners.test_equality import d2ft_model, plain_twin, step


class _Kernels(TorchDispatchMode):
    """Counts calls that compute or copy: neither views nor memory without content."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        returns = function._schema.returns
        view = any(value.alias_info is not None and not value.alias_info.is_write for value in returns)
        self.count += not (view or "empty" in function.__name__ or function.__name__.startswith("_unsafe_view"))
        return function(*args, **(kwargs or {}))


PLAIN = None
NEIGHBOURS, SCATTERED = [2] * 4 + [0] * 4, [2, 0]


def _kernels(name, mode, operations, layers, heads):
    """Kernels of a micro-batch, forward and backward, that adds to the gradients of an earlier one."""
    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads}
    if name == "llama":
        sizes["num_key_value_heads"] = heads
    model, batch = TINY[name].build(**sizes), TINY[name].batch()
    if operations is PLAIN:
        model, under_plan = plain_twin(model, mode, train_boundary=False).train(), nullcontext
    else:
        model = d2ft_model(model, mode).train()
        partition = get_runtime(model).partitions["default"]
        plan = compile_plan(partition, np.resize(operations, partition.num_scheduled))
        under_plan = partial(get_runtime(model).use, plan)
    for _ in range(2):
        with under_plan(), _Kernels() as kernels:
            step(model, batch, accumulate=True)
    return kernels.count


def _per_block(name, mode, operations, heads=8):
    return _kernels(name, mode, operations, 3, heads) - _kernels(name, mode, operations, 2, heads)


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("name, projections, biases", [("llama", 7, 0), ("vit", 6, 4)])
def test_half_of_the_heads_launch_hardly_more_kernels_than_all(name, projections, biases, mode):
    """Neighbours are views. Others are gathered once a direction, their gradients added once, however many runs."""
    plain, neighbours, scattered = (_per_block(name, mode, operations) for operations in (PLAIN, NEIGHBOURS, SCATTERED))
    assert neighbours <= 0.9 * plain
    gathered = 2 * projections * (2 if mode == "lora" else 1) + biases
    assert scattered <= neighbours + gathered + projections
    assert scattered <= (1.1 if name == "llama" else 1.3) * plain
    assert _per_block(name, mode, SCATTERED, heads=16) == scattered
