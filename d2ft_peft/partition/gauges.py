"""Blocks that follow one another, and where their rows are counted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Stack:
    """Blocks that follow one another.

    Attributes:
        name: Path of the module that holds them.
        first: Index of its first block.
        size: Number of its blocks.
        reads: What enters the stack besides inputs of its own: ``"inputs"``: nothing; ``"before"``: what the stacks
            before it return is among the rows of its first block (a language model behind a vision tower);
            ``"states"``: attention in every block reads what the stack before it returned (a decoder).
    """

    name: str
    first: int
    size: int
    reads: Literal["inputs", "before", "states"] = "inputs"

    @property
    def blocks(self) -> range:
        """Indices of its blocks."""
        return range(self.first, self.first + self.size)


@dataclass(frozen=True)
class Gauge:
    """A place at which rows are counted while a model runs.

    Attributes:
        branch: Index of the branch at which that is done.
        stack: Index of its stack.
        other: Whether the rows are those that cross attention reads.
    """

    branch: int
    stack: int
    other: bool = False
