"""What happened, as pictures and small tables. Reads schedules and numbers; never imports torch."""

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
from .table import format_table


__all__ = [
    "OPERATION_COLORS",
    "device_loads_figure",
    "draw_schedule",
    "format_table",
    "loss_curves_figure",
    "plot_device_loads",
    "plot_loss_curves",
    "plot_schedule",
    "save_figure",
    "schedule_figure",
]
