"""What a simulated step takes, and the clocks of the devices while it runs."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from .cluster import Cluster, leaving


# Of the time of a norm and a residual addition, forward takes a third.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True)
class Prediction:
    """One step of one group of devices.

    Attributes:
        seconds: Of the step, on the clock.
        compute: Seconds in which each device runs heads, [R].
        sent: Bytes that each device sends to the others of its group, by purpose, [R]; purposes as in `Traffic`.
        received: The same for what comes in.
        samples: Samples that all groups work on in the step.
        memory: Bytes of weights and training state on the fullest device; activations are not counted.
        fits: Whether they fit.
    """

    seconds: float
    compute: np.ndarray
    sent: dict[str, np.ndarray]
    received: dict[str, np.ndarray]
    samples: float
    memory: float
    fits: bool

    @property
    def throughput(self) -> float:
        """Samples per second of all groups."""
        return self.samples / self.seconds

    @property
    def max_over_mean(self) -> float:
        """Compute seconds of the busiest device over their mean."""
        return float(self.compute.max() / self.compute.mean())


class Clocks:
    """Clocks of the devices of a group: each runs on while it computes, and an exchange waits for the last.

    Args:
        cluster: The devices.
        overlap: Whether exchanges are hidden behind the computation of a branch, as far as that lasts: the limit of a
            pipeline of many small groups of micro-batches.
    """

    def __init__(self, cluster: Cluster, overlap: bool = False):
        self.cluster, self.overlap = cluster, overlap
        self.now = np.zeros(cluster.size)
        self.heads = np.zeros(cluster.size)
        self.sent: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(cluster.size))
        self.received: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(cluster.size))

    def compute(self, flops: np.ndarray | float, passes: np.ndarray | float = 0.0) -> None:
        """Every device works on its own, [R] FLOPs in [R] passes."""
        self.now += flops / self.cluster.flops + passes * self.cluster.overhead

    def rows_forward(self, size: np.ndarray | float) -> None:
        """A norm and a residual addition on [R] bytes of rows."""
        self.now += _FORWARD_SHARE * size / self.cluster.row_bandwidth

    def rows_backward(self, size: np.ndarray | float) -> None:
        """Their backward pass."""
        self.now += (1 - _FORWARD_SHARE) * size / self.cluster.row_bandwidth

    def branch(
        self,
        there: tuple[str, np.ndarray],
        flops: np.ndarray,
        passes: np.ndarray,
        back: tuple[str, np.ndarray],
    ) -> None:
        """One pass of a branch: rows travel there [R, R], heads run, what they make travels back.

        Args:
            there: Purpose and bytes of the exchange before.
            flops: FLOPs of each device's heads, [R].
            passes: Passes in which they run, [R].
            back: Purpose and bytes of the exchange after.
        """
        busy = flops / self.cluster.flops + passes * self.cluster.overhead
        self.heads += busy
        seconds = [self._count(*exchange) for exchange in (there, back)]
        if not any(seconds):
            self.now += busy
        elif self.overlap:
            self.now[:] = self.now.max() + max(busy.max(), sum(seconds))
        else:
            self._meet(seconds[0])
            self.now += busy
            self._meet(seconds[1])

    def exchange(self, purpose: str, sent: np.ndarray) -> None:
        """An all-to-all outside of the branches, [R, R] bytes."""
        self._meet(self._count(purpose, sent))

    def sum_over_group(self, purpose: str, size: float) -> None:
        """An all-reduce of `size` bytes over the group."""
        members = self.cluster.size
        self._meet(self.cluster.link.all_reduce(size, members))
        for counter in (self.sent, self.received):
            counter[purpose] += 2 * (members - 1) / members * size

    def wait(self, seconds: float) -> None:
        """All devices wait for one another, and then so long."""
        self.now[:] = self.now.max() + seconds

    def _count(self, purpose: str, sent: np.ndarray) -> float:
        self.sent[purpose] += leaving(sent)
        self.received[purpose] += leaving(sent.T)
        return self.cluster.link.exchange(sent)

    def _meet(self, seconds: float) -> None:
        if seconds:
            self.wait(seconds)

    def result(self, samples: float, memory: float) -> Prediction:
        """The step as it stands."""
        return Prediction(
            seconds=float(self.now.max()),
            compute=self.heads,
            sent=dict(self.sent),
            received=dict(self.received),
            samples=samples * self.cluster.replicas,
            memory=memory,
            fits=all(memory <= device.memory for device in self.cluster.devices),
        )
