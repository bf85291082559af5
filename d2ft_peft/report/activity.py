"""Picture of Kill-and-Revive: which modules were active when."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ..schedule import Operation
from .figures import _TEXT, OPERATION_COLORS, _new_figure, _set_title, save_figure


_MOST_LABELS = 40
_MOST_ROWS_WITH_LINES = 80
_COLORS = {"idle": OPERATION_COLORS[Operation.SHORTCUT], "active": OPERATION_COLORS[Operation.FULL]}


def plot_activity(
    activity: np.ndarray, names: Sequence[str], path: str | os.PathLike, began: Sequence[int] | None = None
) -> Path:
    """Writes `activity_figure` to `path` and returns the path; the ending sets the format (.png, .svg, .pdf).

    Raises:
        ValueError: see `activity_figure`; or an ending that matplotlib cannot write.
    """
    return save_figure(activity_figure(activity, names, began), path)


def activity_figure(activity: np.ndarray, names: Sequence[str], began: Sequence[int] | None = None) -> Figure:
    """Heat map of activity: rows are modules, columns are intervals, as wide as they lasted.

    Args:
        activity: whether a module was active, bool [intervals, modules].
        names: of the modules; what all of them begin with is left out.
        began: step at which each interval began, ascending; None draws intervals of equal width. The last one, whose
            end is not known, is drawn as wide as most.

    Raises:
        ValueError: shapes that do not fit, no interval, or steps that do not ascend.
    """
    activity = np.asarray(activity)
    if activity.ndim != 2 or activity.size == 0 or activity.shape[1] != len(names):
        raise ValueError(
            f"activity has shape {activity.shape}, it must be [intervals, modules] with at least one interval and "
            f"{len(names)} modules, one for each of names"
        )
    edges = _edges(len(activity), began)
    modules = len(names)
    figure = _new_figure(float(np.clip(4.5 + 0.1 * len(activity), 7, 13)), float(np.clip(1.6 + 0.15 * modules, 3, 11)))
    axes = figure.add_subplot()
    colors = ListedColormap(list(_COLORS.values()))
    axes.pcolormesh(edges, np.arange(modules + 1) - 0.5, activity.astype(bool).T, cmap=colors, vmin=0, vmax=1)
    if modules <= _MOST_ROWS_WITH_LINES:
        axes.hlines(np.arange(1, modules) - 0.5, edges[0], edges[-1], "white", lw=0.4)
    ticks = np.arange(0, modules, -(-modules // _MOST_LABELS))
    axes.set_yticks(ticks, labels=[_short(names)[tick] for tick in ticks], fontsize=7)
    axes.set(xlim=(edges[0], edges[-1]), xlabel="optimizer step" if began is not None else "interval")
    axes.set_ylim(modules - 0.5, -0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True, min_n_ticks=1))
    axes.tick_params(length=0, labelcolor=_TEXT)
    axes.tick_params(axis="x", labelsize=9)
    axes.spines[:].set_visible(False)
    ever, now = int(activity.any(axis=0).sum()), int(activity[-1].sum())
    _set_title(axes, f"{now} of {modules} modules active at a time, {ever} were at some time", figure.get_figwidth())
    handles = [Patch(color=color, label=name) for name, color in reversed(_COLORS.items())]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def _edges(intervals: int, began: Sequence[int] | None) -> np.ndarray:
    """Where columns begin and where the last one ends."""
    if began is None:
        return np.arange(intervals + 1, dtype=float)
    steps = np.asarray(began, dtype=float)
    if steps.shape != (intervals,) or not np.isfinite(steps).all() or (np.diff(steps) <= 0).any():
        raise ValueError(f"began={began!r} must be the step at which each of {intervals} intervals began, ascending")
    width = float(np.median(np.diff(steps))) if intervals > 1 else 1.0
    return np.append(steps, steps[-1] + width)


def _short(names: Sequence[str]) -> list[str]:
    """Names without the parts that all of them begin with."""
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(part) > shared + 1 for part in parts) and len({part[shared] for part in parts}) == 1:
        shared += 1
    return [".".join(part[shared:]) for part in parts]
