"""The table of what `parallel.py` measured.

python examples/benchmarks/parallel_table.py examples/benchmarks/results/parallel.json
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path


def merge(setting: dict, ranks: list[dict]) -> dict:
    """What all ranks measured, together: medians over the repeats."""
    rows = []
    for group, of_ranks in (("equal", ranks), ("slowed", [rank.get("slowed", {"times": {}}) for rank in ranks])):
        for name in of_ranks[0]["times"]:
            repeats = [of_rank["times"][name] for of_rank in of_ranks]
            kind = "heads" if "heads" in repeats[0][0] else "thread"
            compute = [statistics.median(repeat[kind] for repeat in of_rank) for of_rank in repeats]
            row = {
                "group": group,
                "variant": name,
                "step_seconds": statistics.median(
                    max(r["step"] for r in at_once) for at_once in zip(*repeats, strict=True)
                ),
                "compute_kind": kind,
                "compute_seconds": compute,
                "thread_seconds": [statistics.median(r["thread"] for r in of_rank) for of_rank in repeats],
                "max_over_mean": max(compute) / statistics.mean(compute),
                "repeats": repeats,
            }
            if group == "equal":
                for key in ranks[0]["facts"][name]:
                    row[key] = [rank["facts"][name][key] for rank in ranks]
            rows.append(row)
    result = {"setting": setting, "rows": rows, "schedules": ranks[0]["schedules"]}
    result["micro"] = [rank["micro"] for rank in ranks]
    if "slowed" in ranks[0]:
        result["calibrated"] = {key: ranks[0]["slowed"][key] for key in ("capacities", "loads")}
    return result


def table(result: dict) -> str:
    """Markdown, one row per variant; figures per rank are separated by slashes."""
    rows = result["rows"]
    reference = sum(next(row["rows"] for row in rows if row["variant"] == "tensor parallel"))
    lines = [
        title(result["setting"]),
        "",
        "| | sent a step, MB | received, MB | rows, of tensor parallelism | compute, s | max/mean | step, s "
        "| parameters, M | peak memory, MiB |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        if row["group"] == "equal":
            share = f"{sum(row['rows']) / reference:.3f}" if has_rows(row) else "-"
            lines.append(
                f"| {row['variant']} | {each(row['sent'], 1e6)} | {each(row['received'], 1e6)} | {share} "
                f"| {times(row)} | {each(row['parameters'], 1e6)} | {each(row['peak_bytes'], 2**20, 0)} |"
            )
    slowed = [row for row in rows if row["group"] == "slowed"]
    if slowed:
        capacities = ", ".join(f"{c:.2f}" for c in result["calibrated"]["capacities"])
        lines += ["", f"The last rank with a busy neighbour on its core; calibrated capacities: {capacities}", ""]
        lines += ["| | compute, s | max/mean | step, s |", "|---" * 4 + "|"]
        lines += [f"| {row['variant']} | {times(row)} |" for row in slowed]
    return "\n".join(lines)


def title(setting: dict) -> str:
    return (
        f"{setting['model']}, {setting['layers']} blocks of {setting['heads']} heads, width {setting['hidden']}, "
        f"{setting['micro_batches']} micro-batches of {setting['micro_batch_size']}, {setting['processes']} processes"
    )


def has_rows(row: dict) -> bool:
    """Whether the row's variant sends rows of hidden states, as opposed to gradients and weights."""
    return row["variant"].startswith(("D2FT", "tensor", "transformers"))


def each(values: list[float], unit: float, digits: int = 1) -> str:
    """Figures of all ranks; one stands for all where they agree."""
    texts = [f"{value / unit:,.{digits}f}" for value in values]
    return texts[0] if len(set(texts)) == 1 else " / ".join(texts)


def times(row: dict) -> str:
    return f"{each(row['compute_seconds'], 1, 3)} | {row['max_over_mean']:.3f} | {row['step_seconds']:.3f}"


def main(paths: list[str]) -> None:
    print("\n\n".join(table(json.loads(Path(path).read_text())) for path in paths))


if __name__ == "__main__":
    main(sys.argv[1:])
