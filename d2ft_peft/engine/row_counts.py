"""How many rows (token positions) each stack of a model works on, as one forward pass shows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..partition import Gauge


_STATES = ("key_value_states", "encoder_hidden_states")

Lengths = tuple[tuple[float, float], ...]
"""At each gauge of a partition: sequences per sample, and the tokens of each. (0, 0) where the pass did not come by."""


class RowCounts:
    """What one forward pass of a model with several stacks came by.

    Args:
        gauges: Places at which rows are counted, see `Partition.gauges`.

    Attributes:
        last: Number of the place that the last stack begins with; what comes by an earlier one, or this one, after it
            is another pass's.
    """

    def __init__(self, gauges: tuple[Gauge, ...]):
        self.last = last_place(gauges)
        self._seen: list[tuple[int | None, float] | None] = [None] * len(gauges)

    @property
    def empty(self) -> bool:
        """Whether nothing came by."""
        return not any(self._seen)

    def is_over_before(self, place: int) -> bool:
        """Whether what comes by a place is another pass's."""
        return self._seen[self.last] is not None and place <= self.last

    def add(self, place: int, sequences: int | None, tokens: float) -> None:
        """So many sequences of so many tokens came by; None where they lie in one row, and `tokens` are all of them.

        A tower may run more than once in a pass, on images and on videos: what it sees adds up.
        """
        before = self._seen[place]
        if before is None:
            self._seen[place] = (sequences, float(tokens))
        elif sequences is None or before[0] is None:
            self._seen[place] = (None, before[1] * (before[0] or 1) + tokens * (sequences or 1))
        else:
            total = before[0] + sequences
            self._seen[place] = (total, (before[0] * before[1] + sequences * tokens) / total)

    def per_sample(self, samples: int | None = None) -> tuple[int, Lengths]:
        """Samples, and what came by per sample.

        Args:
            samples: Their number, where it is known; else the sequences of the last stack, or of one before it.
        """
        order = [self._seen[self.last], *self._seen[::-1]]
        samples = samples or next((one[0] for one in order if one is not None and one[0]), 1)
        lengths = []
        for one in self._seen:
            if one is None:
                lengths.append((0.0, 0.0))
            elif one[0] is None:
                lengths.append((1.0, one[1] / samples))
            else:
                lengths.append((one[0] / samples, one[1]))
        return samples, tuple(lengths)


def last_place(gauges: tuple[Gauge, ...]) -> int:
    """Number of the place that the last stack begins with."""
    return max(place for place, gauge in enumerate(gauges) if not gauge.other)


def rows_at(args: tuple, kwargs: dict[str, Any], other: bool = False, only: bool = False) -> tuple[int | None, int]:
    """Sequences and tokens of each among the arguments of attention; see `RowCounts.add`.

    Args:
        args, kwargs: The arguments.
        other: Whether to look at what cross attention reads.
        only: Whether they are those of a model that is one subnet: token ids, hidden states, or anything else whose
            length is not known.
    """
    if only:
        return _of_model([value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.ndim])
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    hidden = tensors[0]
    if other:
        named = [kwargs[name] for name in _STATES if isinstance(kwargs.get(name), Tensor)]
        hidden = named[0] if named else tensors[1]
    return (None, hidden.shape[0]) if hidden.ndim == 2 else tuple(hidden.shape[:2])


def _of_model(tensors: list[Tensor]) -> tuple[int, int]:
    ids = [value.shape for value in tensors if value.ndim == 2 and value.dtype in (torch.int64, torch.int32)]
    if ids:
        return tuple(max(ids, key=lambda shape: shape[1]))
    return tuple(tensors[0].shape[:2]) if tensors[0].ndim == 3 else (len(tensors[0]), 1)
