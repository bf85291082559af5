"""Which tokens of a batch pass a block, and which take the residual: SHORTCUT for (token, block)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


FLOOR = 0.1
"""Least weight of a token in a draw, relative to the mean of its sample: no patch is never looked at."""

_LEFT_OUT, _BACKGROUND, _ALWAYS = -1e30, -1.0, 1e30
"""Keys of padding, of real tokens beside a regular grid, and of tokens that are always kept."""


@dataclass
class TokenChoice:
    """How the tokens of one micro-batch are chosen.

    Attributes:
        kind: ``"random"``; ``"random_per_block"``, every block draws anew (random-LTD, arXiv 2211.11586), where the
            others draw once for all blocks; ``"grid"``, regular with a phase at random; ``"variance"``, drawn in
            proportion to the variance of a patch's pixels; ``"attention"``, in proportion to what the sample's mean
            token would attend to.
        blocks: Indices of the middle blocks.
        keep: How many tokens of a sequence of a given length pass them.
        seed: Entropy of the draws.
        variance: Variance of the pixels of each patch, [B, N], of the images that went through the model last.
    """

    kind: str
    blocks: range
    keep: Callable[[int], int]
    seed: tuple[int, ...]
    variance: Tensor | None = None
    _generator: torch.Generator | None = field(default=None, repr=False)

    def new_pass(self) -> TokenPass:
        """The choices of the next forward pass."""
        if self._generator is None:
            # On the host: the same tokens are drawn whatever the device is.
            (state,) = np.random.SeedSequence(self.seed).generate_state(1, np.uint64)
            self._generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        return TokenPass(self)

    def draw(self, hidden: Tensor, real: Tensor | None, is_causal: bool) -> TokenSelection | None:
        """Choose tokens of a batch.

        Args:
            hidden: Hidden states [B, T, d] that enter the block.
            real: Which tokens are no padding, bool [B, T], or None if all are.
            is_causal: Whether tokens attend to earlier ones only: a classifier then reads the last real one.

        Returns:
            The choice, or None if all tokens are kept.
        """
        samples, tokens = hidden.shape[:2]
        keep = self.keep(tokens)
        if keep >= tokens:
            return None
        real = hidden.new_ones(samples, tokens, dtype=torch.bool) if real is None else real
        always = _always(real, is_causal)
        if self.kind == "grid":
            phase = torch.rand(samples, 1, generator=self._generator).to(hidden.device)
            keys = _grid(real & ~always, keep - always.sum(1, keepdim=True), phase)
        else:
            weights = self._weights(hidden, real)
            uniform = torch.rand(samples, tokens, generator=self._generator).clamp_min(1e-20).to(hidden.device)
            # Gumbel noise on log weights: the order is that of successive draws without replacement.
            keys = (0.0 if weights is None else weights.log()) - (-uniform.log()).clamp_min(1e-20).log()
        keys = keys.masked_fill(~real, _LEFT_OUT).masked_fill(always, _ALWAYS)
        return TokenSelection(keys.topk(keep, dim=1).indices.sort(dim=1).values, tokens)

    def _weights(self, hidden: Tensor, real: Tensor) -> Tensor | None:
        """Weights of the draw, [B, T] and positive, or None where all are alike."""
        if self.kind not in ("variance", "attention"):
            return None
        weights = self._of_patches(hidden) if self.kind == "variance" else _received(hidden.detach().float(), real)
        mean = (weights * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)
        return (weights / mean.clamp_min(1e-20)).clamp_min(FLOOR)

    def _of_patches(self, hidden: Tensor) -> Tensor:
        samples, tokens = hidden.shape[:2]
        if self.variance is None or len(self.variance) != samples or self.variance.shape[1] > tokens:
            shape = None if self.variance is None else list(self.variance.shape)
            raise ValueError(
                f"token_choice='variance' found variances of patches of shape {shape} for hidden states of shape "
                f"{list(hidden.shape)}; it is for images whose patches are the tokens: choose 'random' or 'grid'."
            )
        before = tokens - self.variance.shape[1]  # class and register tokens stand before the patches
        return torch.cat([self.variance.mean().expand(samples, before), self.variance], 1)


@dataclass
class TokenPass:
    """The choices of one forward pass; its recomputation under gradient checkpointing finds the same ones.

    Attributes:
        choice: How tokens are chosen.
        selections: What was chosen, by the index of the block (``"random_per_block"``), or once for all.
    """

    choice: TokenChoice
    selections: dict[int | None, TokenSelection | None] = field(default_factory=dict)
    _real: list[Tensor | None] = field(default_factory=list)

    def selection(
        self, block: int, hidden: Tensor, real: Callable[[], Tensor | None], is_causal: bool
    ) -> TokenSelection | None:
        """The tokens that pass a block, `real` is asked once a pass; see `TokenChoice.draw`."""
        key = block if self.choice.kind == "random_per_block" else None
        if key not in self.selections:
            with torch.no_grad():
                self._real = self._real or [real()]
                self.selections[key] = self.choice.draw(hidden, self._real[0], is_causal)
        return self.selections[key]


class TokenSelection:
    """Chosen tokens of a batch.

    Args:
        index: Positions of the kept tokens of each sample, ascending, int64 [B, K].
        tokens: Tokens of a sample, T.
    """

    def __init__(self, index: Tensor, tokens: int):
        self.index, self.tokens = index, tokens
        self._rows = (index + tokens * torch.arange(len(index), device=index.device)[:, None]).flatten()
        self._taken: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def kept(self) -> int:
        """Tokens of a sample that are kept, K."""
        return self.index.shape[1]

    def gather(self, hidden: Tensor) -> Tensor:
        """The kept tokens of hidden states [B, T, d], as [B, K, d]."""
        return hidden.flatten(0, 1).index_select(0, self._rows).unflatten(0, self.index.shape)

    def scatter(self, kept: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states [B, T, d] with the kept tokens [B, K, d] in their places."""
        return hidden.flatten(0, 1).index_copy(0, self._rows, kept.flatten(0, 1)).view_as(hidden)

    def along(self, tensor: Tensor) -> Tensor:
        """A tensor [B or 1, T, ...] at the kept tokens, [B, K, ...]; remembered, since all blocks ask for the same."""
        return self._remembered(tensor, lambda: self._of_all(tensor)[self._samples(1), self.index])

    def of_pairs(self, tensor: Tensor) -> Tensor:
        """A tensor [B or 1, H, T, T] at the pairs of kept tokens, [B, H, K, K]; remembered."""
        rows, columns = self.index[:, :, None], self.index[:, None, :]
        # Indices that are parted by a slice come out first.
        return self._remembered(
            tensor, lambda: self._of_all(tensor)[self._samples(2), :, rows, columns].permute(0, 3, 1, 2)
        )

    def of_keys(self, tensor: Tensor) -> Tensor:
        """A tensor [B or 1, H, 1, T] at the kept tokens, [B, H, 1, K]; remembered."""
        return self._remembered(
            tensor, lambda: self._of_all(tensor)[self._samples(1), :, :, self.index].permute(0, 2, 3, 1)
        )

    def _of_all(self, tensor: Tensor) -> Tensor:
        return tensor.expand(len(self.index), *tensor.shape[1:])

    def _samples(self, axes: int) -> Tensor:
        return torch.arange(len(self.index), device=self.index.device).reshape(-1, *[1] * axes)

    def _remembered(self, tensor: Tensor, take: Callable[[], Tensor]) -> Tensor:
        if id(tensor) not in self._taken:
            self._taken[id(tensor)] = tensor, take()  # the tensor is held, so that its id stays its own
        return self._taken[id(tensor)][1]


