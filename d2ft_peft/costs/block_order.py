"""Whether the blocks of a model run one after the other, each on hidden states of the shape that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..engine.block_region import hidden_of


class BlockOrder:
    """Notes how blocks run in one forward pass.

    Args:
        names: Paths of the blocks.
    """

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.ran: list[int] = []
        self._reshaping: list[str] = []
        self._shape: tuple[int, ...] = ()

    def enter(self, index: int, hidden: Tensor) -> None:
        """A block is called on hidden states."""
        self.ran.append(index)
        self._shape = tuple(hidden.shape)

    def leave(self, output: Any) -> None:
        """The last block that was entered returned this."""
        hidden = hidden_of(output)
        if not isinstance(hidden, Tensor) or tuple(hidden.shape) != self._shape:
            self._reshaping.append(self.names[self.ran[-1]])

    def disorder(self) -> str:
        """Why blocks cannot be left out; empty if they can."""
        if len(self.names) == 1:
            return "the model is one subnet, and there is none beside it to choose among"
        if self._reshaping:
            return f"{self._reshaping[0]} does not return hidden states of the shape that it takes"
        if self.ran != list(range(len(self.names))):
            return f"they run in the order {self.ran[:8]}, and not each once, one after the other"
        return ""
