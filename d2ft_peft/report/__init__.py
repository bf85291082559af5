"""What happened, as pictures and small tables. Reads schedules and numbers; never imports torch.

Tables need nothing. Figures are drawn by matplotlib and pages by plotly, which training does without, so they are an
extra of the package (``pip install "d2ft_peft[report]"``) and loaded when one is first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .run_record import RunRecord, read_run
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
    from .web_page import page, write_page


__all__ = [
    "OPERATION_COLORS",
    "RunRecord",
    "activity_figure",
    "device_loads_figure",
    "draw_schedule",
    "format_table",
    "loss_curves_figure",
    "page",
    "plot_activity",
    "plot_device_loads",
    "plot_loss_curves",
    "plot_schedule",
    "read_run",
    "save_figure",
    "schedule_figure",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """What draws, when it is asked for.

    Raises:
        ImportError: If matplotlib or plotly is not installed; says how to install it.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        figures = importlib.import_module(f".{_DRAWN_IN.get(name, 'figures')}", __name__)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("matplotlib", "plotly"):
            raise
        raise ImportError(
            f"{__name__}.{name} is drawn by {missing}, which is not installed; "
            'install it with pip install "d2ft_peft[report]".',
            name=missing,
        ) from error
    return getattr(figures, name)


_DRAWN_IN = {"activity_figure": "activity", "plot_activity": "activity", "page": "web_page", "write_page": "web_page"}
