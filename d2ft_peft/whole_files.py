"""Files that are whole or not there: written under another name first, and refused by name when they are damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError, safe_open


_PARTIAL = ".partial"
_MODEL_CARD = "README.md"


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Write a file under the name that this yields; it takes its place when all of it is there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    partial = path + _PARTIAL
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


@contextmanager
def replacing_in(directory: str | os.PathLike) -> Iterator[str]:
    """Write files into the folder that this yields; they move into `directory` when all of them are there.

    The folder begins with the directory's model card, which PEFT adds to.
    """
    partial = os.path.join(directory, _PARTIAL)
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    os.makedirs(partial)
    card = os.path.join(directory, _MODEL_CARD)
    if os.path.isfile(card):
        shutil.copy2(card, partial)
    try:
        yield partial
        for folder, _, names in os.walk(partial):
            target = os.path.join(directory, os.path.relpath(folder, partial))
            os.makedirs(target, exist_ok=True)
            for name in sorted(names):
                os.replace(os.path.join(folder, name), os.path.join(target, name))
    finally:
        shutil.rmtree(partial)


@contextmanager
def reading(path: str, framework: str = "pt") -> Iterator[Any]:
    """Open a safetensors file.

    Args:
        path: The file.
        framework: Whose tensors are read, as `safetensors.safe_open` takes it.

    Raises:
        ValueError: If it is missing, or anything but a whole safetensors file; names it.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path!r} is missing; copy the folder again, or take another one.")
    try:
        with safe_open(path, framework) as file:
            yield file
    except SafetensorError as error:
        raise ValueError(damaged(path, error)) from error


def damaged(path: str, error: Exception) -> str:
    """What to say of a file that cannot be read."""
    return f"{path!r} is damaged, or only a part of it was written ({error}); copy it again, or take another folder."
