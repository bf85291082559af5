"""Counts the bytes of every collective below the code that calls it: eager ones, functional ones, DTensor's."""

from __future__ import annotations

from collections import Counter

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode


_NAMESPACES = ("c10d", "_c10d_functional")
_MOVES_NOTHING = ("wait_tensor", "_wrap_tensor_autograd", "barrier", "monitored_barrier_")


class Collectives(TorchDispatchMode):
    """Bytes that this rank sends to others and receives from them, by operation.

    What a rank keeps for itself is not counted. An all-gather moves (R-1) shards in and out, a reduce-scatter likewise.
    An all-reduce of n bytes is counted as the ring of both, 2 n (R-1) / R in each direction: no algorithm moves less.
    All groups are taken to be the whole world.

    Attributes:
        sent: Bytes by (namespace, operation, axes of the tensor).
        received: The same for what comes in.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[tuple[str, str, int]] = Counter()
        self.received: Counter[tuple[str, str, int]] = Counter()

    def functional_rows(self) -> float:
        """Bytes in both directions of DTensor's collectives of tensors [batch, tokens, features]."""
        both = self.sent + self.received
        return sum(size for (namespace, _, axes), size in both.items() if namespace == "_c10d_functional" and axes == 3)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.namespace in _NAMESPACES:
            name = func.__name__.split(".")[0]
            if name not in _MOVES_NOTHING:
                sent, received = _moved(name, args, out, dist.get_world_size(), dist.get_rank())
                key = func.namespace, name, _axes(args[0])
                self.sent[key] += sent
                self.received[key] += received
        return out


def _moved(name: str, args: tuple, out, ranks: int, rank: int) -> tuple[float, float]:
    others = ranks - 1
    if name in ("all_gather_into_tensor", "all_gather_into_tensor_coalesced"):
        return (others * _bytes(args[0]),) * 2
    if name == "_allgather_base_":
        return (others * args[1].nbytes,) * 2
    if name == "allgather_":
        return (others * _bytes(args[1]),) * 2
    if name in ("reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"):
        return (others * _bytes(out),) * 2
    if name == "_reduce_scatter_base_":
        return (others * args[0].nbytes,) * 2
    if name in ("all_reduce", "all_reduce_", "allreduce_"):
        return (2 * others / ranks * _bytes(args[0]),) * 2
    if name == "alltoall_base_":
        result, source, _, of_result, of_source = args[:5]
        return _without_own(source, of_source, ranks, rank), _without_own(result, of_result, ranks, rank)
    if name == "broadcast_":
        size = _bytes(args[0])
        return (others * size, 0) if args[2] == rank else (0, size)
    raise ValueError(f"the collective {name!r} is not counted yet; say in {__name__}.py what it moves.")


def _axes(tensors) -> int:
    while isinstance(tensors, (list, tuple)):
        tensors = tensors[0]
    return tensors.ndim


def _bytes(tensors) -> int:
    return sum(t.nbytes for t in tensors) if isinstance(tensors, (list, tuple)) else tensors.nbytes


def _without_own(tensor, splits: list[int], ranks: int, rank: int) -> float:
    rows = sum(splits) if splits else ranks
    own = splits[rank] if splits else 1
    return tensor.nbytes * (rows - own) / rows if rows else 0
