"""Which features of an attention module's projections belong to which head, found from their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .architecture import BranchSpec
from .partition import FeatureLayout


@dataclass(frozen=True)
class HeadLayouts:
    """How attention is shared among its heads.

    Attributes:
        heads: Number of heads (key/value heads under grouped-query attention).
        query_width: Width of one head's queries that enters the attention products.
        columns: Layouts of the column-parallel projections.
        row: Layout of the row-parallel projection.
    """

    heads: int
    query_width: int
    columns: tuple[FeatureLayout, ...]
    row: FeatureLayout


def head_layouts(where: str, spec: BranchSpec, head_dim: int, columns: Sequence[int], row: int) -> HeadLayouts:
    """Share out projections among heads.

    Queries are as wide as what attention returns, which the row-parallel projection takes; the rest of a fused
    projection is keys and values.

    Args:
        where: Path of the attention module, for messages.
        spec: What is known of it.
        head_dim: Width of one head.
        columns: Output features of its column-parallel projections.
        row: Input features of its row-parallel projection.

    Raises:
        ValueError: If the sizes do not fit heads.
    """
    packed = spec.parts > 1 or spec.interleaved
    if packed and len(columns) != 1:
        raise ValueError(
            f"{where} cannot be cut into heads: `parts` and `interleaved` describe one fused projection, and it has "
            f"{len(columns)}."
        )
    # A third projection tells queries with a gate beside them, head by head, from several things in one projection.
    if not (packed or spec.whole) and max(columns) != row and (len(columns) < 3 or max(columns) % row):
        raise ValueError(
            f"{where} cannot be cut into heads: {spec.row} takes {row} features, but the queries "
            f"have {max(columns)}; of a fused projection say how its parts lie (`parts`, `interleaved` in "
            "d2ft_peft.register_architecture)."
        )
    # A gate may have one feature for each query head.
    gates = {row // head_dim} if len(columns) > 3 else set()
    narrowest = (columns[0] - row) // 2 if packed else min(set(columns) - gates or columns)
    heads, rest = divmod(narrowest, head_dim * spec.repeats)
    if (
        rest
        or heads < 1
        or row % (heads * head_dim)
        or any(width % (heads * head_dim) for width in columns if width not in gates)
    ):
        raise ValueError(
            f"{where} cannot be cut into heads: its projections return {list(columns)} features, which "
            f"must be multiples of head_dim={head_dim} and of the key/value heads."
        )
    if packed:
        layout = _packed(heads, head_dim, row, columns[0], spec)
        row_layout = FeatureLayout(heads, row // heads // spec.repeats, spec.repeats)
        return HeadLayouts(heads, row // heads, (layout,), row_layout)
    layouts = tuple(FeatureLayout(heads, width // heads) for width in columns)
    return HeadLayouts(heads, row // heads, layouts, FeatureLayout(heads, row // heads))


def _packed(heads: int, head_dim: int, row: int, size: int, spec: BranchSpec) -> FeatureLayout:
    if spec.interleaved:
        return FeatureLayout(heads, size // heads)
    group = row // (heads * head_dim * spec.repeats)
    parts = 3 * spec.repeats if group == 1 else (group, 1, 1) * spec.repeats
    return FeatureLayout(heads, head_dim, parts)


def wide_layouts(where: str, heads: int, columns: Sequence[int], row: int) -> HeadLayouts:
    """Share out projections whose values are not as wide as queries and keys, by the number of heads.

    So are up-projections from latents (multi-head latent attention, arXiv 2405.04434).

    Args:
        where: Path of the attention module, for messages.
        heads: Its heads (key/value heads).
        columns: Output features of its column-parallel projections, the queries first.
        row: Input features of its row-parallel projection, as wide as the values.
    """
    if heads < 1 or any(width % heads for width in (*columns, row)):
        raise ValueError(
            f"{where} cannot be cut into heads: its projections return {list(columns)} features and {row} leave it, "
            f"which must be multiples of its {heads} heads."
        )
    layouts = tuple(FeatureLayout(heads, width // heads) for width in columns)
    query_width = (columns[0] + row) // heads // 2  # scores of queries, weights on values
    return HeadLayouts(heads, query_width, layouts, FeatureLayout(heads, row // heads))
