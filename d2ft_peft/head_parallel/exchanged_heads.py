"""A branch's heads on all ranks as one autograd function: rows travel to the heads, what they make travels back.

forward     rows of x --dispatch--> ranks with active heads --heads run--> partial outputs --combine--> sum at home
backward    gradient of the sum --combine backward--> ranks with FULL heads --> gradients of rows --dispatch backward-->

Shape suffixes: B samples that live here, T tokens, D hidden features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .exchange.route import HeadGroup, MicroBatches, Route, among
from .step import Step


if TYPE_CHECKING:
    from .branch import BranchForward


class ExchangedHeads(torch.autograd.Function):
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
