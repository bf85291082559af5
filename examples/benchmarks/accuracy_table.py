"""Tables and a picture of what `accuracy.py` measured.

    python examples/benchmarks/accuracy_table.py examples/benchmarks/results/accuracy/* --png docs/images/accuracy.png

Differences are paired by seed, with the 95 % confidence interval of their mean (Student's t); accuracies are
per cent, losses are nats. The judges are plain fine-tuning on fewer steps and on fewer samples at the same compute.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats


JUDGES = ("fewer_steps", "fewer_samples")


def load(paths: list[str]) -> dict[tuple, dict[tuple, dict[int, dict]]]:
    """Runs by setting (task, mode, metric, steps, samples, size), then by (row, budget), then by seed."""
    settings: dict = defaultdict(lambda: defaultdict(dict))
    for path in paths:
        for line in Path(path).read_text().splitlines():
            run = json.loads(line)
            setting = tuple(run[k] for k in ("task", "mode", "metric", "steps", "train_samples", "size"))
            settings[setting][run["row"], run["budget"]][run["seed"]] = run
    return settings


def difference(runs: dict[int, dict], others: dict[int, dict] | None, sign: int) -> str:
    """Mean of the paired differences, positive where `runs` is better, with its confidence interval."""
    seeds = sorted(set(runs) & set(others or {}))
    if not seeds:
        return "-"
    gaps = sign * np.array([runs[s]["value"] - others[s]["value"] for s in seeds])
    if len(gaps) == 1:
        return f"{gaps[0]:+.2f}"
    half = stats.t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / np.sqrt(len(gaps))
    return f"{gaps.mean():+.2f} ± {half:.2f}"


def table(setting: tuple, rows: dict[tuple, dict[int, dict]]) -> str:
    task, mode, metric, steps, samples, size = setting
    sign = 1 if metric == "accuracy" else -1
    plain = next((runs for (row, _), runs in rows.items() if row.partition(":")[0] == "plain"), None)
    lines = [
        f"### {task}, {mode}: {steps} steps, {samples} samples, size {size}",
        "",
        f"| row | compute | {metric} (mean of seeds) | to plain | to fewer steps | to fewer samples | CPU seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for (row, budget), runs in sorted(rows.items(), key=lambda item: (-item[0][1], item[0][0])):
        values = [run["value"] for run in runs.values()]
        judges = [difference(runs, rows.get((judge, budget)), sign) if row != judge else "-" for judge in JUDGES]
        lines.append(
            f"| {row} | {np.mean([run['compute_ratio'] * run_share(run) for run in runs.values()]):.2f} | "
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
    """What each row gains on the better judge's mean, one panel a setting."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(3, len(settings))
    figure, axes = plt.subplots(
        -(-len(settings) // columns),
        columns,
        figsize=(4.6 * columns, 2.9 * -(-len(settings) // columns)),
        squeeze=False,
    )
    for axis in axes.flat[len(settings) :]:
        axis.set_axis_off()
    for axis, (setting, rows) in zip(axes.flat, settings.items(), strict=False):
        task, mode, metric, _, samples, size = setting
        ordered = sorted(rows.items(), key=lambda item: (item[0][1], item[0][0]))
        for position, ((row, _), runs) in enumerate(ordered):
            values = [run["value"] for run in runs.values()]
            color = "0.4" if row.startswith(("plain", *JUDGES)) else "C0"
            axis.plot(values, [position] * len(values), "o", color=color, alpha=0.35, markersize=4)
            axis.plot(np.mean(values), position, "|", color=color, markersize=14, markeredgewidth=2.5)
        labels = [f"{row.replace('backward_score=', '')} {budget:.0%}" for (row, budget), _ in ordered]
        axis.set_yticks(range(len(labels)), labels, fontsize=7)
        axis.set_title(f"{task}, {mode}, {samples} samples of size {size} ({metric})", fontsize=7.5)
        axis.grid(axis="x", alpha=0.3)
        if metric == "loss":
            axis.invert_xaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--png", default=None)
    args = parser.parse_args()
    settings = load(args.files)
    print("\n\n".join(table(setting, rows) for setting, rows in settings.items()))
    if args.png:
        plot(settings, args.png)


if __name__ == "__main__":
    main()
