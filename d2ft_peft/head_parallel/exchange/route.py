"""From a schedule to routes: which micro-batch's rows each rank needs in a block, and which of its heads run on them.

Everything here follows from the schedule alone, so all ranks know all message sizes before a step begins. The running
micro-batches of a step are numbered 0..n-1 (those that are SHORTCUT everywhere are not run). Each lives on one rank,
its home: there are its residual stream, embedding, norms, task head and loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...partition import Partition
from ...schedule import Operation, Schedule


MicroBatches = tuple[int, ...]
"""Numbers of running micro-batches, ascending."""


@dataclass(frozen=True)
class Residence:
    """Where the running micro-batches of a step live.

    Attributes:
        sizes: Samples of each, [n].
        homes: Rank of each, [n].
    """

    sizes: tuple[int, ...]
    homes: tuple[int, ...]

    def on(self, rank: int, among: Sequence[int] | None = None) -> MicroBatches:
        """Those that live on a rank, of all or of some."""
        return tuple(i for i in (range(len(self.homes)) if among is None else among) if self.homes[i] == rank)

    def samples(self, micro_batches: Sequence[int]) -> list[int]:
        """Samples of some micro-batches, each."""
        return [self.sizes[i] for i in micro_batches]


@dataclass(frozen=True)
class HeadGroup:
    """Heads of one rank in one block that do the same with every micro-batch, so that they run together.

    Attributes:
        heads: Their positions among the heads that the rank owns in the block.
        subnets: Indices of their subnets.
        full: Micro-batches in which they are FULL.
        forward_only: Micro-batches in which they are FORWARD_ONLY.
    """

    heads: tuple[int, ...]
    subnets: tuple[int, ...]
    full: MicroBatches
    forward_only: MicroBatches


@dataclass(frozen=True)
class Route:
    """The way of the rows through one block; both of its branches (attention, FFN) take the same.

    Attributes:
        active: For each rank, the micro-batches that it has FULL or FORWARD_ONLY heads for: these travel forward.
        full: For each rank, those that it has FULL heads for: these travel backward.
        groups: For each rank, its heads.
        heads_active: For each micro-batch, the share of all heads of the block that run, [n].
        any_full: For each micro-batch, whether a head is FULL, [n].
    """

    active: tuple[MicroBatches, ...]
    full: tuple[MicroBatches, ...]
    groups: tuple[tuple[HeadGroup, ...], ...]
    heads_active: tuple[float, ...]
    any_full: tuple[bool, ...]


def make_routes(partition: Partition, schedule: Schedule, ranks: np.ndarray) -> tuple[Route, ...]:
    """One route per block.

    Args:
        partition: The subnets.
        schedule: The operations of a step.
        ranks: Rank of each subnet, [K].
    """
    operations = schedule.operations[~schedule.skipped]
    return tuple(_route(partition, operations, ranks, block) for block in range(len(partition.blocks)))


def _route(partition: Partition, operations: np.ndarray, ranks: np.ndarray, block: int) -> Route:
    subnets = np.flatnonzero(partition.subnet_blocks == block)
    of_block = operations[:, subnets]
    groups = []
    for rank in range(int(ranks.max()) + 1):
        owned = subnets[ranks[subnets] == rank]
        groups.append(_groups(partition, operations, owned))
    return Route(
        active=tuple(_union(group.full + group.forward_only for group in of_rank) for of_rank in groups),
        full=tuple(_union(group.full for group in of_rank) for of_rank in groups),
        groups=tuple(groups),
        heads_active=tuple((of_block != Operation.SHORTCUT).mean(axis=1).tolist()),
        any_full=tuple((of_block == Operation.FULL).any(axis=1).tolist()),
    )


def _groups(partition: Partition, operations: np.ndarray, owned: np.ndarray) -> tuple[HeadGroup, ...]:
    """The subnets of one rank and block by what they do; those that do nothing are left out."""
    alike: dict[bytes, list[tuple[int, int]]] = {}
    for position, subnet in enumerate(owned.tolist()):
        alike.setdefault(operations[:, subnet].tobytes(), []).append((position, subnet))
    groups = []
    for members in alike.values():
        column = operations[:, members[0][1]]
        width = partition.heads_per_subnet
        group = HeadGroup(
            heads=tuple(position * width + head for position, _ in members for head in range(width)),
            subnets=tuple(subnet for _, subnet in members),
            full=tuple(np.flatnonzero(column == Operation.FULL).tolist()),
            forward_only=tuple(np.flatnonzero(column == Operation.FORWARD_ONLY).tolist()),
        )
        if group.full or group.forward_only:
            groups.append(group)
    return tuple(groups)


def choose_homes(routes: Sequence[Route], sizes: Sequence[int]) -> tuple[int, ...]:
    """Let every micro-batch live where most of its work is, equally many on each rank: these rows need not travel.

    Micro-batches choose in the order of what the choice is worth, which need not be the best for all; where it is not
    better than taking turns, they take turns.

    Args:
        routes: The routes of all blocks.
        sizes: Samples of each running micro-batch.

    Returns:
        Rank of each running micro-batch, [n].
    """
    n, num_ranks = len(sizes), len(routes[0].active)
    staying = np.zeros((n, num_ranks))  # rows that do not travel if the micro-batch lives there
    for route in routes:
        for rank in range(num_ranks):
            for of_rank in (route.active[rank], route.full[rank]):
                staying[list(of_rank), rank] += np.asarray(sizes)[list(of_rank)]
    in_turn = np.arange(n) % num_ranks
    homes, room = np.zeros(n, dtype=int), np.full(num_ranks, -(-n // num_ranks))
    best = np.sort(staying, axis=1)
    worth = best[:, -1] - best[:, -2] if num_ranks > 1 else best[:, -1]
    for i in np.argsort(-worth, kind="stable"):
        homes[i] = max(np.flatnonzero(room), key=lambda rank: (staying[i, rank], room[rank], -rank))
        room[homes[i]] -= 1
    everyone = np.arange(n)
    better = staying[everyone, homes].sum() > staying[everyone, in_turn].sum()
    return tuple((homes if better else in_turn).tolist())


def make_waves(residence: Residence, count: int) -> tuple[MicroBatches, ...]:
    """Share micro-batches out over waves, those of every home alike; none is empty.

    Args:
        residence: Where they live.
        count: Most waves.
    """
    waves: list[list[int]] = [[] for _ in range(min(count, len(residence.homes)))]
    by_home = np.argsort(residence.homes, kind="stable").tolist()
    for turn, micro_batch in enumerate(by_home):
        waves[turn % len(waves)].append(micro_batch)
    return tuple(tuple(sorted(wave)) for wave in waves)


def among(micro_batches: MicroBatches, some: MicroBatches) -> MicroBatches:
    """Those that are among some."""
    return tuple(i for i in micro_batches if i in some)


def _union(parts) -> MicroBatches:
    return tuple(sorted({micro_batch for part in parts for micro_batch in part}))
