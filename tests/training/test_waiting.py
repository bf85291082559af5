"""Training waits for a device no more often than the plain Trainer does, which looks at every loss."""

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer

from d2ft_peft import D2FTTrainer
from tests.test_trainer import adapt, arguments, samples
from tests.training.test_session import pair


class ScalarReads(TorchDispatchMode):
    """Counts what `.item()`, `bool(tensor)` and `float(tensor)` come down to."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(function)
        return function(*args, **(kwargs or {}))


def reads(cls, model, data, folder, steps, accumulation):
    args = arguments(
        folder, max_steps=steps, gradient_accumulation_steps=accumulation, logging_strategy="no", max_grad_norm=1.0
    )
    with ScalarReads() as counter:
        cls(model=model, args=args, train_dataset=data).train()
    return counter.count


CONFIGS = {
    "bilevel": {"compute_budget": 0.5},
    "all_full": {"policy": "all_full"},
    "random": {"policy": "random", "compute_budget": 0.5},
    "importance": {"policy": "importance", "compute_budget": 0.5},
    "last losses of micro-batches": {"policy": "importance", "rows": "micro_batches", "compute_budget": 0.5},
    "tokens": {"policy": "fewer_tokens", "compute_budget": 0.9},
    "means": {"policy": "random", "compute_budget": 0.5, "shortcut": "mean"},
}


@pytest.mark.thorough
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_no_step_reads_more_from_the_device_than_a_plain_one(tmp_path, config, accumulation):
    """Between two steps and eight; what a first step looks at once is not counted."""
    data, (_, plain) = samples("llama", 64), pair()[0]
    of_plain = [reads(Trainer, plain, data, tmp_path, steps, accumulation) for steps in (2, 8)]
    ours = []
    for steps in (2, 8):
        model = adapt("llama", "lora", **CONFIGS[config]).float()
        ours.append(reads(D2FTTrainer, model, data, tmp_path, steps, accumulation))
    assert ours[1] - ours[0] <= of_plain[1] - of_plain[0]
