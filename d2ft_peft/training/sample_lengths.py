"""How many tokens the samples of a data set have, read off the items before they are collated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


class SampleLengths:
    """Lengths by index, each read once, so that later epochs load nothing to know them.

    Args:
        targets: Whether labels have a length of their own, as those of encoder-decoders do.

    Attributes:
        differ: Whether lengths can be read off the items, as far as is known.
    """

    def __init__(self, targets: bool = False) -> None:
        self.differ, self.targets = True, targets
        self._known = np.zeros((0, 2) if targets else 0, dtype=np.int64)  # 0: not read yet

    def of(
        self, indices: np.ndarray, items: dict[int, Any], load: Callable[[list[int], dict[int, Any]], None]
    ) -> np.ndarray | None:
        """Tokens of samples, int [n], or inputs and targets of each, int [n, 2]; None where items hold no token ids or
        all have equally many.

        Args:
            indices: Of the samples in the data set, [n].
            items: Those that are loaded, by index.
            load: Loads samples by index into `items`, where they are missing.
        """
        grows = int(indices.max()) + 1 - len(self._known)
        new = np.zeros((max(grows, 0), *self._known.shape[1:]), dtype=np.int64)
        self._known = np.concatenate([self._known, new])
        unknown = [int(index) for index in np.unique(indices) if not self._known[index].any()]
        # One look first: where lengths cannot be read nothing is loaded for them.
        for some in ([next((i for i in unknown if i in items), unknown[0])], unknown) if unknown else ():
            load(some, items)
            found = [num_tokens(items[index]) for index in some]
            if self.targets:
                found = list(zip(found, [num_tokens(items[index], "labels") for index in some], strict=True))
            if None in np.ravel(np.array(found, dtype=object)):
                self.differ = False
                return None
            self._known[some] = found
        lengths = self._known[indices]
        return None if (lengths == lengths[0]).all() else lengths


def num_tokens(item: Any, name: str = "input_ids") -> int | None:
    """Tokens of an item that is not collated yet, at least 1; None if it has no single row of token ids."""
    ids = item.get(name) if isinstance(item, Mapping) else None
    # Of a list its first entry tells: several rows of different lengths (multiple choice) make no array.
    axes = np.ndim(ids[:1] if isinstance(ids, list | tuple) else ids)
    return max(len(ids), 1) if axes == 1 else None
