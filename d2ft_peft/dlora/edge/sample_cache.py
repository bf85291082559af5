"""Which hidden states of a pass are looked up on disk, and which are kept there."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .hidden_cache import HiddenCache
from .remote_pass import RemotePass


class SampleCache:
    """Serves passes from a `HiddenCache`, sample by sample.

    Args:
        hidden_cache: Where hidden states are kept.
    """

    def __init__(self, hidden_cache: HiddenCache):
        self.disk = hidden_cache

    def outputs(
        self, hidden: Tensor, mask: Tensor | None, positions: Tensor | None, run: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Output of a span in which no module was ever alive; only samples that are not known cross.

        Args:
            hidden: Hidden states before the span [batch, tokens, width].
            mask: Which tokens are real [batch, tokens], or None.
            positions: Their positions [1 or batch, tokens], or None.
            run: Runs some rows, given by their indices.
        """
        real = _real(hidden, mask)
        keys = self._keys(hidden, real, positions, "out")
        found = [self.disk.get(key, real[row]) for row, key in enumerate(keys)]
        missing = [row for row, values in enumerate(found) if values is None]
        if missing:
            for row, values in zip(missing, run(torch.tensor(missing)), strict=True):
                self.disk.put(keys[row], values, real[row])
                found[row] = values
        return torch.stack([values.to(hidden.device, hidden.dtype) for values in found])

    def bind(self, one: RemotePass, group: int, hidden: Tensor, mask: Tensor | None, positions: Tensor | None) -> None:
        """Let a pass take the inputs of the lowest group from here if they are known, else keep them when they come."""
        real = _real(hidden, mask)
        names = [name for name in one.adapters.groups[group] if name in one.alive.exchanged]
        if not names:
            return
        count = len(names) if one.adapters.crosses_at_rank else 1
        places = [f"group {group} {names[index] if count > 1 else ''}" for index in range(count)]
        keys = [self._keys(hidden, real, positions, place) for place in places]
        found = [[self.disk.get(key, real[row]) for row, key in enumerate(of_input)] for of_input in keys]
        if all(values is not None for of_input in found for values in of_input):
            one.known = group, [torch.stack(of_input).to(hidden.device) for of_input in found]
            return

        def keep(number: int, inputs: list[Tensor]) -> None:
            if number == group:
                for of_input, values in zip(keys, inputs, strict=True):
                    for row, key in enumerate(of_input):
                        self.disk.put(key, values[row], real[row])

        one.keep = keep

    def _keys(self, hidden: Tensor, real: Tensor, positions: Tensor | None, place: str) -> list[str]:
        rows = range(hidden.shape[0])
        where = [None if positions is None else positions[row % positions.shape[0]] for row in rows]
        return [self.disk.key(hidden[row], real[row], where[row], place) for row in rows]


def _real(hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
