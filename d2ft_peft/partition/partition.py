"""What a subnet is: immutable descriptions of a transformer cut into heads. Names and shapes, no modules."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from .gauges import Gauge, Stack


@dataclass(frozen=True)
class FeatureLayout:
    """How the features of one axis of a projection belong to heads.

    The axis is part-major: its parts follow one another, and in each the features of head 0, of head 1, and so on.

    Attributes:
        heads: Number of heads (key/value heads under grouped-query attention).
        width: Features of one head in one part.
        parts: Number of equal parts (3 for a fused query-key-value projection, else 1); or, where parts differ, how
            many times `width` one head has in each: ``(4, 1, 1)`` for four queries that share a key and a value.
    """

    heads: int
    width: int
    parts: int | tuple[int, ...] = 1

    @property
    def part_widths(self) -> tuple[int, ...]:
        """Features of one head in each part."""
        if isinstance(self.parts, int):
            return (self.width,) * self.parts
        return tuple(times * self.width for times in self.parts)

    @property
    def head_size(self) -> int:
        """Features of one head in all parts."""
        return sum(self.part_widths)

    @property
    def size(self) -> int:
        """Number of features on the axis."""
        return self.heads * self.head_size


@dataclass(frozen=True)
class Projection:
    """One linear layer of a branch.

    Attributes:
        name: Path of the module in the model.
        kind: ``"column"``: heads own output features; ``"row"``: heads own input features.
        layout: How that axis belongs to heads.
        in_features: Width of the input.
        out_features: Width of the output.
        has_bias: Whether the layer has a bias.
        transposed: True for ``Conv1D``, whose weight is [in_features, out_features].
    """

    name: str
    kind: Literal["column", "row"]
    layout: FeatureLayout
    in_features: int
    out_features: int
    has_bias: bool
    transposed: bool

    @property
    def head_axis(self) -> int:
        """Axis of the weight that belongs to heads."""
        return int((self.kind == "row") != self.transposed)


@dataclass(frozen=True)
class PerHead:
    """Something with an axis of heads that a region reads besides its projections.

    Attributes:
        name: An argument of the region's forward, or a path in the region.
        kind: ``"argument"``; ``"parameter"``; ``"module"``, whose output has the axis; or ``"modules"``, a list with as
            many as there are heads.
        axis: The axis, counted from the front (a list has axis 0).
        width: Entries that one head has on it: 2 where two query heads share a key/value head.
    """

    name: str
    kind: Literal["argument", "parameter", "module", "modules"]
    axis: int
    width: int


@dataclass(frozen=True)
class Branch:
    """One residual branch (attention, cross attention or FFN) of one block, or a whole block.

    Attributes:
        name: ``"attention"``, ``"cross_attention"``, ``"ffn"``, or ``"block"`` for a block that is one subnet.
        block: Index of the block.
        region: Path of the module that D2FT runs once per operation.
        columns: Its column-parallel projections; none in a whole block.
        row: Its row-parallel projection; None in a whole block.
        scaled_attributes: See `BranchSpec`.
        query_width: Width of one head's queries (attention), or 0: width that enters the attention products.
        per_head: What else of the region has an axis of heads.
        whole: Projections of the region that compute every feature whenever it runs: they belong to no head.
        residual: Argument of the region that it adds to its output, or "".
        shared_input: Whether the column-parallel projections have the region's input in common.
        apart: Paths of the column-parallel projections that do not take the region's input.
        joined: See `BranchSpec`.
        returns: See `BranchSpec`.
        other_input: Those of `columns`, by name, that read other rows than the first: keys and values of cross
            attention, which come from the encoder.
        hands_on: See `BranchSpec`.
    """

    name: Literal["attention", "cross_attention", "ffn", "block"]
    block: int
    region: str
    columns: tuple[Projection, ...] = ()
    row: Projection | None = None
    scaled_attributes: tuple[str, ...] = ()
    query_width: int = 0
    per_head: tuple[PerHead, ...] = ()
    whole: tuple[str, ...] = ()
    residual: str = ""
    shared_input: bool = True
    apart: tuple[str, ...] = ()
    joined: bool = False
    returns: int | None = None
    other_input: tuple[str, ...] = ()
    hands_on: str = ""

    @property
    def heads(self) -> int:
        """Number of heads that the branch is cut into; a whole block counts as one."""
        return 1 if self.row is None else self.row.layout.heads

    @property
    def row_inside(self) -> bool:
        """Whether the row-parallel projection is part of the region."""
        return self.row is not None and self.row.name.startswith(self.region + ".")

    @property
    def num_returned(self) -> int:
        """Number of values in the tuple that the region returns, 0 if it returns a tensor."""
        usual = 0 if self.name == "ffn" else 2
        return usual if self.returns is None else self.returns

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All projections, column-parallel ones first; none in a whole block."""
        return () if self.row is None else (*self.columns, self.row)

    @property
    def owned(self) -> tuple[str, ...]:
        """Paths of the modules whose weights are the branch's: its projections, or the whole block."""
        return tuple(projection.name for projection in self.projections) or (self.region,)

    def siblings(self, column: Projection) -> tuple[Projection, ...]:
        """The column-parallel projections that share the input of one of them, itself included."""
        if column.name in self.apart or not self.shared_input:
            return (column,)
        others = (other for other in self.columns if other.name not in self.apart)
        elsewhere = column.name in self.other_input
        return tuple(
            other
            for other in others
            if other.in_features == column.in_features and (other.name in self.other_input) == elsewhere
        )

    @property
    def targets(self) -> tuple[str, ...]:
        """Paths of the layers (or of the whole block) that train unless something else is asked for."""
        return (*self.owned, *self.whole)


