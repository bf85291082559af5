"""Checked, read-only copies of the arrays that schedules and problems are made of."""

import numpy as np


def real_array(field: str, value, shape: tuple[int, ...], advice: str) -> np.ndarray:
    """Returns `value` as a read-only, finite, non-negative float64 array of `shape`.

    Args:
        field: name for messages.
        value: anything `np.array` takes.
        shape: required shape.
        advice: what the caller of the public API should do; closes every message.

    Raises:
        ValueError: wrong shape, not numeric, an entry that is not finite or is negative.
    """
    try:
        array = value if is_frozen(value, np.float64) else np.array(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} must be numbers of shape {shape}: {error}; {advice}") from error
    _check_shape(field, array, shape, advice)
    # The smallest is NaN if any entry is: usually two numbers tell that there is nothing to refuse.
    if array.size and not (array.min() >= 0 and array.max() < np.inf):
        _refuse(field, array, ~np.isfinite(array), "must be finite", advice)
        _refuse(field, array, array < 0, "must not be negative", advice)
    if array is value:
        return array
    # Turns -0.0 into 0.0, so that equal arrays have equal bytes.
    array += 0.0
    return freeze(array)


def int_array(field: str, value, shape: tuple[int, ...], low: int, high: int | None, advice: str) -> np.ndarray:
    """Returns `value` as a read-only int64 array of `shape` with every entry in low..high (both included).

    Raises:
        ValueError: wrong shape, not of an integer type, or out of range.
    """
    shape_of(field, value)
    array = np.asarray(value)
    _check_shape(field, array, shape, advice)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{field} has dtype {array.dtype}, it must be of an integer type; {advice}")
    if not is_frozen(array, np.int64):
        array = array.astype(np.int64)
    span = f"must be in {low}..{high}" if high is not None else f"must be at least {low}"
    if array.size and (array.min() < low or (high is not None and array.max() > high)):
        _refuse(field, array, (array < low) | (array > (array if high is None else high)), span, advice)
    return freeze(array)


def shape_of(field: str, value) -> tuple[int, ...]:
    """The shape of what `np.array` takes.

    Raises:
        ValueError: its rows are not equally long.
    """
    try:
        return np.shape(value)
    except ValueError as error:
        raise ValueError(f"{field} must have rows of one length: {error}; give an array") from error


def is_frozen(value, dtype: type) -> bool:
    """Whether `freeze` has made this array of this type: nobody writes to it, so that it can be kept as it is."""
    return (
        isinstance(value, np.ndarray)
        and value.dtype == dtype
        and value.base is None
        and value.flags.c_contiguous
        and not value.flags.writeable
    )


def freeze(array: np.ndarray) -> np.ndarray:
    """Makes `array` C-contiguous and read-only and returns it."""
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array


def _check_shape(field: str, array: np.ndarray, shape: tuple[int, ...], advice: str) -> None:
    if array.shape != shape:
        raise ValueError(f"{field} has shape {array.shape}, it must have shape {shape}; {advice}")


def _refuse(field: str, array: np.ndarray, broken: np.ndarray, constraint: str, advice: str) -> None:
    if broken.any():
        where = tuple(int(i) for i in np.argwhere(broken)[0])
        index = ", ".join(map(str, where))
        raise ValueError(f"{field}[{index}]={array[where].item()!r} {constraint}; {advice}")
