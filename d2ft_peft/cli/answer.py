"""What every command has in common: one answer on stdout, as text or as JSON, and errors of one line."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import datasets
import numpy as np
import transformers
import typer
from rich.console import Console
from rich.table import Table


_WIDTH = 120
"""Characters of a line where no terminal says how many it has."""

JSON = Annotated[bool, typer.Option("--json", help="Print the answer as JSON, and nothing else.")]


def answer(work: Callable[[], dict[str, Any]], show: Callable[[dict[str, Any]], None], as_json: bool) -> None:
    """Do the work and print what it returns; whatever is printed in between goes to stderr.

    Args:
        work: Makes the answer, JSON-friendly but for numpy's numbers.
        show: Prints it for people.
        as_json: Print it as one JSON document instead.

    Raises:
        typer.Exit: With code 2, after one line on stderr, if something that was asked for is wrong or not there.
    """
    with errors_in_one_line(), contextlib.redirect_stdout(sys.stderr), _quiet():
        result = work()
    if as_json:
        typer.echo(json.dumps(_plain(result), indent=2, allow_nan=False))
    else:
        show(result)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Say what is wrong or missing in one line on stderr, and exit with code 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        typer.echo(f"d2ft: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from error


@contextlib.contextmanager
def _quiet():
    """Leave out what libraries say of things that are as they should be: a head that is new, bars of loading."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.disable_progress_bar()
    of_data = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
            warnings.filterwarnings("ignore", message=".*'pin_memory' argument is set as true.*")
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if not of_data:
            datasets.enable_progress_bars()
        if bars:
            transformers.logging.enable_progress_bar()


def _plain(value: Any) -> Any:
    """Numbers, lists and dictionaries of Python; JSON knows no number that is not finite."""
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def console() -> Console:
    """Where answers go; made anew, so that it writes to the stdout of the moment. Names are no markup."""
    made = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
    if not made.is_terminal:
        made.width = _WIDTH
    return made


def table(columns: list[str], rows: list[list[str]], title: str | None = None) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(title=title, title_justify="left", header_style="bold", show_edge=False, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def amount(value: float, unit: str) -> str:
    """A large number in a unit of a fitting size: ``17.5 GFLOP``."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def share(value: float | None) -> str:
    """A share in per cent, or a dash where it is not known."""
    return "-" if value is None else f"{value:.1%}"
