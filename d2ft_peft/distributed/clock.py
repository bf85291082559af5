"""How long a rank computes with its heads, exchanges left out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Seconds that this rank's heads ran, forward and backward.

    It stands still unless it is switched on: on a GPU it has to wait for the kernels before it can read the time.

    Args:
        device: Where the heads run.

    Attributes:
        on: Whether it counts.
        seconds: What it counted.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self.on = False
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done meanwhile."""
        if not self.on:
            yield
            return
        start = self._now()
        try:
            yield
        finally:
            self.seconds += self._now() - start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
