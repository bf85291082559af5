"""One look at a model: how long its sequences are, and the FLOPs of what lies around the subnets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..batches import some_samples
from ..engine.block_region import hidden_states
from ..engine.row_counts import Lengths, RowCounts, rows_at
from ..partition import Partition, base_model, is_linear_like, parts_elsewhere
from ..partition.body import reads_token_ids
from .block_order import BlockOrder
from .counter import flop_counter
from .inference import inference
from .seen import Entry, Probe


# Operations whose second factor is a weight; others multiply activations with one another.
_WITH_WEIGHTS = {
    torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.convolution, torch.ops.aten._convolution,
    torch.ops.aten.cudnn_convolution, torch.ops.aten._grouped_mm, torch.ops.aten._scaled_mm,
}  # fmt: skip
# Facts about packed sequences that transformers hands down to attention without naming them in the forward.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class ProjectionsBypassed(ValueError):
    """A forward pass computes what projections do without calling them, so that no head can be left out."""


def probe_model(model: nn.Module, partition: Partition, batch: dict[str, Any], whole: bool = False) -> Probe:
    """Run the model on the first sample of `batch`, without labels, and note lengths and FLOPs outside of the subnets.

    The model is left as it was: weights, training flags, hooks and random state.

    Args:
        model: The model.
        partition: Its subnets.
        batch: A batch that the model takes.
        whole: Whether to run all of it: patches of several images may lie in one row, and no sample can be taken out.

    Raises:
        ProjectionsBypassed: If the forward pass goes past projections of the subnets.
        ValueError: If it does not reach some of the stacks.
    """
    sample = _known(base_model(model), batch)
    if not whole:
        sample = _one_sample(sample)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), inference(model), watch(model, partition) as probe:
        model(**sample)
    if probe.unreached:
        raise ProjectionsBypassed(
            f"the forward pass of {type(base_model(model)).__name__} goes past {len(probe.unreached)} projections of "
            f"the subnets (e.g. {probe.unreached[0]}), so that D2FT cannot leave out their heads: a fused kernel reads "
            "their weights itself; switch it off (e.g. use_liger_kernel=False, or its swiglu and geglu). Or the "
            "batch is not one that they work on, as text for a vision tower: begin with one that is."
        )
    if probe.idle:
        raise ValueError(
            f"a batch with keys {sorted(batch)} does not reach {', '.join(probe.idle)} of "
            f"{type(base_model(model)).__name__}, so that it does not show what runs there."
        )
    return probe


@contextmanager
def watch(model: nn.Module, partition: Partition) -> Iterator[Probe]:
    """Note what the first forward pass within the context shows, per sample: a row of what enters the blocks.

    The probe is filled once that pass is through. What runs besides it, a backward pass included, is not looked at.
    """
    meter = _Meter(model, partition)
    try:
        with meter:
            yield meter.probe
    finally:
        meter.remove()


@dataclass
class _Frame:
    """A module that is running.

    Attributes:
        module: The module.
        positions: Most rows among its inputs and outputs.
        name: Its path.
        of_subnet: Whether it is part of a projection or of attention, which the cost model knows by their shapes.
        flops: FLOPs that it computed itself, outside of its children.
        products: Those of them that multiply activations with one another.
    """

    module: nn.Module
    name: str
    positions: int
    of_subnet: bool
    flops: float = 0.0
    products: float = 0.0


class _Meter(TorchDispatchMode):
    """Counts FLOPs by the innermost module that runs outside of the subnets. What runs between two stacks is taken to
    follow the last block before it."""

    def __init__(self, model: nn.Module, partition: Partition):
        super().__init__()
        elsewhere = parts_elsewhere(model)
        here = [name for name in partition.projections if not name.startswith(elsewhere)]
        self.probe = Probe(unreached=tuple(here))  # of blocks elsewhere the costs are known from their shapes
        self.order = None if partition.cuts_heads else BlockOrder(partition.blocks)
        self.counts: dict[Any, Callable] = flop_counter().flop_registry
        self.stack: list[_Frame] = []
        self.entries: dict[str | int, list[_Frame]] = {"below": [], "above": []}
        self.place: str | int = "below"
        self.partition, self.is_over = partition, False
        self.samples = 0
        self.entered: set[str] = set()  # prefixes of the blocks that ran
        self.rows = RowCounts(partition.gauges)
        base = self.base = base_model(model)
        # PEFT calls the model that it wraps, or only its forward: the pass begins with the outermost of the three.
        self.roots = {model, getattr(model, "base_model", base), base}
        blocks = {name: index for index, name in enumerate(partition.blocks)}
        self.ends = {stack.blocks[-1] for stack in partition.stacks[:-1]}
        subnets = {*partition.projections, *(b.region for b in partition.branches if b.name not in ("ffn", "block"))}
        self.gauges = {
            partition.branches[g.branch].region if g.other else partition.blocks[partition.branches[g.branch].block]: p
            for p, g in enumerate(partition.gauges)
        }
        named = {module: name for name, module in base.named_modules()}
        self.weights = {_storage(parameter) for parameter in base.parameters()} - {None}
        self.handles: list[torch.utils.hooks.RemovableHandle] = []
        for module in {**dict.fromkeys(self.roots, ""), **named}:
            name = named.get(module, "")
            self._follow(module, name, blocks.get(name), name in subnets)

    def _follow(self, module: nn.Module, name: str, block: int | None, of_subnet: bool) -> None:
        def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self.is_over or (not self.stack and module not in self.roots):
                return
            if of_subnet:
                self.probe.unreached = tuple(other for other in self.probe.unreached if other != name)
            if block is not None and (name or not self.stack):  # the model itself has wrappers
                self.place = block
                self.entered.add(f"{name}." if name else "")
                if self.order is not None:
                    self.order.enter(block, hidden_states(args, kwargs))
            if name in self.gauges and (name or not self.stack):
                place = self.gauges[name]
                of_other, only = self.partition.gauges[place].other, self.partition.is_one_subnet
                self.rows.add(place, *rows_at(args, kwargs, of_other, only))
            of_outer = bool(self.stack) and self.stack[-1].of_subnet
            self.stack.append(_Frame(module, name, _positions((*args, *kwargs.values())), of_subnet or of_outer))

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if not self.stack or self.stack[-1].module is not module:
                return
            frame = self.stack.pop()
            frame.positions = max(frame.positions, _positions((output,)))
            if not frame.flops and not frame.of_subnet:
                frame.flops = _of_unknown_kernel(module, output)
            if frame.flops and not frame.of_subnet:
                self.entries.setdefault(self.place, []).append(frame)
            if block is not None and self.order is not None and (name or not self.stack):
                self.order.leave(output)
            if block is not None and block not in self.ends:
                self.place = "above"
            if not self.stack and output is not None:
                self._finish()

        self.handles.append(module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))
        self.handles.append(module.register_forward_hook(leave, always_call=True))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = self.counts.get(func._overloadpacket)
        if count is not None and self.stack:
            flops = count(*args, **kwargs, out_val=out)
            self.stack[-1].flops += flops
            self.stack[-1].products += flops * (func._overloadpacket not in _WITH_WEIGHTS and not self._reads(args))
        return out

    def _reads(self, args: tuple) -> bool:
        """Whether a weight is among the factors, as where all experts are multiplied in one batch."""
        return any(isinstance(value, Tensor) and _storage(value) in self.weights for value in args)

    def _finish(self) -> None:
        if self.rows.empty:
            self.probe.idle = tuple(stack.name for stack in self.partition.stacks)
            return
        self.is_over = True
        # A stack that this sample has no use for is not gone past.
        ran, unreached = tuple(sorted(self.entered)), self.probe.unreached
        self.probe.unreached = tuple(name for name in unreached if f"{name}.".startswith(ran))
        blocks = self.partition.blocks
        self.probe.idle = tuple(
            stack.name
            for stack in self.partition.stacks
            if not any(f"{blocks[block]}.".startswith(ran) for block in stack.blocks)
        )
        if self.order is not None:
            self.probe.disorder = self.order.disorder()
        self.samples, lengths = self.rows.per_sample()
        several = self.partition.several
        follows = tuple(reads_token_ids(self.base, self.partition, gauge) for gauge in self.partition.gauges)
        ids = next((place for place, follow in enumerate(follows) if follow), 0)
        self.probe.sequence_length = round(lengths[ids][1])
        if several:
            self.probe.lengths, self.probe.follows = lengths, follows
        entries = {place: self._entries(place, frames, lengths) for place, frames in self.entries.items()}
        self.probe.below, self.probe.above = entries.pop("below"), entries.pop("above")
        self.probe.inside = entries

    def _entries(self, place: str | int, frames: list[_Frame], lengths: Lengths) -> list[Entry]:
        block = {"below": 0, "above": len(self.partition.blocks) - 1}.get(place, place)
        stack = self.partition.stack_of(block)
        gauge = next((i for i, g in enumerate(self.partition.gauges) if g.stack == stack and not g.other), 0)
        sequences, tokens = lengths[gauge]
        # Blocks that run several times in a pass are counted as more samples, as they are whenever they train.
        runs = max(1, self.order.ran.count(0)) if self.order is not None else 1
        return [
            Entry(
                frame.flops / self.samples,
                any(p.requires_grad for p in frame.module.parameters(recurse=False)),
                frame.positions * runs >= self.samples * sequences * tokens,
                frame.name,
                gauge,
                frame.products / self.samples,
            )
            for frame in frames
        ]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _storage(value: Tensor) -> int | None:
    """What tells whether tensors share memory; None where there is none to look at (meta, quantized ones)."""
    try:
        return None if value.is_meta else value.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


def _of_unknown_kernel(module: nn.Module, output: Any) -> float:
    """FLOPs of a linear layer whose kernel no counter knows, as those of quantized weights; 0 of anything else."""
    if not is_linear_like(module) or not isinstance(output, Tensor):
        return 0.0
    return 2.0 * module.in_features * output.numel()


def _positions(values: tuple) -> int:
    """Most rows, over all axes but the last, among some tensors."""
    return max((math.prod(value.shape[:-1]) for value in values if isinstance(value, Tensor)), default=0)


def _known(base: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What the model's forward names of a batch, without labels, unless a decoder makes its rows of them."""
    takes = inspect.signature(type(base).forward).parameters
    decodes = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    decodes = decodes and isinstance(batch.get("labels"), Tensor)
    left_out = () if decodes else ("labels",)
    return {
        name: value for name, value in batch.items() if (name in takes or name in _PACKING) and name not in left_out
    }


def _one_sample(batch: dict[str, Any]) -> dict[str, Any]:
    """The first sample of a batch."""
    size = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1), None)
    return dict(batch) if size is None else some_samples(batch, slice(1), size)
