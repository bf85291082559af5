"""The command ``d2ft``: one typer application, a module for each of its commands."""

from __future__ import annotations

import typer

from ..version import __version__
from . import (
    cloud_command,
    compare_command,
    edge_command,
    plan_command,
    report_command,
    simulate_command,
    train_command,
)


app = typer.Typer(
    name="d2ft",
    help="Fine-tuning that costs less: look at what it saves before you train, try it on your data, train, report.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    pass


for command in (
    plan_command,
    compare_command,
    train_command,
    report_command,
    simulate_command,
    cloud_command,
    edge_command,
):
    command.add_to(app)


def main() -> None:
    """The console script."""
    app()
