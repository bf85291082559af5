"""Data parallelism: every device has the whole model, or gathers it block by block, and samples of its own."""

from __future__ import annotations

import numpy as np

from .cluster import Cluster
from .prediction import Clocks, Prediction
from .step_checks import check_step
from .workload import Workload


def data_parallel(
    workload: Workload,
    cluster: Cluster,
    samples: float,
    of_samples: float | None = None,
    overlap: bool = True,
    sharded: bool = False,
) -> Prediction:
    """One step of DDP, or of FSDP2, on all devices of all groups, with equally many samples each.

    Args:
        workload: The model.
        cluster: The devices. Gradients go the slower way if there are replicas.
        samples: Samples of a group, shared out evenly among its devices.
        of_samples: Samples that the step counts for, where some are not run; by default all.
        overlap: Whether what travels is hidden behind computation as far as that lasts: gradients behind the backward
            pass, gathered weights (`sharded`) behind both.
        sharded: Whether the devices share out weights and training state (FSDP2): weights are gathered in both
            passes, gradients are reduced and scattered.
    """
    check_step(workload, cluster, samples, of_samples)
    link = cluster.replica_link if cluster.replicas > 1 else cluster.link
    share, heads = samples / cluster.size, workload.partition.branches
    forward = share * (sum(b.heads * workload.forward(b) for b in heads) + workload.below + workload.above)
    backward = share * (sum(b.heads * workload.backward(b) for b in heads) + workload.boundary_backward)
    time = Clocks(cluster)
    passes = np.full(cluster.size, float(len(heads)))
    time.heads += share * sum(b.heads * (workload.forward(b) + workload.backward(b)) for b in heads) / cluster.flops
    time.heads += 2 * passes * cluster.overhead
    members, blocks = cluster.num_devices, len(workload.partition.blocks)
    trained = (workload.trained_of_all + workload.trained_of_heads) * workload.bytes_per_number
    # What lies around the blocks stays gathered between the passes.
    of_blocks, around = (
        n * workload.bytes_per_number for n in (workload.head_parameters, workload.boundary_parameters)
    )
    gathered, gradients = 0.0, link.all_reduce(trained, members)
    if sharded:
        gathered = blocks * link.gather(of_blocks / blocks, members)
        gradients = blocks * link.gather(trained / blocks, members)
    rows = share * workload.row_bytes * len(heads)
    for flops, run_rows, travel in (
        (forward, time.rows_forward, gathered + (link.gather(around, members) if sharded else 0.0)),
        (backward, time.rows_backward, gathered + gradients),
    ):
        before = time.now.max()
        time.compute(flops, passes)
        run_rows(rows)
        time.wait(max(0.0, before + travel - time.now.max()) if overlap else travel)
    moved = (members - 1) / members * ((2 * of_blocks + around + trained) if sharded else 2 * trained)
    for counter in (time.sent, time.received):
        counter["gradients"] += moved
    memory = workload.memory(1) / members + of_blocks / blocks if sharded else workload.memory(1)
    return time.result(samples if of_samples is None else of_samples, memory)
