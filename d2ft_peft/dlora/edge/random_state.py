"""The state of the random generators that dropout draws from, so that what is done again draws the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.utils.checkpoint import get_device_states, set_device_states


class RandomState:
    """The generators of the CPU and of the devices of some tensors, as they are now."""

    def __init__(self, *tensors: torch.Tensor):
        self._cpu = torch.get_rng_state()
        self._devices, self._states = get_device_states(*tensors)

    def restore(self) -> None:
        """Go back to that state."""
        torch.set_rng_state(self._cpu)
        set_device_states(self._devices, self._states)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Draw once more what was drawn from here on; outside, the draws go on as if that had not been."""
        with torch.random.fork_rng(self._devices):
            self.restore()
            yield
