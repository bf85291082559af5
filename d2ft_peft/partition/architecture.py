"""Where an architecture keeps its blocks, heads and projections: a table, and the tensor-parallel plan as a fallback.

A model can be cut into heads when its attention derives the number of heads from what its projections return
(``view(*shape, -1, head_dim)``), the contract that tensor parallelism relies on too. transformers ships a
tensor-parallel plan for most decoders; the encoders and GPT-2 stand in the table below.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..value_checks import check


# Reasons why a model cannot be cut, by model type. Anything else that cannot is found by looking at its modules.
_REFUSED = {
    "t5": "its attention adds a position bias per head",
    "mt5": "its attention adds a position bias per head",
    "bloom": "its ALiBi attention bias is built for a fixed number of heads",
    "mpt": "its ALiBi attention bias is built for a fixed number of heads",
    "falcon": "it fuses query, key and value in one projection with a fixed split",
    "swin": "its windows carry a relative position bias per head",
    "swinv2": "its windows carry a relative position bias per head",
    "beit": "its attention adds a relative position bias per head",
    "opt": "its attention reshapes to a fixed number of heads",
    "gpt_oss": "its attention has one sink per head",
    "deepseek_v2": "multi-head latent attention shares a compressed key/value across heads",
    "deepseek_v3": "multi-head latent attention shares a compressed key/value across heads",
}


@dataclass(frozen=True)
class BranchSpec:
    """One residual branch of a block: attention or feed-forward network (FFN). Paths are relative to the block.

    Attributes:
        region: Smallest module that holds the column-parallel projections; D2FT runs it once per operation.
        columns: Column-parallel projections (query, key, value; up, gate): heads own *output* features.
        row: Row-parallel projection (output, down): heads own *input* features. It is inside the region, or the next
            thing that its output meets (BERT).
        parts: Number of equal parts in each column-parallel projection (3 for a fused query-key-value).
        scaled_attributes: Integer attributes of the region that are proportional to the number of heads that run.
    """

    region: str
    columns: tuple[str, ...]
    row: str
    parts: int = 1
    scaled_attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("columns", "scaled_attributes"):
            value = getattr(self, name)
            names = isinstance(value, (tuple, list)) and all(isinstance(path, str) for path in value)
            check(names, name, value, "must be a tuple of names; a single one takes a comma, ('qkv',)")


@dataclass(frozen=True)
class Architecture:
    """A stack of equal blocks and the branches in each.

    Attributes:
        blocks: Name of the ``nn.ModuleList`` that holds the blocks, e.g. ``"layers"`` or ``"encoder.layer"``.
        attention: The attention branch.
        ffn: The feed-forward branch, or None where it cannot be cut (mixture of experts): it then always runs.
    """

    blocks: str
    attention: BranchSpec
    ffn: BranchSpec | None


_VIT = Architecture(
    blocks="layers",
    attention=BranchSpec(
        "attention",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
    ),
    ffn=BranchSpec("mlp", ("mlp.fc1",), "mlp.fc2"),
)
_BERT = Architecture(
    blocks="encoder.layer",
    attention=BranchSpec(
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
    ),
    ffn=BranchSpec("intermediate", ("intermediate.dense",), "output.dense"),
)
_GPT2 = Architecture(
    blocks="h",
    attention=BranchSpec("attn", ("attn.c_attn",), "attn.c_proj", parts=3, scaled_attributes=("split_size",)),
    ffn=BranchSpec("mlp", ("mlp.c_fc",), "mlp.c_proj"),
)

_ARCHITECTURES: dict[str, Architecture] = {"vit": _VIT, "bert": _BERT, "gpt2": _GPT2}


def register_architecture(model_type: str, architecture: Architecture) -> None:
    """Teach D2FT a model that has no tensor-parallel plan.

    Args:
        model_type: ``config.model_type`` of the model.
        architecture: Where its blocks, heads and projections are.

    Raises:
        ValueError: If the model type is already registered with something else, or the architecture is none.
    """
    check(isinstance(model_type, str) and model_type != "", "model_type", model_type, "must be a name")
    check(isinstance(architecture, Architecture), "architecture", architecture, "must be an Architecture")
    known = _ARCHITECTURES.get(model_type)
    if known is not None and known != architecture:
        raise ValueError(f"model_type={model_type!r} is already registered as {known}; choose another name.")
    _ARCHITECTURES[model_type] = architecture


def find_architecture(model: nn.Module) -> Architecture:
    """Return the architecture of a transformers model, from the table or from its tensor-parallel plan.

    Raises:
        ValueError: If the model cannot be cut into heads; the message says why.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type in _ARCHITECTURES:
        return _ARCHITECTURES[model_type]
    if model_type in _REFUSED:
        raise ValueError(f"model_type={model_type!r} cannot be partitioned into heads: {_REFUSED[model_type]}.")
    plan = getattr(config, "base_model_tp_plan", None)
    if not plan:
        raise ValueError(
            f"model_type={model_type!r} is not known to D2FT and its config has no `base_model_tp_plan`; describe it "
            f"with d2ft_peft.register_architecture({model_type!r}, Architecture(...)). "
            f"Known: {', '.join(sorted(_ARCHITECTURES))}."
        )
    return _from_tp_plan(model_type, plan)


def _from_tp_plan(model_type: str, plan: dict[str, str]) -> Architecture:
    """Read the branches off a plan such as ``{"layers.*.self_attn.q_proj": "colwise", ...}``."""
    by_parent: dict[str, dict[str, str]] = {}
    stacks = set()
    for path, style in plan.items():
        stack, star, inner = path.partition(".*.")
        if not star or "experts" in inner or style.startswith("replicated"):
            continue
        if style.startswith("mla"):
            raise ValueError(
                f"model_type={model_type!r} cannot be partitioned into heads: multi-head latent attention "
                f"({path}: {style!r}) shares a compressed key/value across heads."
            )
        stacks.add(stack)
        by_parent.setdefault(inner.rpartition(".")[0], {})[inner] = style
    attention = [parent for parent in by_parent if "attn" in parent or "attention" in parent]
    others = [parent for parent in by_parent if parent not in attention]
    if len(stacks) != 1 or len(attention) != 1:
        raise ValueError(
            f"model_type={model_type!r} cannot be partitioned into heads: its tensor-parallel plan names "
            f"{len(stacks)} stacks of blocks and {len(attention)} attention modules "
            f"({', '.join(attention) or 'none'}), one of each is needed; describe the model "
            "with d2ft_peft.register_architecture."
        )
    ffn = _branch_from_styles(model_type, others[0], by_parent[others[0]]) if len(others) == 1 else None
    return Architecture(stacks.pop(), _branch_from_styles(model_type, attention[0], by_parent[attention[0]]), ffn)


def _branch_from_styles(model_type: str, parent: str, styles: dict[str, str]) -> BranchSpec:
    columns = tuple(path for path, style in styles.items() if style == "colwise")
    rows = [path for path, style in styles.items() if style == "rowwise"]
    odd = {path: style for path, style in styles.items() if style not in ("colwise", "rowwise")}
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
    return BranchSpec(region=parent, columns=columns, row=rows[0])
