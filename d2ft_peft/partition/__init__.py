"""What a subnet is: discovery of blocks, heads and projections in a transformers model."""

from . import decoders, encoder_decoders, encoders, towers  # noqa: F401  they register their architectures
from .architecture import Architecture, BranchSpec, register_architecture
from .discovery import base_model, partition_model, parts_elsewhere, unwrap
from .gauges import Gauge, Stack
from .partition import Branch, FeatureLayout, Partition, PerHead, Projection, Subnet


__all__ = [
    "Architecture",
    "Branch",
    "BranchSpec",
    "FeatureLayout",
    "Gauge",
    "Partition",
    "PerHead",
    "Projection",
    "Stack",
    "Subnet",
    "base_model",
    "partition_model",
    "parts_elsewhere",
    "register_architecture",
    "unwrap",
]
