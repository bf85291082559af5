"""Where the blocks of a model keep their projections, found from its modules where nobody wrote it down.

Names say what a module may be, shapes what it can be; what is found this way is believed only after a trial
(`trial.py`): the block, with stand-ins for its weights, must return the same on some of its heads as the whole block
with the other heads masked.
"""

from __future__ import annotations

import inspect
import itertools
import warnings
from collections.abc import Iterator
from dataclasses import replace

from torch import nn
from transformers.pytorch_utils import Conv1D

from .architecture import Architecture, BranchSpec
from .branches import attention_branch, ffn_branch, linear_shape, unwrap
from .trial import try_block


_QUERY = ("q", "q_proj", "query", "query_proj", "q_lin", "q_linear", "wq", "w_q", "to_q", "linear_q")
_ROLES = ("query", "key", "value")
_OUTPUT = ("o", "o_proj", "out_proj", "out_lin", "out", "dense", "proj", "output", "output.dense", "c_proj", "wo")
_FFN_ROW = ("fc2", "lin2", "down_proj", "output_dense", "ffn_output", "output.dense", "fc_out", "linear2", "wo", "w2")


def read_structure(model: nn.Module) -> Architecture:
    """Find the stack of blocks, and attention and FFN in them.

    Args:
        model: A transformers model, with or without PEFT layers in it.

    Raises:
        ValueError: If there is not one stack, its blocks hold no separate query, key and value projections, or the
            trial of a block fails.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    stack, blocks = _find_stack(model, model_type)
    attention = _read_attention(blocks[0], f"{stack}.0")
    ffns = _read_ffn(blocks[0], attention)
    try:
        attention, ffn = _tried(model, model_type, blocks[0], f"{stack}.0", attention, ffns)
    except AttributeError as error:  # its config does not say what those of transformers' encoders and decoders say
        raise ValueError(
            f"model_type={model_type!r} cannot be partitioned into heads: {error}; describe the model with "
            "d2ft_peft.register_architecture."
        ) from error
    whole = [] if ffn is not None else list(_with_matrices(blocks[0], attention))
    if whole:
        warnings.warn(
            f"no feed-forward network that could be cut was found in {stack}.0 of model_type={model_type!r}: "
            f"{', '.join(whole[:4])}{', ...' if whole[4:] else ''} run whole in every block and micro-batch. Only "
            "attention is cut, and a policy over micro-batches chooses within its share of the compute; describe the "
            "model with d2ft_peft.register_architecture if more can be cut.",
            stacklevel=2,
        )
    return Architecture(stack, attention, ffn)


def _find_stack(model: nn.Module, model_type: str) -> tuple[str, nn.ModuleList]:
    """The one list of blocks with attention, innermost where lists are within lists."""
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(_attentions(block) for block in module)
    }
    found = {name: blocks for name, blocks in lists.items() if not any(n.startswith(name + ".") for n in lists)}
    if len(found) != 1:
        what = f"it has {len(found)} lists of blocks ({', '.join(found)})" if found else "it has no list of blocks"
        raise ValueError(
            f"model_type={model_type!r} is not known to D2FT and was looked at: {what} whose attention has query, key "
            "and value projections of its own, and one is needed; describe it with "
            f"d2ft_peft.register_architecture({model_type!r}, Architecture(...))."
        )
    return next(iter(found.items()))


def _linears(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of the linear layers in a module, PEFT's wrappers aside."""
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(unwrap(child), nn.Linear | Conv1D):
            yield path
        else:
            yield from _linears(unwrap(child), f"{path}.")


def _attentions(block: nn.Module) -> list[dict[str, str]]:
    """Query, key and value projection of each attention in a block."""
    paths = set(_linears(block))
    found = []
    for path in sorted(paths):
        parent, dot, name = path.rpartition(".")
        if name not in _QUERY:
            continue
        names = [name.replace("query", role) if "query" in name else name.replace("q", role[0]) for role in _ROLES]
        roles = dict(zip(_ROLES, [f"{parent}{dot}{other}" for other in names], strict=True))
        if paths.issuperset(roles.values()):
            found.append(roles)
    return found


def _read_attention(block: nn.Module, prefix: str) -> BranchSpec:
    found = _attentions(block)
    if len(found) != 1:
        raise ValueError(
            f"{prefix} has {len(found)} attention modules ({', '.join(roles['query'] for roles in found)}); D2FT finds "
            "one by itself: describe the model with d2ft_peft.register_architecture."
        )
    columns = tuple(found[0][role] for role in _ROLES)
    region = columns[0].rpartition(".")[0]
    if not region:
        raise ValueError(f"{prefix} holds query, key and value itself: there is no module of attention to run in part.")
    width = linear_shape(block, prefix, columns[0])[1]
    row = _output_projection(block, region, columns, width)
    if row is None:
        raise ValueError(f"{prefix}.{region} has no output projection that takes the {width} features of its queries.")
    others = [path for path in _linears(block) if path.startswith(region + ".") and path not in (*columns, row)]
    apart = tuple(path for path in others if linear_shape(block, prefix, path)[1] == width)
    return BranchSpec(region, columns + apart, row, apart=apart)


def _output_projection(block: nn.Module, region: str, columns: tuple[str, ...], width: int) -> str | None:
    """What takes what attention returns: within the region or, as in BERT, in a module around it."""
    fitting = [p for p in _linears(block) if p not in columns and linear_shape(block, "", p)[0] == width]
    around = [".".join(region.split(".")[:count]) for count in range(region.count(".") + 1, 0, -1)]
    named = [path for path in fitting if ("." + path).endswith(tuple("." + name for name in _OUTPUT))]
    for candidates in (named, fitting):
        for module in around:
            rows = [path for path in candidates if path.startswith(module + ".")]
            if rows:
                return rows[0]
    return None


