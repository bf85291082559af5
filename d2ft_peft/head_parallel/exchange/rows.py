"""The exchanges of rows in one branch: from where micro-batches live to where heads run on them, and back.

Rows travel by `all_to_all_single` with split sizes that follow from the schedule, while the caller goes on: it waits
when it needs them. A rank without rows in an exchange takes part with splits of zero length, which cost no bytes: a
process group per set of ranks that happen to talk would have to be made anew for every schedule. An exchange in which
no rank has rows for another is left out on all ranks.

Shape suffixes: S samples of one micro-batch, T tokens, D hidden features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks
from .route import MicroBatches, Residence


class Arriving:
    """Rows on their way to this rank.

    Args:
        work: The exchange, or None if there is none.
        buffers: What it reads and writes; kept until it is done.
        pieces: (micro-batch, rows [S, T, D]) of all that arrives, in the order of the ranks that send it.
        named: Makes the context in which to wait, see `Ranks.named`.
    """

    def __init__(self, work, buffers: tuple[Tensor, ...], pieces: list[tuple[int, Tensor]], named):
        self._work, self._buffers, self._pieces, self._named = work, buffers, pieces, named

    def wait(self) -> list[tuple[int, Tensor]]:
        """The rows, once they are here."""
        if self._work is not None:
            with self._named():
                self._work.wait()
            self._work, self._buffers = None, ()
        return self._pieces


class Rows:
    """This rank's end of a branch's exchanges.

    Args:
        ranks: The processes.
        place: Where in the model; for errors.
    """

    def __init__(self, ranks: Ranks, place: str):
        self.ranks, self.place = ranks, place

    def scatter(
        self,
        rows: dict[int, Tensor],
        needed: Sequence[MicroBatches],
        residence: Residence,
        like: Tensor,
        purpose: str,
    ) -> Arriving:
        """Send rows of the micro-batches that live here to the other ranks that need them.

        Args:
            rows: Rows [S, T, D] of every micro-batch that lives here.
            needed: For each rank, the micro-batches that it needs.
            residence: Where the micro-batches live.
            like: Any tensor [any, T, D] of the dtype of the rows.
            purpose: What the rows are, see `Traffic`.

        Returns:
            Rows of every micro-batch that this rank needs and that lives elsewhere.
        """
        rank = self.ranks.rank
        outgoing = [residence.on(rank, of_rank) for of_rank in needed]
        incoming = [residence.on(source, needed[rank]) for source in range(self.ranks.size)]
        return self._exchange(rows, outgoing, incoming, needed, residence, like, purpose)

    def collect(
        self,
        parts: dict[int, Tensor],
        needed: Sequence[MicroBatches],
        residence: Residence,
        like: Tensor,
        purpose: str,
    ) -> Arriving:
        """Inverse way of `scatter`: send this rank's parts [S, T, D] home; what arrives are the parts of others."""
        rank = self.ranks.rank
        outgoing = [residence.on(home, needed[rank]) for home in range(self.ranks.size)]
        incoming = [residence.on(rank, of_rank) for of_rank in needed]
        return self._exchange(parts, outgoing, incoming, needed, residence, like, purpose)

    def _exchange(
        self,
        tensors: dict[int, Tensor],
        outgoing: list[MicroBatches],
        incoming: list[MicroBatches],
        needed: Sequence[MicroBatches],
        residence: Residence,
        like: Tensor,
        purpose: str,
    ) -> Arriving:
        ranks = self.ranks
        # Decided by what all ranks need: on none of them may the call be missing if another makes it.
        if all(len(residence.on(rank, of_rank)) == len(of_rank) for rank, of_rank in enumerate(needed)):
            return Arriving(None, (), [], None)
        outgoing[ranks.rank] = incoming[ranks.rank] = ()  # what stays here is the caller's already
        sent = [tensors[i] for to_rank in outgoing for i in to_rank]
        buffer = torch.cat(sent) if sent else like.new_empty(0, *like.shape[1:])
        in_splits = [sum(residence.samples(from_rank)) for from_rank in incoming]
        out_splits = [sum(residence.samples(to_rank)) for to_rank in outgoing]
        result = like.new_empty(sum(in_splits), *like.shape[1:])

        def named():
            return ranks.named(purpose, self.place)

        with named():
            work = dist.all_to_all_single(
                result, buffer, in_splits, out_splits, group=ranks.group("heads"), async_op=True
            )
        ranks.count(purpose, "heads", buffer.nbytes, result.nbytes)
        ranks.timeline.exchange(work, purpose, self.place)
        arriving = [i for from_rank in incoming for i in from_rank]
        pieces = list(zip(arriving, result.split(residence.samples(arriving)), strict=True))
        return Arriving(work, (buffer, result), pieces, named)
