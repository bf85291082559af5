"""What a resumed run of Kill-and-Revive needs, kept where optimizers keep theirs: in a parameter group."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .rule import KillReviveState


KEY = "kill_revive"
"""Name in ``optimizer.param_groups[0]``. Optimizers save and load keys of groups that they do not know."""


class SavedState:
    """A dictionary of strings, a number and tensors, which ``torch.load(weights_only=True)`` reads.

    Args:
        about: Settings and modules; a state with others is not loaded.

    Attributes:
        held: The dictionary; what is stored is changed in it, so the optimizer saves it as it is.
    """

    def __init__(self, about: dict[str, Any]):
        self._about = about
        self.held: dict[str, Any] = {"about": json.dumps(about), "steps": 0, "state": "", "snapshot": {}}
        self.held |= {"activity": torch.zeros(0, len(about["names"]), dtype=torch.uint8)}
        self.held |= {"began": torch.zeros(0, dtype=torch.int64)}

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self.held["steps"]

    @steps.setter
    def steps(self, steps: int) -> None:
        self.held["steps"] = steps

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimizer save this."""
        optimizer.param_groups[0][KEY] = self.held

    def store(self, state: KillReviveState, steps: int, snapshot: dict[str, list[Tensor]]) -> None:
        """Keep what an interval begins with."""
        row = torch.zeros(1, len(state.known), dtype=torch.uint8)
        row[0, list(state.active)] = 1
        held = self.held
        held |= {"state": state.to_json(), "steps": steps, "snapshot": snapshot}
        held["activity"] = torch.cat([held["activity"].cpu(), row])
        held["began"] = torch.cat([held["began"].cpu(), torch.tensor([steps])])

    def snapshot(self, name: str) -> list[Tensor] | None:
        """A module's parameters when the interval began."""
        return self.held["snapshot"].get(name)

    def activity(self) -> tuple[np.ndarray, np.ndarray]:
        """Which modules were active in each interval, and the step at which it began."""
        return self.held["activity"].cpu().numpy().astype(bool), self.held["began"].cpu().numpy()

    def load(self, optimizer: torch.optim.Optimizer) -> tuple[KillReviveState, int]:
        """Take over the state that an optimizer holds.

        Returns:
            The state, and the optimizer steps so far.

        Raises:
            ValueError: If it is of other modules or other settings, or damaged.
        """
        held = optimizer.param_groups[0][KEY]
        missing = self.held.keys() - held.keys() if isinstance(held, dict) else self.held.keys()
        if missing:
            raise ValueError(f"the optimizer's state of Kill-and-Revive lacks {sorted(missing)}; it is damaged.")
        theirs = json.loads(held["about"])
        changed = [name for name, value in json.loads(json.dumps(self._about)).items() if theirs.get(name) != value]
        if changed:
            name = changed[0]
            raise ValueError(
                f"{name} was {_short(theirs.get(name))} in the run that is resumed, and is {_short(self._about[name])} "
                "now; give it as it was, or start afresh."
            )
        state = KillReviveState.from_json(held["state"])
        if len(state.known) != len(self._about["names"]):
            raise ValueError(
                f"the optimizer's state of Kill-and-Revive is of {len(state.known)} modules; it is damaged."
            )
        self.held = held
        return state, int(held["steps"])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 100 else f"{text[:97]}..."
