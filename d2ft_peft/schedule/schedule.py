"""The schedule: which operation every (micro-batch, subnet) has. Data only; execution reads it and changes nothing."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..value_checks import check_integer
from ._arrays import freeze, int_array, is_frozen, real_array, shape_of
from .operations import COMMUNICATION, Operation


DEFAULT_COSTS = (0.0, 1 / 3, 1.0)
"""Compute of each operation relative to FULL when backward costs twice the forward (full fine-tuning)."""

CAPACITY_TOLERANCE = 1e-9
"""Relative excess over a capacity that counts as rounding of floats, not as a broken capacity."""

_GRID_MICRO_BATCHES, _GRID_SUBNETS = 32, 100


@dataclass(frozen=True, eq=False)
class Schedule:
    """An immutable table of operations with the facts that are needed to judge it (arXiv 2504.12471, section 3).

    N micro-batches, K subnets, M devices. Arrays are copied and made read-only, unless
    they were made so already: the schedules of a run share what they have in common. Two schedules with the same
    content are equal and have the same hash and digest.

    Attributes:
        operations: int8 [N, K], values of `Operation`.
        weights: float [N], size of each micro-batch in samples or tokens, positive. Default: ones.
        devices: int [K], device of each subnet; every device 0..M-1 owns a subnet. Default: one device per subnet,
            as in the paper.
        costs: float [K, 3], compute of each operation (columns by `Operation`) per unit of weight; SHORTCUT is 0,
            columns do not decrease, FULL is positive. Default: 0, 1/3, 1.
        capacities: float [M], load that each device may carry, in the unit of costs * weights; or None: no limit.
        blocks: int [K], transformer block of each subnet, growing towards the output. Default: zeros.

    Raises:
        ValueError: a shape or a value is wrong, or a device's load exceeds its capacity.
    """

    operations: np.ndarray
    weights: np.ndarray = None
    devices: np.ndarray = None
    costs: np.ndarray = None
    capacities: np.ndarray | None = None
    blocks: np.ndarray = None

    def __post_init__(self):
        shape = shape_of("operations", self.operations)
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"operations has shape {shape}, it must be [micro-batches, subnets], both at least 1")
        if not (is_frozen(self.operations, np.int8) and self.operations.min() >= 0 and self.operations.max() <= 2):
            operations = int_array("operations", self.operations, shape, 0, 2, "use the values of Operation")
            object.__setattr__(self, "operations", freeze(operations.astype(np.int8)))
        object.__setattr__(self, "weights", check_weights(self.weights, shape[0]))
        object.__setattr__(self, "devices", check_devices(self.devices, shape[1]))
        object.__setattr__(self, "costs", check_costs(self.costs, shape[1]))
        object.__setattr__(self, "blocks", check_blocks(self.blocks, shape[1]))
        if self.capacities is not None:
            advice = "give one load limit per device"
            object.__setattr__(
                self, "capacities", real_array("capacities", self.capacities, (self.num_devices,), advice)
            )
            self._check_capacities()

    def _check_capacities(self) -> None:
        excess = self.loads > self.capacities * (1 + CAPACITY_TOLERANCE)
        if excess.any():
            device = int(np.argmax(excess))
            raise ValueError(
                f"capacities[{device}]={self.capacities[device]:.6g} is less than the load {self.loads[device]:.6g} "
                f"of device {device}; raise the capacity or give its subnets fewer FULL or FORWARD_ONLY cells"
            )

    @classmethod
    def all_full(cls, num_micro_batches: int, num_subnets: int, **kwargs) -> "Schedule":
        """The schedule of plain fine-tuning: every cell FULL. `kwargs` are the other fields of `Schedule`."""
        for name, value in (("num_micro_batches", num_micro_batches), ("num_subnets", num_subnets)):
            check_integer(name, value, 1)
        return cls(np.full((num_micro_batches, num_subnets), Operation.FULL, dtype=np.int8), **kwargs)

    @property
    def num_micro_batches(self) -> int:
        """N, the number of micro-batches (rows)."""
        return self.operations.shape[0]

    @property
    def num_subnets(self) -> int:
        """K, the number of subnets (columns)."""
        return self.operations.shape[1]

    @property
    def num_devices(self) -> int:
        """M, the number of devices."""
        return int(self.devices.max()) + 1

    @cached_property
    def loads(self) -> np.ndarray:
        """Compute of each device: sum over its cells of weight * cost of the operation; [M], unit of costs * weights.

        Weights are summed per operation before they meet a cost: with whole-number weights devices that do the same
        work in another order get exactly the same load.
        """
        per_subnet = np.zeros(self.num_subnets)
        for operation in (Operation.FORWARD_ONLY, Operation.FULL):
            per_subnet += (self.weights @ (self.operations == operation)) * self.costs[:, operation]
        return freeze(np.bincount(self.devices, per_subnet, minlength=self.num_devices))

    @cached_property
    def full_loads(self) -> np.ndarray:
        """Load of each device if every cell were FULL; [M], unit of costs * weights."""
        return freeze(full_loads(self.costs, self.weights, self.devices))

    @property
    def compute_ratio(self) -> float:
        """Compute relative to all-FULL: sum of loads / sum of full_loads, in [0, 1]."""
        return float(self.loads.sum() / self.full_loads.sum())

    @property
    def communication_ratio(self) -> float:
        """Communication relative to all-FULL: mean of COMMUNICATION over cells, weighted by micro-batch, in [0, 1]."""
        per_micro_batch = np.asarray(COMMUNICATION)[self.operations].mean(axis=1)
        return float(self.weights @ per_micro_batch / self.weights.sum())

    @property
    def workload_variance(self) -> float:
        """Population variance over devices of loads / full_loads (no unit); 0 when all are balanced."""
        shares = self.loads / self.full_loads
        # Relative to the first device: equal shares then give exactly 0, whatever their sum rounds to.
        return float(np.var(shares - shares[0]))

    @property
    def runs_in_part(self) -> bool:
        """Whether a micro-batch runs, and not with every subnet FULL."""
        return bool((self.operations[~self.skipped] != Operation.FULL).any())

    @property
    def alignment(self) -> float:
        """How much subnets agree on what a micro-batch gets, in [0, 1]; 1: every row has a single operation.

        With s_i the share of subnets that have the most common operation of row i, and s_min = ceil(K / 3) / K the
        smallest share that the most common of three operations can have: mean over i of (s_i - s_min) / (1 - s_min).
        A single subnet is always aligned. Micro-batches count alike, whatever their weights.
        """
        smallest = -(-self.num_subnets // 3)
        if smallest == self.num_subnets:
            return 1.0
        agreeing = np.max([(self.operations == operation).sum(axis=1) for operation in Operation], axis=0)
        return float(np.mean((agreeing - smallest) / (self.num_subnets - smallest)))

    @property
    def exact_gradients(self) -> np.ndarray:
        """Cells whose weight gradient equals that of plain fine-tuning on the micro-batch; bool [N, K].

        A cell qualifies if it is FULL, its row has no SHORTCUT at all (the forward pass is the dense one), and every
        cell of the same and of all higher blocks of its row is FULL (the gradient arrives complete).
        """
        highest = np.where(self.operations != Operation.FULL, self.blocks, -1).max(axis=1)
        intact = (self.operations != Operation.SHORTCUT).all(axis=1)
        return intact[:, None] & (self.blocks[None, :] > highest[:, None])

    @property
    def skipped(self) -> np.ndarray:
        """Micro-batches that are not run at all: SHORTCUT in every subnet; bool [N]."""
        return (self.operations == Operation.SHORTCUT).all(axis=1)

    @property
    def counts(self) -> dict[Operation, int]:
        """Number of cells of each operation; the values sum to N * K."""
        return {operation: int((self.operations == operation).sum()) for operation in Operation}

    def to_dict(self) -> dict:
        """The fields as lists of numbers, ready for JSON; `from_dict` reads them back without loss."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: None if array is None else array.tolist() for name, array in arrays.items()}

    @classmethod
    def from_dict(cls, data: dict) -> "Schedule":
        """Rebuilds a schedule from what `to_dict` returned.

        Raises:
            ValueError: no operations, an unknown key, or a value that `Schedule` refuses.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"data={data!r} must be a dictionary, as Schedule.to_dict returns it")
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown or "operations" not in data:
            raise ValueError(f"a schedule needs the key 'operations' and takes {known}; got {sorted(data)}")
        return cls(**data)

    def digest(self) -> str:
        """SHA-256 of the whole content, hexadecimal: ranks compare it to be sure that they run the same schedule."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        content = hashlib.sha256()
        for field in fields(self):
            array = getattr(self, field.name)
            shape = None if array is None else array.shape
            content.update(f"{field.name}{shape}".encode())
            if array is not None:
                content.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
        return content.hexdigest()

    def __eq__(self, other) -> bool:
        return self.digest() == other.digest() if isinstance(other, Schedule) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())

    def __reduce__(self):
        # numpy does not keep the read-only flag when it pickles or copies; building anew sets it again.
        return Schedule, tuple(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {operation.name}" for operation, count in self.counts.items())
        devices = "1 device" if self.num_devices == 1 else f"{self.num_devices} devices"
        summary = (
            f"{self.num_micro_batches} micro-batches x {self.num_subnets} subnets on {devices}: "
            f"{counts}; compute {self.compute_ratio:.3f}, communication {self.communication_ratio:.3f}, "
            f"workload variance {self.workload_variance:.2f}, alignment {self.alignment:.2f}"
        )
        if self.num_micro_batches > _GRID_MICRO_BATCHES or self.num_subnets > _GRID_SUBNETS:
            return summary
        letters = np.array([operation.letter for operation in Operation])[self.operations]
        starts = np.flatnonzero(np.diff(self.blocks)) + 1
        rows = (" ".join("".join(part) for part in np.split(row, starts)) for row in letters)
        return "\n".join([summary, *(f"{index:>4}  {row}" for index, row in enumerate(rows))])


def full_loads(costs: np.ndarray, weights: np.ndarray, devices: np.ndarray) -> np.ndarray:
    """Load of each device if every cell were FULL; [M], unit of costs * weights."""
    return np.bincount(devices, weights.sum() * costs[:, Operation.FULL])


def check_weights(weights, num_micro_batches: int) -> np.ndarray:
    """Read-only weights [N], ones if None. Raises ValueError unless finite and positive."""
    advice = "give the size of each micro-batch in samples or tokens"
    weights = np.ones(num_micro_batches) if weights is None else weights
    weights = real_array("weights", weights, (num_micro_batches,), advice)
    if (weights == 0).any():
        raise ValueError(f"weights[{int(np.argmin(weights))}]=0 must be positive; leave an empty micro-batch out")
    return weights


def check_devices(devices, num_subnets: int) -> np.ndarray:
    """Read-only devices [K], one per subnet if None. Raises ValueError unless they are 0..M-1 without a gap."""
    devices = np.arange(num_subnets) if devices is None else devices
    devices = int_array("devices", devices, (num_subnets,), 0, None, "give the device number of each subnet")
    if devices.max() >= num_subnets or not np.bincount(devices).all():
        missing = np.setdiff1d(np.arange(num_subnets + 1), devices)[0]
        raise ValueError(f"devices: no subnet on device {missing}; number the devices 0..M-1 without a gap")
    return devices


def check_costs(costs, num_subnets: int) -> np.ndarray:
    """Read-only costs [K, 3], DEFAULT_COSTS if None. Raises ValueError unless 0 = SHORTCUT <= FORWARD_ONLY <= FULL."""
    advice = "give the compute of SHORTCUT, FORWARD_ONLY and FULL for each subnet"
    costs = np.tile(DEFAULT_COSTS, (num_subnets, 1)) if costs is None else costs
    costs = real_array("costs", costs, (num_subnets, len(Operation)), advice)
    broken = (costs[:, 0] != 0) | (np.diff(costs, axis=1) < 0).any(axis=1) | (costs[:, Operation.FULL] == 0)
    if broken.any():
        subnet = int(np.argmax(broken))
        raise ValueError(
            f"costs[{subnet}]={costs[subnet].tolist()} must be 0 for SHORTCUT, must not decrease, and FULL must be "
            f"positive; {advice}"
        )
    return costs


def check_blocks(blocks, num_subnets: int) -> np.ndarray:
    """Read-only blocks [K], zeros if None. Raises ValueError unless non-negative integers."""
    blocks = np.zeros(num_subnets, dtype=np.int64) if blocks is None else blocks
    return int_array("blocks", blocks, (num_subnets,), 0, None, "give the transformer block of each subnet")
