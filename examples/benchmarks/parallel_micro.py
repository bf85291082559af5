"""Micro-measurements from which the simulator gets its devices and its link, taken apart from any training step."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from d2ft_peft import Schedule
from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.head_parallel.branch import BranchForward
from d2ft_peft.head_parallel.exchange.route import Residence
from d2ft_peft.head_parallel.exchange.rows import Rows


def micro_measurements(parallel: HeadParallel, batches: list[dict], repeats: int = 5) -> dict[str, list]:
    """Seconds of single operations, on all ranks at the same time, medians of some repeats.

    Returns:
        ``"branches"``: (branch, samples, forward seconds, backward seconds) of this rank's heads on 1 to N
        micro-batches; a mean over all blocks, one after the other, so that weights come from memory as in a step.
        ``"link"``: (bytes sent, seconds) of rows that go to all other ranks, or come back from them, as the engine
        sends them. ``"rows"``: (bytes, seconds) of a norm, a bias and a residual addition, forward and backward.
    """
    n, found = len(batches), {"branches": [], "link": [], "rows": []}
    inputs = _inputs(parallel, batches)
    x = next(iter(inputs.values()))[0]
    for count in sorted({1, 2, (n + 1) // 2, n}):
        rows = x[: len(x) * count // n]
        passes = _medians(lambda r=rows: _all_branches(parallel, r, inputs), repeats)
        for name in inputs:
            found["branches"].append((name, len(rows), passes[name, "forward"], passes[name, "backward"]))
        found["link"].append(_medians(lambda r=rows, c=count: _there_and_back(parallel, r, c), repeats))
        found["rows"].append((rows.nbytes, _medians(lambda r=rows: _norm_and_residual(r), repeats)["seconds"]))
    found["link"] = [(point["bytes"], point["seconds"]) for point in found["link"]]
    return found


def _inputs(parallel: HeadParallel, batches: list[dict]) -> dict[str, tuple]:
    """(rows, other arguments) with which each branch of block 0 runs all micro-batches, by its name."""
    seen: dict[str, tuple] = {}
    branches = [branch for branch in parallel._branches if branch.branch.block == 0]
    for branch in branches:

        def noted(x, args, kwargs, heads, branch=branch):
            seen[branch.branch.name] = (x.detach(), args, kwargs)
            return BranchForward.compute(branch, x, args, kwargs, heads)

        branch.compute = noted
    parallel.forward_backward(batches, Schedule.all_full(len(batches), parallel.planner.partition.num_scheduled))
    parallel.model.zero_grad()
    for branch in branches:
        del branch.compute
    return seen


def _all_branches(parallel: HeadParallel, rows: Tensor, inputs: dict[str, tuple]) -> dict[tuple, float]:
    """Mean seconds of the heads of a branch: forward of all blocks, then backward in reverse order."""
    seconds, outputs, blocks = defaultdict(float), [], len(parallel.planner.partition.blocks)
    for branch in parallel._branches:
        name = branch.branch.name
        x = rows.detach().requires_grad_()
        start = time.perf_counter()
        outputs.append((name, branch.compute(x, *inputs[name][1:], branch.own_heads)))
        seconds[name, "forward"] += (time.perf_counter() - start) / blocks
    gradient = torch.ones_like(rows)
    while outputs:
        name, out = outputs.pop()
        start = time.perf_counter()
        torch.autograd.backward(out, gradient)
        seconds[name, "backward"] += (time.perf_counter() - start) / blocks
    parallel.model.zero_grad()
    return seconds


def _there_and_back(parallel: HeadParallel, rows: Tensor, count: int, times: int = 10) -> dict[str, float]:
    """Bytes that a rank sends, and seconds of one exchange; `count` micro-batches live on every rank, all need all."""
    ranks, size = parallel._ranks, len(rows) // count
    homes = tuple(rank for rank in range(ranks.size) for _ in range(count))
    residence, needed = Residence((size,) * len(homes), homes), [tuple(range(len(homes)))] * ranks.size
    dist.barrier()
    start = time.perf_counter()
    exchanges = Rows(ranks, "a measurement")
    own = dict(zip(residence.on(ranks.rank), rows.split(size), strict=True))
    for _ in range(times):
        arrived = exchanges.scatter(own, needed, residence, rows, "dispatch").wait()
        exchanges.collect({**own, **dict(arrived)}, needed, residence, rows, "combine").wait()
    return {"bytes": rows.nbytes * (ranks.size - 1), "seconds": (time.perf_counter() - start) / (2 * times)}


def _norm_and_residual(rows: Tensor, times: int = 10) -> dict[str, float]:
    x = rows.detach().requires_grad_()
    norm = torch.nn.LayerNorm(rows.shape[-1])
    bias = torch.nn.Parameter(torch.zeros(rows.shape[-1]))
    gradient = torch.ones_like(rows)
    start = time.perf_counter()
    for _ in range(times):
        (x + (norm(x) + bias)).backward(gradient)
        x.grad = None
    return {"seconds": (time.perf_counter() - start) / times}


def _medians(run: Callable[[], dict], repeats: int) -> dict:
    dist.barrier()
    run()
    found = [run() for _ in range(repeats)]
    return {key: statistics.median(one[key] for one in found) for key in found[0]}
