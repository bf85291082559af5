"""Cut a model into subnets: find blocks, heads and projections, and refuse what cannot be cut."""

from __future__ import annotations

from typing import Literal

from torch import nn
from transformers.pytorch_utils import Conv1D

from .architecture import Architecture, BranchSpec, find_architecture
from .partition import Branch, FeatureLayout, Partition, Projection, Subnet
from .whole_blocks import ASKED, boundary, partition_into_blocks


def partition_model(
    model: nn.Module, heads_per_subnet: int = 1, subnets: Literal["heads", "blocks"] | None = "heads"
) -> Partition:
    """Cut a model into subnets (arXiv 2504.12471, section 3).

    Args:
        model: The model, with or without PEFT layers in it.
        heads_per_subnet: Heads (key/value heads under grouped-query attention) that one subnet groups.
        subnets: ``"heads"``, whole ``"blocks"``, or None: blocks where the model cannot be cut into heads.

    Raises:
        ValueError: If the model cannot be cut; the message says what stands in the way.
    """
    if subnets == "blocks":
        return partition_into_blocks(model, ASKED)
    try:
        return _cut_into_heads(model, heads_per_subnet)
    except ValueError as error:
        if subnets == "heads" or heads_per_subnet != 1:
            raise
        return partition_into_blocks(model, str(error).rstrip("."))


def _cut_into_heads(model: nn.Module, heads_per_subnet: int) -> Partition:
    architecture = find_architecture(model)
    stack, blocks = _find_blocks(model, architecture)
    branches, subnets = [], []
    for index, block in enumerate(blocks):
        prefix = f"{stack}.{index}"
        attention = _attention_branch(model, block, prefix, index, architecture.attention)
        _check_heads_per_subnet(heads_per_subnet, attention.heads)
        branches.append(attention)
        if architecture.ffn is not None and _has_module(block, architecture.ffn.row):
            branches.append(_branch("ffn", block, prefix, index, architecture.ffn, attention.heads))
        for first in range(0, attention.heads, heads_per_subnet):
            heads = tuple(range(first, first + heads_per_subnet))
            subnets.append(Subnet(len(subnets), index, heads))
    projections = {p.name for branch in branches for p in branch.projections}
    return Partition(
        model_type=model.config.model_type,
        branches=tuple(branches),
        subnets=tuple(subnets),
        blocks=tuple(f"{stack}.{index}" for index in range(len(blocks))),
        boundary=tuple(boundary(model, "", projections)),
        heads_per_subnet=heads_per_subnet,
    )


def unwrap(module: nn.Module) -> nn.Module:
    """The layer under PEFT's wrappers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def _find_blocks(model: nn.Module, architecture: Architecture) -> tuple[str, nn.ModuleList]:
    """The one ModuleList of the model whose children hold the architecture's projections."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (name == architecture.blocks or name.endswith("." + architecture.blocks))
        and len(module) > 0
        and _has_module(module[0], architecture.attention.row)
    ]
    if len(found) != 1:
        raise ValueError(
            f"expected one stack of blocks named {architecture.blocks!r} in {type(model).__name__}, found "
            f"{len(found)} ({', '.join(name for name, _ in found) or 'none'}); D2FT partitions models with one stack."
        )
    return found[0]


