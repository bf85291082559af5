"""What one optimizer step looks like on a rank: sizes, routes, and what regions take besides the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..schedule import Operation
from .exchange.route import HeadGroup, MicroBatches, Residence, Route, among, make_waves


class Factors(NamedTuple):
    """One number per sample.

    Attributes:
        full: 1 where a head of the block is FULL, else 0.
        active: 1 where a head of the block runs, else 0.
        rescale: 1 / share of the heads that run, 0 where none does.
    """

    full: Tensor
    active: Tensor
    rescale: Tensor


class Step:
    """The running micro-batches of a step, numbered 0..n-1.

    Attributes:
        residence: Where they live.
        sizes: Samples of each, [n].
        own: Those that live on this rank.
        waves: Those whose rows travel together, for each wave.
        routes: One per block.
        rescale: Whether the heads that run are scaled up (``shortcut="rescale"``).
        anchor: A scalar that needs a gradient, see `BranchForward`.
        operations: What this rank's heads did, int [n, K].
    """

    def __init__(
        self,
        residence: Residence,
        rank: int,
        routes: tuple[Route, ...],
        num_subnets: int,
        rescale: bool,
        overlap: int,
        device: torch.device,
    ) -> None:
        self.residence, self.sizes, self.own = residence, residence.sizes, residence.on(rank)
        self.waves, self._rank, self._overlap = make_waves(residence, max(overlap, 1)), rank, overlap
        self.routes, self.rescale = routes, rescale
        self.anchor = torch.zeros((), device=device, requires_grad=True)
        self.operations = np.full((len(self.sizes), num_subnets), Operation.SHORTCUT, dtype=np.int8)
        self._factors = self._factors_of_blocks(device)
        self._by_sample: dict[int, bool] = {}
        self._known: list[Tensor] = []
        self._slices: dict[tuple[int, MicroBatches], Tensor] = {}

    def parts(self, route: Route) -> list[tuple[int | None, MicroBatches]]:
        """In which order this rank runs its heads in a block, for exchanges to overlap with it.

        While the first wave travels here, rows that live here are at hand, and while the last one travels home, the
        rest of them: half of them is run before all waves, half after.

        Args:
            route: The route of the block.

        Returns:
            The wave to wait for, or None for rows that live here, and micro-batches; a wave's results leave when it
            has run.
        """
        active = route.active[self._rank]
        elsewhere = [i for rank, needed in enumerate(route.active) if rank != self._rank for i in needed]
        here, waves = among(active, self.own), range(1, len(self.waves))
        nothing_travels = here == active and not among(self.own, tuple(elsewhere))
        if nothing_travels or not self._overlap:
            return [(0, active), *((wave, ()) for wave in waves)]
        half = (len(here) + 1) // 2
        away = tuple(i for i in active if i not in here)
        travelling = [(number, among(wave, away)) for number, wave in enumerate(self.waves)]
        return [(None, here[:half]), *travelling, (None, here[half:])]

    def executed(self, group: HeadGroup) -> None:
        """Note what a group of heads did."""
        for micro_batches, operation in ((group.full, Operation.FULL), (group.forward_only, Operation.FORWARD_ONLY)):
            self.operations[np.ix_(micro_batches, group.subnets)] = operation

    def factors(self, block: int, like: Tensor) -> Factors:
        """Factors of a block, for the samples [B, 1, 1] that live here."""
        return Factors(*self._factors[block].to(like.dtype).view(3, -1, 1, 1).unbind())

    def _factors_of_blocks(self, device: torch.device) -> Tensor:
        """[blocks, 3, B], for all blocks at once: a copy to a device, made when it is needed, would wait for it."""
        of_samples = np.repeat(np.array(self.own, dtype=int), self.residence.samples(self.own))
        tables = []
        for route in self.routes:
            share = np.array(route.heads_active)
            up = np.divide(1.0, share, out=np.zeros(share.shape), where=share > 0)
            tables.append(np.stack([route.any_full, share > 0, up])[:, of_samples])
        tensor = torch.from_numpy(np.stack(tables))
        tensor = tensor.pin_memory() if device.type == "cuda" else tensor
        return tensor.to(device, non_blocking=True)

    def learn(self, of_all: Any, of_one: Any, samples: int) -> Any:
        """Find out which tensors of a block's inputs belong to samples (masks) and which to none (rotary tables).

        Args:
            of_all: The inputs for all running micro-batches.
            of_one: The same inputs for one micro-batch, whose size is `samples`.
            samples: Samples of that micro-batch.

        Returns:
            `of_all`, without caches: a training forward fills one that nobody reads.
        """
        if isinstance(of_all, dict):
            return {key: self.learn(value, (of_one or {}).get(key), samples) for key, value in of_all.items()}
        if isinstance(of_all, (tuple, list)):
            pairs = zip(of_all, of_one or [None] * len(of_all), strict=True)
            return type(of_all)(self.learn(all_, one, samples) for all_, one in pairs)
        if isinstance(of_all, Cache):
            return None
        if isinstance(of_all, Tensor):
            # No mask for one micro-batch: without padding transformers leaves it out.
            shared = of_one is not None and of_one.shape == of_all.shape
            if not shared and len(of_all) != sum(self.sizes):
                raise ValueError(
                    f"a block takes a tensor of shape {list(of_all.shape)} for {sum(self.sizes)} samples and "
                    f"{'none' if of_one is None else list(of_one.shape)} for {samples}: head-parallel execution needs "
                    "one entry per sample on its first axis, or the same for all."
                )
            self._by_sample[id(of_all)] = not shared
            self._known.append(of_all)  # an id is only good while its object lives
        return of_all

    def side_inputs(self, value: Any, micro_batches: MicroBatches) -> Any:
        """What a region takes besides its rows, for the samples of some micro-batches."""
        if isinstance(value, dict):
            return {key: self.side_inputs(item, micro_batches) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(self.side_inputs(item, micro_batches) for item in value)
        if not isinstance(value, Tensor):
            return value
        if id(value) not in self._by_sample:
            raise ValueError(
                f"a block hands its attention or FFN a tensor of shape {list(value.shape)} that it computed itself; "
                "head-parallel execution knows what the model hands to its blocks only. Use data parallelism."
            )
        if not self._by_sample[id(value)] or len(micro_batches) == len(self.sizes):
            return value
        key = id(value), micro_batches
        if key not in self._slices:
            pieces = value.split(self.sizes)
            self._slices[key] = torch.cat([pieces[i] for i in micro_batches])
        return self._slices[key]
