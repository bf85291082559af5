"""Megatron's tensor parallelism with rows shared out by token (sequence parallelism)."""

from __future__ import annotations

import numpy as np

from ..head_parallel.placement import place_subnets
from .cluster import Cluster
from .prediction import Clocks, Prediction
from .step_checks import check_step
from .workload import Workload


def tensor_parallel(
    workload: Workload, cluster: Cluster, samples: float, of_samples: float | None = None, cuts_boundary: bool = True
) -> Prediction:
    """One step in which every device runs its heads on all samples.

    Each branch gathers the rows before and scatters the sums afterwards, and both again backward; rows come together
    once more after the blocks, and their gradients before them.

    Args:
        workload: The model.
        cluster: The devices; with replicas, every group works on its own samples.
        samples: Samples that a group runs.
        of_samples: Samples that the step counts for, where some are not run; by default all.
        cuts_boundary: Whether embedding and task head are cut as well, or run for all samples on every device.
    """
    check_step(workload, cluster, samples, of_samples)
    partition, size = workload.partition, cluster.size
    ranks = place_subnets(partition, size)
    row_bytes = samples * workload.row_bytes
    everyone = np.full((size, size), row_bytes / size)
    boundary = samples / (size if cuts_boundary else 1)
    time = Clocks(cluster)
    time.compute(boundary * workload.below)

    def heads_of(branch) -> np.ndarray:
        owned = ranks[partition.subnet_blocks == branch.block]
        return np.bincount(owned, minlength=size) * partition.heads_per_subnet

    for branch in partition.branches:
        flops = samples * heads_of(branch) * workload.forward(branch)
        time.rows_forward(row_bytes / size)
        time.branch(("dispatch", everyone), flops, np.ones(size), ("combine", everyone))
    time.exchange("around the blocks", everyone)
    time.compute(boundary * (workload.above + workload.boundary_backward))
    for branch in reversed(partition.branches):
        flops = samples * heads_of(branch) * workload.backward(branch)
        time.branch(("combine backward", everyone), flops, np.ones(size), ("dispatch backward", everyone))
        time.rows_backward(row_bytes / size)
    time.exchange("around the blocks", everyone)
    owned = workload.trained_of_all + workload.trained_of_heads / size
    time.wait(cluster.replica_link.all_reduce(owned * workload.bytes_per_number, cluster.replicas))
    return time.result(samples if of_samples is None else of_samples, workload.memory(size))