@dataclass(frozen=True)
class Subnet:
    """F_k of the paper (arXiv 2504.12471, section 3): some heads of one block with their share of the FFN."""

    index: int
    block: int
    heads: tuple[int, ...]


@dataclass(frozen=True)
class Partition:
    """A model cut into subnets.

    Attributes:
        model_type: ``config.model_type`` of the model.
        branches: Every branch, block by block.
        subnets: The subnets that are scheduled, block by block.
        blocks: Paths of the blocks.
        boundary: Paths of the modules outside the subnets (embeddings, norms, task head): they always run FULL.
        heads_per_subnet: Heads (key/value heads) that one subnet groups.
        stacks: The stacks of blocks, in the order in which they run.
        why_whole: Why its blocks are subnets as a whole; empty where they are cut into heads.
    """

    model_type: str
    branches: tuple[Branch, ...]
    subnets: tuple[Subnet, ...]
    blocks: tuple[str, ...]
    boundary: tuple[str, ...]
    heads_per_subnet: int
    stacks: tuple[Stack, ...] = ()
    why_whole: str = ""

    @property
    def cuts_heads(self) -> bool:
        """Whether blocks are cut into heads; else each block is one subnet."""
        return not self.why_whole

    @property
    def is_one_subnet(self) -> bool:
        """Whether there is nothing to choose among: one module, or the model itself, is the only subnet."""
        return not self.cuts_heads and len(self.subnets) == 1

    @cached_property
    def owned(self) -> tuple[str, ...]:
        """Paths of the modules whose weights are the subnets': projections, or whole blocks."""
        return tuple(name for branch in self.branches for name in branch.owned)

    @property
    def several(self) -> bool:
        """Whether blocks differ in the rows that they see: several stacks, or cross attention."""
        return len(self.gauges) > 1

    @cached_property
    def gauges(self) -> tuple[Gauge, ...]:
        """Where rows are counted: at the first attention of every stack, and at its first cross attention."""
        found = []
        for number, stack in enumerate(self.stacks):
            for name in ("attention", "cross_attention"):
                at = (i for i, b in enumerate(self.branches) if b.name == name and b.block in stack.blocks)
                found += [Gauge(branch, number, name == "cross_attention") for branch in (next(at, None),)
                          if branch is not None]  # fmt: skip
        return tuple(found) or (Gauge(0, 0),)

    def stack_of(self, block: int) -> int:
        """Index of the stack of a block."""
        return next((number for number, stack in enumerate(self.stacks) if block in stack.blocks), 0)

    @property
    def num_scheduled(self) -> int:
        """Number of subnets that a schedule gives operations to: the columns K of its table."""
        return len(self.subnets)

    @property
    def num_subnets(self) -> int:
        """The paper's count: the scheduled subnets and two that always run FULL, the embedding and the task head."""
        return self.num_scheduled + 2

    @cached_property
    def subnet_blocks(self) -> np.ndarray:
        """Block of each scheduled subnet, int [K]."""
        return np.array([subnet.block for subnet in self.subnets])

    @cached_property
    def projections(self) -> dict[str, Projection]:
        """All projections by the path of their module."""
        return {projection.name: projection for branch in self.branches for projection in branch.projections}

    def summary(self, sequence_length: int = 1) -> str:
        """A readable table: block, heads, features, parameters and forward FLOPs per token of the subnets.

        Args:
            sequence_length: Tokens that each token attends to; the attention products grow with it.
        """
        if self.is_one_subnet:
            return f"{self.blocks[0] or 'the model'} is the only subnet ({self.why_whole})"
        if not self.cuts_heads:
            return f"{self.num_scheduled} whole blocks are scheduled ({self.why_whole}); the rest always runs FULL"
        rows = [("block", "subnets", "heads each", "attention", "ffn", "parameters", "FLOPs/token")]
        for block in range(len(self.blocks)):
            subnets = [subnet for subnet in self.subnets if subnet.block == block]
            branches = {branch.name: branch for branch in self.branches if branch.block == block}
            share = len(subnets[0].heads) if subnets else 0
            parameters = sum(subnet_parameters(branch, share) for branch in branches.values())
            flops = 2 * sum(subnet_weights(branch, share) for branch in branches.values())
            flops += 4 * share * sum(branch.query_width for branch in branches.values()) * sequence_length
            features = [
                str(share * branches[name].row.layout.head_size) if name in branches else "-"
                for name in ("attention", "ffn")
            ]
            rows.append((str(block), str(len(subnets)), str(share or "-"), *features, f"{parameters:,}", f"{flops:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        without = len(self.blocks) - len({branch.block for branch in self.branches if branch.name == "ffn"})
        if without:
            lines.append(
                f"in {without} of {len(self.blocks)} blocks no FFN is cut: what they have of one always runs FULL"
            )
        sizes = f"{self.num_subnets} subnets: {self.num_scheduled} scheduled"
        return "\n".join([*lines, f"{sizes}; embedding and head, which always run FULL"])


def subnet_weights(branch: Branch, heads: int) -> int:
    """Weights (without biases) that `heads` heads own in a branch."""
    return sum(p.in_features * p.out_features for p in branch.projections) * heads // branch.heads


def subnet_parameters(branch: Branch, heads: int) -> int:
    """Parameters that `heads` heads own in a branch; the row-parallel bias belongs to no head."""
    biases = sum(p.out_features for p in branch.columns if p.has_bias)
    return subnet_weights(branch, heads) + biases * heads // branch.heads
