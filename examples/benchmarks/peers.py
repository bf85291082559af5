"""Other ways to fine-tune a model more cheaply, each as its authors or PEFT ship it, for `speed.py`.

They train the projections and the head, as the plain step of `step_time.py` and D2FT do, so only the method differs.
BAdam is a package of its own: ``pip install --no-deps badam`` (arXiv 2404.02827; 1.4 was used here).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft.optimizers import create_lorafa_optimizer
from step_time import adapt

from d2ft_peft import partition_model


LEARNING_RATE = 1e-6


@dataclass(frozen=True)
class Tuned:
    """A model as it is fine-tuned, with its optimizer."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer

    @property
    def resident_bytes(self) -> int:
        """Bytes of weights, gradients and optimizer state, which a step finds and leaves."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        gradients = [p for p in self.model.parameters() if p.requires_grad]  # as large as the parameters
        inner = getattr(self.optimizer, "base_optimizer", self.optimizer)
        state = [t for state in inner.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        copies = getattr(self.optimizer, "param_idx2hp", {}).values()  # BAdam's, of the block that trains
        by_address = {t.data_ptr(): t.nbytes for t in (*tensors, *state, *copies)}
        return sum(by_address.values()) + sum(p.nbytes for p in gradients)


def with_adamw(model: torch.nn.Module) -> Tuned:
    """The model with the Trainer's default optimizer."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return Tuned(model.train(), torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True))


def plain(base: torch.nn.Module, mode: str, rank: int) -> Tuned:
    """Full fine-tuning, or PEFT's LoRA."""
    return with_adamw(adapt(base, mode, rank, d2ft=False))


def d2ft(base: torch.nn.Module, mode: str, rank: int) -> Tuned:
    return with_adamw(adapt(base, mode, rank, d2ft=True))


def checkpointing(base: torch.nn.Module, mode: str, rank: int) -> Tuned:
    """Plain, with the activations within every block computed again in backward."""
    tuned = plain(base, mode, rank)
    tuned.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tuned


def lora_fa(base: torch.nn.Module, mode: str, rank: int) -> Tuned:
    """LoRA-FA (arXiv 2308.03303): PEFT's optimizer for it freezes every A, so no layer keeps its input for A."""
    model = adapt(base, "lora", rank, d2ft=False).train()
    alpha = model.peft_config["default"].lora_alpha
    return Tuned(model, create_lorafa_optimizer(model, r=rank, lora_alpha=alpha, lr=LEARNING_RATE))


def badam(base: torch.nn.Module, mode: str, rank: int) -> Tuned:
    """BAdam: one block trains, here the middle one, with the head.

    BAdam moves on to another block every few dozen steps, and a step costs the more the lower its block is, because
    backward goes down to it. With an odd number of blocks the middle one costs the mean over the blocks.
    """
    from badam import BlockOptimizer

    model = adapt(base, "full", rank, d2ft=False).train()
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks = [[f"{name}."] for name in partition_model(base).blocks]
    heads = [f"{name}." for name in ("classifier", "lm_head") if hasattr(base, name)]
    adamw = torch.optim.AdamW([p for _, p in trained], lr=LEARNING_RATE, fused=True)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the names of the block
        optimizer = BlockOptimizer(
            adamw, trained, blocks, switch_block_every=10**9, start_block=(len(blocks) - 1) // 2, switch_mode="fixed",
            active_modules=heads,
        )  # fmt: skip
    return Tuned(model, optimizer)


PEERS: dict[str, tuple[Callable[[torch.nn.Module, str, int], Tuned], tuple[str, ...]]] = {
    "checkpointing": (checkpointing, ("full", "lora")),
    "lora_fa": (lora_fa, ("lora",)),
    "badam": (badam, ("full",)),
}
"""What makes each peer, and in which modes it exists."""
