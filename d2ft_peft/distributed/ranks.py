"""The processes of a head-parallel run, and every exchange between them: counted, and named when it fails.

Rows travel by `all_to_all_single` with split sizes that follow from the schedule. A rank without rows in an exchange
takes part with splits of zero length, which cost no bytes: a process group per set of ranks that happen to talk would
have to be made anew for every schedule. An exchange in which no rank has rows for another is left out on all ranks.

Shape suffixes: B samples, T tokens, D hidden features.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .clock import Clock
from .route import MicroBatches, Residence
from .traffic import Traffic


# How long a rank that saw an exchange fail waits for the others to say where they are.
_REPORT = timedelta(seconds=5)


class Ranks:
    """This rank's end of the exchanges.

    Args:
        timeout: How long an exchange may take before it fails.
        device: Where the tensors are.

    Attributes:
        rank: Number of this rank.
        size: Number of ranks R.
        traffic: What was moved.
        clock: How long the heads of this rank ran.
    """

    def __init__(self, timeout: timedelta, device: torch.device):
        self.group = dist.new_group(timeout=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.timeout, self.device = timeout, device
        self.traffic = Traffic()
        self.clock = Clock(device)
        self.step = 0

    def scatter(
        self, rows_BTD: Tensor, needed: Sequence[MicroBatches], residence: Residence, purpose: str, place: str
    ) -> dict[int, Tensor]:
        """Send rows of micro-batches from where they live to the ranks that need them.

        Args:
            rows_BTD: The micro-batches that live here, one after the other.
            needed: For each rank, the micro-batches that it needs.
            residence: Where the micro-batches live.
            purpose: What the rows are, see `Traffic`.
            place: Where in the model; for errors.

        Returns:
            Rows [S, T, D] of every micro-batch that this rank needs.
        """
        own = residence.on(self.rank)
        lying = dict(zip(own, rows_BTD.split(residence.samples(own)), strict=True))
        outgoing = [residence.on(self.rank, of_rank) for of_rank in needed]
        incoming = [residence.on(source, needed[self.rank]) for source in range(self.size)]
        pieces = self._exchange(lying, outgoing, incoming, needed, rows_BTD, residence, purpose, place)
        return {i: piece for of_source in pieces for i, piece in of_source}

    def collect(
        self,
        parts: dict[int, Tensor],
        needed: Sequence[MicroBatches],
        residence: Residence,
        like: Tensor,
        purpose: str,
        place: str,
    ) -> Tensor:
        """Inverse way of `scatter`: send parts home, where they are added up.

        Args:
            parts: This rank's part [S, T, D] of every micro-batch that it was needed for.
            needed: For each rank, the micro-batches that it has parts of.
            residence: Where the micro-batches live.
            like: Any tensor [any, T, D] of the dtype of the parts.
            purpose: What the rows are, see `Traffic`.
            place: Where in the model; for errors.

        Returns:
            Sums [B, T, D] of the micro-batches that live here, zero where nobody has a part.
        """
        own = residence.on(self.rank)
        outgoing = [residence.on(home, needed[self.rank]) for home in range(self.size)]
        incoming = [residence.on(self.rank, of_rank) for of_rank in needed]
        pieces = self._exchange(parts, outgoing, incoming, needed, like, residence, purpose, place)
        sums = like.new_zeros(sum(residence.samples(own)), *like.shape[1:])
        by_micro_batch = dict(zip(own, sums.split(residence.samples(own)), strict=True))
        for of_source in pieces:
            for i, piece in of_source:
                by_micro_batch[i] += piece
        return sums

    def _exchange(
        self,
        tensors: dict[int, Tensor],
        outgoing: list[MicroBatches],
        incoming: list[MicroBatches],
        needed: Sequence[MicroBatches],
        like: Tensor,
        residence: Residence,
        purpose: str,
        place: str,
    ) -> list[list[tuple[int, Tensor]]]:
        """What each rank sent here, as (micro-batch, rows); what stays here is passed on as it is."""
        staying = [(i, tensors[i]) for i in outgoing[self.rank]]
        outgoing, incoming = list(outgoing), list(incoming)
        outgoing[self.rank], incoming[self.rank] = (), ()
        pieces: list[list[tuple[int, Tensor]]] = [[] for _ in incoming]
        # Decided by what all ranks need: on none of them may the call be missing if another makes it.
        if any(len(residence.on(rank, of_rank)) < len(of_rank) for rank, of_rank in enumerate(needed)):
            sent = [tensors[i] for to_rank in outgoing for i in to_rank]
            buffer = torch.cat(sent) if sent else like.new_empty(0, *like.shape[1:])
            in_splits = [sum(residence.samples(from_rank)) for from_rank in incoming]
            out_splits = [sum(residence.samples(to_rank)) for to_rank in outgoing]
            result = like.new_empty(sum(in_splits), *like.shape[1:])
            with self._named(purpose, place):
                dist.all_to_all_single(result, buffer, in_splits, out_splits, group=self.group)
            self.traffic.count(purpose, buffer.nbytes, result.nbytes)
            arrived = iter(result.split(residence.samples([i for from_rank in incoming for i in from_rank])))
            pieces = [[(i, next(arrived)) for i in from_rank] for from_rank in incoming]
        pieces[self.rank] = staying
        return pieces

    def all_reduce(self, tensor: Tensor, purpose: str, place: str) -> Tensor:
        """Sum over all ranks, in place; the same bits on each."""
        with self._named(purpose, place):
            dist.all_reduce(tensor, group=self.group)
        self.traffic.count(purpose, tensor.nbytes, tensor.nbytes)
        return tensor

    def sum_array(self, values: np.ndarray, purpose: str, place: str) -> np.ndarray:
        """Sum of every rank's numbers, float64 of the same shape."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.all_reduce(tensor, purpose, place).cpu().numpy()

    def differing(self, fingerprints: Sequence[bytes]) -> list[list[int]]:
        """For each fingerprint, the ranks whose own differs from that of rank 0."""
        digests = [int.from_bytes(hashlib.sha256(f).digest()[:8], "big", signed=True) for f in fingerprints]
        mine = torch.tensor(digests, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        with self._named("check", "before the blocks"):
            dist.all_gather(everyone, mine, group=self.group)
        self.traffic.count("check", mine.nbytes * (self.size - 1), mine.nbytes * (self.size - 1))
        table = torch.stack(everyone).cpu()
        return [(column != column[0]).nonzero()[:, 0].tolist() for column in table.T]

    def to_first(self, tensor: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """Every rank's tensor, on rank 0; None on the others.

        Args:
            tensor: This rank's.
            shapes: Shape of each rank's.
        """
        with self._named("gather", "while saving"):
            if self.rank:
                dist.send(tensor.contiguous(), 0, group=self.group)
                self.traffic.count("gather", tensor.nbytes, 0)
                return None
            everyone = [tensor]
            for source in range(1, self.size):
                everyone.append(tensor.new_empty(shapes[source]))
                dist.recv(everyone[-1], source, group=self.group)
                self.traffic.count("gather", 0, everyone[-1].nbytes)
            return everyone

    def barrier(self, place: str) -> None:
        """Wait for all ranks."""
        with self._named("barrier", place):
            dist.barrier(group=self.group)

    @contextmanager
    def _named(self, purpose: str, place: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            where = f"step {self.step}, {place}, exchange {purpose!r}"
            raise RuntimeError(f"rank {self.rank} failed in {where}: {self._absent(where)} ({error})") from error

    def _absent(self, where: str) -> str:
        """Which ranks do not say that the exchange failed for them too: they died, or hang elsewhere."""
        # The group is broken now, but the store that the processes met at usually is not.
        with contextlib.suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            keys = [f"d2ft_failed/{self.group.group_name}/{rank}" for rank in range(self.size)]
            store.set(keys[self.rank], where)
            with contextlib.suppress(RuntimeError):
                store.wait(keys, min(self.timeout, _REPORT))
            absent = [rank for rank, key in enumerate(keys) if not store.check([key])]
            if absent:
                return f"no sign of rank {', '.join(map(str, absent))}, it died or hangs; timeout {self.timeout}"
            elsewhere = [f"rank {rank} in {store.get(key).decode()}" for rank, key in enumerate(keys)]
            return "all ranks report: " + "; ".join(elsewhere)
        return "the process that the ranks met at is gone"
