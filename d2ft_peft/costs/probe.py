"""One look at a model: how long its sequences are, and the FLOPs of what lies around the subnets."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..partition import Partition, base_model, parts_elsewhere
from .counter import flop_counter


# Facts about packed sequences that transformers hands down to attention without naming them in the forward.
_PACKING = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"}


class ProjectionsBypassed(ValueError):
    """A forward pass computes what projections do without calling them, so that no head can be left out."""


class Entry(NamedTuple):
    """What one module outside of the subnets computes for one sample.

    Attributes:
        flops: FLOPs of its forward pass.
        trains: Whether a weight of its own trains.
        scales: Whether it works on every position, so that its FLOPs follow the length of the sequence.
        name: Path of the module.
        products: The part of `flops` that multiplies activations with each other (linear attention), not with weights.
    """

    flops: float
    trains: bool
    scales: bool = True
    name: str = ""
    products: float = 0.0


@dataclass
class Probe:
    """What one sample shows of a model.

    Attributes:
        sequence_length: Tokens that reach the blocks.
        below: What runs before the blocks (embeddings).
        inside: What runs in each block outside of its subnets (experts, routers), by the index of the block.
        above: What runs after the blocks (task head).
        unreached: Projections of subnets that the forward pass did not call.
    """

    sequence_length: int = 0
    below: list[Entry] = field(default_factory=list)
    inside: dict[int, list[Entry]] = field(default_factory=dict)
    above: list[Entry] = field(default_factory=list)
    unreached: tuple[str, ...] = ()

    def at(self, tokens: int) -> Probe:
        """The probe of a sample of another (padded) length."""
        factor = tokens / self.sequence_length

        def scaled(entries: list[Entry]) -> list[Entry]:
            return [
                entry._replace(flops=entry.flops * factor, products=entry.products * factor) if entry.scales else entry
                for entry in entries
            ]

        inside = {block: scaled(entries) for block, entries in self.inside.items()}
        return replace(self, sequence_length=tokens, below=scaled(self.below), inside=inside, above=scaled(self.above))

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; JSON-friendly."""
        inside = [[block, entries] for block, entries in self.inside.items()]
        return {"sequence_length": self.sequence_length, "below": self.below, "inside": inside, "above": self.above}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Probe:
        """Read `state` back."""

        def entries(values: list) -> list[Entry]:
            return [Entry(*value) for value in values]

        inside = {block: entries(values) for block, values in state["inside"]}
        return cls(state["sequence_length"], entries(state["below"]), inside, entries(state["above"]))


def probe_model(model: nn.Module, partition: Partition, batch: dict[str, Any]) -> Probe:
    """Run the model on the first sample of `batch`, without labels, and note lengths and FLOPs outside of the subnets.

    The model is left as it was: weights, training flags, hooks and random state.

    Raises:
        ProjectionsBypassed: If the forward pass goes past projections of the subnets.
    """
    sample = _one_sample(base_model(model), batch)
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), torch.no_grad(), inference(model), watch(model, partition) as probe:
        model(**sample)
    if probe.unreached:
        raise ProjectionsBypassed(
            f"the forward pass of {type(base_model(model)).__name__} goes past {len(probe.unreached)} projections of "
            f"the subnets (e.g. {probe.unreached[0]}), so that D2FT cannot leave out their heads: a fused kernel reads "
            "their weights itself; switch it off (e.g. use_liger_kernel=False, or its swiglu and geglu)."
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
        products: The part of them that multiplies activations with each other.
    """

    module: nn.Module
    name: str
    positions: int
    of_subnet: bool
    flops: float = 0.0
    products: float = 0.0


class _Meter(TorchDispatchMode):
    """Counts FLOPs by the innermost module that runs outside of the subnets."""

    def __init__(self, model: nn.Module, partition: Partition):
        super().__init__()
        elsewhere = parts_elsewhere(model)
        here = [name for name in partition.projections if not name.startswith(elsewhere)]
        self.probe = Probe(unreached=tuple(here))  # of blocks elsewhere the costs are known from their shapes
        self.counts: dict[Any, Callable] = flop_counter().flop_registry
        self.stack: list[_Frame] = []
        self.entries: dict[str | int, list[_Frame]] = {"below": [], "above": []}
        self.place: str | int = "below"
        self.samples = 0
        self.is_over = False
        base = base_model(model)
        # PEFT calls the model that it wraps, or only its forward: the pass begins with the outermost of the three.
        self.roots = {model, getattr(model, "base_model", base), base}
        blocks = {name: index for index, name in enumerate(partition.blocks)}
        subnets = {*partition.projections, *(b.region for b in partition.branches if b.name == "attention")}
        named = {module: name for name, module in base.named_modules()}
        self.weights = {_storage(parameter) for parameter in base.parameters()}
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
            if block is not None:
                self.place = block
                # Blocks do not agree on the name of what enters them.
                hidden = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.samples, self.probe.sequence_length = hidden.shape[:2]
            of_outer = bool(self.stack) and self.stack[-1].of_subnet
            self.stack.append(_Frame(module, name, _positions((*args, *kwargs.values())), of_subnet or of_outer))

        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            if not self.stack or self.stack[-1].module is not module:
                return
            frame = self.stack.pop()
            frame.positions = max(frame.positions, _positions((output,)))
            if frame.flops and not frame.of_subnet:
                self.entries.setdefault(self.place, []).append(frame)
            if block is not None:
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
            flops, frame = count(*args, **kwargs, out_val=out), self.stack[-1]
            frame.flops += flops
            if not any(isinstance(value, Tensor) and _storage(value) in self.weights for value in args):
                frame.products += flops
        return out

    def _finish(self) -> None:
        if not self.samples:
            return
        self.is_over = True
        rows = self.samples * self.probe.sequence_length
        entries = {
            place: [
                Entry(
                    frame.flops / self.samples,
                    any(p.requires_grad for p in frame.module.parameters(recurse=False)),
                    frame.positions >= rows,
                    frame.name,
                    frame.products / self.samples,
                )
                for frame in frames
            ]
            for place, frames in self.entries.items()
        }
        self.probe.below, self.probe.above = entries.pop("below"), entries.pop("above")
        self.probe.inside = entries

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _storage(value: Tensor) -> int | None:
    """What tells whether tensors share memory; None where there is none (meta)."""
    return None if value.is_meta else value.untyped_storage().data_ptr()


def _positions(values: tuple) -> int:
    """Most rows, over all axes but the last, among some tensors."""
    return max((math.prod(value.shape[:-1]) for value in values if isinstance(value, Tensor)), default=0)


def _one_sample(base: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """The first sample of a batch, as far as the model's forward names what it takes, and without labels."""
    takes = inspect.signature(type(base).forward).parameters
    known = {name: value for name, value in batch.items() if (name in takes or name in _PACKING) and name != "labels"}
    n = next((len(value) for value in known.values() if isinstance(value, Tensor) and value.ndim > 1), None)
    return {
        name: value[:1] if isinstance(value, Tensor) and value.ndim and len(value) == n else value
        for name, value in known.items()
    }


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Run a model as at inference, then give every module its training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
