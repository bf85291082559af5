"""How long a process takes for its part of a step, without what it waits for others."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch


class Step(NamedTuple):
    """The moments of a step in one process; what `Pace` calls a moment is a number of seconds or a device's event.

    Attributes:
        before: The last step's gradient exchange ended; None if this process did not wait for it.
        arrived: The samples of this step are about to be chosen. Until here: optimizer, logs, data loader.
        began: They are about to be loaded and run.
        ready: The backward pass of the last of them is through, and the wait for other processes begins.
        samples: Number of samples that ran.
    """

    before: Any
    arrived: Any
    began: Any
    ready: Any
    samples: int


class Pace:
    """Watches the steps of this process.

    On a device that works behind its queue (CUDA) moments are events of its stream, not the processor's clock.

    Args:
        device: The device that the model is on.

    Attributes:
        ended: End of the last gradient exchange, None before the first.
    """

    warm_up = 2
    """Steps that are left out: libraries and allocators find their feet."""

    enough = 3
    """Steps that a median is taken of at least."""

    horizon = 50
    """Steps that a median is taken of at most."""

    def __init__(self, device: torch.device):
        self.device = device
        self._queued = None if device.type == "cpu" else torch.get_device_module(device)
        self._steps: deque[Step] = deque(maxlen=self.horizon)
        self._to_skip = self.warm_up
        self.ended = self._before = self._arrived = self._began = self._ready = None

    def arrive(self) -> None:
        """A step begins."""
        self._before, self._arrived, self._ready = self.ended, self._now(), None
        self._began = self._arrived

    def begin(self) -> None:
        """What the processes had to tell each other at the start of this step is told: from here on it is work."""
        self._began = self._now()

    def begin_together(self) -> None:
        """All processes have waited for each other at the start of this step: nothing before it makes one late."""
        self._before = None
        self.begin()

    def ready(self) -> None:
        """A local backward pass is through; the last one in a step counts."""
        self._ready = self._now()

    def end(self, samples: int) -> None:
        """The step's gradients are exchanged.

        Args:
            samples: Number of samples that ran here.

        Raises:
            RuntimeError: No backward pass was seen.
        """
        self.ended = self._now()
        if self._arrived is None:
            return
        if self._ready is None:
            raise RuntimeError(
                "device_capacities='auto' saw no backward pass in a whole step, and cannot tell how fast this process "
                "is: call backward inside the micro-batch's context, on a loss made of the model's first output."
            )
        step = Step(self._before, self._arrived, self._began, self._ready, samples)
        self._arrived = None
        if self._to_skip:
            self._to_skip -= 1
        else:
            self._steps.append(step)

    @property
    def has_figures(self) -> bool:
        """Whether enough steps were seen since the last `figures`; the same in all processes."""
        return len(self._steps) >= self.enough

    def figures(self) -> np.ndarray:
        """Seconds of a step that do not depend on its samples, seconds per sample, and seconds of a step until this
        process is ready; medians over the steps since the last call."""
        steps = list(self._steps)
        self._steps.clear()
        if self._queued is not None:
            self._queued.synchronize(self.device)
        fixed = [0.0 if step.before is None else self._seconds(step.before, step.arrived) for step in steps]
        work = [self._seconds(step.began, step.ready) for step in steps]
        samples = [step.samples for step in steps]
        return np.array([np.median(values) for values in (fixed, np.divide(work, samples), np.add(fixed, work))])

    def _now(self) -> Any:
        if self._queued is None:
            return time.perf_counter()
        event = self._queued.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, start: Any, end: Any) -> float:
        return end - start if self._queued is None else start.elapsed_time(end) / 1000
