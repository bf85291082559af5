"""Pictures of schedules, device loads and losses.

Every picture has a builder that returns a `matplotlib.figure.Figure` and a `plot_...` function that writes it. Only
matplotlib's object API is used, never pyplot: no display, no global state, no figure left open in a training process.
"""

import math
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..schedule import Operation, Schedule
from ._checks import check_curves, check_schedule, check_window


OPERATION_COLORS = {
    Operation.SHORTCUT: "#dfe3e8",
    Operation.FORWARD_ONLY: "#e69f00",
    Operation.FULL: "#0b4f8a",
}
"""Colour of each operation: distinct for colour-blind readers, and darker the more work, so also in print."""

_CURVE_COLORS = ("#0b4f8a", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#4d4d4d")
_CURVE_STYLES = ("-", "--", ":", "-.")
_TEXT, _HATCH = "#333333", "#9aa3ad"
_DPI = 150
_MOST_BLOCK_LABELS = 32
_MOST_ROWS_WITH_LINES, _MOST_COLUMNS_WITH_LINES = 64, 160
_MOST_LABELLED_BARS = 16
_WIDTH_OF_FOUR_ENTRIES = 9.5
_CHARACTERS_PER_INCH = 11
"""How many characters of a title fit; rather too few, so that nothing is cut off."""


def plot_schedule(schedule: Schedule, path: str | os.PathLike, title: str | None = None) -> Path:
    """Writes `schedule_figure` to `path` and returns the path; the ending sets the format (.png, .svg, .pdf).

    Raises:
        ValueError: not a `Schedule`, or an ending that matplotlib cannot write.
    """
    return save_figure(schedule_figure(schedule, title), path)


def plot_device_loads(schedule: Schedule, path: str | os.PathLike) -> Path:
    """Writes `device_loads_figure` to `path` and returns the path; the ending sets the format (.png, .svg, .pdf).

    Raises:
        ValueError: not a `Schedule`, or an ending that matplotlib cannot write.
    """
    return save_figure(device_loads_figure(schedule), path)


def plot_loss_curves(
    curves: dict[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike,
    xlabel: str = "compute (1 = one step, everything FULL)",
    ylabel: str = "training loss",
    window: int = 1,
) -> Path:
    """Writes `loss_curves_figure` to `path` and returns the path; the ending sets the format (.png, .svg, .pdf).

    Raises:
        ValueError: see `loss_curves_figure`; or an ending that matplotlib cannot write.
    """
    return save_figure(loss_curves_figure(curves, xlabel, ylabel, window), path)


def schedule_figure(schedule: Schedule, title: str | None = None) -> Figure:
    """Heat map of a schedule: rows are micro-batches, columns are subnets, grouped by transformer block.

    Args:
        schedule: what to draw; rows that are SHORTCUT in every subnet are hatched.
        title: default: size, compute, communication and alignment of the schedule.

    Raises:
        ValueError: not a `Schedule`.
    """
    check_schedule(schedule)
    width = float(np.clip(1.6 + 0.14 * schedule.num_subnets, 7.5, 14))
    figure = _new_figure(width, float(np.clip(1.8 + 0.26 * schedule.num_micro_batches, 2.6, 9)))
    axes = figure.add_subplot()
    draw_schedule(axes, schedule)
    if title is None:
        title = (
            f"{schedule.num_micro_batches} micro-batches x {schedule.num_subnets} subnets: "
            f"compute {schedule.compute_ratio:.1%}, communication {schedule.communication_ratio:.1%}, "
            f"alignment {schedule.alignment:.2f}"
        )
    _set_title(axes, title, width)
    handles = _operation_handles(schedule)
    # A legend does not wrap; four entries in a row need more than the narrowest figure.
    columns = 2 if len(handles) > 3 and width < _WIDTH_OF_FOUR_ENTRIES else len(handles)
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def draw_schedule(axes: Axes, schedule: Schedule) -> None:
    """Draws the heat map of `schedule_figure` into `axes`, without title and legend.

    The image array holds the values of `Operation`, columns sorted by block; subnets keep their order in a block.
    """
    order = np.argsort(schedule.blocks, kind="stable")
    colors = ListedColormap([OPERATION_COLORS[operation] for operation in Operation])
    norm = BoundaryNorm(np.arange(len(Operation) + 1) - 0.5, len(Operation))
    axes.imshow(schedule.operations[:, order], cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    for first, last in _runs(schedule.skipped):
        axes.axhspan(first - 0.5, last + 0.5, facecolor="none", edgecolor=_HATCH, hatch="////", linewidth=0, zorder=2)
    if schedule.num_micro_batches <= _MOST_ROWS_WITH_LINES:
        axes.hlines(np.arange(1, schedule.num_micro_batches) - 0.5, -0.5, schedule.num_subnets - 0.5, "white", lw=0.8)
    if schedule.num_subnets <= _MOST_COLUMNS_WITH_LINES:
        axes.vlines(np.arange(1, schedule.num_subnets) - 0.5, -0.5, schedule.num_micro_batches - 0.5, "white", lw=0.4)
    _label_blocks(axes, schedule.blocks[order])
    axes.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.set(ylabel="micro-batch", xlim=(-0.5, schedule.num_subnets - 0.5))
    axes.set_ylim(schedule.num_micro_batches - 0.5, -0.5)
    axes.tick_params(length=0, labelsize=9, labelcolor=_TEXT)
    axes.spines[:].set_visible(False)


def device_loads_figure(schedule: Schedule) -> Figure:
    """Bars: load of each device as a share of its load if every cell were FULL; capacities as a line.

    A capacity above the all-FULL load limits nothing and is drawn at 100 %.

    Raises:
        ValueError: not a `Schedule`.
    """
    check_schedule(schedule)
    shares, devices = schedule.loads / schedule.full_loads, np.arange(schedule.num_devices)
    figure = _new_figure(float(np.clip(2.5 + 0.3 * len(devices), 5, 12)), 3.4)
    axes = figure.add_subplot()
    # Few bars get empty space beside them instead of becoming walls.
    margin = max(0.7, (6 - len(devices)) / 2)
    axes.bar(devices, shares, width=0.8, color=OPERATION_COLORS[Operation.FULL], label="load")
    if len(devices) <= _MOST_LABELLED_BARS:
        for device, share in enumerate(shares):
            inside = share > 0.1
            color = "white" if inside else _TEXT
            axes.text(device, 0.02 if inside else share + 0.01, f"{share:.0%}", ha="center", fontsize=8, color=color)
    if schedule.capacities is not None:
        limits = np.minimum(schedule.capacities / schedule.full_loads, 1)
        edges = np.arange(len(devices) + 1) - 0.5
        axes.stairs(limits, edges, baseline=None, color="#d55e00", linewidth=2, label="capacity")
    axes.set(
        xlim=(-margin, len(devices) - 1 + margin), ylim=(0, 1.05), xlabel="device", ylabel="load, share of all-FULL"
    )
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True, min_n_ticks=1))
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick < len(devices)])
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    _set_title(axes, f"workload variance {schedule.workload_variance:.3g}", figure.get_figwidth())
    _tidy(axes)
    # Bars come after lines by default.
    handles = reversed(axes.get_legend_handles_labels()[0])
    figure.legend(handles=list(handles), loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def loss_curves_figure(
    curves: dict[str, Sequence[tuple[float, float]]],
    xlabel: str = "compute (1 = one step, everything FULL)",
    ylabel: str = "training loss",
    window: int = 1,
) -> Figure:
    """Losses of several runs over the same measure of effort: compute, steps or seconds.

    Args:
        curves: name of the run -> points (x, loss); x does not decrease.
        xlabel: what x is, with its unit.
        ylabel: what y is; where `window` exceeds 1, the label says so.
        window: odd number of points that a drawn value is the mean of, itself in the middle; near an end those that
            exist. The values themselves stay visible behind, pale. 1 draws them as they are.

    Raises:
        ValueError: no curve, a curve without points, a point that is no pair of finite numbers, x that decreases, or
            a window that is not odd and positive.
    """
    check_window(window)
    points = check_curves(curves)
    figure = _new_figure(7.5, 4.2)
    axes = figure.add_subplot()
    handles = []
    for index, xy in enumerate(points.values()):
        color = _CURVE_COLORS[index % len(_CURVE_COLORS)]
        style = _CURVE_STYLES[index // len(_CURVE_COLORS) % len(_CURVE_STYLES)]
        marker = "o" if len(xy) == 1 else None
        if window > 1:
            axes.plot(xy[:, 0], xy[:, 1], color=color, alpha=0.2, linewidth=0.8)
        handles += axes.plot(xy[:, 0], _smooth(xy[:, 1], window), style, color=color, linewidth=1.8, marker=marker)
    axes.set(xlabel=xlabel, ylabel=ylabel if window == 1 else f"{ylabel} (mean of {window} points)")
    _tidy(axes)
    names = [textwrap.fill(name, 80) for name in points]
    # A legend does not wrap: as many columns as the longest name allows.
    columns = int(np.clip(85 // (max(map(len, names)) + 6), 1, len(names)))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike, dpi: int = _DPI) -> Path:
    """Writes a figure, making the folder if there is none, and returns the path.

    Raises:
        ValueError: the path's ending names no format that matplotlib writes.
    """
    path = Path(path)
    formats = sorted(figure.canvas.get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(f"path={str(path)!r} must end in a picture format: .png, or one of {', '.join(formats)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    return path


def _new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _set_title(axes: Axes, title: str, width: float) -> None:
    axes.set_title(textwrap.fill(title, int(width * _CHARACTERS_PER_INCH)), fontsize=10, color=_TEXT)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, labelcolor=_TEXT)


def _operation_handles(schedule: Schedule) -> list[Patch]:
    counts, cells = schedule.counts, schedule.operations.size
    handles = [
        Patch(color=OPERATION_COLORS[operation], label=f"{operation.name} ({counts[operation] / cells:.1%} of cells)")
        for operation in sorted(Operation, reverse=True)
    ]
    if schedule.skipped.any():
        color = OPERATION_COLORS[Operation.SHORTCUT]
        label = f"micro-batch not run ({int(schedule.skipped.sum())})"
        handles.append(Patch(facecolor=color, edgecolor=_HATCH, hatch="////", linewidth=0, label=label))
    return handles


def _label_blocks(axes: Axes, blocks: np.ndarray) -> None:
    """Separators between the blocks of consecutive columns, and the number of each block below its middle."""
    numbers, starts, sizes = np.unique(blocks, return_index=True, return_counts=True)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=2.5)
    step = math.ceil(len(numbers) / _MOST_BLOCK_LABELS)
    axes.set_xticks((starts + (sizes - 1) / 2)[::step], labels=[str(number) for number in numbers[::step]])
    size = f"{sizes[0]} per block" if len(set(sizes)) == 1 else f"{len(blocks)} in all"
    axes.set_xlabel(f"transformer block, and its subnets ({size})")


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of every run of true entries."""
    change = np.diff(np.concatenate([[0], flags.astype(int), [0]]))
    return list(zip(np.flatnonzero(change == 1), np.flatnonzero(change == -1) - 1, strict=True))


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving mean; near the ends over the points that exist."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - window // 2, 0), np.minimum(index + window // 2 + 1, len(values))
    return values if window == 1 else (sums[high] - sums[low]) / (high - low)