def _has_module(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def _submodule(block: nn.Module, prefix: str, path: str) -> nn.Module:
    try:
        return block.get_submodule(path)
    except AttributeError as error:
        raise ValueError(
            f"{prefix} has no module {path!r}: it differs from what the model type promises, or learns a parameter "
            "that is tied to heads; such a model cannot be cut into heads."
        ) from error


def _attention_branch(model: nn.Module, block: nn.Module, prefix: str, index: int, spec: BranchSpec) -> Branch:
    region = _submodule(block, prefix, spec.region)
    head_dim = _head_dim(model, region)
    shapes = [_linear_shape(block, prefix, path) for path in spec.columns]
    # Query, key and value differ in width under grouped-query attention; the narrowest counts key/value heads.
    widths = [out_features // spec.parts for _, out_features, _, _ in shapes]
    heads, rest = divmod(min(widths), head_dim)
    if rest or any(width % (heads * head_dim) for width in widths):
        raise ValueError(
            f"{prefix}.{spec.region} cannot be cut into heads: its projections return {widths} features, which "
            f"must be multiples of head_dim={head_dim} and of the key/value heads."
        )
    row_width = _linear_shape(block, prefix, spec.row)[0]
    if row_width != max(widths):
        # Queries are as wide as what attention returns; anything else fuses several things in one projection.
        raise ValueError(
            f"{prefix}.{spec.region} cannot be cut into heads: {spec.row} takes {row_width} features, but the queries "
            f"have {max(widths)}; a fused projection can be cut only if its parts follow one another (`parts` in "
            "d2ft_peft.register_architecture)."
        )
    _check_region_parameters(region, prefix, spec, head_dim)
    return _branch("attention", block, prefix, index, spec, heads, query_width=max(widths) // heads)


def _branch(
    name: str, block: nn.Module, prefix: str, index: int, spec: BranchSpec, heads: int, query_width: int = 0
) -> Branch:
    return Branch(
        name=name,
        block=index,
        region=f"{prefix}.{spec.region}",
        columns=tuple(_projection(block, prefix, path, "column", heads, spec.parts) for path in spec.columns),
        row=_projection(block, prefix, spec.row, "row", heads, 1),
        scaled_attributes=spec.scaled_attributes,
        query_width=query_width,
    )


def _projection(block: nn.Module, prefix: str, path: str, kind: str, heads: int, parts: int) -> Projection:
    in_features, out_features, has_bias, transposed = _linear_shape(block, prefix, path)
    size = out_features if kind == "column" else in_features
    width, rest = divmod(size, heads * parts)
    if rest:
        raise ValueError(
            f"{prefix}.{path} cannot be shared among heads: its {size} features do not divide by "
            f"{heads} heads{f' x {parts} parts' if parts > 1 else ''}."
        )
    layout = FeatureLayout(heads, width, parts)
    return Projection(f"{prefix}.{path}", kind, layout, in_features, out_features, has_bias, transposed)


def _linear_shape(block: nn.Module, prefix: str, path: str) -> tuple[int, int, bool, bool]:
    """(in_features, out_features, has bias, is transposed) of a projection."""
    module = unwrap(_submodule(block, prefix, path))
    if type(module) is nn.Linear:
        return module.in_features, module.out_features, module.bias is not None, False
    if type(module) is Conv1D:
        return module.nx, module.nf, module.bias is not None, True
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if all(isinstance(size, int) for size in sizes):
        # A linear layer of another kind, such as a quantized one, may run whole; whoever slices it looks at its class.
        return *sizes, getattr(module, "bias", None) is not None, False
    raise ValueError(
        f"{prefix}.{path} is a {type(module).__name__} without in_features and out_features; D2FT cuts linear layers "
        "only."
    )


def _head_dim(model: nn.Module, region: nn.Module) -> int:
    for source, name in ((region, "head_dim"), (region, "attention_head_size"), (model.config, "head_dim")):
        if isinstance(getattr(source, name, None), int):
            return getattr(source, name)
    return model.config.hidden_size // model.config.num_attention_heads


def _check_heads_per_subnet(heads_per_subnet: int, heads: int) -> None:
    if not isinstance(heads_per_subnet, int) or heads_per_subnet < 1 or heads % heads_per_subnet:
        fitting = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ValueError(
            f"heads_per_subnet={heads_per_subnet!r} does not divide the {heads} heads (key/value heads) of a block; "
            f"choose one of {fitting}."
        )


def _check_region_parameters(region: nn.Module, prefix: str, spec: BranchSpec, head_dim: int) -> None:
    """Whatever else the attention learns must not be tied to certain heads (sinks, position biases, joint norms)."""
    inside = {path.removeprefix(spec.region + ".") for path in (*spec.columns, spec.row)}
    for name, parameter in region.named_parameters():
        belongs = any(name == path or name.startswith(path + ".") for path in inside)
        if not belongs and tuple(parameter.shape) != (head_dim,):
            raise ValueError(
                f"{prefix}.{spec.region} cannot be cut into heads: its parameter {name!r} of shape "
                f"{list(parameter.shape)} is not shared by all heads (only norms over head_dim={head_dim} are)."
            )


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model under PEFT's wrapper, whose paths the partition names."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def parts_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the paths of modules that run on another machine: here they have names and shapes, and no weights."""
    return tuple(f"{name}." for name, part in base_model(model).named_modules() if hasattr(part, "elsewhere"))
