"""How many of its candidates each process runs, under ``device_capacities="auto"``."""

from __future__ import annotations

import math
import warnings

import numpy as np
import torch
from torch import nn

from ..processes import gather, rank, world_size
from ..schedule import Budget, balance, balanced_total
from .pace import Pace


TOLERATED_WAIT = 0.05
"""Share of a step for which a process may wait, as foreseen, before it is worth a warning."""

WORTH_A_MOVE = 0.02
"""Share of a step that other counts must save, as foreseen, before they replace the present ones."""

SAME_SPEED = 1.25
"""Figures within this factor of the last ones are averaged with them: they differ by noise, and because a sample costs
more where it makes another micro-batch necessary. Beyond it a device has changed its speed."""


class Shares:
    """Shares the samples of every step out over the processes, by how fast each of them was.

    Every process has the same figures and comes to the same counts, so nobody has to ask.

    Args:
        budget: Share of all candidates, of all processes, that run.
        device: The device that the model is on.

    Attributes:
        pace: Watches this process.
        figures: What the processes last told each other, float [R, 3], see `Pace.figures`; None before the first time,
            when all processes count as equal.
        counts: Samples of the current step, by process, int [R].
        waiting: Mean share of a step that the processes waited for the last one, before `figures` were told.
    """

    first = Pace.warm_up + Pace.enough
    """Step at whose start the processes tell each other for the first time, whatever the interval."""

    def __init__(self, budget: Budget, device: torch.device):
        self.budget, self.pace = budget, Pace(device)
        self.figures: np.ndarray | None = None
        self.counts = np.zeros(0, dtype=np.int64)
        self.waiting = 0.0
        self._candidates = 0
        self._known: dict[int, np.ndarray] = {}
        self._former: dict[int, np.ndarray] = {}
        self._warned = False

    def exchange(self) -> None:
        """Tell each other how fast everyone is; every process calls it alike."""
        if world_size() > 1 and self.pace.has_figures:
            self.take(gather(self.pace.figures()))

    def take(self, figures: np.ndarray) -> None:
        """Take over what the processes said, float [R, 3]."""
        busy = figures[:, 2]
        self.waiting = float(1 - busy.mean() / busy.max())
        if self.figures is not None:
            change = figures[:, 1] / self.figures[:, 1]
            same = (change < SAME_SPEED) & (change > 1 / SAME_SPEED)
            figures = np.where(same[:, None], (figures + self.figures) / 2, figures)
        self.figures, self._known, self._former = figures, {}, self._known

    def begin_step(self, model: nn.Module) -> None:
        """A step begins.

        Raises:
            ValueError: The parameters of the model are sharded.
        """
        if not self._candidates and world_size() > 1:
            _refuse_sharded(model)
        self.pace.arrive()

    def share(self, candidates: int) -> Budget:
        """The budget of this process in a step.

        Args:
            candidates: Number of candidates of every process.
        """
        if candidates not in self._known:
            self._known[candidates] = self._share_out(candidates)
        self._candidates, self.counts = candidates, self._known[candidates]
        return Budget(compute=self.counts[rank()] / candidates)

    def total(self, ran: int) -> int:
        """Samples that run in all processes in this step.

        Args:
            ran: Samples that the policy chose in this one.

        Raises:
            ValueError: They are not as many as they should be.
        """
        if ran != self.counts[rank()]:
            raise ValueError(
                f"device_capacities='auto' gave this process {self.counts[rank()]} samples and the policy ran {ran}; "
                "choose a policy that runs as many whole samples as its budget has room for: 'fewer_samples', "
                "'importance' or 'selective_backprop'."
            )
        return int(self.counts.sum())

    def end_step(self) -> None:
        """The step's gradients are exchanged."""
        self.pace.end(int(self.counts[rank()]))

    def _share_out(self, candidates: int) -> np.ndarray:
        processes = world_size()
        if processes == 1 and not self._warned:
            self._warned = True
            warnings.warn(
                "device_capacities='auto' shares work out between processes, and there is one: it runs "
                f"compute_budget={self.budget.compute:g} of its samples, as without it.",
                stacklevel=4,
            )
        total = max(processes, round(self.budget.compute * processes * candidates))
        equal = np.zeros(processes), np.ones(processes)
        fixed, per_sample = equal if self.figures is None else self.figures[:, :2].T
        counts = balance(total, fixed, per_sample, candidates)
        former = self._former.get(candidates, counts)
        if (fixed + per_sample * former).max() * (1 - WORTH_A_MOVE) < (fixed + per_sample * counts).max():
            counts = former
        if self.figures is not None:
            self._warn_of_waiting(counts, candidates, fixed, per_sample)
        return counts

    def _warn_of_waiting(self, counts: np.ndarray, candidates: int, fixed: np.ndarray, per_sample: np.ndarray) -> None:
        """Speak once if candidates run out, and a process will wait for that reason."""
        ready = fixed + per_sample * counts
        first = int(np.where(counts == candidates, ready, np.inf).argmin())
        wait = 1 - ready[first] / ready.max()
        if self._warned or rank() or counts[first] < candidates or wait < TOLERATED_WAIT:
            return
        self._warned = True
        fits = math.floor(100 * balanced_total(fixed, per_sample, candidates) / (len(counts) * candidates)) / 100
        warnings.warn(
            f"device_capacities='auto': process {first} runs all of its {candidates} candidates and still waits "
            f"{wait:.0%} of the step, since the processes run {counts.tolist()} samples in {_seconds(ready)} s. "
            f"For less waiting set compute_budget to at most {fits:g} with per_device_train_batch_size raised in "
            "proportion, so that a step runs as many samples as now.",
            stacklevel=5,
        )

    def logs(self) -> dict[str, float]:
        """``share_of_process_<rank>``, the part of its candidates that each process runs, and ``waiting_share``, the
        part of a step for which processes waited for the last one, in the mean over all, before `figures` were told."""
        if not self._candidates or len(self.counts) == 1:
            return {}
        shares = {f"share_of_process_{r}": float(n / self._candidates) for r, n in enumerate(self.counts)}
        return shares if self.figures is None else {**shares, "waiting_share": self.waiting}

    def state(self) -> list | None:
        """What a checkpoint holds; JSON-friendly."""
        return None if self.figures is None else self.figures.tolist()

    def load_state(self, state: list | None) -> None:
        """Go on with a checkpoint's figures, if as many processes made it."""
        if state is not None and len(state) == world_size():
            self.take(np.array(state))


def _refuse_sharded(model: nn.Module) -> None:
    from torch.distributed.tensor import DTensor

    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "device_capacities='auto' does not run under FSDP: processes run different numbers of micro-batches, and "
            "in each of them sharded parameters are gathered from all processes; use DistributedDataParallel."
        )


def _seconds(times: np.ndarray) -> list[float]:
    return [float(f"{seconds:.3g}") for seconds in times]
