"""Figures of a run's page, drawn by plotly. Colours of text and axes are the page's, which knows light and dark."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import plotly.graph_objects as go

from ..schedule import Operation, Schedule
from .run_record import RunRecord


COLORS = {"SHORTCUT": "#b9c1cb", "FORWARD_ONLY": "#e69f00", "FULL": "#2f81c7"}
LINES = ("#2f81c7", "#e69f00", "#1fa37c", "#cc79a7", "#56b4e9", "#d55e00")
_PLAIN = "#8b949e"
_LINE_OF_PLAIN = {"color": _PLAIN, "dash": "dot"}
_SCALE = [[0.0, "#dfe7ef"], [0.5, "#6aa9dd"], [1.0, "#0b4f8a"]]
_OF_TIME = "optimizer step"


@dataclass(frozen=True)
class WebFigure:
    """A figure with its heading and what it shows, in a sentence."""

    name: str
    title: str
    caption: str
    figure: go.Figure
    wide: bool = False


def web_figures(record: RunRecord, against: RunRecord | None = None) -> list[WebFigure]:
    """The figures that there are numbers for, in the order of a page.

    Args:
        record: The run.
        against: A plain run to draw beside it, or None.
    """
    makers: tuple[Callable[..., Iterator[WebFigure]], ...] = (
        _loss, _loss_by_time, _metrics, _activity, _activity_by_block, _ratios, _schedule, _loads, _seconds, _memory,
        _bytes, _scores, _gradients,
    )  # fmt: skip
    return [figure for make in makers for figure in make(record, against)]


def _lines(
    title_y: str, *curves: tuple[str, list, list, dict[str, Any]], x: str = _OF_TIME, **layout: Any
) -> go.Figure:
    """Curves with markers where they are short."""
    figure = go.Figure()
    for index, (name, xs, ys, style) in enumerate(curves):
        mode = "lines+markers" if len(xs) <= 40 else "lines"
        line = {"color": LINES[index % len(LINES)], "width": 2} | style
        figure.add_scatter(x=xs, y=ys, name=html.escape(name), mode=mode, line=line, marker={"size": 5})
    figure.update_layout(
        showlegend=len(curves) > 1, xaxis_title=x, yaxis_title=title_y, hovermode="x unified", **layout
    )
    return figure


def _loss(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    curves = [
        (label, *one.series(name), style)
        for one, of, base in ((record, "", {}), (against, ", plain", _LINE_OF_PLAIN))
        if one is not None
        for name, label, style in (
            ("loss", f"training{of}", base),
            ("eval_loss", f"evaluation{of}", base | {"dash": "dash"} if not of else base | {"dash": "dashdot"}),
        )
    ]
    curves = [curve for curve in curves if curve[1]]
    if curves:
        yield WebFigure(
            "loss", "Loss", "Mean over the steps that ran since the entry before.", _lines("loss", *curves), wide=True
        )


def _loss_by_time(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    curves = []
    for one, name, style in ((record, "this run", {}), (against, "plain", _LINE_OF_PLAIN)):
        if one is None:
            continue
        seconds, losses = _elapsed(one)
        if losses:
            curves.append((name, seconds, losses, style))
    if curves and against is not None:
        caption = "The same training loss over the seconds that the steps took, evaluation and saving left out."
        yield WebFigure("loss-by-time", "Loss by time", caption, _lines("loss", *curves, x="seconds"))


def _elapsed(record: RunRecord) -> tuple[list[float], list[float]]:
    """Seconds since the first step at every logged loss, and the losses."""
    seconds, losses, total, before = [], [], 0.0, 0
    for entry in record.history:
        if "step_seconds" in entry and "step" in entry and "loss" in entry:
            total += entry.get("preparation_seconds", 0.0) + entry["step_seconds"] * (entry["step"] - before)
            before = entry["step"]
            seconds.append(total)
            losses.append(entry["loss"])
    return seconds, losses


_NO_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "model_preparation_time")


def _metrics(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    names = dict.fromkeys(name for entry in record.history for name in entry if name.startswith("eval_"))
    for index, name in enumerate(names):
        short = name.removeprefix("eval_")
        if short.endswith(_NO_METRICS) or not record.series(name)[0]:
            continue
        curves = _beside_plain(record, against, name)
        yield WebFigure(f"metric-{index}", short, "On the evaluation data.", _lines(html.escape(short), *curves))


def _beside_plain(record: RunRecord, against: RunRecord | None, name: str) -> list[tuple[str, list, list, dict]]:
    """A figure of the log as curves: of this run, and of the plain one where it has it."""
    curves = [("this run", *record.series(name), {})]
    if against is not None and against.series(name)[0]:
        curves.append(("plain", *against.series(name), _LINE_OF_PLAIN))
    return curves


def _activity(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    activity = record.activity
    if not activity.shares:
        return
    shares = np.array(activity.shares).mean(axis=1)  # [S, 3]
    figure = go.Figure()
    middle, width = _spans(record)
    for operation in reversed(Operation):
        figure.add_bar(
            x=middle, y=shares[:, operation], width=width, name=operation.name,
            marker={"color": COLORS[operation.name], "line": {"width": 0}},
        )  # fmt: skip
    figure.update_layout(
        barmode="stack", bargap=0, xaxis_title=_OF_TIME, yaxis={"title": "share of the samples", "tickformat": ".0%"},
        hovermode="x unified",
    )  # fmt: skip
    caption = "Samples of each step that ran in full, forward only, or not at all; mean over the subnets, as executed."
    yield WebFigure("activity", "What ran", caption, figure, wide=True)


def _spans(record: RunRecord) -> tuple[np.ndarray, np.ndarray]:
    """Middle and width of each span of steps."""
    first, last = np.array(record.activity.first), np.array(record.activity.last)
    return (first + last) / 2, last - first + 1.0


def _activity_by_block(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    if not record.activity.shares:
        return
    shares = np.array(record.activity.shares)  # [S, B, 3]
    if np.allclose(shares, shares[:, :1]):  # all blocks do the same
        return
    middle, _ = _spans(record)
    labels = {"customdata": np.round(shares.transpose(1, 0, 2), 4).tolist()}
    figure = go.Figure(
        go.Heatmap(
            x=middle, y=list(range(shares.shape[1])), z=shares[:, :, Operation.FULL].T, zmin=0, zmax=1,
            colorscale=_SCALE, colorbar={"tickformat": ".0%", "thickness": 12, "title": "FULL"}, **labels,
            hovertemplate="step %{x}, block %{y}<br>FULL %{customdata[2]:.0%}, FORWARD_ONLY %{customdata[1]:.0%}, "
            "SHORTCUT %{customdata[0]:.0%}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(xaxis_title=_OF_TIME, yaxis={"title": "block", "dtick": max(1, shares.shape[1] // 12)})
    caption = "Share of the samples that each block ran in full. Point at a cell for the other operations."
    yield WebFigure("activity-by-block", "What ran, by block", caption, figure, wide=True)


def _ratios(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    named = (
        ("compute_ratio", "compute of the subnets"), ("flops_ratio", "FLOPs, of plain training"),
        ("communication_ratio", "communication"), ("padding_ratio", "padding among the tokens"),
    )  # fmt: skip
    curves = [(label, *record.series(name), {}) for name, label in named if record.series(name)[0]]
    if curves:
        figure = _lines("", *curves, yaxis={"tickformat": ".0%", "rangemode": "tozero"})
        budget = record.about.get("budget, compute")
        if isinstance(budget, int | float):
            figure.add_hline(y=budget, line={"color": _PLAIN, "dash": "dot", "width": 1}, annotation_text="budget")
        yield WebFigure("ratios", "Compute and communication", "As executed, relative to everything FULL.", figure)


def _schedule(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    if record.schedule is None:
        return
    schedule = Schedule.from_dict({**record.schedule, "capacities": None})
    order = np.argsort(schedule.blocks, kind="stable")
    operations = list(Operation)
    edges = [i / len(operations) for i in range(len(operations) + 1)]
    scale = [
        [edge, COLORS[operation.name]]
        for i, operation in enumerate(operations)
        for edge in (edges[i], edges[i + 1])
    ]  # fmt: skip
    names = np.array([operation.name for operation in operations])
    figure = go.Figure(
        go.Heatmap(
            z=schedule.operations[:, order].astype(int), zmin=-0.5, zmax=len(operations) - 0.5, colorscale=scale,
            xgap=1 if schedule.num_subnets <= 160 else 0, ygap=1, showscale=False,
            text=names[schedule.operations[:, order]], customdata=_cells(schedule, order),
            hovertemplate="micro-batch %{y}, block %{customdata[0]}, subnet %{customdata[1]}<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    for operation in reversed(operations):  # a heat map has no legend of its own
        figure.add_scatter(
            x=[None], y=[None], mode="markers", name=operation.name,
            marker={"color": COLORS[operation.name], "symbol": "square", "size": 11},
        )  # fmt: skip
    firsts = np.searchsorted(schedule.blocks[order], np.unique(schedule.blocks))
    every = max(1, len(firsts) // 24)
    figure.update_layout(
        showlegend=True,
        xaxis={"title": "block", "tickvals": firsts[::every].tolist(), "ticktext": [
            str(block) for block in np.unique(schedule.blocks)[::every]
        ], "showgrid": False, "zeroline": False},
        yaxis={"title": "micro-batch", "autorange": "reversed", "dtick": max(1, schedule.num_micro_batches // 12),
               "showgrid": False, "zeroline": False},
    )  # fmt: skip
    sizes = ", ".join(f"{weight:g}" for weight in schedule.weights[:12])
    caption = (
        f"The last one that ran: {schedule.num_micro_batches} rows of {sizes}"
        f"{', ...' if schedule.num_micro_batches > 12 else ''} samples, {schedule.num_subnets} subnets; "
        f"compute {schedule.compute_ratio:.1%}, alignment {schedule.alignment:.2f}."
    )
    yield WebFigure("schedule", "Schedule", caption, figure, wide=True)


def _cells(schedule: Schedule, order: np.ndarray) -> list:
    """Block and number of the subnet of each cell."""
    row = [[int(schedule.blocks[k]), int(k)] for k in order]
    return [row] * schedule.num_micro_batches


def _loads(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    loads = record.activity.loads
    if not loads:
        return
    figure = go.Figure(go.Bar(x=list(range(len(loads))), y=loads, marker={"color": COLORS["FULL"]}))
    figure.update_layout(
        xaxis_title="device", yaxis={"tickformat": ".0%", "range": [0, max(1.0, *loads)], "title": "load"}, bargap=0.15
    )
    spread = max(loads) - min(loads)
    caption = (
        f"Mean over {record.activity.steps} schedules, relative to everything FULL; the largest and the smallest "
        f"are {spread:.1%} apart."
    )
    yield WebFigure("loads", "Loads of the devices", caption, figure)


def _single(record: RunRecord, against: RunRecord | None, name: str, unit: str, title: str, caption: str, key: str):
    if record.series(name)[0]:
        curves = _beside_plain(record, against, name)
        yield WebFigure(key, title, caption, _lines(unit, *curves, yaxis={"rangemode": "tozero"}))


def _seconds(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    caption = "Mean over the optimizer steps since the entry before; evaluation and saving left out."
    yield from _single(record, against, "step_seconds", "seconds", "Seconds of a step", caption, "seconds")


def _memory(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    caption = "The most so far: allocated on the GPU, or on a CPU of the whole process."
    yield from _single(record, against, "peak_memory_mib", "MiB", "Peak memory", caption, "memory")


def _bytes(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    caption = "What this process sent to others in a step, counted."
    yield from _single(record, against, "sent_mib_per_step", "MiB", "Sent in a step", caption, "bytes")


def _scores(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    for index, (name, values) in enumerate(record.scores.items()):
        blocks = np.array(record.blocks)
        if len(blocks) != len(values):
            continue
        rows = [np.array(values)[blocks == block] for block in np.unique(blocks)]
        width = max(map(len, rows))
        table = [[*map(float, row), *[None] * (width - len(row))] for row in rows]
        figure = go.Figure(
            go.Heatmap(
                z=table, colorscale=_SCALE, colorbar={"thickness": 12}, xgap=1, ygap=1,
                hovertemplate="block %{y}, subnet %{x}<br>%{z:.4g}<extra></extra>",
            )
        )  # fmt: skip
        figure.update_layout(
            xaxis={"title": "subnet of the block", "dtick": max(1, width // 12), "showgrid": False},
            yaxis={"title": "block", "dtick": max(1, len(rows) // 12), "showgrid": False},
        )
        caption = f"{html.escape(name)}: mean over the samples that were scored."
        if name == "weight_magnitude":
            caption = "Weight magnitude, as it was when it was last looked at."
        yield WebFigure(f"scores-{index}", "Scores by block", caption, figure)


def _gradients(record: RunRecord, against: RunRecord | None) -> Iterator[WebFigure]:
    for name, title in (("grad_norm", "Gradient norm"), ("learning_rate", "Learning rate")):
        xs, ys = record.series(name)
        if xs:
            figure = _lines(title.lower(), (title, xs, ys, {}), yaxis={"rangemode": "tozero"})
            yield WebFigure(name, title, "As the Trainer logs it.", figure)
