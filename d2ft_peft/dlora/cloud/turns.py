"""Who computes next: edges take turns, and tokens in flight are bounded."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

from ...value_checks import check_integer


class Refused(Exception):
    """There is no room now; says when to try again.

    Args:
        what: What there is no room for.
        seconds: After how long to try again.
    """

    def __init__(self, what: str, seconds: float):
        super().__init__(f"{what}; try again in {seconds:g} s")
        self.seconds = seconds


class NeverFits(Exception):
    """There would not be room even if nothing else was in use."""


class Turns:
    """Lets a bounded number of micro-batches compute at a time, edge after edge.

    An edge with many micro-batches in flight gets no more turns than one with a single one: whoever waits is served in
    the order of edges, not of micro-batches. Whoever waits for an answer of an edge holds no turn.

    Args:
        at_once: How many compute at a time.
    """

    def __init__(self, at_once: int = 1):
        check_integer("compute_at_once", at_once, 1)
        self._free = at_once
        self._lock = threading.Lock()
        self._waiting: dict[str, deque[threading.Event]] = {}

    @contextmanager
    def held(self, edge: str) -> Iterator[None]:
        """Compute for an edge."""
        self.take(edge)
        try:
            yield
        finally:
            self.give_back()

    @contextmanager
    def lent(self, edge: str) -> Iterator[None]:
        """Let others compute meanwhile, then take a turn again."""
        self.give_back()
        try:
            yield
        finally:
            self.take(edge)

    def take(self, edge: str) -> None:
        """Wait for a turn."""
        with self._lock:
            if self._free and not self._waiting:
                self._free -= 1
                return
            event = threading.Event()
            self._waiting.setdefault(edge, deque()).append(event)
        event.wait()

    def give_back(self) -> None:
        """Pass the turn on to the edge that has waited longest for one."""
        with self._lock:
            if not self._waiting:
                self._free += 1
                return
            edge = next(iter(self._waiting))
            queue = self._waiting.pop(edge)
            event = queue.popleft()
            if queue:
                self._waiting[edge] = queue  # behind the others
            event.set()


class Room:
    """Counts what is in use, and refuses what is above the limit.

    Args:
        what: What is counted, for messages.
        limit: Most of it.
        seconds: After how long whoever was refused may try again.
    """

    def __init__(self, what: str, limit: int, seconds: float = 1.0):
        self.what, self.limit, self.seconds = what, limit, seconds
        self.used = 0
        self._lock = threading.Lock()

    def take(self, amount: int, already: int = 0) -> None:
        """Use some more.

        Args:
            amount: How much.
            already: How much of what is in use will be given back only together with it.

        Raises:
            Refused: If there is not enough left now.
            NeverFits: If there never is.
        """
        if amount + already > self.limit:
            raise NeverFits(
                f"{amount + already} {self.what} at once; this server holds {self.limit}: send smaller batches"
            )
        with self._lock:
            if self.used + amount > self.limit:
                what = f"{self.used} of {self.limit} {self.what} are in use, {amount} more asked for"
                raise Refused(what, self.seconds)
            self.used += amount

    @contextmanager
    def held(self, amount: int = 1) -> Iterator[None]:
        """Use some more for a while."""
        self.take(amount)
        try:
            yield
        finally:
            self.give_back(amount)

    def give_back(self, amount: int) -> None:
        """Use less again."""
        with self._lock:
            self.used -= amount
