"""The execution of a schedule: each micro-batch runs on the heads that its row names, and on no others."""

from .intercept import get_runtime
from .plan import Plan, compile_plan
from .runtime import Runtime


__all__ = ["Plan", "Runtime", "compile_plan", "get_runtime"]
