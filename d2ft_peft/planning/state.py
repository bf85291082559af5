"""What a checkpoint holds of D2FT beside the Trainer's own state: random state, scores, feature means."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file

from ..schedule import Operation
from ..scores import GRADIENT_SCORES, ScoreTable
from .planner import D2FTPlanner


STATE_FILE = "d2ft_state.json"
_SCORES_FILE = "d2ft_{}.safetensors"
_MEANS_FILE = "d2ft_means.safetensors"


def save_state(planner: D2FTPlanner, directory: str | os.PathLike, **extra: Any) -> None:
    """Write a planner's state into a checkpoint folder; of several processes one does, after `D2FTPlanner.share`.

    Args:
        planner: The planner.
        directory: The folder.
        extra: What `load_state` is to return besides; JSON-friendly.
    """
    for name, scores in (planner.scores | planner.source.live).items():
        scores.save(os.path.join(directory, _SCORES_FILE.format(name)))
    means = {}
    for branch, mean in planner.runtime.means.items():
        mean.commit()
        means |= {f"{branch}.value": mean.value.cpu().numpy(), f"{branch}.count": mean.count.cpu().numpy()}
    if means:
        save_file(means, os.path.join(directory, _MEANS_FILE))
    with open(os.path.join(directory, STATE_FILE), "w") as file:
        shares = planner.shares and planner.shares.state()
        json.dump({"rng": planner.rng.bit_generator.state, "step": planner.step, "shares": shares, **extra}, file)


def load_state(planner: D2FTPlanner, directory: str | os.PathLike) -> dict[str, Any]:
    """Let a planner continue from a checkpoint folder.

    Returns:
        The state, with what `save_state` was given besides.

    Raises:
        ValueError: If the folder has no state of D2FT.
    """
    path = os.path.join(directory, STATE_FILE)
    if not os.path.isfile(path):
        raise ValueError(
            f"{os.fspath(directory)!r} has no {STATE_FILE}: it was not written by a D2FT trainer, and a resumed run "
            "would schedule differently. Resume from another checkpoint, or start anew from its adapter."
        )
    with open(path) as file:
        state = json.load(file)
    planner.rng.bit_generator.state = state["rng"]
    planner.step = state["step"]
    if planner.shares is not None:
        planner.shares.load_state(state.get("shares"))
    for score in GRADIENT_SCORES:
        table = os.path.join(directory, _SCORES_FILE.format(score))
        if os.path.isfile(table):
            planner.scores[score] = ScoreTable.load(table)
    for name, scores in planner.source.live.items():
        scores.load(os.path.join(directory, _SCORES_FILE.format(name)))
    if planner.runtime.means and os.path.isfile(os.path.join(directory, _MEANS_FILE)):
        means = load_file(os.path.join(directory, _MEANS_FILE))
        for branch, mean in planner.runtime.means.items():
            mean.value = torch.from_numpy(means[f"{branch}.value"])
            mean.count = torch.from_numpy(means[f"{branch}.count"])
    return state


def operations_from(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of operations as they come back from JSON, int8 [N, K]."""
    return np.array([[Operation(value) for value in row] for row in rows], dtype=np.int8)
