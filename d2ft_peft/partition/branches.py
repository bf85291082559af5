"""The branches of one block: which features of which projections belong to which head, and what stands in the way."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from .architecture import BranchSpec
from .head_layouts import head_layouts, wide_layouts
from .partition import Branch, FeatureLayout, PerHead, Projection


# Linear layers under other names, which compute what nn.Linear does.
_LINEAR = ("FalconLinear",)


def unwrap(module: nn.Module) -> nn.Module:
    """The layer under PEFT's wrappers."""
    while hasattr(module, "base_layer"):
        module = module.base_layer
    return module


def has_module(block: nn.Module, path: str) -> bool:
    """Whether there is a module at a path."""
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


def attention_branch(
    part: Any, block: nn.Module, prefix: str, index: int, spec: BranchSpec, name: str = "attention"
) -> Branch | None:
    """The attention of a block, or None if the block has none; `part` has the block's configuration."""
    if not has_module(block, spec.row):
        return None
    region, where = _submodule(block, prefix, spec.region), f"{prefix}.{spec.region}"
    head_dim = _head_dim(part.config, region)
    widths = {path: linear_shape(block, prefix, path)[1] for path in spec.columns}
    columns = [widths[path] for path in spec.columns if path not in spec.apart]
    row = linear_shape(block, prefix, spec.row)[0]
    value_dim = getattr(region, "v_head_dim", None) or head_dim
    if not spec.shared_input:
        layouts = wide_layouts(where, part.config.num_attention_heads, columns, row)
    elif value_dim != head_dim and len(columns) == 3:  # queries, keys and narrower values
        layouts = wide_layouts(where, columns[1] // head_dim, columns, row)
    else:
        layouts = head_layouts(where, spec, head_dim, columns, row)
    layout_of = dict(zip((path for path in spec.columns if path not in spec.apart), layouts.columns, strict=True))
    layout_of |= {path: FeatureLayout(layouts.heads, widths[path] // layouts.heads) for path in spec.apart}
    query_heads = max(1, row // layouts.heads // value_dim)
    per_head = tuple(
        entry
        for name, axis in spec.per_head
        if (entry := _per_head(region, where, name, axis, layouts.heads, query_heads)) is not None
    )
    _check_region_parameters(block, region, prefix, spec, head_dim)
    return Branch(
        name=name,
        block=index,
        region=where,
        columns=tuple(_projection(block, prefix, path, "column", layout_of[path]) for path in spec.columns),
        row=_projection(block, prefix, spec.row, "row", layouts.row),
        scaled_attributes=spec.scaled_attributes,
        query_width=layouts.query_width,
        per_head=per_head,
        whole=tuple(f"{prefix}.{path}" for path in spec.whole),
        residual=spec.residual,
        shared_input=spec.shared_input,
        apart=tuple(f"{prefix}.{path}" for path in spec.apart),
        joined=spec.joined,
        returns=spec.returns,
        other_input=tuple(f"{prefix}.{path}" for path in spec.other_input),
        hands_on=spec.hands_on,
    )


def _per_head(region: nn.Module, where: str, name: str, axis: int, heads: int, query_heads: int) -> PerHead | None:
    """What `BranchSpec.per_head` names, or None if this model does not have it."""
    arguments = inspect.signature(type(region).forward).parameters
    if name in arguments:
        return PerHead(name, "argument", axis, query_heads)
    parent, _, leaf = name.rpartition(".")
    owner = unwrap(region.get_submodule(parent)) if has_module(region, parent) else None
    value = getattr(owner, leaf, None)
    if isinstance(value, nn.ModuleList):
        kind, size = "modules", len(value)
    elif isinstance(value, nn.Parameter):
        kind, size = "parameter", value.shape[axis]
    elif isinstance(value, nn.Module):
        kind, size = "module", next(unwrap(value).parameters()).shape[-1]
    elif parent or leaf in owner.__dict__ or leaf in owner._parameters:  # known, and None in this block
        return None
    else:
        raise ValueError(
            f"per_head names {name!r}, which is no argument of {where}'s forward ({', '.join(arguments)}) and nothing "
            "that it holds; name what has an axis of heads."
        )
    if size % heads:
        raise ValueError(f"{where}.{name} has {size} entries on axis {axis}, which do not divide by its {heads} heads.")
    return PerHead(name, kind, axis, size // heads)


def ffn_branch(block: nn.Module, prefix: str, index: int, spec: BranchSpec, heads: int) -> Branch:
    def shared(path: str, kind: str) -> Projection:
        in_features, out_features, _, _ = linear_shape(block, prefix, path)
        size, parts = (out_features, spec.parts) if kind == "column" else (in_features, 1)
        width, rest = divmod(size, heads * parts)
        if rest:
            raise ValueError(
                f"{prefix}.{path} cannot be shared among heads: its {size} features do not divide by "
                f"{heads} heads{f' x {parts} parts' if parts > 1 else ''}."
            )
        return _projection(block, prefix, path, kind, FeatureLayout(heads, width, parts))

    return Branch(
        name="ffn",
        block=index,
        region=f"{prefix}.{spec.region}",
        columns=tuple(shared(path, "column") for path in spec.columns),
        row=shared(spec.row, "row"),
        scaled_attributes=spec.scaled_attributes,
        residual=spec.residual,
        joined=spec.joined,
        returns=spec.returns,
    )


def _projection(block: nn.Module, prefix: str, path: str, kind: str, layout: FeatureLayout) -> Projection:
    in_features, out_features, has_bias, transposed = linear_shape(block, prefix, path)
    return Projection(f"{prefix}.{path}", kind, layout, in_features, out_features, has_bias, transposed)


def linear_shape(block: nn.Module, prefix: str, path: str) -> tuple[int, int, bool, bool]:
    """(in_features, out_features, has bias, is transposed) of a projection."""
    module = unwrap(_submodule(block, prefix, path))
    if is_plain_linear(module):
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


def is_linear_like(module: nn.Module) -> bool:
    """Whether a module has the sizes of a linear layer, whatever its weights are (quantized ones), and no parts."""
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return all(isinstance(size, int) for size in sizes) and next(module.children(), None) is None


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module computes what ``nn.Linear`` does, so that its weight may be sliced instead of calling it."""
    return type(module) is nn.Linear or type(module).__name__ in _LINEAR


def _head_dim(config: Any, region: nn.Module) -> int:
    names = ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
    for source, name in (*((region, name) for name in names), (config, "head_dim")):
        if isinstance(getattr(source, name, None), int):
            return getattr(source, name)
    return config.hidden_size // config.num_attention_heads


def _check_region_parameters(block: nn.Module, region: nn.Module, prefix: str, spec: BranchSpec, head_dim: int) -> None:
    """Whatever else the attention learns must not be tied to certain heads (sinks, position biases, joint norms)."""
    inside = [path.removeprefix(spec.region + ".") for path in (*spec.columns, *spec.whole, spec.row)]
    inside += [name for name, _ in spec.per_head]
    inside += ["relative_attention_bias"] if spec.hands_on else []  # the region's compute_bias reads it whole
    shared = {(head_dim,)}
    if not spec.shared_input:  # norms of the latents
        shared |= {(linear_shape(block, prefix, path)[0],) for path in spec.columns}
    for name, parameter in region.named_parameters():
        belongs = any(name == path or name.startswith(path + ".") for path in inside)
        if not belongs and tuple(parameter.shape) not in shared:
            raise ValueError(
                f"{prefix}.{spec.region} cannot be cut into heads: its parameter {name!r} of shape "
                f"{list(parameter.shape)} is not shared by all heads (only norms over head_dim={head_dim} are); say "
                "which axis belongs to heads in `per_head` of d2ft_peft.register_architecture."
            )
    for name, module in region.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name == path for path in inside):
            raise ValueError(
                f"{prefix}.{spec.region} cannot be cut into heads: its list {name!r} may hold a module for each head; "
                "name it in `per_head` of d2ft_peft.register_architecture."
            )
