"""What a model costs at the lengths that its batches really have."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..costs import Probe, ProjectionsBypassed, cost_model, probe_model, watch
from ..engine import FrozenCache
from ..engine.row_counts import Lengths, RowCounts, last_place
from ..partition import Partition, base_model
from ..schedule import CostModel, Operation
from .facts import BatchFacts, token_length


Pass = tuple[float, int] | tuple[float, int, int] | tuple[float, Lengths]
"""Samples and tokens per sample of a forward pass, and the tokens that passed the middle blocks where some were left
out. Of a model with several stacks, what each of them saw per sample."""

Unread = tuple[frozenset[str], int]
"""The modules that left out rows which no loss reads, and on how many rows they ran, of all samples together."""


def separated(passes: Sequence[Pass | RowCounts], facts: BatchFacts | None, model: nn.Module) -> list[Pass]:
    """Forward passes as kernels compute them: one that knows where the samples of a row begin computes nothing between
    them."""
    passes = [one.per_sample() if isinstance(one, RowCounts) else one for one in passes]
    if facts is not None:  # of rows that lie in one without an axis of samples
        passes = [one if one[0] is not None else (facts.size, round(one[1] / facts.size)) for one in passes]
    config = getattr(base_model(model), "config", None)
    kernel = getattr(config, "_attn_implementation", None) or ""
    if facts is None or facts.lengths is None or not kernel.startswith("flash"):
        return list(passes)
    return [(1, int(length)) for length in facts.lengths] * len(passes)


_MOST_LENGTHS = 4096


class ModelCosts:
    """FLOPs of a model's subnets, and of what lies around them, for any length of its sequences.

    Schedules are made with the costs at one length, on which all processes agree at the first step and which a resumed
    run reads from its checkpoint; what was executed is counted at the lengths that each forward pass really had.

    Args:
        model: The adapted model.
        partition: Its subnets.
        forward_only_cost: Relative cost of FORWARD_ONLY to make schedules with, instead of the model's own.

    Attributes:
        probe: What a look at the model showed, or None before.
        middle: Indices of the middle blocks, where tokens may be left out.
    """

    def __init__(self, model: nn.Module, partition: Partition, forward_only_cost: float | None = None):
        self.model, self.partition, self.forward_only_cost = model, partition, forward_only_cost
        self.probe: Probe | None = None
        self._surroundings_known = True
        self._by_length: dict[tuple[int | Lengths, int | None, frozenset[str]], CostModel] = {}
        self.middle = range(0)
        self._rows_per_sample = 1.0

    @property
    def known(self) -> bool:
        """Whether schedules can be made."""
        return self.probe is not None

    @property
    def relative(self) -> np.ndarray:
        """Cost of each operation at the agreed length, relative to the costliest, float [K, 3]."""
        costs = self.at(self.probe.sequence_length).costs
        return costs / costs.max()

    def at(self, tokens: int | Lengths, kept: int | None = None, without: frozenset[str] = frozenset()) -> CostModel:
        """The cost model at a length, or at those of several stacks, per sample; with `kept` tokens in the middle
        blocks, or without some modules."""
        key = tokens, None if kept == tokens else kept, without
        if len(self._by_length) > _MOST_LENGTHS:  # several stacks have as many pairs of lengths
            self._by_length.clear()
        if key not in self._by_length and key[1] is not None:
            both = self.at(tokens, None, without), self.at(kept, None, without)
            self._by_length[key] = both[0].with_blocks(self.middle, both[1])
        elif key not in self._by_length:
            probe = self.probe.at(tokens)
            self._by_length[key] = cost_model(self.model, self.partition, probe, self.forward_only_cost, without)
        return self._by_length[key]

    def learn(self, batch: dict[str, Any], sum_over_processes: Callable[[np.ndarray], np.ndarray]) -> None:
        """Look at the model once, on one sample.

        Where the batch is not the model's own input (a trainer concatenates pairs, say), its length is taken from the
        widest row of token ids, and what lies around the subnets is learned from the first forward pass that trains.

        Args:
            batch: A micro-batch.
            sum_over_processes: Adds numbers up over the processes that have different data.

        Raises:
            ValueError: If the batch shows no length at all, or fused kernels go past the subnets' projections.
        """
        try:
            self.probe = self._look(batch)
        except ProjectionsBypassed:
            raise
        except Exception as error:
            length = token_length(batch)
            if length is None:
                raise ValueError(
                    f"a batch with keys {sorted(batch)} is not what the model takes, and has no token ids whose length "
                    "could stand in for a look at the model, of which D2FT has to know what its subnets cost. The "
                    f"model said: {error}"
                ) from error
            self.probe, self._surroundings_known = Probe(sequence_length=length), False
        total, processes = sum_over_processes(np.array([self.probe.sequence_length, 1.0]))
        self.probe = self.probe.at(round(float(total / processes)))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Around a training forward pass: learns from it what `learn` could not see."""
        if self._surroundings_known:
            yield
            return
        with watch(self.model, self.partition) as seen:
            yield
        if seen.sequence_length and not seen.idle:
            self.probe, self._surroundings_known = seen.at(self.probe.sequence_length), True
            self._by_length.clear()

    def flops(self, row: np.ndarray, passes: list[Pass], unread: Sequence[Unread | None] = ()) -> float:
        """FLOPs of a micro-batch as executed; 0 before `learn`.

        Args:
            row: Operation of each subnet, int [K].
            passes: Samples and tokens per sample of each forward pass.
            unread: What each left out; nothing by default.
        """
        if not self.known:
            return 0.0
        pairs = itertools.zip_longest(passes, unread)
        return float(sum(self._of_pass(row, *one, unread=left_out) for one, left_out in pairs))

    def _look(self, batch: dict[str, Any]) -> Probe:
        """What the first sample of a batch shows, or all of it where no sample can be taken out."""
        device = next(self.model.parameters()).device
        sample = {name: v[:1] if isinstance(v, Tensor) and v.ndim else v for name, v in batch.items()}
        try:
            return probe_model(self.model, self.partition, send_to_device(sample, device))
        except ProjectionsBypassed:
            raise
        except Exception:
            return probe_model(self.model, self.partition, send_to_device(dict(batch), device), whole=True)

    def _of_pass(
        self, row: np.ndarray, samples: float, tokens: int | Lengths, kept: int | None = None,
        unread: Unread | None = None,
    ) -> float:  # fmt: skip
        whole = self.at(tokens, kept).step_flops(row[None], np.array([samples]))
        if unread is None:
            return whole
        without, rows = unread
        least = self.at(tokens, kept, without).step_flops(row[None], np.array([samples]))
        of_last = tokens if isinstance(tokens, int) else math.prod(tokens[last_place(self.partition.gauges)])
        return least + (whole - least) * rows / (samples * of_last)

    def flops_below(self, row: np.ndarray, passes: list[Pass], block: int) -> float:
        """Forward FLOPs of the blocks below `block` in some passes; 0 before `learn`."""
        return sum(n * self.at(tokens).forward_below(row, block) for n, tokens in passes) if self.known else 0.0

    def spared(self, row: np.ndarray, cache: FrozenCache | None) -> float:
        """FLOPs that a cache of frozen blocks spared in the current micro-batch."""
        return 0.0 if cache is None else self.flops_below(row, cache.passes, cache.cut)

    def full_flops(self, passes: list[Pass]) -> float:
        """FLOPs of the same passes if every subnet were FULL, on all tokens."""
        return self.flops(self._full_row, [one[:2] for one in passes])

    def share_of_full(self, tokens: int, kept: int) -> float:
        """FLOPs with `kept` tokens of each sample in the middle blocks, relative to all tokens."""
        return self.flops(self._full_row, [(1, tokens, kept)]) / self.full_flops([(1, tokens)])

    @property
    def _full_row(self) -> np.ndarray:
        return np.full(self.partition.num_scheduled, Operation.FULL)

    def shares(self, passes: list[Pass]) -> tuple[float, float]:
        """What passes did of the subnets' compute, and of the tokens that blocks hand on, relative to all tokens."""
        if not self.known or not any(len(one) > 2 for one in passes):
            return 1.0, 1.0
        ran, whole, tokens, everyone = 0.0, 0.0, 0.0, 0.0
        for n, length, *kept in passes:
            ran += n * float(self.at(length, *kept).costs[:, Operation.FULL].sum())
            whole += n * float(self.at(length).costs[:, Operation.FULL].sum())
            left_out = len(self.middle) * (length - (kept[0] if kept else length))
            tokens += n * (len(self.partition.blocks) * length - left_out)
            everyone += n * len(self.partition.blocks) * length
        return ran / whole, tokens / everyone

    def of_samples(self, tokens: np.ndarray) -> np.ndarray:
        """FLOPs of samples of these lengths [n], or of inputs and targets of these lengths [n, 2], where every subnet
        is FULL, [n]."""
        lengths, places = np.unique(tokens, return_inverse=True, axis=0)
        return np.array([self.at(self._lengths(one)).full_flops(np.ones(1)) for one in lengths])[places.ravel()]

    def _lengths(self, tokens: np.ndarray) -> int | Lengths:
        """One length of a sample, or what its inputs and targets are at each gauge."""
        if not np.ndim(tokens):
            return int(tokens)
        gauges, last = self.partition.gauges, len(self.partition.stacks) - 1
        new = [(1.0, float(tokens[int(gauge.stack == last and not gauge.other)])) for gauge in gauges]
        known = zip(new, self.probe.lengths or new, self.probe.follows or [True] * len(new), strict=True)
        return tuple(one if follows else old for one, old, follows in known)

    def saw(self, passes: list[Pass], samples: float) -> None:
        """Note how many samples go through the model for one of a micro-batch: two, where they are pairs."""
        self._rows_per_sample = sum(n for n, *_ in passes) / samples if samples else self._rows_per_sample

    def expected(self, samples: float, length: int | None) -> list[Pass]:
        """The passes of a micro-batch that did not run; its length is the agreed one by default."""
        return [(samples * self._rows_per_sample, length or self.probe.sequence_length)] if self.known else []

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; JSON-friendly."""
        return {
            "probe": self.probe and self.probe.state(),
            "complete": self._surroundings_known,
            "rows_per_sample": self._rows_per_sample,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Make schedules with a checkpoint's costs."""
        self.probe = state["probe"] and Probe.from_state(state["probe"])
        self._surroundings_known, self._rows_per_sample = state["complete"], state["rows_per_sample"]
        self._by_length.clear()
