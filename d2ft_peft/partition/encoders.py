"""Encoders with fused projections, whose parts no shape tells; the others are found from their modules."""

from __future__ import annotations

from typing import Any

from .architecture import Architecture, BranchSpec, register_architecture


_BERT_FFN = BranchSpec("intermediate", ("intermediate.dense",), "output.dense")
_MODERNBERT_FFN = BranchSpec("mlp", ("mlp.Wi",), "mlp.Wo", parts=2)
_MODERNBERT = Architecture("layers", BranchSpec("attn", ("attn.Wqkv",), "attn.Wo", parts=3), _MODERNBERT_FFN)
_MODERNBERT_DECODER = Architecture(
    "layers", BranchSpec("attn", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), "attn.Wo"), _MODERNBERT_FFN
)


def _bert(**kwargs: Any) -> Architecture:
    """BERT with more in its attention."""
    path = "attention.self"
    columns, counts = (f"{path}.query", f"{path}.key", f"{path}.value"), ("num_attention_heads", "all_head_size")
    attention = BranchSpec(path, columns, "attention.output.dense", scaled_attributes=counts, **kwargs)
    return Architecture("encoder.layer", attention, _BERT_FFN)


def _deberta(config: Any) -> Architecture:
    """DeBERTa (arXiv 2006.03654): a fused projection with biases of its own, and projections of relative positions."""
    kinds = (config.pos_att_type or []) if getattr(config, "relative_attention", False) else []
    names = [name for kind, name in (("c2p", "pos_proj"), ("p2c", "pos_q_proj")) if kind in kinds]
    positions = tuple(f"attention.self.{name}" for name in names)
    attention = BranchSpec(
        "attention.self",
        ("attention.self.in_proj", *positions),
        "attention.output.dense",
        interleaved=True,
        apart=positions,
        scaled_attributes=("num_attention_heads",),
        per_head=(("q_bias", 0), ("v_bias", 0)),
    )
    return Architecture("encoder.layer", attention, _BERT_FFN)


for _model_type, _architecture in {
    "modernbert": _MODERNBERT,
    "modernbert-decoder": _MODERNBERT_DECODER,
    "deberta": _deberta,
    "bros": _bert(),  # what it makes of boxes is common to all heads
    "layoutlmv3": _bert(per_head=(("rel_pos", 1), ("rel_2d_pos", 1))),
}.items():
    register_architecture(_model_type, _architecture)
