"""A small Llama under LoRA whose frozen weights leave out some features for some tokens: layers and their prediction.

Shape suffixes: N rows (tokens of the flattened batch), I input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


ROLES = {
    "q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o",
    "gate_proj": "ffn", "up_proj": "ffn", "down_proj": "ffn",
}  # fmt: skip
"""Projections, by what is chosen for them together."""


@dataclass
class Control:
    """What the layers read: which rows are cut, in which blocks, and which features a block keeps.

    Attributes:
        cut: Rows [N] of the flattened batch whose frozen products are cut; None if all are dense.
        whole: Rows that are not; those in neither are padding.
        blocks: Blocks in which they are cut.
        kept: For each block, kept features by role.
    """

    kind: str = "columns"
    skip: float = 0.5
    choice: str = "svd"
    cut_lora: bool = False
    cut: Tensor | None = None
    whole: Tensor | None = None
    blocks: frozenset[int] = frozenset()
    kept: dict[int, dict[str, Tensor]] = field(default_factory=dict)

    def set_rows(self, cut: Tensor, real: Tensor) -> None:
        """Cut some of the real tokens, masks [B, T]."""
        self.cut, self.whole = cut.flatten().nonzero()[:, 0], (real & ~cut).flatten().nonzero()[:, 0]


class FrozenSubset(nn.Module):
    """A frozen linear layer, which leaves out some features for some rows."""

    def __init__(self, linear: nn.Linear, name: str, block: int, control: Control):
        super().__init__()
        self.weight, self.bias = linear.weight, None
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.role, self.takes_kept = ROLES[name], name in ("o_proj", "down_proj")
        self.block, self.control = block, control

    def forward(self, x: Tensor) -> Tensor:
        control = self.control
        if control.cut is None or self.block not in control.blocks:
            return F.linear(x, self.weight)
        kept = control.kept[self.block][self.role]
        x_NI = x.flatten(0, 1)
        out_NO = x.new_zeros(len(x_NI), self.out_features)
        out_NO = out_NO.index_copy(0, control.whole, F.linear(x_NI[control.whole], self.weight))
        if self.takes_kept:
            part = F.linear(x_NI[control.cut[:, None], kept], self.weight[:, kept])
            out_NO = out_NO.index_copy(0, control.cut, part)
        else:
            part = F.linear(x_NI[control.cut], self.weight[kept])
            out_NO = out_NO.index_put((control.cut[:, None], kept), part)
        return out_NO.view(*x.shape[:-1], -1)

    def without_lora(self, layer: nn.Module, args: tuple, out: Tensor) -> Tensor:
        """Hook of the LoRA layer around: nothing of the features that were left out."""
        control = self.control
        if not control.cut_lora or self.takes_kept or control.cut is None or self.block not in control.blocks:
            return out
        mask_NO = out.new_ones(out.flatten(0, 1).shape)
        mask_NO[control.cut] = 0
        mask_NO[control.cut[:, None], control.kept[self.block][self.role]] = 1
        return out * mask_NO.view_as(out)


class Predictor:
    """Hook before a block: which features it keeps, by the norms of what low-rank weights make of the batch."""

    def __init__(self, block: nn.Module, index: int, control: Control, rank: int = 8):
        self.index, self.control, attention = index, control, block.self_attn
        self.head_dim, self.kv_heads = attention.head_dim, attention.config.num_key_value_heads
        self.proxies = {}
        for name, layer in [*attention.named_children(), *block.mlp.named_children()]:
            if name in ROLES and name not in ("o_proj", "down_proj"):
                u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
                self.proxies[name] = [m.to(layer.weight.dtype) for m in (v[:rank], u[:, :rank] * s[:rank])]

    def _norms(self, x: Tensor, name: str) -> Tensor:
        return self._proxy(x, name).square().sum(0)

    def _proxy(self, x: Tensor, name: str) -> Tensor:
        down, up = self.proxies[name]
        return F.linear(F.linear(x, down), up)

    @torch.no_grad()
    def __call__(self, block: nn.Module, args: tuple) -> None:
        control = self.control
        if control.cut is None or self.index not in control.blocks:
            return
        rows = args[0].flatten(0, 1)[control.cut]
        # The FFN's input is not known yet when heads are chosen: the block's own stands for it.
        x, y = block.input_layernorm(rows), block.post_attention_layernorm(rows)
        q = self._norms(x, "q_proj").view(self.kv_heads, -1, self.head_dim).mean(1).flatten()
        scores = {
            "qk": (q * self._norms(x, "k_proj")).sqrt(), "vo": self._norms(x, "v_proj"),
            "ffn": (F.silu(self._proxy(y, "gate_proj")) * self._proxy(y, "up_proj")).square().sum(0),
        }  # fmt: skip
        if control.choice == "random":
            scores = {name: torch.rand_like(score) for name, score in scores.items()}
        control.kept[self.index] = self.features(scores)

    def features(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        """Kept features by role, from the importance of each channel of keys, values and FFN."""
        if self.control.kind == "columns":
            shares = [(score / score.sum()).view(self.kv_heads, -1).sum(1) for score in scores.values()]
            heads = _largest(sum(shares), self.control.skip)
            kept = {name: _spread(heads, len(score) // self.kv_heads) for name, score in scores.items()}
        else:
            kept = {name: _largest(score, self.control.skip) for name, score in scores.items()}
        group = self.proxies["q_proj"][1].shape[0] // self.proxies["k_proj"][1].shape[0]
        queries = {}
        for name in ("qk", "vo"):
            head, channel = kept[name] // self.head_dim, kept[name] % self.head_dim
            queries[name] = (_spread(head, group).view(-1, group) * self.head_dim + channel[:, None]).flatten()
        return {"q": queries["qk"], "k": kept["qk"], "v": kept["vo"], "o": queries["vo"], "ffn": kept["ffn"]}


def _largest(scores: Tensor, skip: float) -> Tensor:
    return scores.topk(len(scores) - round(skip * len(scores))).indices.sort().values


def _spread(units: Tensor, width: int) -> Tensor:
    """Features of some units of a width."""
    return (units[:, None] * width + torch.arange(width)).flatten()


def intercept(model: nn.Module, control: Control) -> None:
    """Let the frozen layers of a Llama under PEFT's LoRA, of all projections, do as the control says."""
    for index, block in enumerate(model.get_base_model().model.layers):
        predictor = Predictor(block, index, control)
        block.register_forward_pre_hook(predictor)
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, LoraLayer):
                    layer.base_layer = FrozenSubset(layer.base_layer, name, index, control)
                    layer.register_forward_hook(layer.base_layer.without_lora)
