"""Tables and a picture of what `lossless.py` measured.

    python examples/benchmarks/lossless_table.py examples/benchmarks/results/lossless/* \
        --page docs/lossless_tables.md --png docs/images/lossless.png

Differences are to `plain`, the stock Trainer's full run, paired by seed, with the 95 % confidence interval of their
mean (Student's t), positive where the row is better. Time is the median ratio of processor seconds to `plain` in the
same round of ``--time``, with the smallest and the largest; where there was none, that of the runs themselves, with ~.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from accuracy_table import difference, gap
from rows import publish, pyplot, read_rows, save


PLAIN = ("plain", 1.0)
DEFAULT = ("default", 0.6)
SHOWN = re.compile(r"default(:(compute_budget=[0-9.]+|head_start=False))?")
"""Rows in the picture; the others stand in the tables."""
PREFACE = """# At or above the full run, row by row

Every run of `examples/benchmarks/results/lossless/`; what follows from them stands in [Benchmarks](benchmarks.md).
Accuracies in per cent, losses in nats per token, differences to the stock Trainer's full run positive where the row is
better, paired by seed, with the 95 % confidence interval of their mean; the number of seeds in brackets. Rates of
CIFAR-10 and SST-2 were tuned for each row, in full and under LoRA. Time: processor seconds of training, passes before
it included, to those of `plain`, rows in turns; with ~ those of the runs themselves. FLOPs likewise, as executed,
padding included."""


@dataclass
class Cell:
    """A row at a budget, on a task in a mode.

    Attributes:
        runs: Evaluated runs, by seed.
        rounds: Short runs in turns, by round.
    """

    runs: dict[int, dict] = field(default_factory=dict)
    rounds: dict[int, dict] = field(default_factory=dict)

    def ratios(self, plain: Cell, name: str = "cpu_seconds", timed: bool = True) -> list[float]:
        """Ratios to plain of what was measured, in the same rounds, or else in the runs of the same seeds."""
        mine, others = (self.rounds, plain.rounds) if timed else (self.runs, plain.runs)
        return [run[name] / others[key][name] for key, run in mine.items() if key in others]

    def time(self, plain: Cell) -> float | None:
        """Time to plain; None where both never ran on equal terms."""
        found = self.ratios(plain) or self.ratios(plain, timed=False)
        return float(np.median(found)) if found else None

    @property
    def sign(self) -> int:
        """Which way is better."""
        return 1 if next(iter(self.runs.values()))["metric"] == "accuracy" else -1

    def gap(self, plain: Cell) -> tuple[float, float | None] | None:
        """See `accuracy_table.gap`."""
        return gap(self.runs, plain.runs, self.sign)


Settings = dict[tuple[str, str], dict[tuple[str, float], Cell]]
"""Cells by (task, mode), then by (row, budget)."""


def load(paths: list[str]) -> Settings:
    """What the files hold; runs to find rates are passed over.

    Raises:
        ValueError: If a row was evaluated at two rates, or in two lengths, with one seed.
    """
    found: Settings = defaultdict(lambda: defaultdict(Cell))
    for run in read_rows(*paths):
        cell = found[run["task"], run["mode"]][run["row"], run["budget"]]
        if run["split"] == "time":
            cell.rounds[run["seed"]] = run
        elif run["split"] == "test":
            if run["seed"] in cell.runs:
                where = ", ".join(f"{name}={run[name]}" for name in ("task", "mode", "row", "budget", "seed"))
                raise ValueError(f"{where} was run twice, at other rates or lengths; leave one of the files out.")
            cell.runs[run["seed"]] = run
    evaluated = {setting: {row: c for row, c in cells.items() if c.runs} for setting, cells in found.items()}
    return {setting: cells for setting, cells in evaluated.items() if cells}


def name(row: tuple[str, float]) -> str:
    return row[0] if row[1] == 1 else f"{row[0].replace(':', ', ')}, {row[1]:.0%}"


def _value(cell: Cell) -> str:
    digits = 2 if cell.sign == 1 else 4
    return f"{np.mean([run['value'] for run in cell.runs.values()]):.{digits}f} ({len(cell.runs)})"


def _difference(cell: Cell, plain: Cell) -> str:
    if cell.sign == 1:
        return difference(cell.runs, plain.runs, 1)
    found = cell.gap(plain)
    return "-" if found is None else f"{found[0]:+.4f}" + ("" if found[1] is None else f" ± {found[1]:.4f}")


def _time(cell: Cell, plain: Cell) -> str:
    ratios, median = cell.ratios(plain), cell.time(plain)
    if median is None:
        return "-"
    return f"{median:.2f} ({min(ratios):.2f} - {max(ratios):.2f})" if ratios else f"~{median:.2f}"


def _flops(cell: Cell, plain: Cell) -> str:
    ratios = cell.ratios(plain, "flops", timed=False)
    return f"{np.mean(ratios):.2f}" if ratios else "-"


def as_good(cell: Cell, plain: Cell, budget: float) -> bool:
    """Whether a row ends at or above the full run, on the mean of the seeds, in the budget's share of its time."""
    found, time = cell.gap(plain), cell.time(plain)
    return found is not None and time is not None and found[0] >= 0 and round(time, 2) <= budget


def overview(settings: Settings, row: tuple[str, float] = DEFAULT) -> str:
    """A row beside the full run, one line a task and mode."""
    lines = [f"| task | fine-tuning | plain | {name(row)} | difference | time |", "|---|---|---|---|---|---|"]
    for (task, mode), cells in settings.items():
        if row in cells and PLAIN in cells:
            cell, plain = cells[row], cells[PLAIN]
            lines.append(
                f"| {task} | {mode} | {_value(plain)} | {_value(cell)} | {_difference(cell, plain)} | "
                f"{_time(cell, plain)} |"
            )
    return "\n".join(lines)


