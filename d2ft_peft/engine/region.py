"""Forward of a region under a plan: one pass for the FULL heads, one outside of autograd for the FORWARD_ONLY heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..partition import Branch
from .checkpointing import in_backward
from .intercept import Intercept, first_tensor
from .plan import Cell, Heads
from .projection import ProjectionForward
from .region_view import RegionView
from .row_counts import rows_at
from .runtime import Follow, Run, Runtime


class RegionForward(Intercept):
    """Runs a region once for the FULL heads and once, outside of autograd, for the FORWARD_ONLY heads.

    Nothing of the second pass enters the graph: neither the projections nor attention nor the activation. Where the
    row-parallel projection is inside the region the two outputs are added; where it follows outside, it adds them.
    Where the block's own forward puts an activation between the two (`BranchSpec.joined`), FULL and FORWARD_ONLY
    features go through it side by side, the latter as constants, and the row-parallel projection takes them apart.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, branch: Branch, index: int):
        super().__init__(module, runtime)
        self.branch, self.index = branch, index
        self.row: ProjectionForward | None = None
        self.view = RegionView(module, branch)
        self._followed_plan = False
        self._returned: int | None = None

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.runtime.follow.pop(self.index, None)  # of a pass that broke off before its row-parallel projection
        planned = self._is_planned()
        if planned:
            args, kwargs = self._without_cache(args, kwargs)
            cell = self._record(args, kwargs)
            if cell is not None:
                return self._run(cell, args, kwargs)
        return self.original(*args, **kwargs)

    def _is_planned(self) -> bool:
        """Whether this pass follows the plan; says so where one that is to be trained has none.

        Raises:
            RuntimeError: If a pass is recomputed in backward otherwise than it ran.
        """
        runtime = self.runtime
        if not runtime.trains:
            if not in_backward():
                self._followed_plan = False
            return False
        planned = runtime.plan is not None
        bound = runtime.grad_at_entry is not None
        if in_backward() and not bound and planned != self._followed_plan:
            raise RuntimeError(
                "a D2FT block is recomputed in backward otherwise than it ran: call backward inside the micro-batch's "
                "context, and switch checkpointing on with model.gradient_checkpointing_enable(), or use "
                "use_reentrant=False."
            )
        if not planned and self.module.training:
            runtime.warn_unplanned()
        if not in_backward():
            self._followed_plan = planned
        return planned

    def _record(self, args: tuple, kwargs: dict) -> Cell | None:
        """What the branch is to do, noted where this is no recomputation; None if every head is FULL."""
        runtime = self.runtime
        cell = runtime.plan.cells[self.index] if self.module.training else None
        if not in_backward():
            runtime.executed[self.index] = cell
            for place, gauge in enumerate(runtime.gauges):
                if gauge.branch == self.index:
                    only = self.branch.row is None and len(runtime.blocks) == 1
                    runtime.count_rows(place, *rows_at(args, kwargs, gauge.other, only))
        return cell

    def _run(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        residual, args, kwargs = self.view.take_residual(args, kwargs)
        handed_on, kwargs = self.view.hand_on(args, kwargs)
        out = self._branch(cell, args, kwargs)
        if self.branch.hands_on:
            out = (out[0], handed_on, *(out[2:] or (None,)))
        if residual is None:
            return out
        return (residual + out[0], *out[1:]) if isinstance(out, tuple) else residual + out

    def _branch(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        full = forward_only = None
        # FULL first: under autocast the second pass may reuse casts of weights, and those must carry gradients.
        if cell.full:
            full = self._pass(self._run_of(cell, cell.full), args, kwargs)
        if cell.forward_only:
            with torch.no_grad():
                run = self._run_of(cell, cell.forward_only, with_bias=not cell.full)
                forward_only = self._pass(run, args, kwargs)
        if full is None and forward_only is None:
            out = self._nothing(cell, args, kwargs)
        elif full is None or forward_only is None:
            out = forward_only if full is None else full
        elif self.branch.joined:
            out = _join(full, forward_only)
        else:
            out = _add(full, forward_only) if self.branch.row_inside else full
        if not self.branch.row_inside:
            self._leave_to_row(cell, forward_only, out)
        return out

    def _run_of(self, cell: Cell, heads: Heads, with_bias: bool = True) -> Run:
        shortcut = self.runtime.shortcut
        scale = cell.num_heads / cell.num_active if shortcut == "rescale" and cell.num_active else 1.0
        return Run(heads, with_bias, scale, cell.skipped if shortcut == "mean" else Heads())

    def _pass(self, run: Run, args: tuple, kwargs: dict) -> Any:
        args, kwargs = self.view.arguments(run.heads, args, kwargs)
        with self.view.of(run.heads):
            self.runtime.run = run
            try:
                out = self.original(*args, **kwargs)
            finally:
                self.runtime.run = None
        if isinstance(out, list):  # two would not add up, but follow one another
            raise ValueError(
                f"region {self.branch.region} returns a list, and D2FT takes apart a tensor or a tuple; such a model "
                "cannot be cut into heads: set subnets='blocks'."
            )
        self._returned = len(out) if isinstance(out, tuple) else 0
        return out

    def _leave_to_row(self, cell: Cell, forward_only: Any, out: Any) -> None:
        if self.branch.joined:
            forward_only = None  # it reaches the row beside what the FULL heads return
        features = out[0] if isinstance(out, tuple) else out
        self.runtime.follow[self.index] = Follow(
            full=self._run_of(cell, cell.full) if cell.full else None,
            forward_only=self._run_of(cell, cell.forward_only, with_bias=not cell.full) if cell.forward_only else None,
            output=forward_only[0] if isinstance(forward_only, tuple) else forward_only,
            nothing=None if cell.num_active else self._run_of(cell, Heads()),
            returned=None if self.branch.joined else (features, features._version),
        )

    def _nothing(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        """Output of a region in which no head runs."""
        x = first_tensor(args, kwargs)
        if self.branch.row_inside:
            out = self.row.constant(x, self._run_of(cell, Heads()))
        else:
            out = x.new_zeros(*x.shape[:-1], 0)
        returned = self._num_returned(x, args, kwargs)
        return (out, *[None] * (returned - 1)) if returned else out

    def _num_returned(self, x: Tensor, args: tuple, kwargs: dict) -> int:
        """Number of values in the tuple that the region returns, 0 if it returns a tensor."""
        if self.branch.returns is not None:
            return self.branch.returns
        if self._returned is None:  # no head ran here yet: one of them, without a trace, shows it
            runtime, devices = self.runtime, [x.device] if x.is_cuda else []
            means, runtime.means = runtime.means, {}
            try:
                with torch.no_grad(), torch.random.fork_rng(devices=devices):
                    self._pass(Run(Heads((0,))), args, kwargs)
            finally:
                runtime.means = means
        return self._returned

    def _without_cache(self, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Training forwards fill a key/value cache that nobody reads; with some of the heads it would break.

        Raises:
            ValueError: If the cache already holds keys and values, which this pass would have to attend to.
        """
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, Cache)]
        for cache in caches:
            if cache.get_seq_length(getattr(self.module, "layer_idx", None) or 0):
                raise ValueError(
                    "past_key_values holds keys and values, and a forward pass that follows a plan cannot read them: "
                    "generate under torch.no_grad(), which runs the whole model, or pass the whole sequence."
                )
        if not caches:
            return args, kwargs
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        return tuple(None if isinstance(value, Cache) else value for value in args), kwargs


def _add(full: Any, forward_only: Any) -> Any:
    """Sum of two passes; attention weights, where they are returned, are those of the FULL heads."""
    if isinstance(full, tuple):
        return (full[0] + forward_only[0], *full[1:])
    return full + forward_only


def _join(full: Any, forward_only: Any) -> Any:
    """Features of two passes side by side."""
    if isinstance(full, tuple):
        return (torch.cat((full[0], forward_only[0]), -1), *full[1:])
    return torch.cat((full, forward_only), -1)
