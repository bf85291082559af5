"""Runs that take turns on one machine, so that whatever else it does hits all of them alike."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.state import GradientState


class Stopped(Exception):
    """Another run failed, and this one has to end."""


class Turns:
    """Hands a baton round: one run goes on at a time, and each finds the random state that it left.

    Runs are threads, since a Trainer's loop can only be left by waiting within it. Only who has the baton runs.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: list[int] = []
        self._now: int | None = None
        self._failed = False

    def run(self, runs: Sequence[Callable[[Callable[[], None]], Any]]) -> list[Any]:
        """Results of the runs, in their order.

        Args:
            runs: Functions that get what they are to call whenever another run may go on.

        Raises:
            Exception: The first one that a run has raised.
        """
        self._waiting, self._now, self._failed = list(range(len(runs))), None, False
        results: list[Any] = [None] * len(runs)
        errors: list[BaseException] = []

        def play(index: int) -> None:
            world = _World()
            try:
                self._wait(index, world)
                results[index] = runs[index](lambda: self._pause(index, world))
            except Stopped:
                pass
            except BaseException as error:
                errors.append(error)
                self._failed = True
            finally:
                self._leave(index)

        outside = _World()
        threads = [threading.Thread(target=play, args=(index,), daemon=True) for index in range(len(runs))]
        for thread in threads:
            thread.start()
        with self._condition:
            self._now = self._waiting[0]
            self._condition.notify_all()
        for thread in threads:
            thread.join()
        outside.enter()
        if errors:
            raise errors[0]
        return results

    def _wait(self, index: int, world: _World) -> None:
        with self._condition:
            self._condition.wait_for(lambda: self._now == index)
        if self._failed:
            raise Stopped
        world.enter()

    def _pause(self, index: int, world: _World) -> None:
        world.leave()
        with self._condition:
            self._now = self._next(index)
            self._condition.notify_all()
        self._wait(index, world)

    def _leave(self, index: int) -> None:
        with self._condition:
            following = self._next(index)
            self._waiting.remove(index)
            self._now = following if self._waiting else None
            self._condition.notify_all()

    def _next(self, index: int) -> int:
        place = self._waiting.index(index)
        return self._waiting[(place + 1) % len(self._waiting)]


class _World:
    """What belongs to the process and each run has its own of: random state, and what accelerate knows of loaders."""

    def __init__(self) -> None:
        self.leave()

    def leave(self) -> None:
        """Remember it."""
        self._state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._gradients = dict(GradientState._shared_state)

    def enter(self) -> None:
        """Bring it back."""
        of_python, of_numpy, of_torch = self._state
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(self._gradients)
