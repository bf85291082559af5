"""What a step is simulated from; a ValueError names what is something else."""

from __future__ import annotations

from ..value_checks import check, is_positive
from .cluster import Cluster
from .workload import Workload


def check_step(workload: Workload, cluster: Cluster, samples: float = 1.0, of_samples: float | None = None) -> None:
    """Check what all kinds of steps are simulated from.

    Raises:
        ValueError: If one is of another type, or a number of samples is none.
    """
    check(isinstance(workload, Workload), "workload", workload, "must be a Workload; workload_of_model makes one")
    check(isinstance(cluster, Cluster), "cluster", cluster, "must be a Cluster of devices")
    check(is_positive(samples), "samples", samples, "must be a finite number above zero")
    if of_samples is not None:
        check(is_positive(of_samples), "of_samples", of_samples, "must be a finite number above zero, or None for all")
