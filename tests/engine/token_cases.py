"""Models of five blocks, batches with padding, and one micro-batch of them on chosen tokens."""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn

from d2ft_peft import D2FTConfig, D2FTPlanner, partition_model
from d2ft_peft.engine import get_runtime
from tests.models import TINY
from tests.tuners.test_equality import LORA, step


TOKENS = 24
_DEEPER = {name: {"num_hidden_layers": 5} for name in TINY}
_DEEPER["gpt2"] = {"n_layer": 5, "n_positions": TOKENS}
_DEEPER["vit"] |= {"image_size": 32, "patch_size": 8}


def base_of(name: str, **kwargs: Any) -> nn.Module:
    return TINY[name].build(**{**_DEEPER[name], **kwargs}).double()


def adapted(base: nn.Module, mode: str = "full", **kwargs: Any) -> nn.Module:
    torch.manual_seed(7)
    settings = {"policy": "fewer_tokens", "token_dense_share": 0.0, "compute_budget": 0.7, **kwargs}
    return get_peft_model(copy.deepcopy(base), D2FTConfig(**(LORA if mode == "lora" else {}), **settings)).train()


def batch_of(name: str, padding: str = "none") -> dict[str, Tensor]:
    """Three samples; of texts the second is shorter than the batch, and the third than what is kept."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        pixels = torch.randn(3, 3, 32, 32, generator=generator).double()
        return {"pixel_values": pixels * torch.linspace(0.1, 2, 32), "labels": torch.tensor([1, 2, 3])}
    ids, position = torch.randint(3, 60, (3, TOKENS), generator=generator), torch.arange(TOKENS)
    lengths = torch.tensor([[TOKENS], [TOKENS - 9], [4]])
    mask = {"none": ids > 0, "left": position >= TOKENS - lengths}.get(padding, position < lengths).long()
    ids = ids * mask
    if padding == "right, over keys":
        return {"input_ids": ids, "attention_mask": mask[:, None, None].bool(), "labels": torch.tensor([1, 2, 3])}
    if TINY[name].kind != "causal":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1, 2, 3])}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def run(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Any, dict[int, Tensor], D2FTPlanner]:
    """One micro-batch; its outputs, the positions of the tokens that passed each middle block, and the planner."""
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with planner.micro_batch(0):
        outputs = step(model, batch)
        chosen = get_runtime(model).token_pass.selections
    return outputs, {block: chosen.get(block, chosen.get(None)).index for block in planner.tokens.blocks}, planner


def blocks_of(model: nn.Module) -> list[nn.Module]:
    return [model.get_submodule(block) for block in partition_model(model).blocks]
