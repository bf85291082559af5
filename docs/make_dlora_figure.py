"""Draw who holds what under DLoRA, and what crosses: docs/images/dlora.png.

python docs/make_dlora_figure.py
"""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch


EDGE, CLOUD, FROZEN, ALIVE, TEXT = "#0b4f8a", "#4d4d4d", "#dfe3e8", "#e69f00", "#333333"
OUT = Path(__file__).parent / "images" / "dlora.png"


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str, face: str, color: str = TEXT) -> None:
    """A rounded box with a text in its middle."""
    axes.add_patch(
        FancyBboxPatch((x, y), width, height, "round,pad=0.02,rounding_size=0.12", facecolor=face, edgecolor="white")
    )
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=9, color=color)


def frame(axes: Axes, x: float, width: float, title: str, color: str) -> None:
    """One side."""
    axes.add_patch(
        FancyBboxPatch((x, 0.1), width, 7.6, "round,pad=0.02,rounding_size=0.2", fill=False, edgecolor=color, lw=1.6)
    )
    axes.text(x + width / 2, 7.98, title, ha="center", va="center", fontsize=11, color=color, weight="bold")


def arrow(axes: Axes, y: float, up: bool, text: str) -> None:
    """Something that crosses; `up` is towards the cloud."""
    start, end = ((4.35, y), (7.65, y)) if up else ((7.65, y), (4.35, y))
    color = EDGE if up else CLOUD
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4})
    axes.text(6.0, y + 0.06, text, ha="center", va="bottom", fontsize=8.5, color=color)


def draw(axes: Axes) -> None:
    """The edge on the left, the cloud on the right."""
    frame(axes, 0.1, 4.1, "edge", EDGE)
    frame(axes, 7.8, 4.1, "cloud", CLOUD)
    box(axes, 0.4, 6.7, 3.5, 0.75, "data, tokenizer, embedding", "#cfe0ef")
    box(axes, 0.4, 5.8, 3.5, 0.65, "blocks 0 to a-1 (optional)", FROZEN)
    box(axes, 0.4, 2.75, 3.5, 2.5, "\n\nadapters of the span,\ntheir optimizer,\nhidden states on disk", "#cfe0ef")
    for index in range(3):
        box(axes, 0.7 + index * 1.05, 4.5, 0.8, 0.5, "A, B", ALIVE)
    box(axes, 0.4, 1.3, 3.5, 0.65, "last b blocks (optional)", FROZEN)
    box(axes, 0.4, 0.35, 3.5, 0.7, "norm, head, labels, loss", "#cfe0ef")
    for index in range(5):
        box(axes, 8.1, 5.75 - index * 0.85, 3.5, 0.65, f"frozen block a{f'+{index}' if index else ''}", FROZEN)
    box(axes, 8.1, 1.3, 3.5, 0.75, "copies of killed adapters (optional)", "#f6dca6")
    box(axes, 8.1, 0.35, 3.5, 0.7, "until backward: this micro-batch's graph", "white")
    arrow(axes, 5.95, True, "hidden states")
    arrow(axes, 4.95, False, "x, once for q, k and v (if one is alive)")
    arrow(axes, 4.4, True, "B A x of the ones that are alive")
    arrow(axes, 3.55, False, "gradients of those")
    arrow(axes, 3.0, True, "gradient of x (if one is alive below)")
    arrow(axes, 1.75, False, "output of the span")
    arrow(axes, 1.2, True, "its gradient")
    axes.set_xlim(0, 12)
    axes.set_ylim(0, 8.3)
    axes.axis("off")


def main() -> None:
    """Write the picture."""
    figure = Figure(figsize=(9.6, 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.add_subplot())
    figure.savefig(OUT, dpi=120)
    print(OUT)


if __name__ == "__main__":
    main()
