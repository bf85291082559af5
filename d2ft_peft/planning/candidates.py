"""The samples that an optimizer step may run, and the padding that the data loader's own batches would give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..processes import gather, rank, world_size
from ..value_checks import check, check_integer, integers


@dataclass(frozen=True, eq=False)
class Candidates:
    """Samples of one optimizer step in this process.

    Attributes:
        indices: Their indices in the data set, int [n].
        size: Samples of one of the data loader's batches.
        lengths: Tokens of each, int [n], or of its inputs and of its targets, int [n, 2]; None where they are alike or
            not known.
        batches: Samples and padded tokens per sample (one number, or two) of the batches that plain training would make
            of them, over all processes divided by their number; None where lengths are.
    """

    indices: np.ndarray
    size: int
    lengths: np.ndarray | None = None
    batches: tuple[tuple[float, Any], ...] | None = None

    @classmethod
    def of_loader(cls, indices: ArrayLike, size: int, lengths: ArrayLike | None = None) -> Candidates:
        """What a data loader gave out, in its order: ``size`` successive samples were to be a batch.

        Raises:
            ValueError: If indices or lengths are no integers, or not equally many, or the size is none.
        """
        check_integer("size", size, 1)
        indices, batches = integers("indices", indices), None
        if lengths is not None:
            lengths = integers("lengths", lengths, axes=2)
            fits = lengths.shape[:1] == indices.shape and (lengths > 0).all()
            check(fits, "lengths", lengths.tolist(), f"must be the tokens of each of the {len(indices)} samples")
            parts = [lengths[first : first + size] for first in range(0, len(lengths), size)]
            batches = tuple((float(len(part)), part.max(axis=0).tolist()) for part in parts)
        return cls(indices, size, lengths, batches)

    @property
    def max_tokens(self) -> int:
        """Tokens of the largest batch that plain training would make, padding included."""
        return max(round(count) * int(np.sum(tokens)) for count, tokens in self.batches)

    @property
    def tokens(self) -> np.ndarray:
        """All tokens of each sample, int [n]."""
        return self.lengths.reshape(len(self.lengths), -1).sum(axis=1)

    def dealt(self) -> Candidates:
        """The candidates of all processes, dealt out anew so that all have equally many tokens and samples.

        In rounds of one sample each, the longest first, which goes to whoever has the fewest tokens so far. Every
        process calls it, with equally many candidates, and comes to the same hands.
        """
        processes = world_size()
        if processes == 1 or self.lengths is None:
            return self
        numbers = np.column_stack([self.indices, self.tokens, self.lengths])
        everyone = gather(numbers).astype(np.int64)  # [R, n, 3 or 4]

        def lengths_of(rows: np.ndarray) -> np.ndarray:
            return rows[:, 2:].reshape(len(rows), *self.lengths.shape[1:])

        batches = tuple(
            (count / processes, tokens)
            for one in everyone
            for count, tokens in Candidates.of_loader(one[:, 0], self.size, lengths_of(one)).batches
        )
        hand = deal(everyone[:, :, 1].ravel(), processes)[rank()]
        mine = everyone.reshape(-1, everyone.shape[-1])[hand]
        return Candidates(mine[:, 0], self.size, lengths_of(mine), batches)


def deal(lengths: np.ndarray, hands: int) -> list[np.ndarray]:
    """Positions of samples [n], dealt out to hands of equal size, n / hands, and nearly equal sums of lengths."""
    rounds = np.argsort(-lengths, kind="stable").reshape(-1, hands)
    dealt, sums = [[] for _ in range(hands)], np.zeros(hands)
    for positions in rounds:
        for hand, position in zip(np.argsort(sums, kind="stable"), positions, strict=True):
            dealt[hand].append(int(position))
            sums[hand] += lengths[position]
    return [np.sort(np.array(hand)) for hand in dealt]
