"""What all ranks must have alike in a step, compared by digests that the host knows: no device is waited for."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..schedule import Schedule
from .exchange.ranks import Ranks


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Claim:
    """Something that ranks have alike.

    Attributes:
        what: What it is, in the plural.
        value: This rank's own; what has the same ``repr`` is the same.
        advice: What to do if it differs.
        in_replica: Whether it is the same within a replica only, and should be another one in each.
    """

    what: str
    value: Any
    advice: str
    in_replica: bool = False

    @property
    def digest(self) -> int:
        """A number for the value, of 64 bits."""
        return int.from_bytes(hashlib.sha256(repr(self.value).encode()).digest()[:8], "big", signed=True)


class Agreement:
    """Compares ranks before anyone begins a step: a rank's own error must not leave the others waiting.

    Schedules and shapes, of which messages and their sizes follow, are compared in every step. What the micro-batches
    contain is on the device: a checksum of it grows there, and is read in the first step and `interval` steps after
    the last time.

    Args:
        ranks: The processes.
        interval: Steps from one comparison of contents to the next.
    """

    def __init__(self, ranks: Ranks, interval: int):
        self._ranks, self._interval = ranks, interval
        self._contents = torch.zeros((), dtype=torch.int64, device=ranks.device)
        self._since: int | None = None  # the first step that the checksum holds
        self._compared = 0  # the step in which contents were compared last

    def compare(self, *claims: Claim) -> None:
        """Raise on every rank if ranks differ in a claim.

        Raises:
            ValueError: For the first of them that differs; says on which ranks.
        """
        numbers = self._ranks.numbers
        found = self._ranks.gather([claim.digest for claim in claims])
        for claim, of_claim in zip(claims, np.moveaxis(found, -1, 0), strict=True):
            replicas = zip(numbers, of_claim, strict=True)
            lines = replicas if claim.in_replica else [(numbers.flatten(), of_claim.flatten())]
            problems = [
                f"on rank {', '.join(map(str, line[of_line != of_line[0]]))} differ from those on rank {line[0]}"
                for line, of_line in lines
                if (of_line != of_line[0]).any()
            ]
            if problems:
                raise ValueError(f"the {claim.what} {', and '.join(problems)}; {claim.advice}.")
            if claim.in_replica and len(numbers) > 1 and (of_claim == of_claim[0]).all():
                warnings.warn(
                    f"all {len(numbers)} replicas have the same {claim.what}; give each its own.", stacklevel=4
                )

    def compare_weights(self, parameters: Sequence[Tensor]) -> None:
        """Compare parameters that are whole on every rank."""
        sums = torch.stack([checksum(p) for p in parameters]).tolist() if parameters else []
        advice = (
            "set the same seed before building the model on every rank (transformers.set_seed), or load the same "
            "checkpoint"
        )
        self.compare(Claim("weights", sums, advice))

    def compare_numbers(self, num_batches: int, overlap: int) -> None:
        """Compare what must fit before ranks plan a step together."""
        advice = "give every rank as many, and one overlap"
        self.compare(Claim("numbers of micro-batches or of waves", (num_batches, overlap), advice))

    def compare_step(self, batches: Sequence[dict[str, Any]], schedule: Schedule) -> None:
        """Compare schedule and micro-batches of the step that begins."""
        named = [(key, value) for batch in batches for key, value in sorted(batch.items()) if isinstance(value, Tensor)]
        shapes = [(key, tuple(tensor.shape), str(tensor.dtype)) for key, tensor in named]
        step = self._ranks.step
        grown, since, contents = self._grown([tensor for _, tensor in named]), self._since or step, None
        due = not self._compared or step - self._compared >= self._interval
        if due:
            contents, self._compared = grown.item(), step
            self._contents, self._since = torch.zeros_like(grown), None
        several = due and since < step
        # Equal shapes in all replicas are as it should be: before contents are known there is nothing to warn of.
        own = shapes if due else (shapes, self._ranks.replica)
        self.compare(
            Claim("schedules", schedule.digest(), "make them from the same numbers and the same seed"),
            Claim(
                f"micro-batches of steps {since} to {step}" if several else "micro-batches",
                (own, contents),
                "give every rank of a replica the same ones (no sampler or data loader that shares them out over all "
                "processes)",
                in_replica=True,
            ),
        )
        if not due:
            self._contents, self._since = grown, since

    def _grown(self, tensors: Sequence[Tensor]) -> Tensor:
        """The checksum of contents, with those of a further step."""
        device = self._contents.device
        if not tensors:
            return self._contents
        sums = torch.stack([checksum(tensor).to(device, non_blocking=True) for tensor in tensors])
        in_order = torch.arange(1, 2 * len(tensors), 2, device=device)  # micro-batches that change places differ
        return 31 * self._contents + (sums * in_order).sum()


def checksum(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits, taken as integers, int64: exact, so equal tensors have equal sums on every device."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
