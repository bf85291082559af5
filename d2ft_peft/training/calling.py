"""Who is calling a callback, and from which checkpoint: events do not say."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that is calling, found on the stack: events do not name it."""
    for values in _callers():
        caller = values.get("self")
        if isinstance(caller, Trainer) and callback in caller.callback_handler.callbacks:
            return caller
    name = type(callback).__name__
    raise RuntimeError(f"{name} found no Trainer that calls it; give it to the constructor of a Trainer.")


def resumed_from(trainer: Trainer) -> str | None:
    """The checkpoint that the running call of ``train()`` resumes from, which events do not name either."""
    for values in _callers():
        if values.get("self") is trainer and isinstance(values.get("resume_from_checkpoint"), str | os.PathLike):
            return os.fspath(values["resume_from_checkpoint"])
    return None


def _callers() -> Iterator[dict[str, Any]]:
    """Local variables of the functions that are running, the innermost first."""
    frame: Any = inspect.currentframe()
    while frame is not None:
        yield frame.f_locals
        frame = frame.f_back
