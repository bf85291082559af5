"""Accuracy over the time that it took, scoring and planning included, by size of the training set.

    python examples/benchmarks/accuracy_time.py examples/benchmarks/results/accuracy_time.jsonl \
        --png docs/images/accuracy_time.png

The runs are `accuracy.py`'s, of several lengths (``--steps``), each with a learning-rate schedule of its own. Time is
the processor's, which another process on the machine changes little. The table says how long every row takes to the
accuracy that plain fine-tuning reaches in half of its longest run: between two lengths it is interpolated, accuracy
over the logarithm of time.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from rows import publish, pyplot, read_rows, save


Curve = dict[int, tuple[float, float]]
"""Mean seconds and mean accuracy over the seeds, by number of steps."""


def load(paths: list[str]) -> dict[int, dict[tuple[str, float], Curve]]:
    """Curves by number of training samples, then by (row, budget)."""
    runs: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for run in read_rows(*paths):
        found = runs[run["train_samples"]][run["row"], run["budget"]][run["steps"]]
        found.append((run["cpu_seconds"], run["value"]))
    return {
        samples: {
            row: {steps: tuple(np.mean(found, axis=0)) for steps, found in sorted(lengths.items())}
            for row, lengths in rows.items()
        }
        for samples, rows in sorted(runs.items())
    }


def target(plain: Curve) -> float:
    """Accuracy of plain fine-tuning in half of its longest run."""
    longest = max(plain.values())[0]
    seconds, accuracies = zip(*sorted(plain.values()), strict=True)
    return float(np.interp(np.log(longest / 2), np.log(seconds), accuracies))


def seconds_to(accuracy: float, curve: Curve) -> float | None:
    """Time at which a curve first reaches an accuracy; None if it does not, the shortest run if that is above it."""
    points = sorted(curve.values())
    if points[0][1] >= accuracy:
        return points[0][0]
    for (before, low), (after, high) in zip(points, points[1:], strict=False):
        if low < accuracy <= high:
            return float(np.exp(np.interp(accuracy, [low, high], np.log([before, after]))))
    return None


def name(row: tuple[str, float]) -> str:
    return row[0] if row[0] == "plain" else f"{row[0].replace(':', ', ')} {row[1]:.0%}"


def table(curves: dict[int, dict[tuple[str, float], Curve]]) -> str:
    rows = sorted({row for found in curves.values() for row in found}, key=lambda row: (row[0] != "plain", row))
    heads = " | ".join(name(row) for row in rows)
    lines = [f"| training samples | accuracy | {heads} |", "|---" * (len(rows) + 2) + "|"]
    for samples, found in curves.items():
        plain = found["plain", 1.0]
        accuracy = target(plain)
        reference = seconds_to(accuracy, plain)
        times = [seconds_to(accuracy, found[row]) if row in found else None for row in rows]
        texts = ["not reached" if t is None else f"{t:.0f} s ({t / reference:.2f})" for t in times]
        lines.append(f"| {samples} | {accuracy:.1f} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def plot(curves: dict[int, dict[tuple[str, float], Curve]], path: str) -> None:
    plt = pyplot()
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure, axes = plt.subplots(1, len(curves), figsize=(4 * len(curves), 3.6), sharey=True, squeeze=False)
    rows = list(dict.fromkeys(row for found in curves.values() for row in found))
    for axis, (samples, found) in zip(axes[0], curves.items(), strict=True):
        for row, curve in found.items():
            color = "0.3" if row[0] == "plain" else f"C{rows.index(row)}"
            axis.plot(*zip(*sorted(curve.values()), strict=True), "o-", color=color, markersize=4, label=name(row))
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"{samples} training samples", fontsize=9)
        axis.set_xlabel("processor seconds, all included", fontsize=8)
        axis.grid(alpha=0.3, which="both")
        axis.tick_params(labelsize=8)
    axes[0, 0].set_ylabel("accuracy in per cent", fontsize=8)
    axes[0, -1].legend(fontsize=8, loc="lower right")
    figure.tight_layout()
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    publish(__doc__, argv, load, table, plot)


if __name__ == "__main__":
    main()
