"""One branch (attention or FFN) of a block across ranks: rows travel to the heads, what they make travels back.

forward     rows of x --dispatch--> ranks with active heads --heads run--> partial outputs --combine--> sum at home
backward    gradient of the sum --combine backward--> ranks with FULL heads --> gradients of rows --dispatch backward-->

Shape suffixes: B samples that live here, S samples of one micro-batch, T tokens, D hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from ..partition import Branch
from ..tuners import D2FTLayer
from .exchange.ranks import Ranks
from .exchange.route import HeadGroup, MicroBatches, Route, among
from .exchange.rows import Rows
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
            (shard.module, shard.layout.parts * shard.layout.width)
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
        return (out, None) if self.branch.name == "attention" else out

    def _row_outside(self, x: Tensor) -> Tensor:
        """The row-parallel projection where it follows the region: it has run already, on the ranks of the heads."""
        return type(self.row).forward(self.row, x) if self._running else x

    def _in_step(self, x_BTD: Tensor, args: tuple, kwargs: dict) -> Tensor:
        step, route = self.step, self.step.routes[self.branch.block]
        # The anchor gives the node a gradient to pass on, on every rank, even where x needs none.
        anchor = step.anchor if self.trains else None
        # Without FULL heads the branch is a constant: as in one process, the norm before it then has no gradient.
        with torch.set_grad_enabled(any(route.any_full)):
            out = _Exchanged.apply(x_BTD, anchor, self, args, kwargs)
        if step.rescale:
            factors = [1 / share if share else 0.0 for share in route.heads_active]
            out = out * step.per_sample(factors, out)
        bias = self._bias()
        if bias is None:
            return out
        if all(route.any_full):
            return out + bias
        # What belongs to no head is a constant too where no head is FULL, and absent where none runs.
        full = step.per_sample([float(any_full) for any_full in route.any_full], out)
        active = step.per_sample([float(share > 0) for share in route.heads_active], out)
        return out + full * bias + (active - full) * bias.detach()

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
        dense = {name: getattr(self.region, name) for name in self.branch.scaled_attributes}
        for name, value in dense.items():
            setattr(self.region, name, value // self.branch.heads * len(heads))
        for convolution, width in self._convolutions:
            convolution.nf = width * len(heads)
        self._running = True
        try:
            out = functional_call(self.region, self._tensors(self.region, heads), (x, *args), kwargs, tie_weights=False)
            out = out[0] if isinstance(out, tuple) else out
            if not self.branch.row_inside:
                out = functional_call(self.row, self._tensors(self.row, heads), (out,), tie_weights=False)
            # Under autocast heads answer in another dtype; ranks without heads could not know which.
            return out.to(x.dtype)
        finally:
            self._running = False
            for name, value in dense.items():
                setattr(self.region, name, value)

    def _tensors(self, module: nn.Module, heads: tuple[int, ...]) -> dict[str, Tensor]:
        """What stands in for parameters of a module: nothing for the row-parallel bias, slices for some heads."""
        stand_in = {}
        for name, parameter in module.named_parameters():
            if id(parameter) in self._biases:
                stand_in[name] = torch.zeros_like(parameter, requires_grad=False)
            elif id(parameter) in self._shards and heads != self.own_heads:
                stand_in[name] = self._shards[id(parameter)].take(self.num_heads, heads)
        return stand_in


class _Exchanged(torch.autograd.Function):
    """Dispatch, heads, combine. Each rank's heads have graphs of their own, which backward runs on FULL rows."""

    @staticmethod
    def forward(ctx, x, anchor, branch, args, kwargs):
        step, route = branch.step, branch.step.routes[branch.branch.block]
        ctx.branch, ctx.step, ctx.route, ctx.x_needs = branch, step, route, ctx.needs_input_grad[0]
        ctx.graphs = {}

        def run_heads(part: MicroBatches, rows: dict[int, Tensor], made: dict[int, Tensor]) -> None:
            for group in route.groups[branch.ranks.rank]:
                _run_full(ctx, group, part, rows, made, args, kwargs)
                forward_only = among(group.forward_only, part)
                if forward_only:
                    out = _run(branch, group, forward_only, rows, args, kwargs)[1]
                    _add(made, forward_only, out, step.sizes)

        out = _travel(branch, step, route, x, route.active, ("dispatch", "combine"), run_heads)
        for group in route.groups[branch.ranks.rank]:
            step.executed(group)
        return out

    @staticmethod
    def backward(ctx, grad):
        def run_heads(part: MicroBatches, gradients: dict[int, Tensor], made: dict[int, Tensor]) -> None:
            for micro_batches, x, out in ctx.graphs.pop(part, ()):
                torch.autograd.backward(out, torch.cat([gradients[i] for i in micro_batches]))
                if ctx.x_needs:
                    _add(made, micro_batches, x.grad, ctx.step.sizes)

        purposes = ("combine backward", "dispatch backward" if ctx.x_needs else None)
        grad_x = _travel(ctx.branch, ctx.step, ctx.route, grad, ctx.route.full, purposes, run_heads)
        return grad_x, None, None, None, None


