"""What a run may spend when its budget is a share of plain training's compute, and what it has spent."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Account:
    """Keeps a run within a share of what plain training would compute on the same batches, in FLOPs.

    A step may spend its own share and whatever earlier steps left of theirs. What exact savings are worth is not
    foreseen but seen: `savings` is the ratio of what ran to what the same samples would have cost as plain training
    runs them, over all steps so far.

    Attributes:
        share: Share of plain training's compute, in (0, 1].
        left: What earlier steps left, or if negative spent too much.
        per_step: What every step puts aside for a pass that was made before the first one.
        steps: Steps that still do.
        foreseen, executed: What was chosen so far, at plain training's cost and as it ran.
    """

    share: float
    left: float = 0.0
    per_step: float = 0.0
    steps: int = 0
    foreseen: float = 0.0
    executed: float = 0.0

    @property
    def savings(self) -> float:
        """Cost of what runs relative to its cost in plain training."""
        return self.executed / self.foreseen if self.foreseen else 1.0

    def prepay(self, flops: float, steps: int) -> None:
        """Spread over the next steps what was spent before them."""
        self.per_step, self.steps = flops / max(steps, 1), steps

    def allowance(self, plain: float) -> float:
        """What a step may spend whose batches cost plain training so much, at plain training's prices."""
        return max(0.0, self.share * plain - self._aside + self.left) / self.savings

    def settle(self, plain: float, foreseen: float, executed: float) -> None:
        """A step is over.

        Args:
            plain: What plain training would have spent on its batches.
            foreseen: What it would have spent on the samples that ran.
            executed: What they cost.
        """
        self.left += self.share * plain - self._aside - executed
        self.steps = max(0, self.steps - 1)
        self.foreseen += foreseen
        self.executed += executed

    @property
    def _aside(self) -> float:
        return self.per_step if self.steps else 0.0

    def state(self) -> dict:
        """What a checkpoint holds; JSON-friendly."""
        return asdict(self)

    def load_state(self, state: dict) -> None:
        """Go on with a checkpoint's figures, under the share that is configured now."""
        for name, value in state.items():
            if name != "share":
                setattr(self, name, value)
