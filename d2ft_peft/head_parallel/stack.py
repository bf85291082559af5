"""Drives a model's own code in three pieces: what comes before the blocks, the blocks, and what follows them.

The micro-batches of a step go through the blocks together, but the embeddings and the task head see each of them alone,
as in a loop over micro-batches: losses that are means over tokens, or that depend on a batch in another way, stay
what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class _Entered(Exception):
    """Leaves the model's forward once all blocks were reached."""


class BlockStack:
    """The blocks of a model.

    Args:
        model: The model, with whatever wraps it.
        blocks: Its blocks, in order.
    """

    def __init__(self, model: nn.Module, blocks: list[nn.Module]):
        self.model, self.blocks = model, blocks

    def enter(self, batch: dict[str, Any]) -> tuple[Tensor, list[tuple[tuple, dict]]]:
        """Run what comes before the blocks.

        Returns:
            The hidden states [B, T, D] that reach the first block, and for every block what else it takes, by position
            and by name.

        Raises:
            ValueError: If the model does something to the hidden states between two blocks.
        """
        hidden: list[Tensor] = []
        inputs: list[tuple[tuple, dict]] = []

        def pass_through(*args: Any, **kwargs: Any) -> Tensor:
            kwargs = dict(kwargs)
            h = args[0] if args else kwargs.pop("hidden_states")
            if hidden and h is not hidden[0]:
                raise ValueError(
                    f"the model changes the hidden states between blocks {len(inputs) - 1} and {len(inputs)}; "
                    "head-parallel execution needs blocks that follow one another directly. Use data parallelism."
                )
            hidden.append(h)
            inputs.append((args[1:], kwargs))
            if len(inputs) == len(self.blocks):
                raise _Entered
            return h

        with self._blocks_are(lambda index: pass_through):
            try:
                self.model(**batch)
            except _Entered:
                return hidden[0], inputs
        raise ValueError(f"the model ran {len(inputs)} of its {len(self.blocks)} blocks; all of them are needed.")

    def run(self, hidden: Tensor, inputs: list[tuple[tuple, dict]]) -> Tensor:
        """Run the blocks on hidden states [B, T, D]."""
        for block, (args, kwargs) in zip(self.blocks, inputs, strict=True):
            hidden = block(hidden, *args, **kwargs)
            if isinstance(hidden, tuple):
                hidden = hidden[0]
        return hidden

    @contextmanager
    def leaving(self, hidden: Tensor) -> Iterator[None]:
        """Let the model, if it is called meanwhile, take hidden states [S, T, D] for what its blocks return."""
        last = len(self.blocks) - 1

        def result(index: int) -> Callable:
            def forward(*args: Any, **kwargs: Any) -> Tensor:
                return hidden if index == last else (args[0] if args else kwargs["hidden_states"])

            return forward

        with self._blocks_are(result):
            yield

    @contextmanager
    def _blocks_are(self, forward_of: Callable[[int], Callable]) -> Iterator[None]:
        """Let every block run something else meanwhile."""
        previous = [block.__dict__.get("forward") for block in self.blocks]
        for index, block in enumerate(self.blocks):
            block.forward = forward_of(index)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, previous, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward


def concatenate(batches: list[dict[str, Any]]) -> dict[str, Any]:
    """The batches as one; what is no tensor, or has no samples, is that of the first.

    Raises:
        ValueError: If they differ in keys or in shapes.
    """
    first = batches[0]
    for batch in batches[1:]:
        if batch.keys() != first.keys():
            raise ValueError(
                f"micro-batches of a step have keys {sorted(first)} and {sorted(batch)}; give all the same."
            )
    joined = dict(first)
    for key, value in first.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        shapes = {tuple(batch[key].shape[1:]) for batch in batches}
        if len(shapes) > 1:
            raise ValueError(
                f"{key!r} has samples of shapes {sorted(shapes)} in the micro-batches of one step, which go through "
                "the blocks together; pad them to the same length, for example with "
                'DataCollatorWithPadding(padding="max_length", max_length=...).'
            )
        joined[key] = torch.cat([batch[key] for batch in batches])
    return joined
