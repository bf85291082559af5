"""When a rank computes, and when its exchanges are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Span:
    """Something that took time on a rank.

    Attributes:
        what: The purpose of an exchange (see `Traffic`), ``"forward"`` or ``"backward"`` for heads that run, or
            ``"wait"``.
        place: Block and branch.
        begin: Seconds, `time.perf_counter`.
        end: The same.
    """

    what: str
    place: str
    begin: float
    end: float


class Timeline:
    """Records spans while it is `on`; on a GPU it then waits for the kernels at the ends of every span.

    Args:
        device: Where the heads run.

    Attributes:
        on: Whether it records.
        spans: What it recorded, in the order in which it ended.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.on = False
        self.spans: list[Span] = []

    @contextmanager
    def span(self, what: str, place: str) -> Iterator[None]:
        """Record what runs meanwhile."""
        if not self.on:
            yield
            return
        begin = self._now()
        try:
            yield
        finally:
            self.spans.append(Span(what, place, begin, self._now()))

    @property
    def compute_seconds(self) -> float:
        """For how long heads ran."""
        return sum(span.end - span.begin for span in self.spans if span.what in ("forward", "backward"))

    def exchange(self, work: Any, what: str, place: str) -> None:
        """Record an exchange that begins now and ends by itself."""
        if self.on:
            begin = time.perf_counter()
            work.get_future().then(lambda _: self.spans.append(Span(what, place, begin, time.perf_counter())))

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
