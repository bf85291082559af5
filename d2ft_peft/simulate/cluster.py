"""Devices and the links between them, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np

from ..value_checks import check, is_integer, is_number, numbers


def _check(record, positive: tuple[str, ...], not_negative: tuple[str, ...]) -> None:
    for field in fields(record):
        value, name = getattr(record, field.name), f"{type(record).__name__}.{field.name}"
        check(is_number(value), name, value, "must be a number")
        if field.name in positive:
            check(value > 0, name, value, "must be positive")
        else:
            check(0 <= value < np.inf, name, value, "must be not negative, and finite")


@dataclass(frozen=True)
class Device:
    """What one device achieves.

    Attributes:
        flops: FLOP/s in the projections and attention products of a branch.
        overhead: Seconds that every pass of a branch takes besides, whatever its size.
        row_bandwidth: Bytes of rows per second through a norm and a residual addition, forward and backward together.
        memory: Bytes that it holds.
    """

    flops: float
    overhead: float = 0.0
    row_bandwidth: float = np.inf
    memory: float = np.inf

    def __post_init__(self):
        _check(self, positive=("flops", "row_bandwidth", "memory"), not_negative=("overhead",))

    def at_speed(self, factor: float) -> Device:
        """The same device, so many times as fast."""
        return Device(self.flops * factor, self.overhead / factor, self.row_bandwidth * factor, self.memory)


@dataclass(frozen=True)
class Link:
    """What connects every device with every other.

    Attributes:
        latency: Seconds that an exchange takes besides, whatever its size.
        bandwidth: Bytes per second of one device, in each direction at the same time.
    """

    latency: float
    bandwidth: float

    def __post_init__(self):
        _check(self, positive=("bandwidth",), not_negative=("latency",))

    def exchange(self, sent: np.ndarray) -> float:
        """Seconds of an all-to-all, over when the device with the most bytes is done; 0 if nothing moves.

        Args:
            sent: Bytes from each device (rows) to each other (columns), [R, R]; the diagonal stays where it is.
        """
        busiest = max(leaving(sent).max(), leaving(sent.T).max())
        return self.latency + busiest / self.bandwidth if busiest else 0.0

    def all_reduce(self, size: float, members: int) -> float:
        """Seconds to sum `size` bytes over R devices: each sends 2 size (R - 1) / R bytes, in 2 log2 R hops."""
        return 2 * self.gather(size, members)

    def gather(self, size: float, members: int) -> float:
        """Seconds until each of R devices has `size` bytes of which each had its share: half of `all_reduce`."""
        if not size or members == 1:
            return 0.0
        return self.latency * np.ceil(np.log2(members)) + size * (members - 1) / members / self.bandwidth


def leaving(sent: np.ndarray) -> np.ndarray:
    """Bytes that each device sends to others, [R]; of the transposed table, those that it receives."""
    return sent.sum(axis=1) - np.diag(sent)


NO_LINK = Link(0.0, np.inf)


@dataclass(frozen=True)
class Cluster:
    """Devices that share out one model, any number of times over.

    Attributes:
        devices: The devices of one group, which holds one model.
        link: Between the devices of a group.
        replicas: Number of groups, which train on different samples and sum their gradients.
        replica_link: Between the groups; bandwidth is that of one device, all of them using it at once.
    """

    devices: tuple[Device, ...]
    link: Link = NO_LINK
    replicas: int = 1
    replica_link: Link = NO_LINK

    def __post_init__(self):
        devices = self.devices
        fits = isinstance(devices, Sequence) and all(isinstance(device, Device) for device in devices)
        check(fits, "devices", devices, "must be a sequence of Device")
        check(is_integer(self.replicas), "replicas", self.replicas, "must be a whole number")
        if not devices or self.replicas < 1:
            raise ValueError(
                f"a cluster of {len(devices)} devices x {self.replicas} replicas has no device; give one at least."
            )
        for name in ("link", "replica_link"):
            check(isinstance(getattr(self, name), Link), name, getattr(self, name), "must be a Link")

    @property
    def size(self) -> int:
        """Devices of one group."""
        return len(self.devices)

    @property
    def num_devices(self) -> int:
        """Devices of all groups."""
        return self.size * self.replicas

    @cached_property
    def flops(self) -> np.ndarray:
        """FLOP/s of the devices of a group, [R]."""
        return np.array([device.flops for device in self.devices])

    @cached_property
    def overhead(self) -> np.ndarray:
        """Overhead of the devices of a group, [R]."""
        return np.array([device.overhead for device in self.devices])

    @cached_property
    def row_bandwidth(self) -> np.ndarray:
        """Row bandwidth of the devices of a group, [R]."""
        return np.array([device.row_bandwidth for device in self.devices])


def fit_line(amounts: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """(latency, rate) of seconds = latency + amount / rate, with the smallest sum of squared relative errors.

    Makes a `Device` of seconds at FLOPs, and a `Link` of seconds at bytes. The latency is not negative.

    Args:
        amounts: FLOPs or bytes of some measurements, at two sizes at least.
        seconds: What they took.

    Raises:
        ValueError: If they are no numbers, too few, or do not grow.
    """
    x, y = numbers("amounts", amounts), numbers("seconds", seconds)
    if x.shape != y.shape or len(np.unique(x)) < 2 or not (y > 0).all():
        raise ValueError(
            f"amounts={list(amounts)} and seconds={list(seconds)}: a line needs measurements of at least two sizes, "
            "with positive seconds."
        )
    (latency, slope), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones(len(y)), rcond=None)
    if latency < 0:
        latency, slope = 0.0, (x / y).sum() / np.square(x / y).sum()
    if slope <= 0:
        raise ValueError(f"seconds do not grow with the amount ({list(seconds)} at {list(amounts)}); measure longer.")
    return float(latency), float(1 / slope)
