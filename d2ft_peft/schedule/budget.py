"""How much work a training step may do, and what is possible at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from .operations import Operation
from .schedule import CAPACITY_TOLERANCE, full_loads


_HOW = "give exactly one of compute_budget, communication_budget, device_capacities and num_full"


@dataclass(frozen=True)
class Budget:
    """The work that a step may do: a share of all-FULL, or counts of micro-batches (arXiv 2504.12471, section 3).

    Exactly one of `compute`, `communication` and `num_full` is given. Messages use the names of the configuration:
    compute_budget, device_capacities (a tuple in `compute`), communication_budget, num_full, num_forward_only.

    Attributes:
        compute: share of its own all-FULL load that a device may do, in (0, 1]; a tuple gives each device its own.
        communication: share of its all-FULL communication that a device may do, in (0, 1].
        num_full: number of micro-batches that each subnet does FULL, at least 1.
        num_forward_only: number of micro-batches that each subnet does FORWARD_ONLY, beside num_full.

    Raises:
        ValueError: not exactly one is given, or a value is out of range.
    """

    compute: float | tuple[float, ...] | None = None
    communication: float | None = None
    num_full: int | None = None
    num_forward_only: int = 0

    def __post_init__(self):
        given = [name for name in ("compute", "communication", "num_full") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a budget has {len(given)} limits ({', '.join(given) or 'none'}); {_HOW}")
        if isinstance(self.compute, Sequence | np.ndarray) and not isinstance(self.compute, str | bytes):
            if len(self.compute) == 0:
                raise ValueError(f"device_capacities={self.compute!r} must have a share for each device; {_HOW}")
            shares = tuple(_share(f"device_capacities[{device}]", share) for device, share in enumerate(self.compute))
            object.__setattr__(self, "compute", shares)
        elif self.compute is not None:
            object.__setattr__(self, "compute", _share("compute_budget", self.compute))
        if self.communication is not None:
            object.__setattr__(self, "communication", _share("communication_budget", self.communication))
        self._check_counts()

    def _check_counts(self) -> None:
        if self.num_full is not None:
            object.__setattr__(self, "num_full", _count("num_full", self.num_full))
            if self.num_full == 0:
                raise ValueError("num_full=0 must be at least 1, or nothing trains; the nearest possible is 1")
        object.__setattr__(self, "num_forward_only", _count("num_forward_only", self.num_forward_only))
        if self.num_forward_only and self.num_full is None:
            raise ValueError(f"num_forward_only={self.num_forward_only} needs num_full; {_HOW}")

    @property
    def counts(self) -> tuple[int, int] | None:
        """(num_full, num_forward_only) if the budget is given in counts, else None."""
        return None if self.num_full is None else (self.num_full, self.num_forward_only)

    def leaves_forward_only_a_choice(self, num_micro_batches: int) -> bool:
        """Whether a forward score can have a say: FORWARD_ONLY fits beside the FULL cells that are taken first.

        Where FULL and FORWARD_ONLY counts fill the step, what is not FULL is FORWARD_ONLY, whatever the score.

        Args:
            num_micro_batches: micro-batches of a usual step.
        """
        if self.counts is not None:
            return 0 < self.num_forward_only < num_micro_batches - self.num_full
        if isinstance(self.compute, tuple):
            return True
        share = self.communication if self.compute is None else self.compute
        return (share * num_micro_batches) % 1 > CAPACITY_TOLERANCE

    def of_rest(self, num_micro_batches: int, usual: int, forward_only: float) -> "Budget":
        """The budget of the rest of an epoch: as many FULL micro-batches as are worth no less.

        Args:
            num_micro_batches: micro-batches of the rest.
            usual: micro-batches of a usual step, which counts refer to.
            forward_only: cost of FORWARD_ONLY relative to FULL.
        """
        if self.counts is not None:
            share = (self.num_full + self.num_forward_only * forward_only) / usual
        else:
            share = float(np.mean(self.communication if self.compute is None else self.compute))
        count = math.ceil(share * num_micro_batches * (1 - CAPACITY_TOLERANCE))
        return Budget(compute=min(1.0, count / num_micro_batches))

    def of_samples(self, num_samples: int, usual: int) -> "Budget":
        """The budget where samples are scheduled: their nearest whole number, and at least one.

        Args:
            num_samples: candidates of the step.
            usual: micro-batches of a usual step, which counts refer to.
        """
        if isinstance(self.compute, tuple):
            return self
        share = self.num_full / usual if self.counts is not None else self.communication or self.compute
        share = min(1.0, max(1, round(share * num_samples)) / num_samples)
        return Budget(compute=share) if self.communication is None else Budget(communication=share)

    def capacities(self, costs: np.ndarray, weights: np.ndarray, devices: np.ndarray) -> np.ndarray:
        """Compute that each device may do; [M], unit of costs * weights.

        For shares: share * load if all cells were FULL. For counts: mean weight of a micro-batch times the sum over
        the device's subnets of num_full * cost(FULL) + num_forward_only * cost(FORWARD_ONLY).

        Args:
            costs: float [K, 3], see `Schedule.costs`.
            weights: float [N], see `Schedule.weights`.
            devices: int [K], see `Schedule.devices`.

        Raises:
            ValueError: the budget is impossible or limits communication.
        """
        self.check(costs, weights, devices)
        if self.communication is not None:
            raise ValueError(
                f"communication_budget={self.communication:g} sets no compute capacity; "
                "give compute_budget or num_full to limit compute"
            )
        if self.counts is None:
            return np.asarray(self.compute) * full_loads(costs, weights, devices)
        per_subnet = self.num_full * costs[:, Operation.FULL] + self.num_forward_only * costs[:, Operation.FORWARD_ONLY]
        return np.bincount(devices, weights.mean() * per_subnet)

    def communication_capacities(self, weights: np.ndarray, devices: np.ndarray) -> np.ndarray:
        """Communication that each device may do: share * (its subnets) * (sum of weights); [M], unit of weights.

        Raises:
            ValueError: the budget does not limit communication.
        """
        if self.communication is None:
            raise ValueError("this budget does not limit communication; give communication_budget")
        return self.communication * np.bincount(devices) * weights.sum()

    def check(self, costs: np.ndarray, weights: np.ndarray, devices: np.ndarray) -> None:
        """Refuses a budget under which nothing could train.

        With one share for all, every device must be able to do at least one cell FULL; with a tuple at least one
        device must. Counts must fit into the number of micro-batches.

        Raises:
            ValueError: impossible; the message names the nearest possible budget.
        """
        if self.counts is not None:
            self._check_counts_fit(len(weights))
            return
        if self.communication is not None:
            costs = np.ones((len(costs), len(Operation)))
        cheapest = np.full(int(devices.max()) + 1, np.inf)
        np.minimum.at(cheapest, devices, costs[:, Operation.FULL] * weights.min())
        needed = cheapest / full_loads(costs, weights, devices)
        if isinstance(self.compute, tuple):
            self._check_tuple(needed)
            return
        share = self.compute if self.communication is None else self.communication
        if share * (1 + CAPACITY_TOLERANCE) < needed.max():
            raise self.impossible(float(needed.max()), len(weights), "FULL cell")

    def impossible(self, needed: float, num_micro_batches: int, what: str) -> ValueError:
        """The error for a share that is too small; names the smallest share that is possible.

        Args:
            needed: the smallest share that is possible.
            num_micro_batches: N.
            what: what does not fit ("FULL cell", ...).
        """
        budget = f"compute_budget={self.compute}"
        if self.communication is not None:
            budget = f"communication_budget={self.communication}"
        elif isinstance(self.compute, tuple):
            budget = f"device_capacities of at most {max(self.compute):g}"
        nearest = f"{round_up(needed):g}"
        if math.isclose(needed * num_micro_batches, 1):
            nearest += f" (1 FULL of {num_micro_batches})"
        return ValueError(
            f"{budget} with {num_micro_batches} micro-batches: no {what} fits, so nothing would train; "
            f"the nearest possible is {nearest}"
        )

    def _check_counts_fit(self, num_micro_batches: int) -> None:
        if self.num_full + self.num_forward_only > num_micro_batches:
            num_full = min(self.num_full, num_micro_batches)
            raise ValueError(
                f"num_full={self.num_full} and num_forward_only={self.num_forward_only} exceed the "
                f"{num_micro_batches} micro-batches of a step; the nearest possible is num_full={num_full} and "
                f"num_forward_only={num_micro_batches - num_full}"
            )

    def _check_tuple(self, needed: np.ndarray) -> None:
        if len(self.compute) != len(needed):
            raise ValueError(
                f"device_capacities has {len(self.compute)} entries, but subnets are placed on {len(needed)} devices; "
                "give one share per device"
            )
        missing = needed / np.asarray(self.compute)
        if missing.min() > 1 + CAPACITY_TOLERANCE:
            device = int(np.argmin(missing))
            raise ValueError(
                f"device_capacities={self.compute}: no FULL cell fits on any device, so nothing would train; "
                f"the nearest possible raises device_capacities[{device}] to {round_up(needed[device]):g}"
            )


def round_up(share: float) -> float:
    """The shortest decimal in [share, 1.001 * share], at most 1: what a message advises must itself be possible."""
    for digits in range(1, 18):
        decimal = math.ceil(share * 10**digits * (1 - CAPACITY_TOLERANCE)) / 10**digits
        if decimal <= 1.001 * share:
            return min(decimal, 1.0)
    return share


def _share(field: str, value) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{field}={value!r} must be a number in (0, 1]; give the share of all-FULL work")
    if value > 1:
        raise ValueError(f"{field}={value:g} must be in (0, 1]; the nearest possible is 1 (everything FULL)")
    if value <= 0:
        raise ValueError(
            f"{field}={value:g} must be in (0, 1], or nothing trains; the nearest possible is one FULL micro-batch: "
            "1 / number of micro-batches"
        )
    return float(value)


def _count(field: str, value) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{field}={value!r} must be a whole number of micro-batches")
    if value < 0:
        raise ValueError(f"{field}={value} must not be negative; the nearest possible is {int(field == 'num_full')}")
    return int(value)
