"""Predicts what a training step takes on devices that are not here, from the routes that the engine itself would take.

Numbers only: nothing is trained, and no process started.
"""

from .cluster import Cluster, Device, Link, fit_line
from .data_parallel_step import data_parallel
from .head_parallel_step import head_parallel
from .of_model import workload_of_model
from .prediction import Prediction
from .tensor_parallel_step import tensor_parallel
from .workload import Workload


__all__ = [
    "Cluster",
    "Device",
    "Link",
    "Prediction",
    "Workload",
    "data_parallel",
    "fit_line",
    "head_parallel",
    "tensor_parallel",
    "workload_of_model",
]