def _always(real: Tensor, is_causal: bool) -> Tensor:
    """Tokens that are always kept, bool [B, T]: the first real one (class token, attention sink), and the last one
    where attention is causal."""
    order = torch.arange(real.shape[1], device=real.device)
    always = order == real.int().argmax(1, keepdim=True)
    if is_causal:
        always = always | (order == (order * real).argmax(1, keepdim=True))
    return always & real


def _grid(candidates: Tensor, count: Tensor, phase: Tensor) -> Tensor:
    """Keys that let `count` [B, 1] candidates win which lie as regularly as possible, [B, T]."""
    number = candidates.sum(1, keepdim=True).clamp_min(1)
    position, step = candidates.cumsum(1) - candidates.int(), count / number
    wins = ((position + 1) * step + phase).floor() > (position * step + phase).floor()
    # What a rounding error leaves over or lacks is settled by position.
    return torch.where(wins | (step >= 1), 0.0, _BACKGROUND) - position * 1e-6


def _received(hidden: Tensor, real: Tensor) -> Tensor:
    """What the mean token of each sample would attend to, [B, T]: one product, instead of all pairs of tokens."""
    centred = torch.nn.functional.layer_norm(hidden, hidden.shape[-1:])
    mean = (centred * real[..., None]).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
    scores = torch.einsum("btd,bd->bt", centred, mean) / hidden.shape[-1] ** 0.5
    return scores.masked_fill(~real, _LEFT_OUT).softmax(1)
