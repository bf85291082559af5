"""Score files: written as a whole or not at all, and refused by name where they cannot be read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def write_arrays(
    path: str | os.PathLike, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> None:
    """Write arrays as safetensors; whoever reads `path` meanwhile finds the former file or the whole new one."""
    temporary = f"{os.fspath(path)}.{os.getpid()}.tmp"
    try:
        save_file(arrays, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


@contextmanager
def opened_arrays(path: str | os.PathLike) -> Iterator[safe_open]:
    """Open what `write_arrays` wrote.

    Raises:
        ValueError: If the file is missing or damaged, or what is asked of it is not there; the message names it.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            yield file
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{os.fspath(path)!r} is no readable file of scores ({type(error).__name__}: {error}); resume from another "
            "checkpoint, or delete the file and score anew."
        ) from error
