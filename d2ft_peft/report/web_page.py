"""One self-contained HTML page of a run: the numbers that matter, then figures. Nothing is fetched to show it."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs

from ..version import __version__
from ..whole_files import replacing
from .run_record import RunRecord
from .web_figures import WebFigure, web_figures


def write_page(record: RunRecord, path: str | os.PathLike, against: RunRecord | None = None) -> Path:
    """Write `page` and return the path; the file is whole or not there.

    Args:
        record: The run.
        path: The file; its folder is made if there is none.
        against: A plain run to draw beside it, or None.
    """
    text = page(record, against)
    with replacing(os.fspath(path)) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(text)
    return Path(path)


def page(record: RunRecord, against: RunRecord | None = None) -> str:
    """The page as text.

    Args:
        record: The run.
        against: A plain run to draw beside it, or None.
    """
    figures = web_figures(record, against)
    parts = {
        "title": html.escape(record.title),
        "subtitle": html.escape(_subtitle(record)),
        "cards": "\n".join(_card(*card) for card in cards(record, against)),
        "figures": "\n".join(_section(figure) for figure in figures) or "<p>Nothing was logged.</p>",
        "facts": "\n".join(
            f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_shown(value))}</td></tr>"
            for name, value in record.about.items()
        ),
        "version": html.escape(__version__),
        "data": in_script(json.dumps({figure.name: json.loads(figure.figure.to_json()) for figure in figures})),
        "plotly": get_plotlyjs(),
    }
    text = files(__package__).joinpath("web_page.html").read_text(encoding="utf-8")
    before, *rest = text.split("{{")
    pieces = [before]
    for piece in rest:  # one pass: what is filled in is not looked at again
        name, _, after = piece.partition("}}")
        pieces += [parts[name], after]
    return "".join(pieces)


def in_script(text: str) -> str:
    """JSON as it may stand within a script: nothing in it ends the element."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026").replace("\u2028", "\\u2028")


def _section(figure: WebFigure) -> str:
    wide = " wide" if figure.wide else ""
    return (
        f'<section class="figure{wide}"><h2>{html.escape(figure.title)}</h2><p>{figure.caption}</p>'
        f'<div class="plot" id="plot-{html.escape(figure.name, quote=True)}"></div></section>'
    )


def _card(label: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><div class="label">{html.escape(label)}</div><div class="value">{html.escape(value)}</div>'
        f'<div class="note">{html.escape(note)}</div></div>'
    )


def cards(record: RunRecord, against: RunRecord | None = None) -> Iterator[tuple[str, str, str]]:
    """The headline: label, value and note of each number that is known."""
    flops, compute = record.last("flops_ratio"), record.last("compute_ratio")
    if flops is not None:
        budget = record.about.get("budget, compute")
        note = f"of plain training's FLOPs{f'; budget {budget:.0%}' if isinstance(budget, int | float) else ''}"
        yield "Compute", f"{flops:.1%}", note
    elif compute is not None:
        yield "Compute", f"{compute:.1%}", "of the subnets"
    seconds = record.last("train_runtime")
    if seconds is not None:
        yield "Time", duration(seconds), _beside(against, "train_runtime", seconds, record)
    for name, label in _results(record):
        value = record.last(name)
        shown = f"{value:.1%}" if "accuracy" in name and 0 <= value <= 1 else f"{value:.4g}"
        there = None if against is None else against.last(name)
        yield label, shown, "" if there is None else f"plain: {there:.4g}"
    memory = record.last("peak_memory_mib")
    if memory is not None:
        yield "Peak memory", f"{memory / 1024:.2f} GiB", _beside(against, "peak_memory_mib", memory, record)
    communication = record.last("communication_ratio")
    if communication is not None:
        yield "Communication", f"{communication:.1%}", "of everything FULL, where heads are shared out"
    trained, parameters = (record.about.get(name) for name in ("trained parameters", "parameters"))
    if isinstance(trained, int) and isinstance(parameters, int) and parameters:
        yield "Trained", f"{trained:,}", f"parameters, {trained / parameters:.1%} of those held"


def _results(record: RunRecord) -> Iterator[tuple[str, str]]:
    """What a run is judged by: a metric of the evaluation, and losses."""
    if record.last("eval_accuracy") is not None:
        yield "eval_accuracy", "Accuracy"
    if record.last("eval_loss") is not None:
        yield "eval_loss", "Evaluation loss"
    if record.last("train_loss") is not None:
        yield "train_loss", "Training loss, mean"
    elif record.last("loss") is not None:
        yield "loss", "Training loss, last"


def _beside(against: RunRecord | None, name: str, value: float, record: RunRecord) -> str:
    there = None if against is None else against.last(name)
    if there:
        return f"{value / there:.0%} of plain"
    if name == "train_runtime" and record.last("step_seconds") is not None:
        return f"{record.last('step_seconds'):.3g} s a step"
    return ""


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _subtitle(record: RunRecord) -> str:
    about = record.about
    parts = [about.get("method"), about.get("model")]
    if about.get("LoRA rank"):
        parts.append(f"LoRA r={about['LoRA rank']}")
    if about.get("policy"):
        parts.append(f"policy {about['policy']}")
    steps = record.last("step")
    if steps:
        parts.append(f"{steps:,.0f} steps")
    return ", ".join(str(part) for part in parts if part)


def _shown(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
