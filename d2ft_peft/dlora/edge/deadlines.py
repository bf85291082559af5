"""Deadlines of calls whose answers come in pieces."""

from __future__ import annotations

import threading
import time
from typing import Any

from ..wire import protocol


class Deadlines:
    """Cancels calls whose answer does not come: one thread for all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[int, tuple[float, Any]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    class _Over:
        def __init__(self, watch: Deadlines, call: Any, seconds: float):
            self.watch, self.call, self.seconds = watch, call, seconds

        def __enter__(self) -> None:
            self.watch._until[id(self)] = (time.monotonic() + self.seconds, self.call)
            self.watch._run()

        def __exit__(self, *error: Any) -> None:
            self.watch._until.pop(id(self), None)

    def over(self, call: Any, seconds: float) -> _Over:
        """Watch over a call for as long as the context lasts."""
        return self._Over(self, call, seconds)

    def end(self) -> None:
        """Watch no more."""
        self._ended.set()

    def _run(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="d2ft-deadlines", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, protocol.FIRST_ANSWER_SECONDS / 4)):
            now = time.monotonic()
            for until, call in list(self._until.values()):
                if until < now:
                    call.cancel()