def verdicts(settings: Settings) -> str:
    """On how many tasks each row is as good as the full run, in its share of the time."""
    counts: dict = defaultdict(list)
    for (_, mode), cells in settings.items():
        for row, cell in cells.items():
            if row[1] < 1 and PLAIN in cells:
                counts[mode, row].append(as_good(cell, cells[PLAIN], row[1]))
    lines = []
    for (mode, row), found in sorted(counts.items(), key=lambda item: (item[0][0], -sum(item[1]) / len(item[1]))):
        share = f"at or above the full run at <= {row[1]:g} of its time on {sum(found)} of {len(found)} tasks"
        lines.append(f"- {mode}, {name(row)}: {share}")
    return "\n".join(lines)


def equal_time(settings: Settings, time: float = DEFAULT[1]) -> str:
    """The budgets at which rows would take a share of plain's time, on the line through the two nearest that ran."""
    lines = []
    for (task, mode), cells in settings.items():
        points: dict = defaultdict(list)
        for (row, budget), cell in cells.items():
            found = cell.time(cells.get(PLAIN, Cell()))
            if budget < 1 and found is not None and "compute_budget" not in row:
                points[row].append((abs(found - time), found, budget))
        for row, found in points.items():
            (_, t1, b1), *others = sorted(found)
            if others and others[0][1] != t1:
                (_, t2, b2), *_ = others
                lines.append(f"- {task}, {mode}, {row}: compute_budget={b1 + (time - t1) * (b2 - b1) / (t2 - t1):.2f}")
    return "\n".join([f"Budgets that would take {time:g} of plain's time:", "", *lines]) if lines else ""


def table(setting: tuple[str, str], cells: dict[tuple[str, float], Cell]) -> str:
    """All rows of a task and mode."""
    plain = cells.get(PLAIN, Cell())
    first = next(iter((plain if plain.runs else next(iter(cells.values()))).runs.values()))
    title = f"## {setting[0]}, {setting[1]}: {first['steps']} steps, {first['train_samples']} samples"
    padding = first["logged"].get("padding") if plain.runs else None
    lines = [
        title if not padding else f"{title}, {padding:.0%} padding",
        "",
        f"| row | rate | {first['metric']} (mean of seeds) | to plain | time | FLOPs | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row, cell in sorted(cells.items(), key=lambda item: (-item[0][1], item[0][0] != "plain", item[0][0])):
        rate = next(iter(cell.runs.values()))["lr"]
        seconds = np.median([run["cpu_seconds"] for run in cell.runs.values()])
        compared = (
            [show(cell, plain) for show in (_difference, _time, _flops)] if cell is not plain else ["-", "1", "1"]
        )
        lines.append(f"| {name(row)} | {rate:g} | {_value(cell)} | {' | '.join(compared)} | {seconds:.0f} |")
    return "\n".join(lines)


def tables(settings: Settings) -> str:
    parts = [overview(settings), verdicts(settings), equal_time(settings)]
    parts += [table(setting, cells) for setting, cells in settings.items()]
    return "\n\n".join(part for part in parts if part)


def plot(settings: Settings, path: str) -> None:
    """Differences to plain over time to plain, a point a task, mode and row: good is above, and left."""
    plt = pyplot()
    points: dict = defaultdict(list)
    for (task, mode), cells in settings.items():
        for row, cell in cells.items():
            plain = cells.get(PLAIN, Cell())
            time, found = cell.time(plain), cell.gap(plain)
            if SHOWN.fullmatch(row[0]) and time is not None and found is not None:
                points["accuracy" if cell.sign == 1 else "loss"].append((f"{task} {mode}", row, time, *found))
    points = {metric: points[metric] for metric in ("accuracy", "loss") if metric in points}
    rows = list(dict.fromkeys(row for found in points.values() for _, row, *_ in found))
    tasks = list(dict.fromkeys(task for found in points.values() for task, *_ in found))
    marks = "os^vD<>pP*XhHd"
    figure, axes = plt.subplots(1, len(points), figsize=(5.5 * len(points), 6), squeeze=False)
    for axis, (metric, found) in zip(axes[0], points.items(), strict=True):
        for task, row, time, mean, half in found:
            color, marker = f"C{rows.index(row) % 10}", marks[tasks.index(task) % len(marks)]
            axis.errorbar(time, mean, yerr=half, fmt=marker, color=color, markersize=5, elinewidth=0.6, alpha=0.8)
        axis.axhline(0, color="0.5", linewidth=0.8)
        axis.axvline(DEFAULT[1], color="0.5", linewidth=0.8, linestyle="--")
        axis.set_xlabel("time to plain", fontsize=8)
        unit = "points of accuracy" if metric == "accuracy" else "nats of loss"
        axis.set_ylabel(f"{unit} better than plain", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    of_rows = [
        plt.Line2D([], [], marker="o", color=f"C{i % 10}", linestyle="", label=name(row)) for i, row in enumerate(rows)
    ]
    of_tasks = [
        plt.Line2D([], [], marker=marks[i % len(marks)], color="0.4", linestyle="", label=task)
        for i, task in enumerate(tasks)
    ]
    lines = -(-len(of_rows + of_tasks) // 3)
    figure.tight_layout(rect=(0, 0.035 * lines + 0.01, 1, 1))
    figure.legend(handles=of_rows + of_tasks, loc="lower center", ncols=3, fontsize=7, frameon=False)
    save(figure, path)


def main(argv: list[str] | None = None) -> None:
    publish(__doc__, argv, load, tables, plot, PREFACE)


if __name__ == "__main__":
    main()
