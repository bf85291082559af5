"""A run that is killed and resumed ends with the same bits as one that was not."""

import os
import signal

import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.planning.state import STATE_FILE, load_state
from tests.distributed.launch import FORKSERVER
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_equal, samples, trained


CASES = {
    "scores of samples": ({"backward_score": "fisher", "num_full": 1, "num_forward_only": 1}, 2),
    "random draws": ({"policy": "random", "compute_budget": 0.5}, 2),
    "inside a window": ({"policy": "random", "compute_budget": 0.5, "num_micro_batches": 4}, 1),
    "last losses": ({"policy": "importance", "compute_budget": 0.5}, 2),
    "last losses, inside a window": ({"policy": "importance", "compute_budget": 0.5, "num_micro_batches": 4}, 1),
    "last losses of micro-batches, inside a window": (
        {"policy": "importance", "rows": "micro_batches", "compute_budget": 0.5, "num_micro_batches": 4}, 1,
    ),
    "tokens": ({"policy": "fewer_tokens", "compute_budget": 0.95, "token_dense_share": 0.34, "token_ramp": 0.2}, 2),
    "tokens, inside a window": (
        {"policy": "fewer_tokens", "compute_budget": 0.9, "token_dense_share": 0.0, "num_micro_batches": 4}, 1,
    ),
    "means of features": ({"policy": "random", "compute_budget": 0.5, "shortcut": "mean"}, 2),
}  # fmt: skip


def train(folder, case, kill_before=None, resume=False):
    """Train 6 steps, saving every second one; dropout draws from torch's random stream all the time."""
    config, accumulation = CASES[case]
    torch.manual_seed(5)
    model = get_peft_model(TINY["vit"].build(hidden_dropout_prob=0.2), D2FTConfig(**config))

    class Killed(D2FTTrainer):
        def training_step(self, *args, **kwargs):
            if kill_before is not None and self.state.global_step >= kill_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(*args, **kwargs)

    args = arguments(
        folder, max_steps=6, save_strategy="steps", save_steps=2, save_total_limit=1, max_grad_norm=1.0,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    trainer = Killed(model=model, args=args, train_dataset=samples(n=40))
    trainer.train(resume_from_checkpoint=resume)
    return trained(model)


def train_until_killed(folder, case):
    torch.set_num_threads(1)  # as here: sums are not the same bits with another number of threads
    train(folder, case, kill_before=5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, case, monkeypatch):
    process = FORKSERVER.Process(target=train_until_killed, args=(tmp_path / "killed", case))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "killed" / "checkpoint-4" / STATE_FILE).is_file()
    whole = train(tmp_path / "whole", case)

    def never(*args):
        raise AssertionError("samples were scored again, by weights that have moved")

    monkeypatch.setattr("d2ft_peft.training.data.score_samples", never)
    assert_equal(train(tmp_path / "killed", case, resume=True), whole)


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"has no {STATE_FILE}"):
        load_state(D2FTPlanner(adapt()), tmp_path)
