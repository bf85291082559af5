"""Scores of all processes on each of them. Lengths are sent first: no value has to stand for an empty place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..processes import broadcast, rank, world_size
from .score_table import ScoreTable


_CHUNK_BYTES = 8 << 20
"""Most bytes of a table that are under way at a time."""


def gather_samples(indices: np.ndarray, values: dict[Any, np.ndarray]) -> tuple[np.ndarray, dict[Any, np.ndarray]]:
    """Samples and their numbers from all processes, one process after another; every process calls it alike.

    Args:
        indices: Indices of this process's samples, int [n]; each process may have another n, or none.
        values: Numbers of theirs, float [n], by any key; the same keys in every process. They may be infinite or NaN.

    Returns:
        The indices of all, int64, and their numbers, float64.
    """
    if world_size() == 1:
        return indices, values
    lengths = _lengths(len(indices))
    everyone = np.concatenate(list(_from_each(np.asarray(indices, dtype=np.int64), lengths)))
    own = np.stack([np.zeros(len(indices)), *values.values()], axis=1)
    rows = np.concatenate(list(_from_each(np.ascontiguousarray(own), lengths)))
    return everyone, dict(zip(values, rows.T[1:], strict=True))


def gather_tables(table: ScoreTable) -> ScoreTable:
    """The tables of all processes in one; a sample that several have scored counts once, as the first has it.

    The table grows row by row where it is to lie, so a process holds no more than it, its own part and a few megabytes.

    Args:
        table: This process's part. All have the same score and subnets; one may be empty.

    Raises:
        ValueError: If no sample of any process has a score; on all processes alike.
    """
    if world_size() > 1:
        table = _gathered(table)
    return table.require_samples()


def _gathered(table: ScoreTable) -> ScoreTable:
    lengths = _lengths(len(table.samples))
    parts = list(_from_each(table.samples.astype(np.int64), lengths))
    samples, first = np.unique(np.concatenate(parts), return_index=True)
    counted = np.zeros(sum(lengths), dtype=bool)
    counted[first] = True
    width = table.values.shape[1]
    values = np.empty((len(samples), width), dtype=np.float32)
    step = max(1, _CHUNK_BYTES // (4 * width))
    for source, (part, start) in enumerate(zip(parts, np.cumsum(lengths) - lengths, strict=True)):
        for begin in range(0, len(part), step):
            rows = slice(begin, min(begin + step, len(part)))
            chunk = _broadcast(
                np.ascontiguousarray(table.values[rows], dtype=np.float32) if source == rank() else None,
                source, (rows.stop - rows.start, width), np.float32,
            )  # fmt: skip
            kept = counted[start + rows.start : start + rows.stop]
            values[np.searchsorted(samples, part[rows][kept])] = chunk[kept]
    return ScoreTable(table.score, samples, values)


def _lengths(own: int) -> list[int]:
    lengths = [np.array([own]) if source == rank() else None for source in range(world_size())]
    return [int(_broadcast(length, source, (1,), np.int64)[0]) for source, length in enumerate(lengths)]


def _from_each(own: np.ndarray, lengths: list[int]) -> Iterator[np.ndarray]:
    """What each process has, [length, ...]."""
    for source, length in enumerate(lengths):
        shape = (length, *own.shape[1:])
        yield (
            _broadcast(own if source == rank() else None, source, shape, own.dtype)
            if length
            else np.empty(shape, own.dtype)
        )


def _broadcast(own: np.ndarray | None, source: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    return broadcast(np.empty(shape, dtype) if own is None else own, source)
