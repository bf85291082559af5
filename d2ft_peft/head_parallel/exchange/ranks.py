"""The processes of a head-parallel run, and what they tell each other: counted, and named when it fails.

A process has a number of its own, its global rank, which errors name, and a place on two axes: its rank among those
that share out the heads of one model, and the number of that replica of the model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .timeline import Timeline
from .traffic import Traffic


# How long a rank that saw an exchange fail waits for the others to say where they are.
_REPORT = timedelta(seconds=5)


class Ranks:
    """This rank's end of the exchanges.

    Args:
        timeout: How long an exchange may take before it fails.
        device: Where the tensors are.
        numbers: Global ranks, int [replicas, R ranks that share out the heads], see `replicas`.

    Attributes:
        numbers: The same.
        global_rank: Number of this process.
        rank: Number of this rank among those of its replica.
        size: Number of ranks R of a replica.
        replica: Number of this rank's replica.
        num_replicas: Number of replicas.
        traffic: What was moved.
        timeline: When, while it is on.
    """

    def __init__(self, timeout: timedelta, device: torch.device, numbers: np.ndarray):
        self.timeout, self.device, self.numbers = timeout, device, numbers
        self.global_rank = dist.get_rank()
        self.replica, self.rank = np.argwhere(numbers == self.global_rank)[0].tolist()
        self.num_replicas, self.size = numbers.shape
        # Groups of our own: those of a mesh have a timeout of their own. What ranks tell each other of a step is known
        # on the host, where nobody waits for a device.
        self._groups = self._make_groups(None)
        self._host_groups = self._groups if device.type == "cpu" else self._make_groups("gloo")
        self._members = {"all": numbers.flatten(), "heads": numbers[self.replica], "data": numbers[:, self.rank]}
        self.traffic, self.timeline = Traffic(), Timeline(device)
        self.step = 0

    def _make_groups(self, backend: str | None) -> dict[str, dist.ProcessGroup]:
        everyone = dist.new_group(timeout=self.timeout, backend=backend)
        groups = {"all": everyone, "heads": everyone}
        if self.num_replicas > 1:
            for axis, lines in (("heads", self.numbers), ("data", self.numbers.T)):
                groups[axis], _ = dist.new_subgroups_by_enumeration(
                    lines.tolist(), timeout=self.timeout, backend=backend
                )
        return groups

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank of the first replica."""
        return self.rank == self.replica == 0

    def group(self, axis: str) -> dist.ProcessGroup:
        """The processes on an axis of the mesh that go with this rank: ``"heads"``, ``"data"``, or ``"all"``."""
        return self._groups[axis]

    def all_reduce(self, tensor: Tensor, purpose: str, place: str, axis: str = "heads") -> Tensor:
        """Sum over the ranks on an axis, in place; the same bits on each."""
        return self._sum(tensor, self._groups, purpose, place, axis)

    def sum_array(self, values: np.ndarray, purpose: str, place: str, axis: str = "heads") -> np.ndarray:
        """Sum of every rank's numbers, float64 of the same shape; no device takes part."""
        tensor = torch.tensor(values, dtype=torch.float64)
        return self._sum(tensor, self._host_groups, purpose, place, axis).numpy()

    def _sum(self, tensor: Tensor, groups: dict[str, dist.ProcessGroup], purpose: str, place: str, axis: str) -> Tensor:
        if len(self._members[axis]) > 1:
            with self.named(purpose, place, axis):
                dist.all_reduce(tensor, group=groups[axis])
            self.count(purpose, axis, tensor.nbytes, tensor.nbytes)
        return tensor

    def count(self, purpose: str, axis: str, sent: int, received: int) -> None:
        """Add to `traffic`; without replicas all processes are on the heads axis."""
        self.traffic.count(purpose, "heads" if self.num_replicas == 1 else axis, sent, received)

    def gather(self, values: Sequence[int]) -> np.ndarray:
        """Every rank's own numbers, int64 [replicas, R, len(values)]; no device takes part."""
        mine = torch.tensor(values, dtype=torch.int64)
        everyone = [torch.empty_like(mine) for _ in range(self.numbers.size)]
        with self.named("check", "before the blocks", "all"):
            dist.all_gather(everyone, mine, group=self._host_groups["all"])
        others = mine.nbytes * (len(everyone) - 1)
        self.count("check", "all", others, others)
        return torch.stack(everyone).numpy()[self.numbers]

    def to_first(self, tensor: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor] | None:
        """The tensors of the first replica's ranks, on the first of them; None on the others.

        Args:
            tensor: This rank's.
            shapes: Shape of each rank's.
        """
        if self.replica:
            return None
        with self.named("gather", "while saving"):
            if self.rank:
                dist.send(tensor.contiguous(), int(self.numbers[0, 0]), group=self.group("heads"))
                self.count("gather", "heads", tensor.nbytes, 0)
                return None
            everyone = [tensor]
            for source in range(1, self.size):
                everyone.append(tensor.new_empty(shapes[source]))
                dist.recv(everyone[-1], int(self.numbers[0, source]), group=self.group("heads"))
                self.count("gather", "heads", 0, everyone[-1].nbytes)
            return everyone

    def barrier(self, place: str) -> None:
        """Wait for all ranks."""
        with self.named("barrier", place, "all"):
            dist.barrier(group=self._host_groups["all"])

    @contextmanager
    def named(self, purpose: str, place: str, axis: str = "heads") -> Iterator[None]:
        """Let an exchange that fails say who, where, and whom it waited for."""
        try:
            yield
        except RuntimeError as error:
            where = f"step {self.step}, {place}, exchange {purpose!r}"
            raise RuntimeError(
                f"rank {self.global_rank} failed in {where}: {self._absent(where, axis)} ({error})"
            ) from error

    def _absent(self, where: str, axis: str) -> str:
        """Which ranks do not say that an exchange failed for them too: they died, or hang elsewhere."""
        # The group is broken now, but the store that the processes met at usually is not.
        with contextlib.suppress(RuntimeError):
            store, members = dist.distributed_c10d._get_default_store(), self._members[axis].tolist()
            keys = {rank: f"d2ft_failed/{self.group('all').group_name}/{rank}" for rank in members}
            store.set(keys[self.global_rank], where)
            with contextlib.suppress(RuntimeError):
                store.wait(list(keys.values()), min(self.timeout, _REPORT))
            absent = [rank for rank, key in keys.items() if not store.check([key])]
            if absent:
                return f"no sign of rank {', '.join(map(str, absent))}, it died or hangs; timeout {self.timeout}"
            elsewhere = [f"rank {rank} in {store.get(key).decode()}" for rank, key in keys.items()]
            return "all ranks report: " + "; ".join(elsewhere)
        return "the process that the ranks met at is gone"
