"""What a region sees while some of its heads run: sizes that it splits by, and its tensors with an axis of heads."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..partition import Branch, FeatureLayout, PerHead
from .intercept import Intercept, first_tensor
from .plan import Heads
from .runtime import Runtime
from .subset_linear import select


_CONFIG = "config."


class RegionView:
    """Shows a region the heads of a pass.

    What the region holds is covered, never changed: an entry in a module's ``__dict__`` is found before its parameters
    and children, so that state-dict keys and whoever looks at ``named_parameters`` meanwhile are left alone.

    Args:
        region: The module.
        branch: Its branch.
    """

    def __init__(self, region: nn.Module, branch: Branch):
        self.region, self.branch = region, branch
        self._names = tuple(inspect.signature(type(region).forward).parameters)[1:]
        self._arguments = {entry.name: entry for entry in branch.per_head if entry.kind == "argument"}
        self._held = [entry for entry in branch.per_head if entry.kind in ("parameter", "modules")]

    @contextmanager
    def of(self, heads: Heads) -> Iterator[None]:
        """Let the region's own code see these heads only."""
        covered: list[tuple[dict, str, Any]] = []
        try:
            for owner, name, value in self._stand_ins(heads):
                covered.append((owner.__dict__, name, owner.__dict__.get(name, _MISSING)))
                owner.__dict__[name] = value
            yield
        finally:
            for attributes, name, value in reversed(covered):
                if value is _MISSING:
                    del attributes[name]
                else:
                    attributes[name] = value

    def _stand_ins(self, heads: Heads) -> Iterator[tuple[nn.Module, str, Any]]:
        of_config = {}
        for name in self.branch.scaled_attributes:
            in_config = name.startswith(_CONFIG)
            attribute = name.removeprefix(_CONFIG)
            dense = getattr(self.region.config if in_config else self.region, attribute)
            scaled = dense // self.branch.heads * len(heads)
            if in_config:
                of_config[attribute] = scaled
            else:
                yield self.region, attribute, scaled
        if of_config:
            yield self.region, "config", _ConfigView(self.region.config, of_config)
        for entry in self._held:
            parent, _, leaf = entry.name.rpartition(".")
            owner = _computing(self.region.get_submodule(parent))
            yield owner, leaf, take_heads(getattr(owner, leaf), entry, heads, self.branch.heads)

    def arguments(self, heads: Heads, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of a call, of those with an axis of heads what belongs to these heads."""
        if not self._arguments:
            return args, kwargs

        def taken(name: str, value: Any) -> Any:
            entry = self._arguments.get(name)
            fits = entry is not None and isinstance(value, Tensor) and value.shape[entry.axis] > 1
            return take_heads(value, entry, heads, self.branch.heads) if fits else value

        args = tuple(taken(name, value) for name, value in zip(self._names, args, strict=False))
        return args, {name: taken(name, value) for name, value in kwargs.items()}

    def hand_on(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, dict[str, Any]]:
        """What the region hands on to the next block, of all heads; and the arguments with it.

        The first block makes it, whatever its own heads do: those of the blocks above read it.
        """
        name = self.branch.hands_on
        given = kwargs.get(name) if name else None
        if not name or given is not None or not getattr(self.region, "has_relative_attention_bias", False):
            return given, kwargs
        hidden = first_tensor(args, kwargs)
        made = self.region.compute_bias(hidden.shape[1], hidden.shape[1], device=hidden.device)
        return made, {**kwargs, name: made}

    def take_residual(self, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor | None, tuple, dict[str, Any]]:
        """What the region adds to its output, and the arguments with a zero in its place."""
        name = self.branch.residual
        if not name:
            return None, args, kwargs
        if name in kwargs:
            residual = kwargs[name]
            return residual, args, {**kwargs, name: residual.new_zeros(())}
        place = self._names.index(name)
        residual = args[place]
        return residual, (*args[:place], residual.new_zeros(()), *args[place + 1 :]), kwargs


class HeadsOfOutput(Intercept):
    """Takes the heads of a pass out of what a module within a region returns, which is computed of all heads."""

    def __init__(self, module: nn.Module, runtime: Runtime, entry: PerHead, num_heads: int):
        super().__init__(module, runtime)
        self.entry, self.num_heads = entry, num_heads

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out, run = self.original(*args, **kwargs), self.runtime.run
        return out if run is None else take_heads(out, self.entry, run.heads, self.num_heads)


def take_heads(value: Any, entry: PerHead, heads: Heads, num_heads: int) -> Any:
    """The part of a tensor, or of a list of modules, that belongs to some heads.

    An axis may count samples and heads together (ALiBi as [B * heads, 1, T]); the heads are then those of each sample.

    Raises:
        ValueError: If the axis does not divide by the heads.
    """
    if entry.kind == "modules":
        return [value[head * entry.width + i] for head in heads.indices for i in range(entry.width)]
    axis = entry.axis % value.ndim
    per_sample = num_heads * entry.width
    size = value.shape[axis]
    if size % per_sample:
        raise ValueError(
            f"{entry.name} of shape {list(value.shape)} has {size} entries on axis {entry.axis}, which do not divide "
            f"by {num_heads} heads of {entry.width}; `per_head` of the model's BranchSpec names the wrong axis."
        )
    selection = select(FeatureLayout(num_heads, entry.width), heads)
    if size == per_sample:
        return selection.take(value, axis)
    return selection.take(value.unflatten(axis, (-1, per_sample)), axis + 1).flatten(axis, axis + 1)


def _computing(module: nn.Module) -> nn.Module:
    """The module that computes, under the wrapper of an adapter: D2FT's copy, or what PEFT's modules_to_save holds."""
    own = getattr(type(module), "active_layer", None)
    if own is not None:
        return own(module)
    saved = getattr(module, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and not module.disable_adapters:
        active = [name for name in module.active_adapters if name in saved]
        return saved[active[0]] if active else module.original_module
    return getattr(module, "original_module", module)


class _Missing:
    pass


_MISSING = _Missing()


class _ConfigView:
    """A config in which a few numbers are those of the heads that run."""

    def __init__(self, config: Any, numbers: dict[str, int]):
        self.__dict__.update(numbers, _config=config)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)
