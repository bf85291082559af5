"""When a rank computes, and when its exchanges are under way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


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
    """Records spans while it is `on`. Meant for CPUs: a GPU works later than it is told to.

    Attributes:
        on: Whether it records.
        spans: What it recorded, in the order in which it ended.
    """

    def __init__(self) -> None:
        self.on = False
        self.spans: list[Span] = []

    @contextmanager
    def span(self, what: str, place: str) -> Iterator[None]:
        """Record what runs meanwhile."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            if self.on:
                self.spans.append(Span(what, place, begin, time.perf_counter()))

    def exchange(self, work: Any, what: str, place: str) -> None:
        """Record an exchange that begins now and ends by itself."""
        if self.on:
            begin = time.perf_counter()
            work.get_future().then(lambda _: self.spans.append(Span(what, place, begin, time.perf_counter())))
