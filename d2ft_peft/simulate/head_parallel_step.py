"""The head-parallel engine, step by step: the same routes, homes and exchanges as `HeadParallel` runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..head_parallel.exchange.route import MicroBatches, Residence, Route, choose_homes, make_routes
from ..head_parallel.placement import place_subnets
from ..schedule import Schedule
from ..value_checks import check
from .cluster import Cluster
from .prediction import Clocks, Prediction
from .step_checks import check_step
from .workload import Workload


# Before the blocks ranks compare numbers of micro-batches, then schedules and shapes; afterwards they sum which
# gradients there are, and losses.
_CHECKS_BEFORE, _CHECKS_AFTER = 2, 2


def head_parallel(workload: Workload, cluster: Cluster, schedule: Schedule, overlap: bool = False) -> Prediction:
    """One step of head-parallel D2FT.

    Exchanges stop all devices of a group: a branch takes as long as its slowest device, and an exchange as its busiest.

    Args:
        workload: The model. Every device gets neighbouring heads, as `place_subnets` has it.
        cluster: The devices; with replicas, every group runs the same schedule on its own samples.
        schedule: Operations of the step; its weights are samples.
        overlap: See `Clocks`.

    Raises:
        ValueError: If there are more devices in a group than subnets in a block.
    """
    check_step(workload, cluster)
    check(isinstance(schedule, Schedule), "schedule", schedule, "must be a Schedule")
    partition = workload.partition
    ranks = place_subnets(partition, cluster.size)
    routes = make_routes(partition, schedule, ranks)
    sizes = tuple(schedule.weights[~schedule.skipped].tolist())
    residence = Residence(sizes, choose_homes(routes, sizes))
    everyone = range(cluster.size)
    own = np.array([sum(residence.samples(residence.on(rank))) for rank in everyone])
    row_bytes = workload.row_bytes
    time = Clocks(cluster, overlap)
    time.wait(_CHECKS_BEFORE * cluster.link.latency)
    # Every rank makes the embeddings of all micro-batches once, to learn what the blocks take besides.
    time.compute((own.sum() + own) * workload.below)

    def exchanged(needed: Sequence[MicroBatches]) -> np.ndarray:
        """Bytes from each home to each rank that needs its rows."""
        samples = [[sum(residence.samples(residence.on(home, of))) for of in needed] for home in everyone]
        return np.array(samples) * row_bytes

    # Below the first FULL head nothing asks for a gradient, unless the embedding trains.
    needed, needs_gradient = workload.lora_rank is None, {}
    for branch in partition.branches:
        route = routes[branch.block]
        needs_gradient[branch], needed = needed, needed or any(route.any_full)
        full, forward_only, passes, _ = _work(route, residence)
        there = exchanged(route.active)
        flops = (full + forward_only) * workload.forward(branch)
        time.rows_forward(own * row_bytes)
        time.branch(("dispatch", there), flops, passes, ("combine", there.T))
    time.compute(own * (workload.above + workload.boundary_backward))
    for branch in reversed(partition.branches):
        route = routes[branch.block]
        full, _, _, passes = _work(route, residence)
        there = exchanged(route.full)
        flops = full * workload.backward(branch)
        back = there.T * needs_gradient[branch]
        time.branch(("combine backward", there), flops, passes, ("dispatch backward", back))
        time.rows_backward(own * row_bytes)
    time.wait(_CHECKS_AFTER * cluster.link.latency)
    time.sum_over_group("gradients", workload.trained_of_all * workload.bytes_per_number)
    owned = workload.trained_of_all + workload.trained_of_heads / cluster.size
    time.wait(cluster.replica_link.all_reduce(owned * workload.bytes_per_number, cluster.replicas))
    return time.result(schedule.weights.sum(), workload.memory(cluster.size))


def _work(route: Route, residence: Residence) -> tuple[np.ndarray, ...]:
    """Of each rank [R]: heads x samples FULL, heads x samples FORWARD_ONLY, passes forward, passes backward."""
    table = np.zeros((4, len(route.groups)))
    for rank, groups in enumerate(route.groups):
        for group in groups:
            full, forward_only = (sum(residence.samples(of)) for of in (group.full, group.forward_only))
            heads = len(group.heads)
            table[:, rank] += heads * full, heads * forward_only, (full > 0) + (forward_only > 0), full > 0
    return tuple(table)
