"""A cloud in this process, and the same adapted model on an edge and whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from d2ft_peft.dlora import BaseModel, Cloud, connect

from ..models import TINY


def tiny_base(folder: Path, name: str = "llama", seed: int = 0, **overrides: Any) -> str:
    """A tiny model's checkpoint, in float64."""
    TINY[name].build(seed, **overrides).double().save_pretrained(folder)
    return str(folder)


@contextmanager
def serve(base: str, dtype: torch.dtype = torch.float64, port: int = 0, **options: Any) -> Iterator[tuple[Cloud, str]]:
    """A running cloud and its address."""
    cloud = Cloud(BaseModel.load(base, dtype), **options)
    address = f"localhost:{cloud.start(port)}"
    try:
        yield cloud, address
    finally:
        cloud.stop()


def adapter(**options: Any) -> LoraConfig:
    """LoRA on every projection, not at zero."""
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options})


def whole(
    base: str, config: LoraConfig, model_class: Any = AutoModelForCausalLM, dtype: torch.dtype = torch.float64
) -> PeftModel:
    """The adapted model in one place, by stock PEFT."""
    torch.manual_seed(0)
    return get_peft_model(model_class.from_pretrained(base, dtype=dtype), config)


def edge_like(
    model: PeftModel, address: str, base: str, config: LoraConfig, dtype: torch.dtype = torch.float64, **options: Any
) -> PeftModel:
    """The same adapted model on an edge."""
    edge = connect(address, base, config, dtype=dtype, **options)
    adapted = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    edge.load_state_dict(adapted, strict=False)
    return edge


def ragged(name: str = "llama", n: int = 3, seed: int = 1) -> dict[str, Tensor]:
    """A batch with padding, and with a prompt that nothing is to be learned from."""
    batch = TINY[name].batch(n, seed)
    if "attention_mask" in batch:
        batch["attention_mask"][-1, 5:] = 0
    if TINY[name].kind == "causal":
        batch["labels"][-1, 5:] = -100
        batch["labels"][0, :2] = -100
    return batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of what trains."""
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model: PreTrainedModel | PeftModel, batch: dict[str, Tensor], **more: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one micro-batch."""
    model.zero_grad()
    loss = model(**batch, **more).loss
    loss.backward()
    return loss.detach(), gradients(model)


def check_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    """Equal to within rounding, every one of them, and not all zero."""
    assert found.keys() == expected.keys()
    assert any(value.abs().max() > 0 for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def samples(n: int = 10) -> list[dict[str, Tensor]]:
    """Texts of different lengths."""
    batch = TINY["llama"].batch(n)
    return [{name: value[i, : 3 + i % 5] for name, value in batch.items()} for i in range(n)]


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of such texts, padded to the longest."""
    pad = torch.nn.utils.rnn.pad_sequence
    filler = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad([row[name] for row in rows], True, value) for name, value in filler.items()}


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    """Whether something comes true in time: what other threads do is not done at once."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()
