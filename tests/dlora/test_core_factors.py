"""The frozen factors between which a core is trained: how long they are, and a core read back from plain LoRA."""

import pytest
import torch

from d2ft_peft.dlora import BaseModel
from d2ft_peft.dlora.edge.core_adapter import CoreB

from .cases import tiny_base


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_factors_let_a_step_of_adam_weigh_as_much_as_in_lora(tmp_path, name):
    base = BaseModel.load(tiny_base(tmp_path, name), torch.float64)
    group = base.groups[0]
    a, b = base.factors(group.names[0], 4)
    torch.testing.assert_close(a @ a.T, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(b.T @ b, b.shape[0] / 12 * torch.eye(4, dtype=torch.float64))
    # What Adam's first step makes of a gradient that has one sign, at a learning rate of 1.
    step_of_core = b @ torch.ones(4, 4).double() @ a
    rows_of_lora = a / 3**0.5
    step_of_lora = torch.ones(b.shape[0], 4).double() @ rows_of_lora
    torch.testing.assert_close(step_of_core.norm(), step_of_lora.norm())


def test_a_core_is_read_back_from_the_lora_adapter_that_it_is():
    torch.manual_seed(0)
    factor = 1.7 * torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64)).Q
    trained, fresh = CoreB(factor), CoreB(factor)
    torch.nn.init.normal_(trained.core)
    fresh.load_state_dict({"weight": trained.state_dict()["weight"]})
    torch.testing.assert_close(fresh.core, trained.core)
