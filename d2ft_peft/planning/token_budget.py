"""How many tokens pass the middle blocks in which step, so that training as a whole keeps its budget."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

import numpy as np

from ..engine.token_choice import TokenChoice
from ..processes import rank
from .model_costs import ModelCosts, Pass


if TYPE_CHECKING:
    from ..tuners import D2FTConfig

_FEWEST = 2
"""The tokens that are always kept: the first, and the last that is no padding."""


class TokenBudget:
    """Chooses the tokens of every micro-batch under ``rows="tokens"``.

    The budget is a share of a whole step's FLOPs, embeddings and head included, on average over training: what the
    last steps on all tokens (and a ramp at the start) take more, the others take less.

    Args:
        config: What the user asked for.
        costs: What the model costs.
        num_blocks: Blocks of the model.

    Attributes:
        blocks: Indices of the middle blocks.
    """

    def __init__(self, config: D2FTConfig, costs: ModelCosts, num_blocks: int):
        self.config, self.costs = config, costs
        self.blocks = range(config.token_margins[0], num_blocks - config.token_margins[1])
        self._step, self._steps, self._begun = 0, None, 0
        self._share = 1.0
        self._probe, self._known = costs.probe, {}

    def begin_step(self, step: int, steps: int | None) -> None:
        """An optimizer step begins.

        Args:
            step: Its number, from 0.
            steps: Steps of the whole run.

        Raises:
            ValueError: If the number of steps is needed and not known, or the budget is too small for the steps on
                more tokens.
        """
        config = self.config
        if steps is None and (config.token_dense_share or config.token_ramp):
            raise ValueError(
                f"token_dense_share={config.token_dense_share} and token_ramp={config.token_ramp} are shares of all "
                "steps, whose number a planner on its own does not know; give D2FTPlanner(model, steps=...), or set "
                "both to 0."
            )
        self._step, self._steps, self._begun = step, steps, 0
        budget = config.budget.compute
        self._share = budget if steps is None else share_of_step(
            budget, step, steps, config.token_dense_share, config.token_ramp
        )  # fmt: skip

    def next_micro_batch(self) -> TokenChoice:
        """How the next micro-batch of the step chooses: its draws depend on seed, process, step and its number alone,
        so that a resumed run draws the same."""
        seed = (self.config.seed, rank(), self._step, self._begun)
        self._begun += 1
        share = self._share
        return TokenChoice(self.config.token_choice, self.blocks, lambda tokens: self.kept(tokens, share), seed)

    def kept(self, tokens: int, share: float) -> int:
        """Most tokens of a sample that may pass the middle blocks, so that a step costs `share` of a plain one.

        Args:
            tokens: Tokens of a sample, padded ones included.
            share: Of the FLOPs, in (0, 1].

        Raises:
            ValueError: If even two tokens cost more.
        """
        if share >= 1 or tokens <= _FEWEST:
            return tokens
        if self._probe is not self.costs.probe:  # what lies around the blocks was learned meanwhile
            self._probe, self._known = self.costs.probe, {}
        if (tokens, share) not in self._known:
            self._known[tokens, share] = self._most(tokens, share)
        return self._known[tokens, share]

    def _most(self, tokens: int, share: float) -> int:
        def cost(kept: int) -> float:
            return self.costs.share_of_full(tokens, kept)

        kept = bisect_right(range(_FEWEST, tokens + 1), share, key=cost) + _FEWEST - 1
        if kept < _FEWEST:
            raise ValueError(
                f"compute_budget={self.config.budget.compute} leaves {share:.3f} of the FLOPs to a step on "
                f"sequences of {tokens} tokens, of which what lies around its middle blocks takes {cost(_FEWEST):.3f}: "
                "raise the budget, or lower token_margins, token_dense_share or token_ramp."
            )
        return kept

    def check_ran(self, passes: list[Pass]) -> None:
        """Speak if blocks ran on all tokens where some were to be left out.

        Raises:
            RuntimeError: They did; something stands between D2FT and the blocks.
        """
        for _, tokens, *kept in passes:
            if not kept and self.kept(tokens, self._share) < tokens:
                raise RuntimeError(
                    "rows='tokens', and the middle blocks ran on all tokens: they are in eval mode, or something "
                    "replaced their forward after get_peft_model; wrap the model last."
                )


def share_of_step(budget: float, step: int, steps: int, dense: float, ramp: float) -> float:
    """The share of a plain step's FLOPs that a step may take, so that the mean over all steps is the budget.

    Args:
        budget: The mean, in (0, 1].
        step, steps: Number of the step, from 0, and of all of them.
        dense: Share of the last steps that run on all tokens.
        ramp: Share of the first steps over which the number of tokens falls from all to what the others keep.

    Raises:
        ValueError: If the steps on more tokens take the whole budget.
    """
    density = np.zeros(steps)
    first = round(ramp * steps)
    density[:first] = 1 - np.arange(first) / max(first, 1)
    density[steps - round(dense * steps) :] = 1
    mean = density.mean()
    if mean >= budget and budget < 1:
        raise ValueError(
            f"compute_budget={budget} is taken up by the steps on more tokens (token_dense_share={dense}, "
            f"token_ramp={ramp}: {mean:.3f} of all work); raise it, or lower these."
        )
    base = 1.0 if budget >= 1 else (budget - mean) / (1 - mean)
    return float(base + (1 - base) * density[min(step, steps - 1)])
