"""Draws docs/images/operations.png: the three operations of a subnet, and a schedule that is made of them.

python docs/make_operations_figure.py
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyBboxPatch, Patch

from d2ft_peft.report import OPERATION_COLORS, draw_schedule, save_figure
from d2ft_peft.schedule import Operation, Schedule


TARGET = Path(__file__).parent / "images" / "operations.png"
FORWARD, BACKWARD, IDLE, TEXT = "#333333", "#c2185b", "#6f7882", "#333333"
DASHES = (0, (3, 1.5))

HEADINGS = {
    Operation.FULL: ("FULL", "forward and backward:\nits weights train"),
    Operation.FORWARD_ONLY: ("FORWARD_ONLY", "its output is a constant\nfor autograd"),
    Operation.SHORTCUT: ("SHORTCUT", "not run: only the\nresidual passes"),
}

# One string per micro-batch, one letter per head: every head does 2 FULL, 2 FORWARD_ONLY and 1 SHORTCUT.
EXAMPLE = (
    "FFF FFF FFF FFF",
    "FOF FFO FFF FFF",
    "OFO OOF OSO OOO",
    "OOO SSO OOO OOO",
    "SSS OOS SOS SSS",
)


def example_schedule() -> Schedule:
    """Five micro-batches, four blocks of three heads."""
    letters = {operation.letter: operation for operation in Operation}
    rows = [[letters[letter] for letter in row.replace(" ", "")] for row in EXAMPLE]
    return Schedule(rows, blocks=np.repeat(np.arange(4), 3))


def operations_figure() -> Figure:
    """The picture: operations left, schedule right."""
    figure = Figure(figsize=(9, 3.8), facecolor="white")
    FigureCanvasAgg(figure)
    for index, operation in enumerate(HEADINGS):
        axes = figure.add_axes((0.01 + 0.185 * index, 0.1, 0.18, 0.88))
        _draw_operation(axes, operation)
    _draw_example(figure.add_axes((0.625, 0.245, 0.365, 0.515)))
    passes = [
        Line2D([], [], color=FORWARD, lw=1.8, label="forward"),
        Line2D([], [], color=BACKWARD, lw=1.8, ls=DASHES, label="gradient"),
    ]
    cells = [Patch(color=OPERATION_COLORS[operation], label=operation.name) for operation in HEADINGS]
    for handles, center in ((passes, 0.28), (cells, 0.797)):
        figure.legend(
            handles=handles,
            loc="lower center",
            bbox_to_anchor=(center, 0),
            ncols=3,
            frameon=False,
            fontsize=8.5,
            handlelength=1.6,
            columnspacing=1.4,
        )
    return figure


def _draw_operation(axes: Axes, operation: Operation) -> None:
    axes.set(xlim=(0, 10), ylim=(0, 20))
    axes.set_axis_off()
    name, meaning = HEADINGS[operation]
    axes.text(5, 19, name, ha="center", va="center", fontsize=11, fontweight="bold", color=TEXT)
    axes.text(5, 18.2, meaning, ha="center", va="top", fontsize=8.5, color=TEXT)
    _draw_subnet(axes, operation)
    # The residual stream, on the left, carries both passes whatever the operation.
    _arrow(axes, [(2.3, 0.6), (2.3, 15.6)], FORWARD)
    _arrow(axes, [(1.1, 15.6), (1.1, 0.6)], BACKWARD, DASHES)
    if operation == Operation.SHORTCUT:
        return
    _arrow(axes, [(2.3, 1.8), (7.2, 1.8), (7.2, 5.4)], FORWARD)
    _arrow(axes, [(7.2, 10.6), (7.2, 13.4), (2.85, 13.4)], FORWARD)
    axes.plot(2.3, 13.4, "o", markersize=11, markerfacecolor="white", markeredgecolor=FORWARD, markeredgewidth=1.3)
    axes.plot(2.3, 13.4, "+", markersize=7, markeredgecolor=FORWARD, markeredgewidth=1.5)
    if operation == Operation.FULL:
        _arrow(axes, [(1.1, 12), (5.8, 12), (5.8, 10.6)], BACKWARD, DASHES)
        _arrow(axes, [(5.8, 5.4), (5.8, 3.2), (1.25, 3.2)], BACKWARD, DASHES)


def _draw_subnet(axes: Axes, operation: Operation) -> None:
    runs = operation != Operation.SHORTCUT
    color = OPERATION_COLORS[operation]
    box = FancyBboxPatch((3.9, 5.6), 5.4, 4.8, boxstyle="round,pad=0.1,rounding_size=0.5", facecolor=color)
    box.set(edgecolor=color if runs else IDLE, linestyle="-" if runs else "--")
    axes.add_patch(box)
    ink = {Operation.FULL: "white", Operation.FORWARD_ONLY: "black", Operation.SHORTCUT: IDLE}[operation]
    axes.text(6.6, 8, "head +\nits share\nof the FFN", ha="center", va="center", fontsize=8.5, color=ink)


def _arrow(axes: Axes, points: list[tuple[float, float]], color: str, style="-") -> None:
    """A line through `points` with an arrow head at its end."""
    x, y = zip(*points, strict=True)
    axes.plot(x, y, color=color, linestyle=style, linewidth=1.6, solid_capstyle="butt")
    head = {"arrowstyle": "-|>", "color": color, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11, "linewidth": 0}
    before = np.array(points[-1]) - 0.01 * (np.array(points[-1]) - np.array(points[-2]))
    axes.annotate("", xy=points[-1], xytext=tuple(before), arrowprops=head)


def _draw_example(axes: Axes) -> None:
    schedule = example_schedule()
    draw_schedule(axes, schedule)
    axes.set_yticks(range(5), labels=range(1, 6))
    axes.set_xticks([1, 4, 7, 10], labels=[f"block {block}" for block in range(1, 5)])
    figure, center = axes.get_figure(), 0.797
    figure.text(center, 0.936, "A schedule", ha="center", va="center", fontsize=11, fontweight="bold", color=TEXT)
    meaning = f"each head: 2 FULL, 2 FORWARD_ONLY, 1 SHORTCUT\nequal loads, {schedule.compute_ratio:.0%} of the compute"
    figure.text(center, 0.901, meaning, ha="center", va="top", fontsize=8.5, color=TEXT)
    axes.set_xlabel("one column per subnet (3 heads per block)", fontsize=9, color=TEXT)
    axes.set_ylabel("micro-batch", fontsize=9, color=TEXT)
    for (row, column), operation in np.ndenumerate(schedule.operations):
        color = "white" if operation == Operation.FULL else "black"
        letter = Operation(operation).letter
        axes.text(column, row, letter, ha="center", va="center", fontsize=8, color=color)


if __name__ == "__main__":
    print(save_figure(operations_figure(), TARGET, dpi=200))
