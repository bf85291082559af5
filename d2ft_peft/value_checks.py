"""What a value must be: a ValueError names the field, its value and the constraint."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import numpy as np


def check(condition: bool, name: str, value: Any, constraint: str) -> None:
    """Refuse a value of a field.

    Raises:
        ValueError: If the condition does not hold.
    """
    if not condition:
        raise ValueError(f"{name}={value!r} {constraint}.")


def check_integer(name: str, value: Any, minimum: int, otherwise: str = "") -> None:
    """Refuse what is no integer of at least `minimum`; `otherwise` says what else the field may be."""
    check(is_integer(value) and value >= minimum, name, value, f"must be an integer of at least {minimum}{otherwise}")


def is_integer(value: Any) -> bool:
    """Whether a value is a whole number, as Python's and numpy's are; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a real number, infinities and NaN included; True and False are none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether a value is a number above zero, and finite."""
    return is_number(value) and 0 < value < math.inf


def numbers(name: str, value: Any) -> np.ndarray:
    """A sequence of numbers as a float array.

    Raises:
        ValueError: If it is none.
    """
    try:
        array = np.asarray(value, dtype=float)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={value!r} must be a sequence of numbers: {error}.") from error
    check(array.ndim == 1, name, value, "must be a sequence of numbers")
    return array


def integers(name: str, value: Any, axes: int = 1) -> np.ndarray:
    """A sequence of whole numbers as an array of at most `axes` axes; an empty one is of integers, whatever it was made
    of.

    Raises:
        ValueError: If it is none.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name}={value!r} must be a sequence of whole numbers: {error}.") from error
    check(1 <= array.ndim <= axes and (array.dtype.kind in "iu" or not array.size), name, value,
          "must be a sequence of whole numbers")  # fmt: skip
    return array if array.size else array.astype(np.int64)
