"""Where an architecture keeps its blocks, heads and projections: the description, and a table of model types.

A model can be cut into heads when its attention derives the number of heads from what its projections return
(``view(*shape, -1, head_dim)``), the contract that tensor parallelism relies on too, or from attributes that can be
scaled with it. transformers ships a tensor-parallel plan for most decoders; others stand in the table, or are found
from their modules and tried.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..value_checks import check


# Reasons why a model cannot be cut, by model type. Anything else that cannot is found by looking at its modules.
_REFUSED = {
    **dict.fromkeys(
        ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm"),
        "it has no attention in which heads could be left out, but a recurrence over channels",
    ),
    "swin": "its windows carry a relative position bias per head",
    "swinv2": "its windows carry a relative position bias per head",
    "swin2sr": "its windows carry a relative position bias per head",
    "maskformer-swin": "its windows carry a relative position bias per head",
    "donut-swin": "its windows carry a relative position bias per head",
    "hiera": "its blocks change their width and their number of heads from stage to stage",
    "albert": "its blocks share their weights: one module runs as every block, and a schedule has a cell for each",
    "big_bird": "its sparse attention is built for a fixed number of heads",
    "longformer": "its attention has a second set of projections for global tokens, which only some batches use",
    "led": "its attention has a second set of projections for global tokens, which only some batches use",
    "squeezebert": "its projections are convolutions",
    "wavlm": "its attention reads the weights of its projections instead of calling them",
    **dict.fromkeys(
        (
            "bit",
            "convnext",
            "convnextv2",
            "dinov3_convnext",
            "efficientnet",
            "focalnet",
            "mobilenet_v1",
            "mobilenet_v2",
            "poolformer",
            "regnet",
            "resnet",
        ),
        "it mixes pixels by convolutions or pooling and has no attention",
    ),
    "fnet": "it mixes tokens by Fourier transforms and has no attention",
    **dict.fromkeys(
        ("cvt", "glpn", "levit", "mobilevit", "mobilevitv2", "pvt", "pvt_v2", "segformer"),
        "its blocks change their width from stage to stage, and convolutions stand among them",
    ),
    **dict.fromkeys(
        ("flaubert", "xlm"), "attention and feed-forward networks are in lists of their own, and a block is in neither"
    ),
    **dict.fromkeys(
        ("funnel", "xlnet"),
        "its attention multiplies with parameters of all heads instead of calling linear layers",
    ),
    "canine": "it runs three stacks, on characters, on molecules of them, and on characters again",
    "convbert": "its attention stands beside a convolution, and both make the features of its output projection",
    "ibert": "its layers hand on the scales of quantized activations beside their values",
    "lilt": "its attention has a second stream, of the layout, whose heads are narrower",
    "nystromformer": "its attention has a convolution of its own for every head",
    "bigbird_pegasus": "its sparse attention is built for a fixed number of heads",
    "bitnet": "its attention norms the features of all heads together",
    "diffllama": "its attention subtracts one half of its heads from the other",
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa"), "an indexer beside its latent attention chooses keys, for all heads together"
    ),
    "deepseek_v4": "all its heads share one key and value, and groups of them an output projection",
    "falcon_h1": "attention and a recurrence run side by side in its blocks, on one input",
    "nemotron_h": "each of its blocks is attention, a recurrence or experts alone",
    "recurrent_gemma": "its blocks hold attention or a recurrence under one name",
    **dict.fromkeys(("zamba", "zamba2"), "its blocks share one block of attention, which runs in several of them"),
    "jetmoe": "the queries and outputs of its attention are experts",
    "openai-gpt": "its attention returns a list, of which two cannot be added",
    **dict.fromkeys(
        ("blip_text_model", "blip_2_qformer"), "its blocks hold a second attention beside the first, to an image"
    ),
    "blip_vision_model": "its attention takes the width of a head from its input, whichever heads run",
    "trocr": "its attention gives what it returns the width of its input, whichever heads run",
    **dict.fromkeys(
        ("wav2vec2-bert", "wav2vec2-conformer"),
        "its blocks hold two feed-forward networks and a convolution, and its attention embeddings of distances",
    ),
}


@dataclass(frozen=True)
class BranchSpec:
    """One residual branch of a block: attention or feed-forward network (FFN). Paths are relative to the block.

    Attributes:
        region: Smallest module that holds the column-parallel projections; D2FT runs it once per operation.
        columns: Column-parallel projections (query, key, value; up, gate): heads own *output* features.
        row: Row-parallel projection (output, down): heads own *input* features. It is inside the region, or the next
            thing that its output meets (BERT).
        parts: Number of parts in each column-parallel projection, one after another: 3 for a fused query-key-value
            (whose queries may be wider than keys and values), 2 for a fused gate and up.
        repeats: How often this order repeats, each time for a share of the heads (CodeGen: 4).
        interleaved: Whether the parts of one head (with its group of queries) follow one another instead, head by head.
        scaled_attributes: Integer attributes of the region that are proportional to the number of heads that run;
            ``"config.NAME"`` for what its forward reads of its config.
        per_head: What else has an axis of heads, with that axis: arguments of the region's forward (ALiBi, position
            biases), or paths in it of parameters (sinks), of modules (their output: a norm over all heads) and of lists
            of modules. The heads that run are taken of it. An argument whose axis has one entry is shared by all heads.
        whole: Linear layers of the region that every pass computes whole: what they return is common to the heads.
        residual: Argument that the region adds to its output, where it does so itself.
        shared_input: Whether the column-parallel projections have the region's input in common.
        apart: Those of the columns that do not take the region's input (embeddings of relative positions).
        joined: Whether something lies between the region and the row, outside of the region, that works on each
            feature alone (an activation in the block's own forward): FULL and FORWARD_ONLY heads then go through it
            side by side.
        returns: Number of values in the tuple that the region returns, 0 if it returns a tensor; by default a tuple of
            two for attention, and a tensor for the FFN.
        other_input: Those of `columns` that read other rows than the first (keys and values of cross attention).
        hands_on: Argument of the region with an axis of heads, [1, heads, queries, keys], that it also returns, as its
            second output, to the next block; where it is missing, the region's ``compute_bias`` makes it (T5).
    """

    region: str
    columns: tuple[str, ...]
    row: str
    parts: int = 1
    repeats: int = 1
    interleaved: bool = False
    scaled_attributes: tuple[str, ...] = ()
    per_head: tuple[tuple[str, int], ...] = ()
    whole: tuple[str, ...] = ()
    residual: str = ""
    shared_input: bool = True
    apart: tuple[str, ...] = ()
    joined: bool = False
    returns: int | None = None
    other_input: tuple[str, ...] = ()
    hands_on: str = ""

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
        cross_attention: Attention to the rows of another stack (decoders), between the two; a head of it belongs to the
            subnet of the same head of `attention`.
    """

    blocks: str
    attention: BranchSpec
    ffn: BranchSpec | None
    cross_attention: BranchSpec | None = None


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

Described = Architecture | tuple[Architecture, ...]
"""One for each of several stacks, in the order in which they run."""

_ARCHITECTURES: dict[str, Described | Callable[[Any], Described]] = {"vit": _VIT, "bert": _BERT, "gpt2": _GPT2}


def register_architecture(model_type: str, architecture: Described | Callable[[Any], Described]) -> None:
    """Teach D2FT a model that has no tensor-parallel plan.

    Args:
        model_type: ``config.model_type`` of the model.
        architecture: Where its blocks, heads and projections are, one for each of several stacks in the order in which
            they run; or a function that says so of a config.

    Raises:
        ValueError: If the model type is already registered with something else, or the architecture is none.
    """
    check(isinstance(model_type, str) and model_type != "", "model_type", model_type, "must be a name")
    stacks = architecture if isinstance(architecture, tuple) else (architecture,)
    described = stacks and all(isinstance(stack, Architecture) for stack in stacks)
    constraint = "must be an Architecture, a tuple of such, or a function that makes one of a config"
    check(described or callable(architecture), "architecture", architecture, constraint)
    known = _ARCHITECTURES.get(model_type)
    if known is not None and known != architecture:
        raise ValueError(f"model_type={model_type!r} is already registered as {known}; choose another name.")
    _ARCHITECTURES[model_type] = architecture


def known_architecture(model_type: str | None, config: Any) -> Described | None:
    """The architecture that the table has of a model type, or None.

    Raises:
        ValueError: If the model is known not to be cut; the message says why.
    """
    if model_type in _ARCHITECTURES:
        known = _ARCHITECTURES[model_type]
        return known(config) if callable(known) else known
    if model_type in _REFUSED:
        raise ValueError(f"model_type={model_type!r} cannot be partitioned into heads: {_REFUSED[model_type]}.")
    return None
