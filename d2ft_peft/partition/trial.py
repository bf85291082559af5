"""A block tried on some of its heads, with stand-ins for its weights: is it what its names and shapes promise?

The whole block, with the other heads masked where the row-parallel projections read them, is held against the same
block run as D2FT runs it: regions once for the FULL and once for the FORWARD_ONLY heads, projections on those heads
only. Weights are not read: projections are replaced by random ones of rank 4 in float64, so that a trial of a large
model, a quantized one or one without weights (on the meta device) costs milliseconds and no memory.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .partition import Branch, FeatureLayout
from .stand_in import CannotBeCut, StandIn, stand_in_for


class _Trial:
    """State of a trial: `full` and `forward_only` heads, and which of them run now."""

    def __init__(self, heads: int):
        self.full, self.forward_only = [heads - 1], [0] if heads > 1 else []
        self.active = self.full + self.forward_only
        self.dense, self.heads, self.number = True, None, 0
        self.outputs: dict[str, list[Any]] = {}
        self.versions: dict[str, int] = {}
        self.met: list[Tensor] = []

    def begin(self) -> None:
        """A call of the whole block begins."""
        if self.dense:
            self.outputs, self.met = {}, []

    def running(self) -> list[int]:
        """The heads of the current pass. Raises `CannotBeCut` outside of one."""
        if self.heads is None:
            raise CannotBeCut("a projection runs outside of its region")
        return self.heads

    @staticmethod
    def features(layout: FeatureLayout, heads: list[int]) -> list[int]:
        """The features of some heads, part by part; trials are for projections in equal parts."""
        starts = range(0, layout.size, layout.heads * layout.width)
        return [part + head * layout.width + i for part in starts for head in heads for i in range(layout.width)]

    def projection(self, layout: FeatureLayout, kind: str) -> Callable[[StandIn, Tensor], Tensor]:
        """What a projection computes: ``"column"``, ``"row inside"`` of its region, or ``"row"`` outside of it."""

        def column(stand: StandIn, x: Tensor) -> Tensor:
            out = stand.whole(x)
            return out if self.dense else out[..., self.features(layout, self.running())]

        def row(stand: StandIn, x: Tensor) -> Tensor:
            if self.dense:
                self.met.append(x)
                kept = torch.zeros(layout.size, dtype=x.dtype)
                kept[self.features(layout, self.active)] = 1
                return stand.whole(x * kept)
            inside = kind == "row inside"
            down = stand.down[:, self.features(layout, self.running() if inside else self.active)]
            if x.shape[-1] != down.shape[1]:
                raise CannotBeCut(
                    f"the row-parallel projection met {x.shape[-1]} features instead of the {down.shape[1]} that run"
                )
            out = x @ down.T @ stand.up.T
            return out if inside and self.number else out + stand.bias

        return column if kind == "column" else row

    def region(self, branch: Branch, module: nn.Module) -> Callable[..., Any]:
        """What stands before a region's forward."""
        own = type(module).forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.dense:
                out = own(module, *args, **kwargs)
                self.outputs.setdefault(branch.name, []).append(out)
                self.versions[branch.name] = _first(out)._version
                return out
            if not self.active:
                first = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                width = branch.row.out_features if branch.row_inside else 0
                return _as_returned(self.outputs[branch.name][0], first.new_zeros(*first.shape[:-1], width))
            passes = [heads for heads in (self.full, self.forward_only) if heads]
            found = [self._pass(branch, module, number, heads, args, kwargs) for number, heads in enumerate(passes)]
            firsts = [_first(out) for out in found]
            joined = sum(firsts) if branch.row_inside else torch.cat(firsts, -1)
            return (joined, *found[0][1:]) if isinstance(found[0], tuple) else joined

        return forward

    def _pass(self, branch: Branch, module: nn.Module, number: int, heads: list[int], args: tuple, kwargs: dict) -> Any:
        whole = {name: getattr(module, name) for name in branch.scaled_attributes}
        for name, value in whole.items():
            setattr(module, name, value // branch.heads * len(heads))
        self.heads, self.number = heads, number
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        taken = {entry.name: entry for entry in branch.per_head}

        def of_heads(name: str, value: Any) -> Any:
            if value is None or name not in taken:
                return value
            width = taken[name].width
            index = torch.tensor([head * width + i for head in heads for i in range(width)])
            return value.index_select(taken[name].axis, index)

        args = tuple(of_heads(name, value) for name, value in itertools.zip_longest(names[: len(args)], args))
        try:
            return type(module).forward(module, *args, **{name: of_heads(name, kwargs[name]) for name in kwargs})
        finally:
            self.heads = None
            for name, value in whole.items():
                setattr(module, name, value)


def try_block(
    block: nn.Module, prefix: str, branches: list[Branch], hidden_size: int | None = None
) -> dict[str, dict[str, Any]] | str:
    """Run a block on some of its heads, and whole with the others masked.

    Args:
        block: The block; it is only looked at.
        prefix: Its path in the model.
        branches: Its branches, attention first, whose projections have one part, or several equal ones.
        hidden_size: Width of what enters the block, if it is not that of attention's input.

    Returns:
        For each branch by its name what was seen of it: `joined` and `returns` of `BranchSpec`. Or, in words, why the
        block cannot be run in part.
    """
    # Stand-ins have values, also within `torch.device("meta")`.
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("cpu"):
        torch.manual_seed(0)
        try:
            return _try(block, prefix, branches, hidden_size)
        except CannotBeCut as refused:
            return str(refused)


def _try(block: nn.Module, prefix: str, branches: list[Branch], hidden_size: int | None) -> dict[str, dict[str, Any]]:
    heads, stand = branches[0].heads, stand_in_for(block, {})
    trial = _Trial(heads)
    for branch in branches:
        region = stand.get_submodule(branch.region.removeprefix(prefix + "."))
        for projection in branch.projections:
            kind = "column" if projection.kind == "column" else "row inside" if branch.row_inside else "row"
            layer = stand.get_submodule(projection.name.removeprefix(prefix + "."))
            layer.instead = trial.projection(projection.layout, kind)
        region.forward = trial.region(branch, region)
    call = _Call(stand, trial, branches[0], prefix, hidden_size)

    trial.active = list(range(heads))
    stand.train()
    call()
    facts = {branch.name: _facts(branch, trial) for branch in branches}
    stand.eval()
    whole = call()
    trial.active = trial.full + trial.forward_only
    expected = call()
    if len(trial.active) < heads and torch.allclose(whole, expected, rtol=1e-3, atol=1e-3):
        raise CannotBeCut("its heads make no difference to what it returns, so that nothing can be compared")
    trial.dense = False
    _check_equal(call(), expected)
    trial.full = trial.forward_only = trial.active = []
    call()
    return facts


def _facts(branch: Branch, trial: _Trial) -> dict[str, Any]:
    outputs = trial.outputs.get(branch.name, [])
    if len(outputs) != 1:
        raise CannotBeCut(f"its {branch.name} ({branch.region}) runs {len(outputs)} times instead of once")
    out = outputs[0]
    # What is changed in place on its way to the row-parallel projection is the same tensor, and not the same.
    untouched = _first(out)._version == trial.versions[branch.name] and any(x is _first(out) for x in trial.met)
    joined = not branch.row_inside and not untouched
    return {"joined": joined, "returns": len(out) if isinstance(out, tuple) else 0}


class _Call:
    """A call of a block, with what blocks of its kind are called with; what that is, the first call finds out."""

    def __init__(self, stand: nn.Module, trial: _Trial, attention: Branch, prefix: str, hidden_size: int | None):
        self.stand, self.trial, heads = stand, trial, attention.heads
        self.tokens = next(tokens for tokens in (7, 5, 11) if tokens % heads or heads == 1)
        self.names = dict(list(inspect.signature(type(stand).forward).parameters.items())[1:])
        self.region = stand.get_submodule(attention.region.removeprefix(prefix + "."))
        self.rotated = getattr(self.region, "rotary_ndims", attention.columns[1].layout.width)
        self.heads = heads
        widths = dict.fromkeys((attention.columns[0].in_features, hidden_size))
        self.ways = [(width, masked) for width in widths if width for masked in (False, True)]
        self.given: tuple[Tensor, dict[str, Any]] | None = None

    def __call__(self) -> Tensor:
        if self.given is not None:
            x, given = self.given
            return _first(self._attempt(x, given))
        refused = None
        for width, masked in self.ways:
            x = torch.randn(2, self.tokens, width, dtype=torch.float64)
            given = self._arguments(x, masked)
            try:
                out = _first(self._attempt(x, given))
            except CannotBeCut as error:
                refused = refused or error
            else:
                self.given = x, given
                return out
        raise refused

    def _attempt(self, x: Tensor, given: dict[str, Any]) -> Any:
        self.trial.begin()
        try:
            return self.stand(x, **given)
        except CannotBeCut:
            raise
        except Exception as error:  # anything may go wrong in a forward that was not written for this
            reason = str(error).splitlines()[0] if str(error) else ""
            raise CannotBeCut(f"it fails: {type(error).__name__}: {reason}") from error

    def _arguments(self, x: Tensor, masked: bool) -> dict[str, Any]:
        required = [
            p.name for p in list(self.names.values())[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        given: dict[str, Any] = dict.fromkeys(required)
        known = self._known(x)
        given |= {name: value for name, value in known.items() if name in self.names}
        if masked and "attention_mask" in self.names:
            given["attention_mask"] = torch.ones(2, 1, self.tokens, self.tokens, dtype=x.dtype)
        return given

    def _known(self, x: Tensor) -> dict[str, Any]:
        """Arguments by the names that transformers gives them."""
        places = torch.arange(self.tokens)
        known: dict[str, Any] = {
            "position_embeddings": tuple(torch.randn(2, 1, self.tokens, self.rotated, dtype=x.dtype)),
            "position_bias": torch.randn(2, self.heads, self.tokens, self.tokens, dtype=x.dtype),
            "relative_position_bias": torch.randn(1, self.heads, self.tokens, self.tokens, dtype=x.dtype),
        }
        patch = getattr(self.stand, "patch_size", None)
        if isinstance(patch, int):
            known["resolution"] = (patch, patch * (self.tokens - 1))
        positions = getattr(self.region, "pos_ebd_size", getattr(self.region, "max_relative_positions", None))
        if getattr(self.region, "relative_attention", False) and positions:
            known["relative_pos"] = (places[:, None] - places)[None]
            known["rel_embeddings"] = torch.randn(2 * positions, x.shape[-1], dtype=x.dtype)
        return known


def _check_equal(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().clamp(min=1.0)
    # Some models take the softmax in float32.
    if found.shape != expected.shape or not (found - expected).abs().max() <= 1e-5 * scale:
        raise CannotBeCut("on some heads it does not return what the whole block makes of them")


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _as_returned(sample: Any, out: Tensor) -> Any:
    return (out, *[None] * (len(sample) - 1)) if isinstance(sample, tuple) else out
