"""Whether D2FT pays, from measurements with their uncertainty."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np


# Student's t, two-sided 95 %, by degrees of freedom; beyond, that of the normal distribution is close enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
        2.110, 2.101, 2.093, 2.086)  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval; infinite where there is one value only."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """The interval of Student's t over independent values, at least one."""
        values = np.asarray(values, dtype=float)
        mean, n = float(values.mean()), len(values)
        if n < 2:
            return cls(mean, -np.inf, np.inf)
        t = _T95[n - 2] if n - 2 < len(_T95) else 1.96 + 2.5 / (n - 1)
        half = float(t * values.std(ddof=1) / np.sqrt(n))
        return cls(mean, mean - half, mean + half)

    @classmethod
    def of_ratios(cls, values: Sequence[float]) -> Interval:
        """The same of ratios, by their logarithms."""
        one = cls.of(np.log(np.asarray(values, dtype=float)))
        return cls(*(float(np.exp(bound)) for bound in (one.mean, one.low, one.high)))

    def __neg__(self) -> Interval:
        return Interval(-self.mean, -self.high, -self.low)

    def as_json(self) -> dict[str, float]:
        """Bounds that are infinite are none for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """The answer, and why.

    Attributes:
        answer: "worth it", "not worth it" or "not decided".
        because: A sentence.
    """

    answer: Literal["worth it", "not worth it", "not decided"]
    because: str

    def __str__(self) -> str:
        return f"{self.answer} here, because {self.because}"

    def as_json(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def judge(
    time: Interval,
    loss: Interval,
    beside_fewer: Interval | None,
    tolerance: float,
    accuracy: Interval | None = None,
) -> Verdict:
    """Judge D2FT beside plain training.

    Args:
        time: Seconds of a step, relative to plain training's.
        loss: Difference of the loss at the end, relative to plain training's loss; positive is worse.
        beside_fewer: The same difference to plain training on fewer samples, which saves as much without D2FT.
        tolerance: How much higher a loss may be, relative to plain training's, and still count as equal; likewise how
            much lower an accuracy, as a share of the samples.
        accuracy: Difference of the accuracy to plain training's, positive is better; None where there is none.
    """
    seconds = f"a step takes {_range(time)} of plain training's time"
    higher = f"the loss ends {_percent(loss)} of plain training's"
    if not time.low < 1:
        return Verdict("not worth it", f"no time is saved: {seconds}.")
    if loss.low > 0:
        return Verdict("not worth it", f"{higher} higher, though {seconds}.")
    if accuracy is not None and accuracy.high < 0:
        return Verdict(
            "not worth it", f"the accuracy ends {_percent(-accuracy)} points below plain training's, though {seconds}."
        )
    if beside_fewer is not None and beside_fewer.low > 0:
        return Verdict(
            "not worth it",
            f"plain training on fewer samples, which needs nothing of D2FT, ends with a lower loss: {higher} apart "
            f"from plain, and {_percent(beside_fewer)} above that of fewer samples.",
        )
    if not time.high < 1:
        return Verdict("not decided", f"whether time is saved is within the noise: {seconds}; measure more steps.")
    if loss.high > tolerance:
        return Verdict(
            "not decided",
            f"{seconds}, but the loss may end as much as {_bound(loss.high)} higher, and {tolerance:.1%} count as "
            "equal; run more seeds or more steps.",
        )
    if accuracy is not None and accuracy.low < -tolerance:
        return Verdict(
            "not decided",
            f"{seconds}, but the accuracy may end as many as {_bound(-accuracy.low)} points lower, and "
            f"{tolerance:.1%} count as equal; run more seeds, or hold out more samples.",
        )
    return Verdict(
        "worth it", f"{seconds}, and the loss ends no more than {_bound(loss.high)} higher. {_than(beside_fewer)}"
    )


def _than(beside_fewer: Interval | None) -> str:
    if beside_fewer is None:
        return ""
    if beside_fewer.high < 0:
        return f"It ends {_percent(-beside_fewer)} lower than plain training on fewer samples."
    return "Plain training on fewer samples is not told apart from it."


def _range(one: Interval) -> str:
    if not np.isfinite(one.high):
        return f"{one.mean:.2f} (one measurement)"
    return f"{one.mean:.2f} ({one.low:.2f} to {one.high:.2f})"


def _percent(one: Interval) -> str:
    if not np.isfinite(one.high):
        return f"{one.mean:.1%} (one run)"
    return f"{one.mean:.1%} ({one.low:.1%} to {one.high:.1%})"


def _bound(value: float) -> str:
    return f"{max(value, 0):.1%}" if np.isfinite(value) else "any amount"
