"""Blocks that run on chosen tokens: the others take the residual past them.

A block is called as ever; before its own forward stands an interception that takes the chosen tokens out of the hidden
states, and out of every argument that has an axis of tokens, and puts what the block returns back in their places. So
everything around a block sees whole sequences, hooks and recorded outputs included.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..partition import Partition, parts_elsewhere
from ..partition.body import attention_kernel
from .checkpointing import in_backward
from .intercept import Intercept
from .patch_variance import PatchVariance, find_patches
from .runtime import Runtime
from .token_choice import TokenSelection


_ATTENTION = ("eager", "sdpa")
_MIXING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNNBase)


class TokenRows(Intercept):
    """Runs a block on the chosen tokens of a forward pass that is to be trained.

    Attributes:
        index: Index of the block.
        is_causal: Whether its attention is causal.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, index: int, is_causal: bool):
        super().__init__(module, runtime)
        self.index, self.is_causal = index, is_causal
        self._names = tuple(inspect.signature(type(module).forward).parameters)[1:]

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        runtime = self.runtime
        if not self._applies():
            return self.original(*args, **kwargs)
        if in_backward() and runtime.grad_at_entry is None:
            raise RuntimeError(
                "a block that runs on chosen tokens is recomputed in backward by a checkpoint that D2FT does not know, "
                "and the choice may be another pass's: switch checkpointing on with "
                "model.gradient_checkpointing_enable()."
            )
        named = {**dict(zip(self._names, args, strict=False)), **kwargs}
        hidden = named["hidden_states"]
        selection = runtime.token_pass.selection(self.index, hidden, lambda: _real(named), self.is_causal)
        if not in_backward():
            runtime.note_kept(hidden.shape[1] if selection is None else selection.kept)
        if selection is None:
            return self.original(*args, **kwargs)
        args = tuple(_at(name, value, selection, hidden) for name, value in zip(self._names, args, strict=False))
        kwargs = {name: _at(name, value, selection, hidden) for name, value in kwargs.items()}
        out = self.original(*args, **kwargs)
        if isinstance(out, tuple):
            return (selection.scatter(out[0], hidden), *out[1:])
        return selection.scatter(out, hidden)

    def _applies(self) -> bool:
        token_pass = self.runtime.token_pass
        if token_pass is None or self.index not in token_pass.choice.blocks:
            return False
        return self.runtime.trains and self.module.training


def install_token_rows(model: nn.Module, runtime: Runtime, partition: Partition, images: bool) -> None:
    """Let the blocks of a model, but for the first, run on chosen tokens wherever a micro-batch asks for it.

    Args:
        model: The transformers model.
        runtime: Its state.
        partition: Its subnets.
        images: Whether to note the variance of patches as well.
    """
    for index, name in enumerate(partition.blocks[1:], start=1):
        TokenRows(model.get_submodule(name), runtime, index, _is_causal(model, partition)).install()
    for patches in find_patches(model, partition) if images else ():
        PatchVariance(patches, runtime).install()


def check_takes_tokens(model: nn.Module, partition: Partition, margins: tuple[int, int], choice: str) -> None:
    """Refuse a model whose blocks cannot run on some of the tokens.

    Args:
        model: The transformers model.
        partition: Its subnets.
        margins: How many of the first and of the last blocks see all tokens.
        choice: See `TokenChoice.kind`.

    Raises:
        ValueError: With the reason.
    """
    blocks, kind = partition.blocks, model.config.model_type
    first = model.get_submodule(blocks[0])
    attention = attention_kernel(model, blocks[0])
    mixing = [name for name, module in first.named_modules() if isinstance(module, _MIXING)]
    reasons = {
        f"token_margins={list(margins)} leaves none of its {len(blocks)} blocks between them; choose smaller ones": (
            sum(margins) >= len(blocks)
        ),
        f"its attention is {attention!r}, which reads the layout of a sequence off arguments other than masks; load it "
        f"with attn_implementation='sdpa'": attention not in _ATTENTION,
        "its blocks have experts, whose balance is computed over all tokens of a batch": (
            len({branch.block for branch in partition.branches if branch.name == "ffn"}) < len(blocks)
        ),
        f"its blocks mix neighbouring tokens ({', '.join(mixing)})": bool(mixing),
        "its attention takes tensors per head, such as position biases, with axes of tokens": any(
            entry.kind == "argument" for branch in partition.branches for entry in branch.per_head
        ),
        "some of its blocks mix tokens otherwise than by attention": any(
            block not in {branch.block for branch in partition.branches if branch.name == "attention"}
            for block in range(len(blocks))
        ),
        "its blocks do not see the same tokens: it has several stacks, or cross attention; choose another policy": (
            partition.several
        ),
        "its blocks do not name their hidden_states": (
            "hidden_states" not in inspect.signature(type(first).forward).parameters
        ),
        "some of its blocks run on another machine": any(
            f"{name}.".startswith(parts_elsewhere(model)) for name in blocks
        ),
        "token_choice='variance' is for images, and it has no convolution that makes tokens of patches": (
            choice == "variance" and not find_patches(model, partition)
        ),
        "token_choice='attention' looks at later tokens, which causal attention must not; choose 'random' or 'grid'": (
            choice == "attention" and _is_causal(model, partition)
        ),
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"rows='tokens' is not possible with model_type={kind!r}: {reason}.")


