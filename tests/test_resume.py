"""A run that is killed and resumed ends with the same bits as one that was not."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.planning.state import STATE_FILE, load_state
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_equal, samples, trained


ROOT = Path(__file__).parents[1]
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


def kill_all(folder):
    """Train every case in a process of its own until it kills itself; forked, so that imports are paid once."""
    for case in CASES:
        child = os.fork()
        if child == 0:
            train(Path(folder) / case, case, kill_before=5)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"{case}: status {status}"


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Folder with the output of one killed run a case."""
    folder = tmp_path_factory.mktemp("killed")
    # The settings of these tests come along: sums are not the same bits with another number of threads.
    program = f"import tests.conftest; from tests.test_resume import kill_all; kill_all({str(folder)!r})"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()[-2000:]
    return folder


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_to_the_same_bits(tmp_path, killed, case, monkeypatch):
    assert (killed / case / "checkpoint-4" / STATE_FILE).is_file()
    whole = train(tmp_path, case)

    def never(*args):
        raise AssertionError("samples were scored again, by weights that have moved")

    monkeypatch.setattr("d2ft_peft.training.data.score_samples", never)
    assert_equal(train(killed / case, case, resume=True), whole)


def test_a_checkpoint_without_our_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"has no {STATE_FILE}"):
        load_state(D2FTPlanner(adapt()), tmp_path)
