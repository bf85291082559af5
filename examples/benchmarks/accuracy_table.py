"""Tables and a picture of what `accuracy.py` measured.

    python examples/benchmarks/accuracy_table.py examples/benchmarks/results/accuracy/* \
        --page docs/accuracy_tables.md --png docs/images/accuracy.png

Differences are paired by seed, with the 95 % confidence interval of their mean (Student's t); accuracies are
per cent, losses are nats. The judges are plain fine-tuning on fewer steps and on fewer samples at the same compute.
Where a row ran at several learning rates, the one with the best mean counts, the judges' rows likewise.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from rows import publish, pyplot, read_rows, save
from scipy import stats


JUDGES = ("fewer_steps", "fewer_samples")
FAR_BELOW = -8.0
"""Points on `fewer_samples` below which a row stands in a panel of its own."""
PREFACE = """# Accuracy, row by row

Every run of `examples/benchmarks/results/accuracy/`; what follows from them stands in
[Benchmarks](benchmarks.md#accuracy). Accuracies in per cent, losses in nats, differences positive where the row is
better, paired by seed, with the 95 % confidence interval of their mean; the number of seeds in brackets. Machines of
different speed were used, also within a table, so CPU seconds tell the order of magnitude only."""


def load(paths: list[str]) -> dict[tuple, dict[tuple, dict[int, dict]]]:
    """Runs by setting (task, mode, metric, steps, samples, size), then by (row, budget), then by seed."""
    by_rate: dict = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for run in read_rows(*paths):
        setting = tuple(run[k] for k in ("task", "mode", "metric", "steps", "train_samples", "size"))
        by_rate[setting][run["row"], run["budget"]][run["lr"]][run["seed"]] = run
    return {setting: {row: at_best_rate(rates) for row, rates in rows.items()} for setting, rows in by_rate.items()}


def at_best_rate(rates: dict[float, dict[int, dict]]) -> dict[int, dict]:
    """Runs by seed at the learning rate with the best mean, over the seeds that were run at every rate."""
    seeds = set.intersection(*(set(runs) for runs in rates.values()))

    def mean(runs: dict[int, dict]) -> float:
        values = [run["value"] if run["metric"] == "accuracy" else -run["value"] for run in runs.values()]
        return float(np.mean([value for seed, value in zip(runs, values, strict=True) if not seeds or seed in seeds]))

    return max(rates.values(), key=mean)


def gap(runs: dict[int, dict], others: dict[int, dict] | None, sign: int) -> tuple[float, float | None] | None:
    """Mean of the paired differences, positive where `runs` is better, and half of its confidence interval; the half
    is None for a single pair, and all is None without one."""
    seeds = sorted(set(runs) & set(others or {}))
    if not seeds:
        return None
    gaps = sign * np.array([runs[s]["value"] - others[s]["value"] for s in seeds])
    if len(gaps) == 1:
        return gaps[0], None
    return gaps.mean(), stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))


def difference(runs: dict[int, dict], others: dict[int, dict] | None, sign: int) -> str:
    """`gap`, in words."""
    found = gap(runs, others, sign)
    if found is None:
        return "-"
    return f"{found[0]:+.2f}" if found[1] is None else f"{found[0]:+.2f} ± {found[1]:.2f}"


def table(setting: tuple, rows: dict[tuple, dict[int, dict]]) -> str:
    task, mode, metric, steps, samples, size = setting
    sign = 1 if metric == "accuracy" else -1
    plain = next((runs for (row, _), runs in rows.items() if row.partition(":")[0] == "plain"), None)
    lines = [
        f"## {task}, {mode}: {steps} steps, {samples} samples, size {size}",
        "",
        f"| row | rate | compute | {metric} (mean of seeds) | to plain | to fewer steps | to fewer samples "
        "| CPU seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (row, budget), runs in sorted(rows.items(), key=lambda item: (-item[0][1], item[0][0])):
        values = [run["value"] for run in runs.values()]
        judges = [difference(runs, rows.get((judge, budget)), sign) if row != judge else "-" for judge in JUDGES]
        lines.append(
            f"| {row} | {next(iter(runs.values()))['lr']:g} | "
            f"{np.mean([run['compute_ratio'] * run_share(run) for run in runs.values()]):.2f} | "
            f"{np.mean(values):.2f} ({len(values)}) | {difference(runs, plain, sign) if runs is not plain else '-'} | "
            f"{judges[0]} | {judges[1]} | {np.median([run['cpu_seconds'] for run in runs.values()]):.0f} |"
        )
    return "\n".join(lines)


def run_share(run: dict) -> float:
    """Steps of the run, as a share of the plain run's."""
    if run["row"].startswith("fewer_steps"):
        return run["budget"]
    return 1 / run["budget"] if run["row"].partition(":")[0].endswith("*") else 1.0


def plot(settings: dict, path: str) -> None:
    """What each row gains on `fewer_samples` at the same budget, with its interval, where several seeds were run.

    Accuracies far below the judge's have a panel of their own, or nothing could be seen of the others.
    """
    plt = pyplot()

    bars: dict[str, list] = {"accuracy": [], "far below": [], "loss": []}
    for (task, mode, metric, steps, samples, size), rows in settings.items():
        for (row, budget), runs in sorted(rows.items(), key=lambda item: (-item[0][1], item[0][0])):
            name = row.partition(":")[0]
            judge = rows.get(("fewer_samples", 0.6 if name == "plain" else budget))
            found = gap(runs, judge, 1 if metric == "accuracy" else -1)
            if row == "fewer_samples" or found is None or found[1] is None:
                continue
            share = "" if name == "plain" else f" {budget:.0%}"
            label = f"{task} {mode}, {samples} x {size}, {steps} steps: {row.replace(':', ', ')}{share}"
            panel = "far below" if metric == "accuracy" and found[0] < FAR_BELOW else metric
            bars[panel].append((label, *found, "0.4" if name in ("plain", *JUDGES) else "C0"))
    bars = {panel: rows for panel, rows in bars.items() if rows}
    figure, axes = plt.subplots(
        len(bars), 1, squeeze=False, figsize=(10, 1.6 + 0.24 * sum(map(len, bars.values()))),
        height_ratios=[1 + len(rows) for rows in bars.values()],
    )  # fmt: skip
    for axis, (panel, rows) in zip(axes[:, 0], bars.items(), strict=True):
        for position, (_, mean, half, color) in enumerate(rows[::-1]):
            axis.errorbar(mean, position, xerr=half, fmt="o", color=color, capsize=3, markersize=5)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [label for label, *_ in rows[::-1]], fontsize=8)
        axis.set_ylim(-0.7, len(rows) - 0.3)
        unit = "nats of loss" if panel == "loss" else "points of accuracy"
        axis.set_xlabel(f"{unit} better than fewer_samples at the budget (plain: 60%)", fontsize=8)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    save(figure, path)


def tables(settings: dict) -> str:
    return "\n\n".join(table(setting, rows) for setting, rows in settings.items())


def main(argv: list[str] | None = None) -> None:
    publish(__doc__, argv, load, tables, plot, PREFACE)


if __name__ == "__main__":
    main()