def _travel(
    branch: BranchForward,
    step: Step,
    route: Route,
    x_BTD: Tensor,
    needed: tuple[MicroBatches, ...],
    purposes: tuple[str, str | None],
    run_heads: Callable[[MicroBatches, dict[int, Tensor], dict[int, Tensor]], None],
) -> Tensor | None:
    """Send rows to the ranks that need them, run heads, send home what they make, and add it up there.

    While rows travel this rank runs heads on others, see `Step.parts`.

    Args:
        branch: The branch.
        step: The step.
        route: The route of the branch's block.
        x_BTD: The micro-batches that live here, one after the other.
        needed: For each rank, the micro-batches that it needs.
        purposes: What the rows are on both ways, see `Traffic`; None if nothing goes home.
        run_heads: Given some micro-batches and rows of them, adds to the third what it makes of each.

    Returns:
        Sums [B, T, D] of the micro-batches that live here, zero where nobody made anything; None if nothing goes home.
    """
    exchanges, residence, timeline = branch.rows, step.residence, branch.ranks.timeline
    there, back = purposes
    waves = [[among(of_rank, wave) for of_rank in needed] for wave in step.waves]
    rows = dict(zip(step.own, x_BTD.split(residence.samples(step.own)), strict=True))
    coming = [exchanges.scatter(rows, of_wave, residence, x_BTD, there) for of_wave in waves]
    made: dict[int, Tensor] = {}
    going = []
    for wave, part in step.parts(route):
        if wave is not None:
            with timeline.span("wait", branch.place):
                rows.update(coming[wave].wait())
        with timeline.span("forward" if there == "dispatch" else "backward", branch.place):
            run_heads(part, rows, made)
        if wave is not None and back:
            going.append(exchanges.collect(made, waves[wave], residence, x_BTD, back))
    if not back:
        return None
    sums = x_BTD.new_zeros(x_BTD.shape)
    at_home = dict(zip(step.own, sums.split(residence.samples(step.own)), strict=True))
    with timeline.span("wait", branch.place):
        arrived = [piece for exchange in going for piece in exchange.wait()]
    for i, piece in [*arrived, *made.items()]:
        if i in at_home:
            at_home[i] += piece
    return sums


def _run_full(
    ctx, group: HeadGroup, part: MicroBatches, rows: dict, made: dict[int, Tensor], args: tuple, kwargs: dict
) -> None:
    full = among(group.full, part)
    if not full:
        return
    with torch.enable_grad():
        x, out = _run(ctx.branch, group, full, rows, args, kwargs, needs_grad=ctx.x_needs)
    if out.requires_grad:
        ctx.graphs.setdefault(part, []).append((full, x, out))
    _add(made, full, out.detach(), ctx.step.sizes)


def _run(
    branch: BranchForward,
    group: HeadGroup,
    micro_batches: MicroBatches,
    rows: dict[int, Tensor],
    args: tuple,
    kwargs: dict,
    needs_grad: bool = False,
) -> tuple[Tensor, Tensor]:
    """(input, output) of a group's heads on some micro-batches, as one batch."""
    x = torch.cat([rows[i] for i in micro_batches]).detach().requires_grad_(needs_grad)
    args, kwargs = branch.step.side_inputs(args, micro_batches), branch.step.side_inputs(kwargs, micro_batches)
    return x, branch.compute(x, args, kwargs, group.heads)


def _add(made: dict[int, Tensor], micro_batches: MicroBatches, values: Tensor, sizes: tuple[int, ...]) -> None:
    """Add rows to what was made of their micro-batches."""
    for i, value in zip(micro_batches, values.split([sizes[i] for i in micro_batches]), strict=True):
        made[i] = made[i] + value if i in made else value


def _take_hidden(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """(hidden states, other positional arguments, other keyword arguments) of a region or a block."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest
