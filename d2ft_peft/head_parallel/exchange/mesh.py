"""Which processes share out the heads of one model, and which have copies of it."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


# Ours, and what accelerate and transformers call them.
_DATA, _HEADS = ("data", "dp_replicate"), ("heads", "tp")


def replicas(mesh: DeviceMesh | None) -> np.ndarray:
    """Numbers of the processes, int [replicas, ranks that share out the heads of a replica].

    Args:
        mesh: See `HeadParallel`; None puts all processes on the heads axis.

    Raises:
        ValueError: If the mesh has other axes, or does not hold every process once.
    """
    size = dist.get_world_size()
    if mesh is None:
        return np.arange(size)[None]
    names = mesh.mesh_dim_names or ()
    if not (names[-1:] and names[-1] in _HEADS and all(name in _DATA for name in names[:-1]) and len(names) <= 2):
        raise ValueError(
            f"mesh has axes {names}; it needs 'heads', or 'data' and 'heads' in this order: "
            "init_device_mesh(device, (replicas, ranks), mesh_dim_names=('data', 'heads'))."
        )
    numbers = mesh.mesh.numpy().reshape(-1, mesh.mesh.shape[-1])
    if sorted(numbers.flatten().tolist()) != list(range(size)):
        raise ValueError(f"mesh={numbers.tolist()} must hold each of the {size} processes once.")
    return numbers
