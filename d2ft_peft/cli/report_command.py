"""``d2ft report``: the page of a run that is over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..report import read_run
from .answer import JSON, answer, console


_EPILOG = "Example: d2ft report out/vit --against out/vit-plain --output vit.html"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("report", epilog=_EPILOG)(report)


def report(
    run: Annotated[Path, typer.Argument(help="Output folder of a Trainer, or one of its checkpoints.")],
    output: Annotated[Path | None, typer.Option(help="The HTML file; report.html in the folder without it.")] = None,
    against: Annotated[Path | None, typer.Option(help="Folder of a plain run to draw beside it.")] = None,
    as_json: JSON = False,
) -> None:
    """Write a run's report: one HTML file that needs nothing else."""

    def work() -> dict[str, Any]:
        from ..report import write_page

        record, beside = read_run(run), None if against is None else read_run(against)
        target = output or (run if run.is_dir() else run.parent) / "report.html"
        names = {name: None for entry in record.history for name in entry}
        last = {name: record.last(name) for name in names}
        return {"run": str(run), "report": str(write_page(record, target, beside)), "about": record.about, "last": last}

    answer(work, lambda found: console().print(found["report"]), as_json)
