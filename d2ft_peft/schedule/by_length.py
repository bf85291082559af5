"""Samples of different lengths, cut into micro-batches so that little of them is padding."""

import numpy as np


def cut_by_length(lengths: np.ndarray, costs: np.ndarray, max_tokens: float, overhead: float = 0.0) -> list[np.ndarray]:
    """The cheapest micro-batches of some samples, each padded to its longest one.

    In the order of their lengths every best cut is one into neighbours, so a dynamic programme over cuts finds it.

    Args:
        lengths: Tokens of each sample, int [n].
        costs: What a sample costs that is padded to this sample's length, [n]; it grows with the length.
        max_tokens: Most tokens of a micro-batch, padding included, which bounds its memory; a sample that is longer
            runs on its own.
        overhead: What a micro-batch costs whatever is in it, in the unit of `costs`.

    Returns:
        Positions of the samples of each micro-batch, longest first, int arrays.
    """
    order = np.argsort(lengths, kind="stable")
    lengths, costs = np.asarray(lengths)[order], np.asarray(costs, dtype=float)[order]
    n = len(order)
    best, cuts = np.append(0.0, np.full(n, np.inf)), np.zeros(n + 1, dtype=int)
    for end in range(1, n + 1):
        widest = max(1, int(max_tokens // max(lengths[end - 1], 1)))
        starts = np.arange(max(0, end - widest), end)
        totals = best[starts] + (end - starts) * costs[end - 1] + overhead
        choice = int(totals.argmin())
        best[end], cuts[end] = totals[choice], starts[choice]
    parts, end = [], n
    while end:
        parts.append(np.sort(order[cuts[end] : end]))
        end = cuts[end]
    return parts