def _read_ffn(block: nn.Module, attention: BranchSpec) -> list[BranchSpec | None]:
    """What the feed-forward network outside of attention may be, likeliest first; None where it is not found.

    A projection of twice the features that the row takes holds a gate and what it gates: one after the other, or
    feature by feature.
    """
    hidden = linear_shape(block, "", attention.row)[1]
    shapes = {path: linear_shape(block, "", path)[:2] for path in _outside(block, attention)}
    rows = [path for path, (_, out) in shapes.items() if out == hidden]
    rows = [row for row in rows if ("." + row).endswith(tuple("." + name for name in _FFN_ROW))] or rows
    # Of several FFNs the outermost, which every block has.
    rows.sort(key=lambda path: path.count("."))
    for row in rows:
        columns = _columns_of(row, shapes, hidden, 1)
        if 1 <= len(columns) <= 2:
            region = _common(columns)
            if not region and len(columns) == 2:
                return [None]
            return [BranchSpec(region or columns[0], columns, row)]
    for row in rows:
        columns = _columns_of(row, shapes, hidden, 2)
        if len(columns) == 1:
            region = _common(columns) or columns[0]
            return [*(BranchSpec(region, columns, row, parts=parts) for parts in (2, 1)), None]
    return [None]


def _columns_of(row: str, shapes: dict[str, tuple[int, int]], hidden: int, parts: int) -> tuple[str, ...]:
    """The projections that may come before a row-parallel one, nearest by name."""
    columns = tuple(path for path in shapes if path != row and shapes[path] == (hidden, parts * shapes[row][0]))
    # Those of an FFN in a list of FFNs belong to that one.
    nearest = [path for path in columns if path.rpartition(".")[0] == row.rpartition(".")[0]]
    return tuple(nearest) or tuple(path for path in columns if path.count(".") == row.count("."))


def _outside(block: nn.Module, attention: BranchSpec) -> list[str]:
    """Paths of the linear layers of a block that are no part of its attention."""
    return [path for path in _linears(block) if not _is_of(attention, path)]


def _is_of(attention: BranchSpec, path: str) -> bool:
    inside = (*attention.columns, attention.row)
    return path in inside or path.startswith(_common(inside) + ".")


def _with_matrices(block: nn.Module, attention: BranchSpec, prefix: str = "") -> Iterator[str]:
    """Paths of the modules of a block that multiply with matrices of their own and are no part of its attention."""
    for name, child in block.named_children():
        path, module = f"{prefix}{name}", unwrap(child)
        if isinstance(module, nn.Linear) or any(
            sum(size > 1 for size in p.shape) > 1 for p in module.parameters(recurse=False)
        ):
            yield from () if _is_of(attention, path) else (path,)
        else:
            yield from _with_matrices(module, attention, f"{path}.")


def _common(paths: tuple[str, ...]) -> str:
    """Path of the smallest module that holds all of some modules; "" for the block itself."""
    parts = [path.split(".")[:-1] for path in paths]
    equal = itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts, strict=False))
    return ".".join(names[0] for names in equal)


def _tried(
    model: nn.Module,
    model_type: str,
    block: nn.Module,
    prefix: str,
    attention: BranchSpec,
    ffns: list[BranchSpec | None],
) -> tuple[BranchSpec, BranchSpec | None]:
    """The branches with what the trial found out about them; of what the FFN may be, what passes first."""
    region = block.get_submodule(attention.region)
    reasons = []
    for ffn, scaled in itertools.product(ffns, _scaled_attributes(model, block, region, attention, prefix)):
        tried = replace(attention, scaled_attributes=scaled, per_head=_biases(block, region))
        branches = [attention_branch(model, block, prefix, 0, tried)]
        if ffn is not None:
            try:
                branches.append(ffn_branch(block, prefix, 0, ffn, branches[0].heads))
            except ValueError:  # its features are no multiple of the heads
                if None in ffns:
                    continue
                raise
        found = try_block(block, prefix, branches, getattr(model.config, "hidden_size", None))
        if isinstance(found, str):
            reasons.append(found)
            continue
        seen = replace(tried, **found["attention"])
        return seen, None if ffn is None else replace(ffn, **found["ffn"])
    reason = next((reason for reason in reasons if not reason.startswith("it fails")), reasons[0])
    raise ValueError(
        f"model_type={model_type!r} cannot be partitioned into heads: {prefix} was tried on some of its heads, and "
        f"{reason}; describe the model with d2ft_peft.register_architecture if it can be cut otherwise."
    )


def _scaled_attributes(
    model: nn.Module, block: nn.Module, region: nn.Module, spec: BranchSpec, prefix: str
) -> list[tuple[str, ...]]:
    """Which integers of the region may count heads or their features: the fewest first."""
    branch = attention_branch(model, block, prefix, 0, spec)
    widths = {projection.layout.size for projection in branch.projections}
    counts = {branch.heads, branch.heads * branch.query_width // branch.columns[1].layout.width}
    names = [
        name
        for name, value in vars(region).items()
        if type(value) is int and not name.startswith("_") and value in widths | counts
    ]
    names = names[:5]
    return [subset for size in range(len(names) + 1) for subset in itertools.combinations(names, size)]


def _biases(block: nn.Module, region: nn.Module) -> tuple[tuple[str, int], ...]:
    """Arguments of the region that hold a bias of every head."""
    names = inspect.signature(type(region).forward).parameters
    found = [name for name in ("position_bias", "relative_position_bias") if name in names]
    if not found and "attention_mask" in names and getattr(block, "relative_position_bias", None) is not None:
        found = ["attention_mask"]  # the block adds its bias to the mask
    return tuple((name, 1) for name in found)
