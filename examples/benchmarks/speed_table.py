"""Tables and a picture of what `speed.py` measured.

    python examples/benchmarks/speed_table.py examples/benchmarks/results/speed.jsonl \
        --page docs/speed_tables.md --png docs/images/speed.png

Ratios are to the plain step of the same mode, full or LoRA, measured in the same run. Times are those of all forward
and backward passes, with the smallest and the largest ratio of the repeats; "with optimizer" adds the optimizer's step.
Memory is the peak of what a step allocates (activations), and that with weights, gradients and optimizer state.
Efficiency is the share of time saved over the share of FLOPs saved.
"""

from __future__ import annotations

from collections import defaultdict

from rows import publish, pyplot, read_rows, save


CELL_KEYS = ("shape", "blocks", "micro_batch_size", "num_micro_batches", "dtype", "threads", "device", "rank")
MARKERS = {
    "checkpointing": ("X", "0.4"), "lora_fa": ("P", "C1"), "badam": ("D", "C3"),
    "aligned": ("o", "C0"), "depth": ("^", "C2"), "spread": ("s", "C4"), "drop_bp": ("v", "C5"), "lisa": ("<", "C6"),
    "stochastic_depth": (">", "C7"), "dynamic_pruning": ("p", "C8"), "moe": ("*", "C9"),
}  # fmt: skip
PREFACE = """# Speed and memory, row by row

Every row of `examples/benchmarks/results/speed.jsonl`; what follows from them, and what the columns mean, stands in
[Benchmarks](benchmarks.md#beside-other-methods-on-other-shapes). Ratios are to the plain step of the same mode in the
same run, with the smallest and the largest of the repeats in brackets. Seconds of different cells do not compare: they
were measured on machines of different speed."""


def load(paths: list[str]) -> dict[tuple, list[dict]]:
    """Rows by cell."""
    cells: dict = defaultdict(list)
    for row in read_rows(*paths):
        cells[tuple(row[key] for key in CELL_KEYS)].append(row)
    return {cell: sorted(rows, key=place) for cell, rows in cells.items()}


def kind(row: dict) -> str:
    """D2FT's schedule, or the method."""
    return row["schedule"] or row["variant"]


def place(row: dict) -> tuple:
    """Full before LoRA, the plain step first, then the peers, then the schedules by falling budget."""
    order = ("plain", *MARKERS)
    return row["mode"], order.index(kind(row)), -row["budget"]


def title(cell: tuple) -> str:
    shape, blocks, size, count, dtype, threads, device, _ = cell
    where = f"{threads} threads" if device == "cpu" else device
    return f"{shape}, {blocks} blocks, {count} micro-batches of {size}, {dtype}, {where}"


def table(cell: tuple, rows: list[dict]) -> str:
    lines = [
        f"## {title(cell)}",
        "",
        "| mode | step | seconds | time | FLOPs | efficiency | with optimizer | activations | all memory | GFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = f"D2FT {row['schedule']} {row['budget']:.1f}" if row["schedule"] else row["variant"]
        low, high = row["time_ratio_range"]
        time = "1" if row["variant"] == "plain" else f"{row['time_ratio']:.3f} ({low:.2f} - {high:.2f})"
        worth = "-" if row["efficiency"] is None else f"{row['efficiency']:.2f}"
        lines.append(
            f"| {row['mode']} | {name} | {row['seconds']:.3f} | {time} | {row['flops_ratio']:.3f} | {worth} | "
            f"{row['time_ratio_with_optimizer']:.3f} | {row['memory_ratio']:.2f} | "
            f"{row['memory_ratio_with_weights']:.2f} | {row['flops'] / row['seconds'] / 1e9:.0f} |"
        )
    return "\n".join(lines)


def summary(cells: dict[tuple, list[dict]]) -> str:
    """Efficiency of D2FT, cells by (mode, schedule), one number a budget."""
    d2ft = [row for rows in cells.values() for row in rows if row["variant"] == "d2ft"]
    columns = [(mode, name) for mode in ("full", "lora") for name in MARKERS]
    columns = [column for column in columns if any((row["mode"], row["schedule"]) == column for row in d2ft)]
    budgets = sorted({row["budget"] for row in d2ft}, reverse=True)
    heads = " | ".join(f"{mode} {name}" for mode, name in columns)
    given = ", ".join(f"{budget:g}" for budget in budgets)
    lines = [f"## Efficiency of D2FT at budgets {given}", "", f"| | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for cell, rows in cells.items():
        found = {(row["mode"], row["schedule"], row["budget"]): row["efficiency"] for row in rows}
        values = [[found.get((*column, budget)) for budget in budgets] for column in columns]
        texts = [" ".join("-" if v is None else f"{v:.2f}" for v in each) if any(each) else "-" for each in values]
        lines.append(f"| {title(cell)} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def plot(cells: dict[tuple, list[dict]], path: str) -> None:
    """Time over FLOPs, one panel a cell and mode: on the diagonal every saved FLOP is saved time."""
    plt = pyplot()

    panels = [
        (cell, mode, [row for row in rows if row["mode"] == mode])
        for cell, rows in cells.items()
        for mode in sorted({row["mode"] for row in rows})
    ]
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.4 * columns, 3.1 * lines + 0.4), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (cell, mode, rows) in zip(axes.flat, panels, strict=False):
        axis.plot([0, 1.5], [0, 1.5], color="0.8", linewidth=1, zorder=0)
        for row in rows:
            if row["variant"] != "plain":
                marker, color = MARKERS[kind(row)]
                low, high = row["time_ratio_range"]
                axis.plot([row["flops_ratio"]] * 2, [low, high], color=color, alpha=0.4, linewidth=1.5)
                axis.plot(row["flops_ratio"], row["time_ratio"], marker, color=color, markersize=5)
        axis.set_title(f"{cell[0]}, micro-batches of {cell[2]}, {mode}", fontsize=8)
        axis.set_xlabel("FLOPs to plain", fontsize=7)
        axis.set_ylabel("time to plain", fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    marks = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=name) for name, (m, c) in MARKERS.items()]
    figure.tight_layout(rect=(0, 0.3 / (3.1 * lines + 0.4), 1, 1))
    figure.legend(handles=marks, loc="lower center", ncols=min(len(marks), 2 * columns), fontsize=7, frameon=False)
    save(figure, path)


def tables(cells: dict[tuple, list[dict]]) -> str:
    return "\n\n".join([summary(cells), *(table(cell, rows) for cell, rows in cells.items())])


def main(argv: list[str] | None = None) -> None:
    publish(__doc__, argv, load, tables, plot, PREFACE)


if __name__ == "__main__":
    main()
