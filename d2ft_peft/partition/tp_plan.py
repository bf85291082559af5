"""Architectures read off the tensor-parallel plan that transformers ships for most decoders."""

from __future__ import annotations

from torch import nn

from .architecture import Architecture, BranchSpec


_COLUMN, _ROW = "colwise", "rowwise"
# What follows needs the features of all ranks, so that tensor parallelism gathers and splits them again.
_GATHERED, _SPLIT = "colwise_gather_output", "rowwise_split_input"
_NORMS = {"q_norm": "q_proj", "k_norm": "k_proj"}


def architecture_of_plan(model: nn.Module, model_type: str, plan: dict[str, str]) -> Architecture | None:
    """Read the branches off a plan such as ``{"layers.*.self_attn.q_proj": "colwise", ...}``.

    Returns:
        The architecture, or None if the plan says nothing of attention (some share out experts only).

    Raises:
        ValueError: If the plan names no one stack with one attention module, or ties heads together.
    """
    by_parent: dict[str, dict[str, str]] = {}
    stacks = set()
    for path, style in plan.items():
        stack, star, inner = path.partition(".*.")
        if not star or "." not in inner or "experts" in inner or style.startswith("replicated"):
            continue
        if style.startswith("mla"):
            raise ValueError(
                f"model_type={model_type!r} cannot be partitioned into heads: multi-head latent attention "
                f"({path}: {style!r}) shares a compressed key/value across heads."
            )
        stacks.add(stack)
        by_parent.setdefault(inner.rpartition(".")[0], {})[inner] = style
    if not any(_is_attention(parent) for parent in by_parent):
        return None
    # What mixes tokens otherwise than by attention (linear attention) has no row-parallel projection.
    attention = [parent for parent in by_parent if _is_attention(parent)]
    attention = [parent for parent in attention if {_ROW, _SPLIT} & set(by_parent[parent].values())] or attention
    others = [
        parent
        for parent in by_parent
        if not _is_attention(parent) and not parent.rpartition(".")[2].startswith("shared_expert")
    ]
    if len(stacks) != 1 or len(attention) != 1:
        raise ValueError(
            f"model_type={model_type!r} cannot be partitioned into heads: its tensor-parallel plan names "
            f"{len(stacks)} stacks of blocks and {len(attention)} attention modules "
            f"({', '.join(attention) or 'none'}), one of each is needed; describe the model "
            "with d2ft_peft.register_architecture."
        )
    (parent,) = attention
    branch = _joint_norms(model, parent, by_parent[parent]) or _branch(model, model_type, parent, by_parent[parent])
    ffn = _ffn(model, model_type, others[0], by_parent[others[0]]) if len(others) == 1 else None
    return Architecture(stacks.pop(), branch, ffn)


def _is_attention(parent: str) -> bool:
    return "attn" in parent or "attention" in parent


def _joint_norms(model: nn.Module, parent: str, styles: dict[str, str]) -> BranchSpec | None:
    """Attention whose queries and keys are normed over all heads: these are computed whole, and taken by head after."""
    paths = {path.rpartition(".")[2]: path for path in styles}
    if not {"q_proj", "k_proj", "v_proj", "o_proj"} <= paths.keys():
        return None
    for region in _at(model, parent):
        norms = [getattr(region, norm, None) for norm in _NORMS]
        if all(_is_joint(region, norm, column) for norm, column in zip(norms, _NORMS.values(), strict=True)):
            return BranchSpec(
                parent,
                (paths["v_proj"],),
                paths["o_proj"],
                whole=(paths["q_proj"], paths["k_proj"]),
                per_head=tuple((norm, -1) for norm in _NORMS),
            )
    return None


def _at(model: nn.Module, parent: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if f".{name}".endswith(f".{parent}")]


def _is_joint(region: nn.Module, norm: nn.Module | None, column: str) -> bool:
    weight = next(norm.parameters(), None) if isinstance(norm, nn.Module) else None
    projection = getattr(region, column, None)
    head_dim = getattr(region, "head_dim", None)
    features = getattr(projection, "out_features", None)
    return weight is not None and tuple(weight.shape) == (features,) and features != head_dim


def _is_parameter(model: nn.Module, parent: str, path: str) -> bool:
    """Whether a path of the plan names a parameter, such as sinks, which not every block needs to have."""
    leaf = path.rpartition(".")[2]
    return any(isinstance(getattr(region, leaf, None), nn.Parameter) for region in _at(model, parent))


def _ffn(model: nn.Module, model_type: str, parent: str, styles: dict[str, str]) -> BranchSpec:
    columns = [path for path, style in styles.items() if style == _GATHERED]
    rows = [path for path, style in styles.items() if style == _SPLIT]
    if len(styles) == 2 and len(rows) == 1 and [path.rpartition(".")[2] for path in columns] == ["gate_up_proj"]:
        return BranchSpec(parent, tuple(columns), rows[0], parts=2)
    return _branch(model, model_type, parent, styles)


def _branch(model: nn.Module, model_type: str, parent: str, styles: dict[str, str]) -> BranchSpec:
    per_head = {path for path, style in styles.items() if style == _COLUMN and _is_parameter(model, parent, path)}
    columns = tuple(path for path, style in styles.items() if style == _COLUMN and path not in per_head)
    rows = [path for path, style in styles.items() if style == _ROW]
    odd = {path: style for path, style in styles.items() if style not in (_COLUMN, _ROW)}
    if odd or len(rows) != 1 or not columns:
        reason = (
            "it has " + ", ".join(f"{path} ({style})" for path, style in odd.items())
            if odd
            else f"it has {len(columns)} column-parallel and {len(rows)} row-parallel projections"
        )
        raise ValueError(
            f"model_type={model_type!r} cannot be partitioned into heads: module {parent!r} needs plain "
            f"column-parallel projections and one row-parallel projection, but {reason} "
            "(fused projections and norms across heads tie the heads together)."
        )
    return BranchSpec(
        region=parent,
        columns=columns,
        row=rows[0],
        per_head=tuple((path.rpartition(".")[2], 0) for path in sorted(per_head)),
    )
