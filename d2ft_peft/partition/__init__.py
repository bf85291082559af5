"""What a subnet is: discovery of blocks, heads and projections in a transformers model."""

from . import decoders, encoders  # noqa: F401  they register their architectures
from .architecture import Architecture, BranchSpec, register_architecture
from .discovery import base_model, partition_model, parts_elsewhere, unwrap
from .partition import Branch, FeatureLayout, Partition, PerHead, Projection, Subnet


__all__ = [
    "Architecture",
    "Branch",
    "BranchSpec",
    "FeatureLayout",
    "Partition",
    "PerHead",
    "Projection",
    "Subnet",
    "base_model",
    "partition_model",
    "parts_elsewhere",
    "register_architecture",
    "unwrap",
]
