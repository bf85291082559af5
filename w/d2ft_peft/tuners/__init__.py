"""The PEFT tuners and the execution of a schedule."""

from .layer import D2FTLayer
from .model import D2FTLoraModel, D2FTModel, get_runtime
from .plan import Plan, compile_plan
from .runtime import Runtime


__all__ = ["D2FTLayer", "D2FTLoraModel", "D2FTModel", "Plan", "Runtime", "compile_plan", "get_runtime"]
