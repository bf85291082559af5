"""Which rank owns which subnets, and on which rank a micro-batch lives. Numbers only, no processes."""

from __future__ import annotations

import numpy as np

from ..partition import Partition
from ..value_checks import check_integer


def place_subnets(partition: Partition, num_ranks: int) -> np.ndarray:
    """Rank of each subnet, int [K]: every rank gets neighbouring heads of every block, as equally many as possible.

    Args:
        partition: The subnets.
        num_ranks: Number of ranks.

    Raises:
        ValueError: If a rank would own nothing.
    """
    check_integer("num_ranks", num_ranks, 1)
    per_block = np.bincount(partition.subnet_blocks)
    if num_ranks > per_block.min():
        raise ValueError(
            f"{num_ranks} processes cannot share the {per_block.min()} subnets of a block, each needs one; start at "
            f"most {per_block.min()} processes, or lower heads_per_subnet."
        )
    first = np.cumsum(per_block) - per_block
    blocks = partition.subnet_blocks
    return (np.arange(len(blocks)) - first[blocks]) * num_ranks // per_block[blocks]


def heads_by_rank(partition: Partition, ranks: np.ndarray, block: int) -> tuple[tuple[int, ...], ...]:
    """The heads of a block that each rank owns, in the order in which its features are laid out there.

    Args:
        partition: The subnets.
        ranks: Rank of each subnet, [K].
        block: Index of the block.
    """
    owned: list[list[int]] = [[] for _ in range(int(ranks.max()) + 1)]
    for subnet in partition.subnets:
        if subnet.block == block:
            owned[ranks[subnet.index]].extend(subnet.heads)
    return tuple(tuple(heads) for heads in owned)