def _is_causal(model: nn.Module, partition: Partition) -> bool:
    region = next(branch.region for branch in partition.branches if branch.name == "attention")
    return bool(getattr(model.get_submodule(region), "is_causal", True))


def _real(arguments: dict[str, Any]) -> Tensor | None:
    """Which tokens are no padding, bool [B, T]; None if there is no mask. A real token attends to itself.

    Raises:
        ValueError: If a row packs several samples: positions start again from one real token to the next.
    """
    samples, tokens = arguments["hidden_states"].shape[:2]
    real, positions = _unmasked(arguments.get("attention_mask"), samples, tokens), arguments.get("position_ids")
    # One row of positions for several samples is the model's own; of others one number is read from the device.
    if isinstance(positions, Tensor) and positions.ndim == 2 and len(positions) == samples:
        falls = positions[:, 1:] < positions[:, :-1]
        if (falls if real is None else falls & real[:, 1:] & real[:, :-1]).any():
            raise ValueError(
                "position_ids start again within a row: it packs several samples, of which rows='tokens' would mix "
                "the tokens up; leave packing off."
            )
    return real


def _unmasked(mask: Tensor | None, samples: int, tokens: int) -> Tensor | None:
    if mask is None:
        return None
    _check_mask(mask, tokens)
    of_tokens = mask[:, 0, 0] if mask.shape[2] == 1 else mask[:, 0].diagonal(dim1=1, dim2=2)
    if mask.is_floating_point():  # added to scores
        of_tokens = of_tokens > torch.finfo(mask.dtype).min / 2
    return (of_tokens != 0).expand(samples, tokens)


def _check_mask(mask: Any, tokens: int) -> None:
    fits = isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[3] == tokens and mask.shape[2] in (1, tokens)
    if not fits:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask={shape}: rows='tokens' knows masks [B, 1, {tokens}, {tokens}] and [B, 1, 1, {tokens}] "
            "only; load the model with attn_implementation='sdpa'."
        )


def _at(name: str, value: Any, selection: TokenSelection, hidden: Tensor) -> Any:
    """An argument of a block, for the chosen tokens only.

    Raises:
        ValueError: If it has an axis of tokens whose meaning is not known, or packs several samples into a row.
    """
    tokens = selection.tokens
    if value is None or isinstance(value, Cache):
        return value
    if name == "hidden_states":
        return selection.gather(value)
    if name == "attention_mask":
        _check_mask(value, tokens)
        return selection.of_keys(value) if value.shape[2] == 1 else selection.of_pairs(value)
    if name == "position_ids" and value.ndim == 2:
        return selection.along(value)
    if name == "position_embeddings" and isinstance(value, tuple) and all(part.ndim == 3 for part in value):
        return tuple(selection.along(part) for part in value)
    if name == "cache_position" and value.ndim == 1:
        return value[: selection.kept]
    if name.startswith("cu_seq_lens") or name == "seq_idx":
        raise ValueError(f"{name} packs several samples into a row, of which rows='tokens' would mix the tokens up.")
    if _has_axis(value, tokens):
        raise ValueError(
            f"the blocks take {name!r} with an axis of {tokens}, the number of tokens, and rows='tokens' does not know "
            "what it is; choose another policy, such as 'fewer_samples'."
        )
    return value


def _has_axis(value: Any, size: int) -> bool:
    if isinstance(value, Tensor):
        return size in value.shape
    if isinstance(value, Mapping):
        return any(_has_axis(item, size) for item in value.values())
    return isinstance(value, (tuple, list)) and any(_has_axis(item, size) for item in value)
