"""How many of a step's candidates may run, and which of them share a micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from ..processes import mean_over_processes
from ..schedule import Budget
from ..schedule.by_length import cut_by_length
from .account import Account
from .candidates import Candidates
from .facts import BatchFacts
from .model_costs import ModelCosts


OVERHEAD_TOKENS = 64
"""What another micro-batch must save to be worth its calls, in tokens."""


class SampleChoice:
    """The candidates of one step, and what they cost at plain training's prices, where every subnet is FULL.

    Args:
        costs: Of the model.
        candidates: Of this process.
        padding: How samples of different lengths share a micro-batch, see `D2FTConfig`.
    """

    def __init__(self, costs: ModelCosts, candidates: Candidates, padding: str):
        self.costs, self.candidates = costs, candidates
        self.padding = "keep" if candidates.lengths is None else padding

    @cached_property
    def flops(self) -> np.ndarray:
        """FLOPs of each candidate at its own length, or at the length that schedules are made with; [n]."""
        lengths, count = self.candidates.lengths, len(self.candidates.indices)
        agreed = np.full(count, self.costs.probe.sequence_length)
        return self.costs.of_samples(agreed if lengths is None else lengths)

    @cached_property
    def plain(self) -> float:
        """FLOPs of plain training on the data loader's batches."""
        if self.candidates.batches is None:
            return float(self.flops.sum())
        counts, tokens = zip(*self.candidates.batches, strict=True)
        return float(np.array(counts) @ self.costs.of_samples(np.array(tokens)))

    @property
    def weights(self) -> np.ndarray:
        """What each candidate counts in a budget: its real tokens' cost, relative to the mean; [n]."""
        return self.flops / self.flops.mean()

    def cut(self, members: np.ndarray) -> list[np.ndarray]:
        """Micro-batches of some candidates, as positions, int arrays."""
        if self.padding == "keep":
            return np.array_split(members, -(-len(members) // self.candidates.size))
        if self.padding == "flatten":
            tokens = np.cumsum(self.candidates.tokens[members])
            parts = -(-tokens[-1] // self.candidates.max_tokens)
            ends = np.searchsorted(tokens, tokens[-1] * np.arange(1, parts) / parts)
            return [part for part in np.split(members, ends) if len(part)]
        per_token = self.flops.sum() / self.candidates.lengths.sum()
        parts = cut_by_length(
            self.candidates.tokens[members], self.flops[members], self.candidates.max_tokens,
            OVERHEAD_TOKENS * per_token,
        )  # fmt: skip
        return [members[part] for part in parts]

    def foreseen(self, micro_batches: list[np.ndarray]) -> float:
        """FLOPs of micro-batches, padding included."""
        if self.padding == "flatten":
            return float(sum(self.flops[part].sum() for part in micro_batches))
        if np.ndim(self.candidates.lengths) == 2:  # the longest input and the longest target need not be one sample's
            padded = np.array([self.candidates.lengths[part].max(axis=0) for part in micro_batches])
            return float(self.costs.of_samples(padded) @ [len(part) for part in micro_batches])
        return float(sum(len(part) * self.flops[part].max() for part in micro_batches))

    def budget(self, budget: Budget, usual: int, account: Account | None) -> Budget:
        """What the candidates may do.

        Args:
            budget: As it is configured.
            usual: Micro-batches of a usual step, which counts refer to.
            account: What the run may spend, where its budget is a share of plain training's compute.
        """
        count = len(self.candidates.indices)
        if account is None and self.candidates.lengths is None:
            return budget.of_samples(count, usual)
        least = float(self.flops.max() / self.flops.sum())  # one sample fits, whichever
        if account is not None:
            everything = self.foreseen(self.cut(np.arange(count)))
            share = account.allowance(self.plain) / everything
        else:
            one = budget.of_samples(10**6, usual)
            share = one.communication or one.compute
        share = min(1.0, max(share, least))
        return Budget(compute=share) if budget.communication is None else Budget(communication=share)


def prices_of_batches(costs: ModelCosts, facts: Sequence[BatchFacts]) -> np.ndarray:
    """FLOPs of micro-batches in plain training, in the mean over the processes, [N]."""
    lengths = np.array([one.length or costs.probe.sequence_length for one in facts])
    return mean_over_processes(*(costs.of_samples(lengths) * [one.size for one in facts]))


def budget_of_batches(account: Account, prices: np.ndarray, sizes: np.ndarray) -> Budget:
    """The budget of a step over whole micro-batches of these prices and sizes [N]; one of them fits, whichever."""
    share = account.allowance(float(prices.sum())) / prices.sum()
    return Budget(compute=min(1.0, max(share, sizes.max() / sizes.sum())))
