"""The planner of a head-parallel run: every process has the same micro-batches, and its own heads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from torch import nn

from ..partition import Partition
from ..planning.planner import D2FTPlanner
from ..schedule import Problem, Schedule
from ..scores import ScoreSource
from ..scores.contribution import weight_magnitude
from .exchange.ranks import Ranks
from .placement import heads_by_rank, place_subnets


# Policies that fill every device's capacity on its own. The others decide by block or by micro-batch.
_PER_DEVICE = ("bilevel", "joint")


class HeadParallelPlanner(D2FTPlanner):
    """Makes the schedule of every step from the same numbers on every rank.

    Args:
        model: A model wrapped with a `D2FTConfig`, whole or cut.
        ranks: The processes.
        num_micro_batches: See `D2FTPlanner`.
    """

    is_head_parallel = True

    def __init__(self, model: nn.Module, ranks: Ranks, num_micro_batches: int | None = None):
        super().__init__(model, num_micro_batches, progress=False)
        self.ranks_of_subnets = place_subnets(self.partition, ranks.size)
        if self.config.policy in _PER_DEVICE:
            self.policy = by_rank(self.policy, self.ranks_of_subnets)
        self.source = _CutScoreSource(self.source, ranks, self.ranks_of_subnets)
        self.ranks = ranks
        self._logged = 0, 0  # bytes of rows, and steps, that were in the logs

    def pop_logs(self) -> dict[str, float]:
        """Means over the steps since the last call: `D2FTPlanner.pop_logs`, and the bytes of rows (`Traffic.rows`)."""
        rows, steps = self.ranks.traffic.rows, self.ranks.traffic.steps
        before, first = self._logged if self._logged[1] <= steps else (0, 0)  # the counter may have been reset
        self._logged = rows, steps
        logs = super().pop_logs()
        return {**logs, "row_bytes": (rows - before) / (steps - first)} if steps > first else logs

    def note_step(self, schedule: Schedule, tokens: int | None) -> None:
        """A step ran.

        Args:
            schedule: As it was executed on all ranks.
            tokens: Length of its samples; by default the one that schedules are made with.
        """
        flops = full_flops = 0.0
        if self.costs.known:
            cost_model = self.costs.at(tokens or self.costs.probe.sequence_length)
            flops, full_flops = cost_model.schedule_flops(schedule), cost_model.full_flops(schedule.weights)
        self._last_flops = flops / self.ranks.size  # this process's share
        if self._planned is not None:
            for facts, skipped in zip(self._planned.facts, self.schedule.skipped, strict=True):
                self.counts.see(None if skipped else facts)
        self.counts.add(schedule, flops, full_flops)

    def pass_by(self, index: int) -> None:
        """Nothing to note: `note_step` does for a whole step."""

    def _sum_over_replicas(self, values: np.ndarray) -> np.ndarray:
        return self.ranks.sum_array(values, "check", "before the blocks", "data")

    def _devices(self) -> np.ndarray:
        return self.ranks_of_subnets


def by_rank(policy: Callable[[Problem], Schedule], ranks_of_subnets: np.ndarray) -> Callable[[Problem], Schedule]:
    """Let a policy decide for all subnets of a rank together, as if they were one.

    A knapsack over single subnets gives a rank's heavier heads every micro-batch and its lighter ones none. Then every
    row travels to every rank, and skipping saves no bytes.

    Args:
        policy: The policy.
        ranks_of_subnets: Rank of each subnet, [K].
    """

    def decide(problem: Problem) -> Schedule:
        size = int(ranks_of_subnets.max()) + 1
        of_rank = (ranks_of_subnets[:, None] == np.arange(size)).astype(float)
        together = dataclasses.replace(
            problem,
            forward_scores=problem.forward_scores @ of_rank,
            backward_scores=problem.backward_scores @ of_rank,
            costs=of_rank.T @ problem.costs,
            devices=np.arange(size),
            blocks=np.zeros(size, dtype=np.int64),
        )
        return problem.schedule(policy(together).operations[:, ranks_of_subnets])

    return decide


class _CutScoreSource(ScoreSource):
    """Scores of a model of which each rank holds a part."""

    def __init__(self, source: ScoreSource, ranks: Ranks, ranks_of_subnets: np.ndarray):
        super().__init__(source.model, source.partition, source.names, source.interval)
        self.ranks, self.ranks_of_subnets = ranks, ranks_of_subnets

    def _weight_magnitude(self) -> np.ndarray:
        own = self.ranks_of_subnets == self.ranks.rank
        scores = np.zeros(len(own))
        here = cut_partition(self.partition, self.ranks_of_subnets, self.ranks.rank)
        scores[own] = weight_magnitude(self.model, here)
        return self.ranks.sum_array(scores, "check", "weight magnitude")


def cut_partition(partition: Partition, ranks_of_subnets: np.ndarray, rank: int) -> Partition:
    """The partition of what one rank holds: its subnets, with their heads numbered as they lie there."""
    branches = []
    for branch in partition.branches:
        heads = len(heads_by_rank(partition, ranks_of_subnets, branch.block)[rank])

        def cut(projection, heads=heads):
            return dataclasses.replace(projection, layout=dataclasses.replace(projection.layout, heads=heads))

        columns = tuple(cut(projection) for projection in branch.columns)
        branches.append(dataclasses.replace(branch, columns=columns, row=cut(branch.row)))
    subnets, width = [], partition.heads_per_subnet
    placed = dict.fromkeys(range(len(partition.blocks)), 0)
    for subnet in partition.subnets:
        if ranks_of_subnets[subnet.index] == rank:
            first = placed[subnet.block]
            placed[subnet.block] += width
            heads = tuple(range(first, first + width))
            subnets.append(dataclasses.replace(subnet, index=len(subnets), heads=heads))
    return dataclasses.replace(partition, branches=tuple(branches), subnets=tuple(subnets))
