"""Rows of the inputs that TRL's GRPO and RLOO make of completions: taken out, put together, cut to what they hold.

Each row is a prompt, padded on the left, followed by a completion, padded on the right.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad


Rows = dict[str, Any]
"""Inputs of a micro-batch by TRL's names."""

_PROMPT = {"prompt_ids", "prompt_mask"}
_COMPLETION = {
    "completion_ids", "completion_mask", "tool_mask", "old_per_token_logps", "ref_per_token_logps",
    "sampling_per_token_logps", "importance_sampling_ratio",
}  # fmt: skip
_ROW = {"advantages", "old_logps"}
_STEP = {"num_items_in_batch"}


def join_rows(batches: Sequence[Rows]) -> Rows:
    """All rows of some micro-batches, which may have been generated apart and so be padded to different widths.

    A number that belongs to what was generated together (``num_items_in_batch``) becomes the mean over micro-batches.

    Raises:
        ValueError: If they hold something that is not known to have one row for each completion, images for example.
    """
    unknown = sorted(set(batches[0]) - _PROMPT - _COMPLETION - _ROW - _STEP)
    if unknown:
        raise ValueError(
            f"the generated inputs hold {unknown}, and single completions are left out of text alone; set "
            "rows='micro_batches', which leaves out whole micro-batches."
        )
    prompt, completion = (max(batch[name].shape[1] for batch in batches) for name in ("prompt_ids", "completion_ids"))
    joined = {}
    for name in batches[0]:
        values = [batch[name] for batch in batches]
        if name in _PROMPT:
            values = [pad(value, (prompt - value.shape[1], 0)) for value in values]
        elif _by_token(name, batches):
            values = [pad(value, (0, completion - value.shape[1])) for value in values]
        same = all(value is values[0] for value in values)
        if name in _STEP:
            joined[name] = values[0] if same else torch.stack([value.double() for value in values]).mean()
        else:
            joined[name] = torch.cat(values)
    return joined


def take_rows(rows: Rows, positions: np.ndarray, cut: bool, cut_prompts: bool) -> Rows:
    """Some of the rows.

    Args:
        rows: What `join_rows` returned.
        positions: Which, int [n].
        cut: Whether to cut off columns in which none of them has a token.
        cut_prompts: Whether to cut such columns off the prompts as well, on the left.
    """
    index = torch.from_numpy(np.asarray(positions)).to(rows["prompt_ids"].device)
    taken = {name: value if name in _STEP else value[index] for name, value in rows.items()}
    if not cut:
        return taken
    prompts, completions = (lengths.max() for lengths in num_tokens(taken))
    by_token = {name for name in taken if _by_token(name, [taken])}
    first = rows["prompt_ids"].shape[1] - int(prompts) if cut_prompts else 0
    last = max(int(completions), 1)
    for name, value in taken.items():
        if name in _PROMPT:
            taken[name] = value[:, first:]
        elif name in by_token:
            taken[name] = value[:, :last]
    return taken


def _by_token(name: str, batches: Sequence[Rows]) -> bool:
    """Whether a value has a column for each token of the completions; some have one for the whole, by the arguments."""
    return name not in _PROMPT | _STEP and all(
        batch[name].ndim == 2 and batch[name].shape[1] == batch["completion_ids"].shape[1] for batch in batches
    )


def num_tokens(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each row's prompt and of its completion that are attended to, int [n] each."""
    both = torch.stack([rows["prompt_mask"].sum(dim=1), rows["completion_mask"].sum(dim=1)]).cpu().numpy()
    return both[0], both[1]


def num_loss_tokens(rows: Rows) -> np.ndarray:
    """Tokens of each row that carry loss, int [n]: of completions, without what tools answered."""
    mask = rows["completion_mask"]
    return (mask if "tool_mask" not in rows else mask * rows["tool_mask"]).sum(dim=1).cpu().numpy()


def width(rows: Rows) -> int:
    """Tokens of a row, padding included."""
    return rows["prompt_ids"].shape[1] + rows["completion_ids"].shape[1]
