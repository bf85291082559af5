"""What the benchmarks share: command lines, files with a row a line, tables and pictures of them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's own words, as they stand there."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_shape(parser: argparse.ArgumentParser, models: list[str], image_size: int, vocabulary: int) -> None:
    """Arguments of `step_time.build_model` and `step_time.make_batch`."""
    parser.add_argument("--model", choices=models, default="vit")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--intermediate", type=int, default=None, help="width of the FFN, 4 x hidden by default")
    parser.add_argument("--image-size", type=int, default=image_size)
    parser.add_argument("--length", type=int, default=128, help="tokens per sequence")
    parser.add_argument("--vocabulary", type=int, default=vocabulary)
    parser.add_argument("--micro-batches", type=int, default=5)
    parser.add_argument("--micro-batch-size", type=int, default=8)


def read_rows(*paths: str | Path) -> Iterator[dict]:
    """The rows of some files, one after the other; a file that does not exist has none."""
    for path in map(Path, paths):
        if path.exists():
            yield from map(json.loads, path.read_text().splitlines())


def append_rows(path: str | Path, rows: Iterable[dict]) -> None:
    """Add rows to a file, by one write: several processes may share it."""
    with Path(path).open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


def run_missing(path: str | Path, settings: Iterable[dict], run: Callable[[dict], dict]) -> None:
    """Make the runs that a file does not hold yet, one line each: a command can be continued.

    Args:
        path: The file.
        settings: What tells runs apart, by the names that their rows have.
        run: Makes the run of a setting.
    """
    done = list(read_rows(path))
    for setting in settings:
        if not any(all(row.get(key) == value for key, value in setting.items()) for row in done):
            result = run(setting)
            append_rows(path, [result])
            print({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}, flush=True)


def publish(
    description: str,
    argv: list[str] | None,
    load: Callable[[list[str]], Any],
    tables: Callable[[Any], str],
    plot: Callable[[Any, str], None],
    preface: str | None = None,
) -> None:
    """The command line of a script that shows measured rows: as tables, on a page or in the terminal, and as a picture.

    Args:
        description: What the help says.
        argv: Arguments, or None for those of the command line.
        load: From names of files to what is shown.
        tables: Makes the tables.
        plot: Writes the picture to a file.
        preface: What a page begins with; None if there is none.
    """
    parser = command_line(description)
    parser.add_argument("files", nargs="+")
    if preface is not None:
        parser.add_argument("--page", help="Markdown file that gets the tables, instead of the terminal")
    parser.add_argument("--png", default=None)
    args = parser.parse_args(argv)
    loaded = load(args.files)
    if getattr(args, "page", None):
        Path(args.page).write_text(f"{preface}\n\n{tables(loaded)}\n")
    else:
        print(tables(loaded))
    if args.png:
        plot(loaded, args.png)


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen; loaded by those who draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def save(figure: Any, path: str) -> None:
    """Write a figure to a file, and close it."""
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
