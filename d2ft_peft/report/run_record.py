"""What is kept of a run, for its report: logs, what ran when, the last schedule, loads, scores. JSON, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..schedule import Operation, Schedule


RUN_FILE = "d2ft_run.json"
_FORMAT = 1
_MOST_SPANS = 240


@dataclass
class Activity:
    """What ran over time: by block, the share of the samples under each operation, and the load of each device.

    Spans of steps are joined in pairs when there are too many to draw, so that a run of any length stays small.

    Attributes:
        first, last: First and last optimizer step of each span.
        shares: Shares of SHORTCUT, FORWARD_ONLY and FULL by span and block, [S][B][3].
        loads: Mean load of each device, relative to everything FULL, [M].
        steps: Schedules that `loads` is the mean of.
    """

    first: list[int] = field(default_factory=list)
    last: list[int] = field(default_factory=list)
    shares: list[list[list[float]]] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    steps: int = 0

    def add(self, first: int, last: int, schedule: Schedule) -> None:
        """Steps ran as this schedule."""
        self.first.append(first)
        self.last.append(last)
        self.shares.append(_shares_by_block(schedule).tolist())
        self._add_loads(schedule.loads / schedule.full_loads)
        if len(self.first) > _MOST_SPANS:
            self._join_pairs()

    def _add_loads(self, loads: np.ndarray) -> None:
        if len(self.loads) != len(loads):  # the first one, or a policy that places subnets anew
            self.loads, self.steps = loads.tolist(), 1
            return
        self.steps += 1
        self.loads = (np.array(self.loads) + (loads - self.loads) / self.steps).tolist()

    def _join_pairs(self) -> None:
        pairs = range(0, len(self.first) - 1, 2)
        rest = len(self.first) % 2
        widths = np.array(self.last) - self.first + 1
        shares = [
            np.average([self.shares[i], self.shares[i + 1]], axis=0, weights=widths[i : i + 2]).tolist() for i in pairs
        ]
        self.shares = shares + self.shares[len(self.shares) - rest :]
        first = [self.first[i] for i in pairs] + self.first[len(self.first) - rest :]
        self.last = [self.last[i + 1] for i in pairs] + self.last[len(self.last) - rest :]
        self.first = first

    def cut(self, step: int) -> None:
        """Forget what ran after a step: a run goes on from a checkpoint that was made there."""
        kept = sum(first <= step for first in self.first)
        self.first, self.last, self.shares = self.first[:kept], self.last[:kept], self.shares[:kept]


def _shares_by_block(schedule: Schedule) -> np.ndarray:
    """Share of the samples under each operation in each block, [B, 3]."""
    blocks = np.asarray(schedule.blocks)
    counts = np.zeros((int(blocks.max()) + 1, len(Operation)))
    for operation in Operation:
        np.add.at(counts[:, operation], blocks, schedule.weights @ (schedule.operations == operation))
    return counts / counts.sum(axis=1, keepdims=True)


@dataclass
class RunRecord:
    """A run, as its report shows it.

    Attributes:
        title: Names the run.
        about: Facts in the order in which they are shown: model, method, data, machine.
        history: The Trainer's log, entry by entry.
        activity: What ran over time.
        schedule: The last schedule that ran, as `Schedule.to_dict` gives it, or None.
        scores: Mean score of each subnet by name, [K].
        blocks: Block of each subnet, [K].
    """

    title: str = "run"
    about: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    activity: Activity = field(default_factory=Activity)
    schedule: dict[str, Any] | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    blocks: list[int] = field(default_factory=list)

    def series(self, name: str, over: str = "step") -> tuple[list[float], list[float]]:
        """One figure of the log over another: x and y of the entries that have both."""
        points = [(entry[over], entry[name]) for entry in self.history if _number(entry, name) and _number(entry, over)]
        return [x for x, _ in points], [y for _, y in points]

    def last(self, name: str) -> float | None:
        """The last logged value of a figure, or None."""
        values = self.series(name)[1] or [entry[name] for entry in self.history if _number(entry, name)]
        return values[-1] if values else None

    def to_json(self) -> str:
        """The record as one line."""
        return json.dumps({"format": _FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str, name: str = "the record") -> RunRecord:
        """Read `to_json` back.

        Args:
            text: What it returned.
            name: What to call it in a message.

        Raises:
            ValueError: If it is something else, or of another version.
        """
        try:
            values = json.loads(text)
            if values.pop("format") != _FORMAT:
                raise ValueError("it was written by another version")
            return cls(**{**values, "activity": Activity(**values["activity"])})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{name} is damaged, or no record of a D2FT run ({error}); give the folder of a run."
            ) from error


def _number(entry: Mapping[str, Any], name: str) -> bool:
    value = entry.get(name)
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def read_run(folder: str | Path) -> RunRecord:
    """The record of a run's folder: the one that `ReportCallback` wrote, else what the Trainer's own state says.

    Args:
        folder: The output folder of a Trainer, or one of its checkpoints; or the file with a record.

    Raises:
        ValueError: If there is nothing to read.
    """
    folder = Path(folder)
    if folder.is_file():
        return RunRecord.from_json(folder.read_text(), str(folder))
    if (folder / RUN_FILE).is_file():
        return RunRecord.from_json((folder / RUN_FILE).read_text(), str(folder / RUN_FILE))
    state = _trainer_state(folder)
    if state is None:
        raise ValueError(
            f"run={str(folder)!r} has neither {RUN_FILE} nor a trainer_state.json, here or in a checkpoint; give the "
            "output folder of a Trainer, and save a checkpoint (save_strategy) or train with report=."
        )
    try:
        history = json.loads(state.read_text())["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{str(state)!r} is damaged ({error}); give another checkpoint.") from error
    return RunRecord(folder.name, _about_adapter(folder, state.parent), history)


def _trainer_state(folder: Path) -> Path | None:
    """The newest state of a Trainer in a folder."""
    found = [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]
    found = [path for path in found if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _about_adapter(*folders: Path) -> dict[str, Any]:
    """What configurations beside a checkpoint say of how it was trained."""
    about: dict[str, Any] = {}
    for folder in folders:
        for name in ("adapter_config.json", "d2ft_config.json"):
            try:
                values = json.loads((folder / name).read_text())
            except (OSError, ValueError):
                continue
            told = {
                "model": values.get("base_model_name_or_path"), "r": values.get("r"), "policy": values.get("policy"),
                "compute budget": values.get("compute_budget"),
            }  # fmt: skip
            about |= {key: value for key, value in told.items() if value is not None}
    return about
