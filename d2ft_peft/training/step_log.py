"""What the Trainer's log says of optimizer steps of which some do not run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class StepLog:
    """Counts optimizer steps, and those that ran; a loss is the mean over the latter.

    Attributes:
        steps, ran: Since the start of this call of ``train()``.
        logged_steps, logged_ran: The same when the last entry was written.
    """

    steps: int = 0
    ran: int = 0
    logged_steps: int = 0
    logged_ran: int = 0

    def count(self, runs: bool) -> None:
        """An optimizer step, and whether anything of it runs."""
        self.steps += 1
        self.ran += runs

    def correct(self, logs: dict[str, float]) -> None:
        """Make the Trainer's means over all steps means over those that ran; where none ran there is no loss."""
        if {"loss", "learning_rate"} <= logs.keys():  # the Trainer's own entry
            steps, ran = self.steps - self.logged_steps, self.ran - self.logged_ran
            self.logged_steps, self.logged_ran = self.steps, self.ran
            _mean_over(logs, "loss", steps, ran)
            if not ran:
                logs.pop("grad_norm", None)
        if "train_loss" in logs:
            _mean_over(logs, "train_loss", self.steps, self.ran)


def _mean_over(logs: dict[str, float], name: str, steps: int, ran: int) -> None:
    if not ran:
        del logs[name]
    elif ran != steps:
        logs[name] *= steps / ran
