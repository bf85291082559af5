"""What one sample costs: FLOPs of every branch and head, bytes of its rows, parameters. From shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..partition import Branch, Partition
from ..partition.partition import subnet_parameters, subnet_weights
from ..value_checks import check, check_integer, is_number


# A fused attention kernel computes the scores a second time in backward.
_ATTENTION_BACKWARD = 2.5


@dataclass(frozen=True)
class Workload:
    """A model and the length of its samples.

    `torch.device("meta")` makes the partition of a model of any size without its weights:
    ``partition_model(AutoModelForCausalLM.from_config(config))``.

    Attributes:
        partition: The model's subnets.
        tokens: Tokens of a sample.
        bytes_per_number: Bytes of one number of rows, weights and gradients.
        below: Forward FLOPs of a sample before the blocks (embedding).
        above: Forward FLOPs of a sample after them (task head).
        boundary_parameters: Parameters of what belongs to no head; every device of a group has them.
        lora_rank: Rank of LoRA, or None: everything trains.
        state_bytes: Bytes that a trained parameter takes besides its weight (gradient, moments of the optimizer, a
            copy in float32). Activations are not counted.
    """

    partition: Partition
    tokens: int
    bytes_per_number: int = 4
    below: float = 0.0
    above: float = 0.0
    boundary_parameters: int = 0
    lora_rank: int | None = None
    state_bytes: int = 12

    def __post_init__(self) -> None:
        cut = isinstance(self.partition, Partition)
        check(cut, "partition", self.partition, "must be what partition_model returns")
        for name in ("tokens", "bytes_per_number"):
            check_integer(name, getattr(self, name), 1)
        if self.lora_rank is not None:
            check_integer("lora_rank", self.lora_rank, 1, " or None")
        for name in ("below", "above", "boundary_parameters", "state_bytes"):
            value = getattr(self, name)
            check(is_number(value) and 0 <= value < math.inf, name, value, "must be a finite number, not negative")
        if not self.partition.cuts_heads:
            raise ValueError(
                f"partition={self.partition.model_type!r} has whole blocks as subnets ({self.partition.why_whole}); "
                "simulated steps know heads and the shapes of their projections only."
            )

    @property
    def row_bytes(self) -> float:
        """Bytes of a sample's rows of hidden states."""
        return float(self.tokens * self.partition.branches[0].columns[0].in_features * self.bytes_per_number)

    def forward(self, branch: Branch) -> float:
        """FLOPs of a sample and head of a branch, forward."""
        return self.tokens * (2.0 * subnet_weights(branch, 1) + self._products(branch))

    def backward(self, branch: Branch) -> float:
        """The same backward; frozen weights need no gradient."""
        projections = (1 if self.lora_rank else 2) * 2.0 * subnet_weights(branch, 1)
        return self.tokens * (projections + _ATTENTION_BACKWARD * self._products(branch))

    def _products(self, branch: Branch) -> float:
        return 4.0 * self.tokens * branch.query_width

    @property
    def boundary_backward(self) -> float:
        """Backward FLOPs of a sample outside of the blocks."""
        return self.above if self.lora_rank else 2 * (self.below + self.above)

    @property
    def head_parameters(self) -> int:
        """Parameters of all heads."""
        return sum(subnet_parameters(branch, branch.heads) for branch in self.partition.branches)

    @property
    def trained_of_heads(self) -> float:
        """Trained parameters that belong to heads."""
        return self._lora()[0] if self.lora_rank else self.head_parameters

    @property
    def trained_of_all(self) -> float:
        """Trained parameters that belong to no head: every device has a copy, and their gradients are summed."""
        return self._lora()[1] if self.lora_rank else self.boundary_parameters

    def _lora(self) -> tuple[float, float]:
        """Parameters of LoRA that belong to heads, and that all heads share."""
        owned = shared = 0
        for branch in self.partition.branches:
            for projection in branch.projections:
                sizes = (projection.out_features, projection.in_features)
                own, common = sizes if projection.kind == "column" else sizes[::-1]
                owned, shared = owned + own, shared + common
        return self.lora_rank * owned, self.lora_rank * shared

    def memory(self, shares: int) -> float:
        """Bytes of weights and training state on a device that has 1 / `shares` of the heads."""
        weights = self.head_parameters / shares + self.boundary_parameters
        state = self.trained_of_heads / shares + self.trained_of_all
        return self.bytes_per_number * weights + self.state_bytes * state
