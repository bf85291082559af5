"""Micro-measurements from which the simulator gets its devices and its link, taken apart from any training step."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from d2ft_peft.distributed import HeadParallel


def micro_measurements(parallel: HeadParallel, batches: list[dict], repeats: int = 5) -> dict[str, list]:
    """Seconds of single operations, on all ranks at the same time, the best of some repeats.

    Returns:
        ``"branches"``: (branch, samples, forward seconds, backward seconds) of this rank's heads of block 0 on 1 to N
        micro-batches. ``"link"``: (bytes sent to each other rank, seconds) of an all-to-all. ``"rows"``: (bytes,
        seconds) of a norm and a residual addition of rows of that many bytes, forward and backward.
    """
    found: dict[str, list] = {"branches": [], "link": [], "rows": []}
    inputs = _inputs_of_block_0(parallel, batches)
    for branch, (x, args, kwargs) in inputs.items():
        n = len(batches)
        for count in sorted({1, 2, (n + 1) // 2, n}):
            rows = x[: len(x) * count // n]
            forward, backward = _best(lambda b=branch, r=rows, a=args, k=kwargs: _pass(b, r, a, k), repeats)
            found["branches"].append((branch.branch.name, len(rows), forward, backward))
    hidden = next(iter(inputs.values()))[0]
    others = dist.get_world_size()
    for size in (2**10, 2**14, 2**18, 2**20, 2**22):
        out = torch.zeros(others * size // 4)
        found["link"].append(
            (size, _best(lambda o=out: (_timed(lambda: dist.all_to_all_single(torch.empty_like(o), o)),), repeats)[0])
        )
    for part in (1, 2):
        rows = hidden[: len(hidden) // part].detach().requires_grad_()
        norm = torch.nn.LayerNorm(rows.shape[-1])
        found["rows"].append(
            (rows.nbytes, _best(lambda r=rows, m=norm: (_timed(lambda: _norm_and_residual(r, m)),), repeats)[0])
        )
    parallel.model.zero_grad()
    return found


def _norm_and_residual(rows: torch.Tensor, norm: torch.nn.Module) -> None:
    out = rows + norm(rows)
    out.backward(out.detach())
    rows.grad = None


def _pass(branch, rows, args, kwargs) -> tuple[float, float]:
    x = rows.detach().requires_grad_()
    start = time.perf_counter()
    out = branch.compute(x, args, kwargs, branch.own_heads)
    forward = time.perf_counter() - start
    gradient = torch.ones_like(out)
    start = time.perf_counter()
    torch.autograd.backward(out, gradient)
    return forward, time.perf_counter() - start


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _best(run: Callable[[], tuple], repeats: int) -> tuple:
    dist.barrier()
    run()
    return tuple(min(values) for values in zip(*(run() for _ in range(repeats)), strict=True))


def _inputs_of_block_0(parallel: HeadParallel, batches: list[dict]) -> dict:
    """(rows, other arguments) with which the branches of block 0 run all micro-batches."""
    from d2ft_peft import Schedule

    seen: dict = {}
    branches = [branch for branch in parallel._branches if branch.branch.block == 0]
    for branch in branches:
        compute = branch.compute

        def noted(x, args, kwargs, heads, branch=branch, compute=compute):
            seen[branch] = (x.detach(), args, kwargs)
            return compute(x, args, kwargs, heads)

        branch.compute = noted
    schedule = Schedule.all_full(len(batches), parallel.planner.partition.num_scheduled)
    parallel.forward_backward(batches, schedule)
    for branch in branches:
        del branch.compute
    return seen
