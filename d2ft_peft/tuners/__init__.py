"""D2FT as PEFT methods: configuration, layer, and the tuners of the two variants."""

from ..engine import compile_plan, get_runtime  # where 0.1 had them
from .config import D2FTConfig
from .layer import D2FTLayer
from .model import D2FTLoraModel, D2FTModel
from .readiness import check_intercepted, check_trains


__all__ = [
    "D2FTConfig",
    "D2FTLayer",
    "D2FTLoraModel",
    "D2FTModel",
    "check_intercepted",
    "check_trains",
    "compile_plan",
    "get_runtime",
]
