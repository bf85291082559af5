"""Draws what `unequal.py` measured, step by step.

    python examples/benchmarks/unequal_figure.py examples/benchmarks/results/unequal.json docs/images/unequal.png

The first step of every turn is left out.
"""

import json
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


STYLES = {"plain": ("plain data parallelism", "0.5"), "auto": ('device_capacities="auto"', "C0")}


def draw(measured: dict, target: Path) -> None:
    """Idle share of the process that waits, and samples per second, over the steps of the run."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    idle, speed = figure.subplots(2, 1, sharex=True)
    phases = list(measured["summary"]["plain"])
    length = 1 + max(step["step"] for step in measured["trace"]["plain"])
    for name, (label, color) in STYLES.items():
        steps = [step for step in measured["trace"][name] if not step["first"]]
        number = [phases.index(step["phase"]) * length + step["step"] for step in steps]
        idle.plot(number, [100 * max(step["idle"]) for step in steps], ".-", color=color, label=label)
        speed.plot(number, [sum(step["samples"]) / step["seconds"] for step in steps], ".-", color=color)
    for axes in (idle, speed):
        for boundary in range(length, length * len(phases), length):
            axes.axvline(boundary - 0.5, color="0.7", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(bottom=0)
    for index, phase in enumerate(phases):
        idle.text((index + 0.5) * length, 1.02, phase, transform=idle.get_xaxis_transform(), ha="center", va="bottom")
    idle.set_ylabel("idle, % of the step")
    speed.set_ylabel("samples per second")
    speed.set_xlabel("step")
    idle.legend(frameon=False, loc="upper left")
    FigureCanvasAgg(figure).print_png(str(target))


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
