"""What a subnet is: discovery of blocks, heads and projections in a transformers model."""

from . import decoders, encoder_decoders, encoders, towers  # noqa: F401  they register their architectures
from .architecture import Architecture, BranchSpec, register_architecture
from .branches import is_linear_like, is_plain_linear, unwrap
from .discovery import base_model, partition_model, parts_elsewhere
from .gauges import Gauge, Stack
from .partition import Branch, FeatureLayout, Partition, PerHead, Projection, Subnet
from .whole_blocks import (
    boundary_below,
    boundary_parameters,
    holds_subnets,
    modules_with_weights,
    partition_into_blocks,
)


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
    "boundary_below",
    "boundary_parameters",
    "holds_subnets",
    "is_linear_like",
    "is_plain_linear",
    "modules_with_weights",
    "partition_into_blocks",
    "partition_model",
    "parts_elsewhere",
    "register_architecture",
    "unwrap",
]
