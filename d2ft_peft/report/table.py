"""Small tables as text that reads well in a terminal and renders as Markdown."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real


def format_table(rows: list[dict], columns: list[str] | None = None, formats: dict[str, str] | None = None) -> str:
    """An aligned Markdown table, one line per row.

    Columns that hold numbers only are aligned right, others left. A float without a format gets four significant
    digits, and no fewer than its whole part. A missing value or None is an empty cell.

    Args:
        rows: maps column names to values.
        columns: which columns, in which order. Default: all, in the order in which the rows first name them.
        formats: format specification per column for its numbers, as in `format(value, specification)`: ".1%".

    Returns:
        The table without a newline at the end.

    Raises:
        ValueError: no column, a column that no row has, a format of an unknown column or one that does not apply.
    """
    _check_kinds(rows, columns, formats)
    present = list(dict.fromkeys(name for row in rows for name in row))
    columns = present if columns is None else list(columns)
    formats = {} if formats is None else formats
    _check(present, columns, formats)
    cells = [[_cell(row.get(name), name, formats.get(name)) for name in columns] for row in rows]
    header = [_escape(name) for name in columns]
    # Markdown needs three dashes in the line below the header.
    widths = [max(3, *map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [_is_numeric([row.get(name) for row in rows]) for name in columns]
    rule = [_rule(width, is_right) for width, is_right in zip(widths, right, strict=True)]
    return "\n".join(_line(line, widths, right) for line in [header, rule, *cells])


def _check_kinds(rows, columns, formats) -> None:
    if not isinstance(rows, Sequence) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"rows={rows!r} must be a list of dictionaries from column names to values")
    if columns is not None and (isinstance(columns, str) or not isinstance(columns, Iterable)):
        raise ValueError(f"columns={columns!r} must be a list of names, or None for all")
    if formats is not None and not isinstance(formats, Mapping):
        raise ValueError(f"formats={formats!r} must be a dictionary from column names to specifications, or None")


def _check(present: list[str], columns: list[str], formats: dict[str, str]) -> None:
    if not columns:
        raise ValueError("columns=[] must not be empty; name the columns or give at least one row")
    for name in columns:
        if present and name not in present:
            raise ValueError(f"columns names {name!r}, which no row has; choose from {present}")
    for name in formats:
        if name not in columns:
            raise ValueError(f"formats names {name!r}, which is not a column; choose from {columns}")


def _cell(value, name: str, specification: str | None) -> str:
    if value is None:
        return ""
    if not _is_number(value):
        return _escape(str(value))
    if specification is not None:
        try:
            return format(value, specification)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"formats[{name!r}]={specification!r} does not apply to {value!r}: {error}; "
                'give a specification such as ".2f" or ".1%"'
            ) from error
    return str(value) if isinstance(value, Integral) else _format_float(float(value))


def _format_float(value: float) -> str:
    if math.isfinite(value) and 1e3 <= abs(value) < 1e15:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _is_number(value) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_numeric(values: list) -> bool:
    given = [value for value in values if value is not None]
    return bool(given) and all(map(_is_number, given))


def _escape(text: str) -> str:
    """A bar or a line break would end the cell."""
    return " ".join(text.replace("|", "\\|").splitlines())


def _rule(width: int, right: bool) -> str:
    return "-" * (width - 1) + ":" if right else "-" * width


def _line(cells: list[str], widths: list[int], right: list[bool]) -> str:
    padded = (
        cell.rjust(width) if is_right else cell.ljust(width)
        for cell, width, is_right in zip(cells, widths, right, strict=True)
    )
    return f"| {' | '.join(padded)} |"
