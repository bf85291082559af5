"""What stands before a branch (attention or FFN) of a block on a rank that owns some of its heads.

Shape suffixes: B samples that live here, S samples of one micro-batch, T tokens, D hidden features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..engine.plan import Heads
from ..engine.region_view import RegionView
from ..partition import Branch
from ..tuners import D2FTLayer
from .exchange.ranks import Ranks
from .exchange.rows import Rows
from .exchanged_heads import ExchangedHeads
from .step import Step
from .storage.shard import Shard, row_biases


class BranchForward:
    """Stands before the forward of a branch's region (see `BranchSpec`) on a rank that owns some of its heads.

    Within a step the region's input is dispatched and its output combined; at inference every rank has all rows and
    the heads' parts are summed. The block's own code around the region is not touched.

    Args:
        base: The transformers model.
        branch: The branch.
        shards: The model's cut parameters.
        ranks: The processes.
        num_heads: Heads of the branch that this rank owns.
    """

    def __init__(self, base: nn.Module, branch: Branch, shards: list[Shard], ranks: Ranks, num_heads: int):
        self.branch, self.ranks, self.num_heads = branch, ranks, num_heads
        self.region = base.get_submodule(branch.region)
        self.row = base.get_submodule(branch.row.name)
        self._view = RegionView(self.region, branch)
        self.place = f"block {branch.block} ({branch.name})"
        self.rows = Rows(ranks, self.place)
        self.step: Step | None = None
        self.own_heads = tuple(range(num_heads))
        self._running = False
        self._biases = {id(bias) for bias in row_biases(base, branch)}
        self._parts = [self.region] if branch.row_inside else [self.region, self.row]
        self._shards = {id(shard.tensor): shard for shard in shards}
        modules = [self.region, self.row]
        self._convolutions = [
            (shard.module, shard.layout.head_size)
            for shard in shards
            if shard.module in set(self.region.modules()) and isinstance(shard.module, Conv1D) and shard.axis == 1
        ]
        self.trains = any(p.requires_grad for m in modules for p in m.parameters() if id(p) not in self._biases)

    def install(self) -> None:
        """Take the place of the region's forward."""
        self.region.forward = self
        if not self.branch.row_inside:
            self.row.forward = self._row_outside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._running:
            return type(self.region).forward(self.region, *args, **kwargs)
        if self.step is not None:
            x, args, kwargs = _take_hidden(args, kwargs)
            out = self._in_step(x, args, kwargs)
        else:
            out = self._at_inference(args, kwargs)
        returned = self.branch.num_returned
        return (out, *[None] * (returned - 1)) if returned else out

    def _row_outside(self, x: Tensor) -> Tensor:
        """The row-parallel projection where it follows the region: it has run already, on the ranks of the heads."""
        return type(self.row).forward(self.row, x) if self._running else x

    def _in_step(self, x_BTD: Tensor, args: tuple, kwargs: dict) -> Tensor:
        step, route = self.step, self.step.routes[self.branch.block]
        # The anchor gives the node a gradient to pass on, on every rank, even where x needs none.
        anchor = step.anchor if self.trains else None
        # Without FULL heads the branch is a constant: as in one process, the norm before it then has no gradient.
        with torch.set_grad_enabled(any(route.any_full)):
            out = ExchangedHeads.apply(x_BTD, anchor, self, args, kwargs)
        if step.rescale:
            out = out * step.factors(self.branch.block, out).rescale
        bias = self._bias()
        if bias is None:
            return out
        if all(route.any_full):
            return out + bias
        # What belongs to no head is a constant too where no head is FULL, and absent where none runs.
        factors = step.factors(self.branch.block, out)
        return out + factors.full * bias + (factors.active - factors.full) * bias.detach()

    def _at_inference(self, args: tuple, kwargs: dict) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a head-parallel model ran a forward with gradients outside of HeadParallel.forward_backward, which "
                "would train on a part of it; call that, or run inference under torch.no_grad()."
            )
        x, args, kwargs = _take_hidden(args, kwargs)
        out = self.ranks.all_reduce(self.compute(x, args, kwargs, self.own_heads).contiguous(), "inference", self.place)
        bias = self._bias()
        return out if bias is None else out + bias

    def _bias(self) -> Tensor | None:
        row = self.row.active_layer() if isinstance(self.row, D2FTLayer) else self.row
        return getattr(row, "base_layer", row).bias

    def compute(self, x: Tensor, args: tuple, kwargs: dict, heads: tuple[int, ...]) -> Tensor:
        """What some heads of this rank add to the residual stream, without the row-parallel bias.

        Args:
            x: Rows [S, T, D].
            args: What else the region takes by position.
            kwargs: What else it takes by name.
            heads: The heads, by their positions among those that the rank owns.

        Returns:
            [S, T, D]
        """
        for convolution, width in self._convolutions:
            convolution.nf = width * len(heads)
        self._running = True
        try:
            with self._view.of(Heads(heads)):
                tensors = self._tensors(self.region, heads)
                out = functional_call(self.region, tensors, (x, *args), kwargs, tie_weights=False)
            out = out[0] if isinstance(out, tuple) else out
            if not self.branch.row_inside:
                out = functional_call(self.row, self._tensors(self.row, heads), (out,), tie_weights=False)
            # Under autocast heads answer in another dtype; ranks without heads could not know which.
            return out.to(x.dtype)
        finally:
            self._running = False

    def _tensors(self, module: nn.Module, heads: tuple[int, ...]) -> dict[str, Tensor]:
        """What stands in for parameters of a module: nothing for the row-parallel bias, slices for some heads."""
        stand_in = {}
        for name, parameter in module.named_parameters():
            if id(parameter) in self._biases:
                stand_in[name] = torch.zeros_like(parameter, requires_grad=False)
            elif id(parameter) in self._shards and heads != self.own_heads:
                stand_in[name] = self._shards[id(parameter)].take(self.num_heads, heads)
        return stand_in


def _take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """(hidden states, other positional arguments, other keyword arguments) of a region or a block."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
