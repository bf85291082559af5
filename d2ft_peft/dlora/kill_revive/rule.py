"""Kill-and-Revive as numbers: which modules train next. No torch; the same numbers in, the same decision out.

DLoRA, arXiv 2404.05182: a module's responsiveness is the L2 norm of its parameters' change over an interval. The least
responsive active modules are killed, idle ones that became responsive are revived, and the number of active modules
stays. How an idle module, whose parameters do not change, can become responsive the paper does not say: see
`KillReviveRule.idle`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from numbers import Integral, Real
from typing import Any

import numpy as np


_CHOICES = {
    "unit": ("steps", "epochs"),
    "choose": ("responsive", "fixed", "redrawn", "top"),
    "idle": ("probe", "last", "random"),
    "norm": ("l2", "relative", "rms"),
}


@dataclass(frozen=True)
class KillReviveRule:
    """How modules are chosen.

    Attributes:
        active: Modules that train at a time, k of the paper.
        interval: Time between two decisions.
        unit: What `interval` and `warmup` count: optimizer steps, or epochs, which need not be whole.
        warmup: Time at the start in which all modules train, so that something is known of each; then those that
            changed most stay. 0: modules drawn at random are the first.
        choose: ``"responsive"`` is Kill-and-Revive. The others are what it has to beat: ``"fixed"`` keeps the modules
            drawn at the start, ``"redrawn"`` draws them anew at every decision, and ``"top"`` keeps those that changed
            most in the warm-up, or else in the first interval.
        idle: What an idle module's responsiveness is. ``"last"``: what it was when the module was last active, times
            the factor by which that of active modules has changed since (their median); one that never was active
            comes first. ``"probe"``: the norm of its gradient in one micro-batch, times its change for each unit of
            gradient when it was last active, followed in the same way; for one that never was active, the median of
            the active ones. ``"random"``: not known; `max_swaps` idle modules drawn at random get a turn at every
            decision.
        decay: For ``idle="last"``, within (0, 1]: a further factor for every decision since, to forget.
        norm: ``"l2"`` as in the paper, which large modules win; ``"relative"`` divides by the norm of the parameters,
            ``"rms"`` by the square root of their number.
        margin: An idle module must be this share more responsive than the one in whose place it comes, or nothing is
            swapped. Chance moves modules by a few per cent.
        max_swaps: Most modules killed in one decision; None: all, for ``idle="random"`` a quarter of them.
        seed: Of all draws.
    """

    active: int = 16
    interval: float = 20
    unit: str = "steps"
    warmup: float = 0
    choose: str = "responsive"
    idle: str = "probe"
    decay: float = 1.0
    norm: str = "l2"
    margin: float = 0.1
    max_swaps: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(map(repr, choices))}.")
        self._check_number("active", 1, whole=True, remedy="at least one module must train")
        whole = self.unit == "steps"
        self._check_number("interval", 1 if whole else 0, whole, "use unit='epochs' for shares of an epoch")
        if self.interval == 0:
            raise ValueError("interval=0 must be positive; give the share of an epoch between two decisions.")
        self._check_number("warmup", 0, whole, "use unit='epochs' for shares of an epoch")
        self._check_number("margin", 0, remedy="0 swaps on any difference")
        self._check_number("seed", 0, whole=True, remedy="it seeds numpy's generator")
        if self.max_swaps is not None:
            self._check_number("max_swaps", 1, whole=True, remedy="choose='fixed' never swaps, None sets no limit")
        self._check_number("decay", 0, remedy="1 remembers for ever")
        if not 0 < self.decay <= 1:
            raise ValueError(f"decay={self.decay!r} must lie within (0, 1]; 1 remembers for ever.")

    def _check_number(self, name: str, least: float, whole: bool = False, remedy: str = "") -> None:
        value, kind = getattr(self, name), Integral if whole else Real
        if isinstance(value, bool) or not isinstance(value, kind) or not math.isfinite(value) or value < least:
            noun = "whole number" if whole else "finite number"
            raise ValueError(f"{name}={value!r} must be a {noun}, at least {least}; {remedy}.")

    @property
    def compares(self) -> bool:
        """Whether decisions read how much modules changed."""
        return self.choose in ("responsive", "top")

    @property
    def probes(self) -> bool:
        """Whether decisions read gradients of idle modules."""
        return self.choose == "responsive" and self.idle == "probe"

    def in_steps(self, steps_per_epoch: int | None) -> tuple[float, float]:
        """Warm-up and interval in optimizer steps.

        Raises:
            ValueError: If they are given in epochs of unknown length.
        """
        if self.unit == "steps":
            return float(self.warmup), float(self.interval)
        if steps_per_epoch is None:
            raise ValueError("unit='epochs' needs the number of steps in an epoch; give steps_per_epoch, or use steps.")
        return self.warmup * steps_per_epoch, self.interval * steps_per_epoch


@dataclass(frozen=True)
class KillReviveState:
    """What a decision depends on besides what was just observed.

    Attributes:
        active: Indices of the active modules, ascending.
        known: Responsiveness last known of every module; None if nothing is known of it.
        decisions: How many were made.
        rates: Change for each unit of gradient norm, as far as known; for ``idle="probe"``.
    """

    active: tuple[int, ...]
    known: tuple[float | None, ...]
    decisions: int = 0
    rates: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        active, size = self.active, len(self.known)
        if any(isinstance(i, bool) or not isinstance(i, Integral) or not 0 <= i < size for i in active):
            raise ValueError(f"active={active!r} must be indices of {size} modules, 0 to {size - 1}.")
        if not active or list(active) != sorted(set(active)):
            raise ValueError(f"active={active!r} must be ascending, without repetition, and not empty.")
        if isinstance(self.decisions, bool) or not isinstance(self.decisions, Integral) or self.decisions < 0:
            raise ValueError(f"decisions={self.decisions!r} must be a whole number, at least 0.")
        object.__setattr__(self, "known", _observed("known", self.known, size))
        object.__setattr__(self, "rates", _observed("rates", self.rates or None, size))

    def to_json(self) -> str:
        """A string from which `from_json` makes an equal state."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> KillReviveState:
        """The state that a string stands for; raises ValueError if it stands for none."""
        values = json.loads(text)
        names = {field.name for field in fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            raise ValueError(f"a state of Kill-and-Revive has the fields {sorted(names)}, not {values!r}.")
        lists = {name: values[name] for name in ("active", "known", "rates")}
        if not all(isinstance(value, list) for value in lists.values()):
            raise ValueError(f"active, known and rates must be lists, not {lists!r}.")
        return cls(**{**values, **{name: tuple(value) for name, value in lists.items()}})


@dataclass(frozen=True)
class Observations:
    """What was seen in an interval, a number for each module; None, NaN or infinity where nothing was.

    Attributes:
        change: L2 norm of the change of its parameters since the last decision; of active modules.
        gradient: L2 norm of its gradient in one micro-batch; of all modules, for ``idle="probe"``.
        scale: What its responsiveness is divided by, positive; None for 1.
    """

    change: Sequence[float | None]
    gradient: Sequence[float | None] | None = None
    scale: Sequence[float | None] | None = None


Decision = tuple[KillReviveState, tuple[int, ...], tuple[int, ...]]
"""The state after a decision, and the indices that were killed and revived, ascending."""


def first_state(rule: KillReviveRule, num_modules: int) -> KillReviveState:
    """The modules that train first, drawn at random; all of them where all are compared first.

    Raises:
        ValueError: If there is no module.
    """
    if num_modules < 1:
        raise ValueError(f"num_modules={num_modules} must be at least 1.")
    everything = rule.choose == "top" or (rule.compares and rule.warmup > 0)
    k = num_modules if everything else min(rule.active, num_modules)
    drawn = np.random.default_rng((rule.seed, 0)).choice(num_modules, k, replace=False)
    return KillReviveState(tuple(sorted(drawn.tolist())), (None,) * num_modules)


def is_due(step: int, warmup: float, interval: float) -> bool:
    """Whether a decision follows optimizer step `step`, counted from 1: at the end of the warm-up, if there is one, and
    of each interval after it. Times in steps, which need not be whole."""

    def intervals(at: int) -> int:
        return math.floor((at - warmup) / interval + 1e-9)  # 0.1 x 30 is a little more than 3

    return intervals(step) >= (0 if warmup else 1) and intervals(step) > intervals(step - 1)


def decide(rule: KillReviveRule, state: KillReviveState, observations: Observations) -> Decision:
    """Kill and revive.

    Args:
        rule: How.
        state: The state that the last decision left, or `first_state`.
        observations: What was seen since.

    Returns:
        The new state; modules killed, which were active; modules revived, which were idle. As many of the one as of the
        other, but where all were active until now.

    Raises:
        ValueError: If the numbers of modules differ, or a norm is negative or no number.
    """
    size = len(state.known)
    known, rates = _responsiveness(rule, state, observations)
    rng = np.random.default_rng((rule.seed, state.decisions + 1))
    k = min(rule.active, size)
    if rule.choose == "fixed":
        active = set(state.active)
    elif rule.choose == "redrawn":
        active = set(rng.choice(size, k, replace=False).tolist())
    elif rule.choose == "top" or len(state.active) > k:
        active = set(sorted(state.active, key=lambda i: (-(known[i] or 0.0), i))[:k])
    else:
        active = _swapped(rule, state, known, rng)
    after = replace(state, active=tuple(sorted(active)), known=known, rates=rates, decisions=state.decisions + 1)
    return after, tuple(sorted(set(state.active) - active)), tuple(sorted(active - set(state.active)))


def check_decision(
    before: KillReviveState, after: KillReviveState, killed: Sequence[int], revived: Sequence[int]
) -> None:
    """Raise ValueError if a decision that was made elsewhere does not fit."""
    was, now = set(before.active), set(after.active)
    if len(after.known) != len(before.known) or set(killed) != was - now or set(revived) != now - was:
        raise ValueError(
            f"the decision does not fit: killed={tuple(killed)} and revived={tuple(revived)} do not lead from "
            f"active={before.active} to {after.active} of {len(after.known)} modules; return what rule.decide returns."
        )


def _swapped(
    rule: KillReviveRule, state: KillReviveState, known: Sequence[float | None], rng: np.random.Generator
) -> set[int]:
    """The active modules after the least responsive ones made room for more responsive idle ones."""
    lot = rng.permutation(len(known))  # breaks ties
    active = set(state.active)
    worst_first = sorted(active, key=lambda i: (known[i] or 0.0, lot[i]))
    if rule.idle == "random":
        most = rule.max_swaps or max(1, len(active) // 4)
        idle = sorted(set(range(len(known))) - active, key=lambda i: lot[i])
        pairs = list(zip(worst_first, idle, strict=False))[:most]
        return active - {i for i, _ in pairs} | {j for _, j in pairs}
    unknown = math.inf if rule.idle == "last" else 0.0
    value = {j: unknown if known[j] is None else known[j] for j in range(len(known)) if j not in active}
    best_first = sorted(value, key=lambda j: (-value[j], lot[j]))
    for i, j in list(zip(worst_first, best_first, strict=False))[: rule.max_swaps]:
        if value[j] <= (known[i] or 0.0) * (1 + rule.margin):
            break
        active = active - {i} | {j}
    return active


Norms = tuple[float | None, ...]


def _responsiveness(rule: KillReviveRule, state: KillReviveState, observations: Observations) -> tuple[Norms, Norms]:
    """What is known of every module now, observed, expected or as it was before; and changes by gradient norm."""
    size = len(state.known)
    change = _observed("change", observations.change, size)
    gradient = _observed("gradient", observations.gradient, size)
    scale = _observed("scale", observations.scale, size)
    if 0.0 in scale:
        raise ValueError(f"scale={observations.scale!r} must be positive; give None where it is not known.")
    active = set(state.active)
    idle = [i for i in range(size) if i not in active]
    seen = [_ratio(change[i], scale[i] or 1.0) if i in active else None for i in range(size)]
    known = [old if new is None else new for old, new in zip(state.known, seen, strict=True)]
    measured = [_ratio(change[i], gradient[i]) if i in active else None for i in range(size)]
    rates = [old if new is None else new for old, new in zip(state.rates, measured, strict=True)]
    slowed = _median(map(_ratio, seen, state.known), 1.0)
    rates_slowed, usual = _median(map(_ratio, measured, state.rates), 1.0), _median(measured, None)
    for i in idle:
        if rule.idle == "last":
            known[i] = _product(known[i], slowed * rule.decay)
        elif rule.idle == "probe" and gradient[i] is not None:
            rates[i] = _product(rates[i], rates_slowed)
            expected = _product(usual if rates[i] is None else rates[i], gradient[i] / (scale[i] or 1.0))
            known[i] = known[i] if expected is None else expected
    return tuple(known), tuple(rates)


def _ratio(above: float | None, below: float | None) -> float | None:
    """Quotient of two norms; None if it is not known or not finite."""
    if above is None or not below:
        return None
    return above / below if math.isfinite(above / below) else None


def _product(norm: float | None, factor: float) -> float | None:
    """Product of a norm and a factor; None if it is not known or not finite."""
    return None if norm is None or not math.isfinite(norm * factor) else norm * factor


def _median(values: Iterable[float | None], otherwise: float | None) -> float | None:
    """Median of those that are known; `otherwise` if none is."""
    there = [value for value in values if value is not None]
    return float(np.median(there)) if there else otherwise


def _observed(name: str, values: Any, size: int) -> tuple[float | None, ...]:
    """Norms of `size` modules as floats; None for those that are not known or not finite."""
    if values is None:
        return (None,) * size
    if isinstance(values, str) or len(values) != size:
        raise ValueError(f"{name} has {len(values)} entries, it must have one for each of {size} modules.")
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or value < 0):
            raise ValueError(f"{name} holds {value!r}; entries must be norms, not negative, or None.")
    return tuple(float(v) if v is not None and math.isfinite(v) else None for v in values)
