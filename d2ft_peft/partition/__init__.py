"""What a subnet is: discovery of blocks, heads and projections in a transformers model."""

from .architecture import Architecture, BranchSpec, register_architecture
from .discovery import base_model, partition_model, parts_elsewhere, unwrap
from .partition import Branch, FeatureLayout, Partition, Projection, Subnet
from .whole_blocks import modules_with_weights, partition_into_blocks


__all__ = [
    "Architecture",
    "Branch",
    "BranchSpec",
    "FeatureLayout",
    "Partition",
    "Projection",
    "Subnet",
    "base_model",
    "modules_with_weights",
    "partition_into_blocks",
    "partition_model",
    "parts_elsewhere",
    "register_architecture",
    "unwrap",
]
