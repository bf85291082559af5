"""Checks of what figures are made from; messages name the field, the value and the constraint."""

from collections.abc import Mapping, Sequence
from numbers import Integral

import numpy as np

from ..schedule import Schedule


def check_schedule(schedule) -> None:
    """Raises ValueError unless it is a `Schedule`."""
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule is a {type(schedule).__name__}, it must be a Schedule; build it with Schedule(...)")


def check_window(window) -> None:
    """Raises ValueError unless it is an odd positive whole number."""
    if isinstance(window, bool) or not isinstance(window, Integral) or window < 1 or window % 2 == 0:
        raise ValueError(f"window={window!r} must be an odd whole number of points, at least 1; 1 does not smooth")


def check_curves(curves: dict[str, Sequence[tuple[float, float]]]) -> dict[str, np.ndarray]:
    """The points of every curve as a finite array [points, 2] with growing x; raises ValueError otherwise."""
    if not isinstance(curves, Mapping) or not curves:
        raise ValueError(f"curves={curves!r} must not be empty: a dictionary of points (x, loss) by run")
    return {name: _check_points(f"curves[{name!r}]", points) for name, points in curves.items()}


def _check_points(field: str, points) -> np.ndarray:
    try:
        points = np.array(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{field} must be pairs (x, loss) of numbers: {error}") from error
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"{field} has shape {points.shape}, it must be a list of at least one pair (x, loss)")
    broken = ~np.isfinite(points).all(axis=1)
    if broken.any():
        index = int(np.argmax(broken))
        raise ValueError(f"{field}[{index}]={tuple(points[index].tolist())} must be finite; leave such points out")
    falling = np.diff(points[:, 0]) < 0
    if falling.any():
        index = int(np.argmax(falling)) + 1
        raise ValueError(f"{field}[{index}] has x={points[index, 0]:g}, x must not decrease; sort the points by x")
    return points
