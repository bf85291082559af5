"""What the PEFT tests share: a table of modes, adapted models, logits, and a little training under partial plans."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.checkpointing import PlannedCheckpoint
from d2ft_peft.engine.intercept import Intercept
from tests.models import TINY


MODES = {"full": {}, "boundary": {"train_boundary": True}, "lora": {"r": 4, "lora_alpha": 8}}
MODULES_TO_SAVE = {
    "vit": ["classifier"],
    "bert": ["classifier"],
    "llama": ["lm_head"],
    "qwen3": ["lm_head"],
    "gpt2": ["ln_f"],
}
# Some of the projections, as a user would name them.
SOME_TARGETS = {
    "vit": ["v_proj", "fc2"],
    "bert": ["value", "intermediate.dense"],
    "llama": ["v_proj", "down_proj"],
    "qwen3": ["q_proj", "up_proj"],
    "gpt2": ["c_attn"],
}

# Qwen3 is Llama with norms inside attention: its boundary is what is new.
CASES = [(name, mode) for name in TINY for mode in MODES if name != "qwen3" or mode == "boundary"]
each_mode = pytest.mark.parametrize("mode", MODES)


@cache
def plain_model(name: str, **overrides):
    """The untouched base model, shared: read it, never change it."""
    return TINY[name].build(**overrides).eval()


def fresh(name: str, **overrides):
    return copy.deepcopy(plain_model(name, **overrides))


def config_for(mode: str, **kwargs) -> D2FTConfig:
    return D2FTConfig(**MODES[mode], **kwargs)


def adapted(name: str, mode: str, **kwargs):
    return get_peft_model(fresh(name), config_for(mode, **kwargs))


def trained(name: str, mode: str, **kwargs):
    model = adapted(name, mode, **kwargs)
    train_briefly(model, name)
    return model


@cache
def shared(name: str, mode: str):
    """A trained model for tests that only read or save it."""
    return trained(name, mode)


def logits(model, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**TINY[name].batch()).logits


def mixed_row(partition, seed: int = 0) -> np.ndarray:
    """Operations of every kind in every block, and the last block FULL, so that gradients reach all others."""
    row = np.random.default_rng(seed).integers(0, 3, partition.num_scheduled)
    row[partition.subnet_blocks == len(partition.blocks) - 1] = 2
    row[::2] = 2
    return row


def train_briefly(model, name: str, adapter: str = "default") -> None:
    """Two steps under plans in which all three operations occur, large enough to see."""
    runtime = get_runtime(model)
    partition = runtime.partitions[adapter]
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    # LoRA's B starts at zero: A moves from the second step on.
    for seed in range(2):
        optimizer.zero_grad()
        with runtime.use(compile_plan(partition, mixed_row(partition, seed))):
            model(**TINY[name].batch()).loss.backward()
        optimizer.step()


def state(model) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def trainable(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


def same(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def close(first: torch.Tensor, second: torch.Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def differs(first: torch.Tensor, second: torch.Tensor) -> None:
    assert (first - second).abs().max() > 1e-4


def assert_plain(model) -> None:
    """Nothing of D2FT or PEFT is left in the model."""
    for module in model.modules():
        assert not type(module).__module__.startswith(("peft", "d2ft_peft")), type(module)
        assert "forward" not in module.__dict__, f"{type(module).__name__} keeps an interception"
        assert not isinstance(module.__dict__.get("_gradient_checkpointing_func"), PlannedCheckpoint)


def interceptions(model) -> list[Intercept]:
    return [m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), Intercept)]
