"""torch.compile of a model under plans: right gradients, and nothing that is compiled for one of them."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from d2ft_peft.engine import compile_plan, get_runtime
from tests.tuners.test_equality import enable_checkpointing, step
from tests.tuners.test_execution import build


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def _gradients(model, called, batch, plan):
    model.zero_grad()
    with get_runtime(model).use(plan):
        loss = step(called, batch).loss
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at it
@pytest.mark.parametrize(
    "name, mode, checkpointing",
    [("vit", "full", "off"), ("bert", "lora", "off"), ("vit", "lora", "non-reentrant")],
)
def test_gradients_are_right_and_a_new_plan_compiles_nothing(name, mode, checkpointing):
    """All plans train something in every block: what is compiled may depend on whether its input has a gradient."""
    model, _, _, partition, batch = build(name, mode)
    enable_checkpointing(model, checkpointing)
    compiled = torch.compile(model, backend="eager")
    frames = []
    for operations in ([2, 1, 0, 2], [0, 2], [2, 0, 0, 0], [2], [1, 1, 2, 1], [0, 1, 2, 2]):
        plan = compile_plan(partition, np.resize(operations, partition.num_scheduled))
        loss, gradients = _gradients(model, compiled, batch, plan)
        expected_loss, expected = _gradients(model, model, batch, plan)
        torch.testing.assert_close(loss, expected_loss)
        assert gradients.keys() == expected.keys()
        for parameter, gradient in expected.items():
            torch.testing.assert_close(gradients[parameter], gradient, msg=parameter)
        frames.append(counters["frames"]["ok"])
    # The second plan still meets what the first has not: gradients that exist, and a pass without them.
    assert frames[0] > 0 and len(set(frames[2:])) == 1
