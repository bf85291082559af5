"""Vision towers whose blocks work on the patches of all images in one row, with a fused projection."""

from __future__ import annotations

from .architecture import Architecture, BranchSpec, register_architecture


_ATTENTION = BranchSpec("attn", ("attn.qkv",), "attn.proj", parts=3, scaled_attributes=("num_heads",), returns=0)
for _model_type, _ffn in {
    "qwen2_vl_vision": BranchSpec("mlp", ("mlp.fc1",), "mlp.fc2"),
    "qwen2_5_vl_vision": BranchSpec("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
    "qwen3_vl_vision": BranchSpec("mlp", ("mlp.linear_fc1",), "mlp.linear_fc2"),
}.items():
    register_architecture(_model_type, Architecture("blocks", _ATTENTION, _ffn))
