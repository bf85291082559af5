"""What a checkpoint holds of D2FT beside the Trainer's own state.

`d2ft_state.json` has numbers and the list of the other files with their sizes, and is written last: a folder in which
it stands and fits is complete. Files appear under their names only once they are whole.
"""

from __future__ import annotations

import json
import os
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from ..scores import ScoreTable
from ..whole_files import reading, replacing
from .planner import D2FTPlanner


STATE_FILE = "d2ft_state.json"
ARRAYS_FILE = "d2ft_state.safetensors"
_SCORES_FILE = "d2ft_{}.safetensors"
_FORMAT = 3
_NUMBERS = {
    "rng",
    "step",
    "num_micro_batches",
    "costs",
    "counts",
    "shares",
    "account",
    "magnitude_era",
    "scores",
    "files",
}


def save_state(planner: D2FTPlanner, directory: str | os.PathLike, **extra: Any) -> None:
    """Write a planner's state into a checkpoint folder; of several processes one does, after `D2FTPlanner.share`.

    Args:
        planner: The planner.
        directory: The folder.
        extra: What `load_state` is to return besides; JSON-friendly.
    """
    numbers, arrays = planner_state(planner)
    files = {name: _place_table(planner, table, directory) for name, table in planner.scores.items()}
    sizes = {file: os.path.getsize(os.path.join(directory, file)) for file in files.values()}
    if arrays:
        path = os.path.join(directory, ARRAYS_FILE)
        with replacing(path) as temporary:
            save_file(arrays, temporary)
        sizes[ARRAYS_FILE] = os.path.getsize(path)
    with replacing(os.path.join(directory, STATE_FILE)) as temporary, open(temporary, "w") as file:
        json.dump({"format": _FORMAT, **numbers, "scores": files, "files": sizes, **extra}, file)


def load_state(planner: D2FTPlanner, directory: str | os.PathLike) -> dict[str, Any]:
    """Let a planner continue from a checkpoint folder.

    Returns:
        The state, with what `save_state` was given besides.

    Raises:
        ValueError: If the folder has no state of D2FT, or a file of it is missing or damaged.
    """
    state = _read_numbers(directory)
    for name, size in state["files"].items():
        path = os.path.join(directory, name)
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            found = f"has {os.path.getsize(path)} bytes" if os.path.isfile(path) else "is missing"
            raise ValueError(f"{path!r} {found} and should have {size} bytes; resume from another checkpoint.")
    for name, file in state["scores"].items():
        planner.scores[name] = ScoreTable.load(os.path.join(directory, file))
        planner.table_files[planner.scores[name].fingerprint] = os.path.join(directory, file)
    arrays = _read_arrays(os.path.join(directory, ARRAYS_FILE)) if ARRAYS_FILE in state["files"] else {}
    load_planner_state(planner, state, arrays)
    return state


def planner_state(planner: D2FTPlanner) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Everything that a planner's next schedule and next log depend on, but for tables of scores.

    Returns:
        Numbers, JSON-friendly, and arrays by name.
    """
    arrays = {f"live.{name}": scores.values for name, scores in planner.source.live.items()}
    for branch, mean in planner.runtime.means.items():
        mean.commit()
        arrays |= {f"mean.{branch}.value": mean.value.cpu().numpy(), f"mean.{branch}.count": mean.count.cpu().numpy()}
    planner.counts.close(planner.schedule)
    era = None
    if planner.source.magnitude is not None:
        era, arrays["magnitude"] = planner.source.magnitude
    numbers = {
        "rng": planner.rng.bit_generator.state,
        "step": planner.step,
        "num_micro_batches": planner.num_micro_batches,
        "costs": planner.costs.state(),
        "counts": planner.counts.state(),
        "shares": planner.shares and planner.shares.state(),
        "account": planner.account and {**planner.account.state(), "open_step": planner.open_step},
        "magnitude_era": era,
    }
    return numbers, arrays


def load_planner_state(planner: D2FTPlanner, numbers: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Take over what `planner_state` returned."""
    planner.rng.bit_generator.state = numbers["rng"]
    planner.step, planner.num_micro_batches = numbers["step"], numbers["num_micro_batches"]
    planner.costs.load_state(numbers["costs"])
    planner.counts.load_state(numbers["counts"])
    if planner.shares is not None:
        planner.shares.load_state(numbers["shares"])
    if planner.account is not None and numbers["account"]:
        account = dict(numbers["account"])
        planner.open_step = account.pop("open_step")
        planner.account.load_state(account)
    for name, scores in planner.source.live.items():
        if f"live.{name}" in arrays:
            scores.restore(arrays[f"live.{name}"])
    for branch, mean in planner.runtime.means.items():
        if f"mean.{branch}.value" in arrays:
            mean.value = torch.from_numpy(arrays[f"mean.{branch}.value"])
            mean.count = torch.from_numpy(arrays[f"mean.{branch}.count"])
    if "magnitude" in arrays:
        planner.source.magnitude = numbers["magnitude_era"], arrays["magnitude"]


def _place_table(planner: D2FTPlanner, table: ScoreTable, directory: str | os.PathLike) -> str:
    """Put a table of scores into the folder. It is the same in every checkpoint of a run, so that the file of an
    earlier one is linked where the file system can; returns its name."""
    name = _SCORES_FILE.format(table.score)
    path = os.path.join(directory, name)
    with replacing(path) as temporary:
        try:
            os.link(planner.table_files.get(table.fingerprint, ""), temporary)
        except OSError:
            table.save(temporary)
    planner.table_files[table.fingerprint] = path
    return name


def _read_numbers(directory: str | os.PathLike) -> dict[str, Any]:
    path = os.path.join(directory, STATE_FILE)
    if not os.path.isfile(path):
        weights_only = not os.path.isfile(os.path.join(directory, "scheduler.pt"))
        why = (
            "it holds weights alone (save_only_model=True)" if weights_only else "it was not written by a D2FT trainer"
        )
        raise ValueError(
            f"{os.fspath(directory)!r} has no {STATE_FILE}: {why}, and a resumed run would schedule differently. "
            "Resume from another checkpoint, or start anew from its adapter."
        )
    try:
        with open(path) as file:
            state = json.load(file)
        if not isinstance(state, dict) or state.get("format") != _FORMAT or not state.keys() >= _NUMBERS:
            raise KeyError(sorted(_NUMBERS - set(state)) or "format")
        return state
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path!r} is damaged, or was written by another version of d2ft_peft ({error!r}); resume from another "
            "checkpoint, or start anew from its adapter."
        ) from error


def _read_arrays(path: str) -> dict[str, np.ndarray]:
    with reading(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dictionary
