"""What happened, as pictures and small tables. Reads schedules and numbers; never imports torch.

Tables need nothing. Figures are drawn by matplotlib, which training does without, so it is an extra of the package
(``pip install "d2ft_peft[report]"``) and loaded when a figure is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .table import format_table


if TYPE_CHECKING:
    from .activity import activity_figure, plot_activity
    from .figures import (
        OPERATION_COLORS,
        device_loads_figure,
        draw_schedule,
        loss_curves_figure,
        plot_device_loads,
        plot_loss_curves,
        plot_schedule,
        save_figure,
        schedule_figure,
    )


__all__ = [
    "OPERATION_COLORS",
    "activity_figure",
    "device_loads_figure",
    "draw_schedule",
    "format_table",
    "loss_curves_figure",
    "plot_activity",
    "plot_device_loads",
    "plot_loss_curves",
    "plot_schedule",
    "save_figure",
    "schedule_figure",
]


def __getattr__(name: str) -> Any:
    """What draws, when it is asked for.

    Raises:
        ImportError: If matplotlib is not installed; says how to install it.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        drawn_in = "activity" if "activity" in name else "figures"
        figures = importlib.import_module(f".{drawn_in}", __name__)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ImportError(
            f"{__name__}.{name} is drawn by matplotlib, which is not installed; "
            'install it with pip install "d2ft_peft[report]".',
            name="matplotlib",
        ) from error
    return getattr(figures, name)
