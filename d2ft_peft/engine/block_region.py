"""Forward of a whole block under a plan: it runs, it is a constant for autograd, or its input is passed on.

    FULL            out = block(x)
    FORWARD_ONLY    out = x + constant(block(x) - x)
    SHORTCUT        out = x

What a block returns besides its hidden states is nobody's to invent: None and what it was given are handed on, and
where it makes something else (a position bias, attention weights, a second stream) it has to run FULL.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..partition import Branch
from .intercept import first_tensor
from .plan import Cell
from .region import RegionForward
from .runtime import Runtime


class BlockRegion(RegionForward):
    """Runs a block under a plan."""

    def __init__(self, module: nn.Module, runtime: Runtime, branch: Branch, index: int):
        super().__init__(module, runtime, branch, index)
        self._structures: dict[tuple, Any] = {}  # by the kind of call

    def _run(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        x = hidden_states(args, kwargs)
        if not cell.num_active:
            return self._passed_on(x, args, kwargs)
        with torch.no_grad():
            output = self.original(*args, **kwargs)
        structure = self._structure_of(output, x, args, kwargs)
        hidden = _Constant.apply(x, hidden_of(output))
        return _rebuilt(structure, hidden, args, kwargs)

    def _passed_on(self, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """What the block returns if its hidden states are its input."""
        structure = self._structures.get(_kind_of_call(args, kwargs))
        if structure is None:
            # Once for each kind of call: only the block itself knows whether it returns a tensor or a tuple.
            with torch.no_grad():
                structure = self._structure_of(self.original(*args, **kwargs), x, args, kwargs)
        return _rebuilt(structure, x, args, kwargs)

    def _structure_of(self, output: Any, x: Tensor, args: tuple, kwargs: dict) -> Any:
        """How the block's output is made up; checked, and remembered for calls of this kind.

        Raises:
            ValueError: If it holds what a block that does not run could not hand on.
        """
        hidden, name = hidden_of(output), self.branch.region or "of the whole model"
        if not isinstance(hidden, Tensor) or hidden.shape != x.shape:
            what = list(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(
                f"block {name} makes {what} of hidden states {list(x.shape)}, so that its input cannot stand in for "
                "its output; choose a policy over samples (exact_first, fewer_samples, ...), which runs every block."
            )
        structure: Any = Tensor
        if isinstance(output, (tuple, list)):
            structure = [type(output), *(_source(item, args, kwargs) for item in output[1:])]
            made = [place for place, source in enumerate(structure[1:], start=1) if source is None]
            if made:
                raise ValueError(
                    f"block {name} returns more than its hidden states ({type(output[made[0]]).__name__} at place "
                    f"{made[0]}), which later blocks or the caller may read, so that it cannot be left out; leave "
                    "output_attentions and the like off, or choose a policy over samples (exact_first, fewer_samples, "
                    "...), which runs every block."
                )
        self._structures[_kind_of_call(args, kwargs)] = structure
        return structure


class _Constant(torch.autograd.Function):
    """x + constant(hidden - x), without its rounding: the value is `hidden`, the gradient is that of x."""

    @staticmethod
    def forward(ctx, x: Tensor, hidden: Tensor) -> Tensor:
        ctx.dtype = x.dtype
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def hidden_states(args: tuple, kwargs: dict) -> Tensor:
    """The hidden states that a block is given: the argument of that name, or the first tensor."""
    given = kwargs.get("hidden_states")
    if isinstance(given, Tensor):
        return given
    found = first_tensor(args, kwargs)
    if found is None:
        raise ValueError(
            "a block was called without a tensor, so that D2FT cannot tell its hidden states; choose a policy over "
            "samples (exact_first, fewer_samples, ...)."
        )
    return found


def hidden_of(output: Any) -> Any:
    """The hidden states among what a block returns: the first of several, or all of it."""
    return output[0] if isinstance(output, (tuple, list)) and output else output


def _kind_of_call(args: tuple, kwargs: dict) -> tuple:
    """What of a call may decide what a block returns: flags, and what is there at all."""
    named = (*enumerate(args), *sorted(kwargs.items()))
    return tuple((name, value if isinstance(value, bool) else value is None) for name, value in named)


def _source(item: Any, args: tuple, kwargs: dict) -> tuple | None:
    """Where an item of a block's output comes from: it says nothing, or is an argument; None if the block made it."""
    if item is None or isinstance(item, (bool, int, float, str)) or item == ():
        return ("constant", item)
    for key, value in (*enumerate(args), *kwargs.items()):
        if item is value:
            return ("argument", key)
    return None


def _rebuilt(structure: Any, hidden: Tensor, args: tuple, kwargs: dict) -> Any:
    if structure is Tensor:
        return hidden
    kind, *sources = structure
    items = [value if how == "constant" else _argument(value, args, kwargs) for how, value in sources]
    return kind((hidden, *items))


def _argument(key: int | str, args: tuple, kwargs: dict) -> Any:
    return args[key] if isinstance(key, int) else kwargs[key]
