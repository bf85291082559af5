"""Forward of a region under a plan: one pass for the FULL heads, one outside of autograd for the FORWARD_ONLY heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..partition import Branch
from .intercept import Intercept
from .plan import Cell, Heads
from .projection import ProjectionForward
from .runtime import Follow, Run, Runtime


class RegionForward(Intercept):
    """Runs a region once for the FULL heads and once, outside of autograd, for the FORWARD_ONLY heads.

    Nothing of the second pass enters the graph: neither the projections nor attention nor the activation. Where the
    row-parallel projection is inside the region the two outputs are added; where it follows outside, it adds them.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, branch: Branch, index: int):
        super().__init__(module, runtime)
        self.branch, self.index = branch, index
        self.row: ProjectionForward | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.runtime.cell(self.index) if self.module.training else None
        if cell is None:
            return self.original(*args, **kwargs)
        args, kwargs = _without_cache(args, kwargs)
        full = forward_only = None
        # FULL first: under autocast the second pass may reuse casts of weights, and those must carry gradients.
        if cell.full:
            full = self._pass(self._run_of(cell, cell.full), args, kwargs)
        if cell.forward_only:
            with torch.no_grad():
                run = self._run_of(cell, cell.forward_only, with_bias=not cell.full)
                forward_only = self._pass(run, args, kwargs)
        if not self.branch.row_inside:
            self._leave_to_row(cell, forward_only)
        if full is None and forward_only is None:
            return self._nothing(cell, args, kwargs)
        if full is None or forward_only is None:
            return forward_only if full is None else full
        return _add(full, forward_only) if self.branch.row_inside else full

    def _run_of(self, cell: Cell, heads: Heads, with_bias: bool = True) -> Run:
        shortcut = self.runtime.shortcut
        scale = cell.num_heads / cell.num_active if shortcut == "rescale" and cell.num_active else 1.0
        return Run(heads, with_bias, scale, cell.skipped if shortcut == "mean" else Heads())

    def _pass(self, run: Run, args: tuple, kwargs: dict) -> Any:
        dense = {name: getattr(self.module, name) for name in self.branch.scaled_attributes}
        for name, value in dense.items():
            setattr(self.module, name, value // self.branch.heads * len(run.heads))
        self.runtime.run = run
        try:
            return self.original(*args, **kwargs)
        finally:
            self.runtime.run = None
            for name, value in dense.items():
                setattr(self.module, name, value)

    def _leave_to_row(self, cell: Cell, forward_only: Any) -> None:
        self.runtime.follow[self.index] = Follow(
            full=self._run_of(cell, cell.full) if cell.full else None,
            forward_only=self._run_of(cell, cell.forward_only, with_bias=not cell.full) if cell.forward_only else None,
            output=forward_only[0] if isinstance(forward_only, tuple) else forward_only,
            nothing=None if cell.num_active else self._run_of(cell, Heads()),
        )

    def _nothing(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        """Output of a region in which no head runs."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if self.branch.row_inside:
            out = self.row.constant(x, self._run_of(cell, Heads()))
        else:
            out = x.new_zeros(*x.shape[:-1], 0)
        return (out, None) if self.branch.name == "attention" else out


def _add(full: Any, forward_only: Any) -> Any:
    """Sum of two passes; attention weights, where they are returned, are those of the FULL heads."""
    if isinstance(full, tuple):
        return (full[0] + forward_only[0], *full[1:])
    return full + forward_only


def _without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Training forwards fill a key/value cache that nobody reads; with some of the heads it would break."""
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return tuple(None if isinstance(value, Cache) else value for value in args), kwargs
