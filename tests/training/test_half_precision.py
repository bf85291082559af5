"""Full fine-tuning in float16, with every subnet FULL, ends with the bits of the stock Trainer."""

import copy
import math

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples, trained, trained_as_plain


def both(name, dtype, train):
    """What the stock Trainer and D2FT's trained, and the weights before."""
    base = TINY[name].build().to(dtype)
    plain, projections = copy.deepcopy(base), partition_model(base).projections
    for parameter_name, parameter in plain.named_parameters():
        parameter.requires_grad_(parameter_name.rpartition(".")[0] in projections)
    before = trained(plain)
    model = get_peft_model(copy.deepcopy(base), D2FTConfig(policy="all_full", skip_unread_rows=False))
    logs = [train(cls, tuned) for cls, tuned in ((Trainer, plain), (D2FTTrainer, model))]
    return trained_as_plain(model), trained(plain), before, logs


def scaled(cls, scale):
    class Scaled(cls):
        """Scales gradients as accelerate lets it be done on GPUs."""

        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            self.accelerator.native_amp = True

    return Scaled


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize(("scale", "left_out"), [(2.0**20, 1), (2.0**10, 0), (2.0**80, 8)])
def test_under_a_gradient_scaler(tmp_path, name, scale, left_out):
    """Also where gradients overflow at first, or in all eight steps, which are left out then."""

    def train(cls, model):
        args = arguments(tmp_path, fp16=True, max_steps=8)
        trainer = scaled(cls, scale)(model=model, args=args, train_dataset=samples(name))
        trainer.train()
        halved = math.log2(scale / trainer.accelerator.scaler.get_scale())
        return halved, [entry.get("grad_norm") for entry in trainer.state.log_history if "loss" in entry]

    ours, theirs, before, logs = both(name, torch.float32, train)
    assert_equal(ours, theirs)
    assert str(logs[0]) == str(logs[1])  # some norms are not numbers
    assert logs[0][0] == left_out
    assert all(value.equal(before[key]) for key, value in ours.items()) == (left_out == 8)


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_of_weights_in_half_precision(tmp_path, name, dtype):
    def train(cls, model):
        cls(model=model, args=arguments(tmp_path), train_dataset=samples(name)).train()

    ours, theirs, before, _ = both(name, dtype, train)
    assert {value.dtype for value in ours.values()} == {dtype}
    assert_equal(ours, theirs)
    assert not any(value.equal(before[key]) for key, value in ours.items())
