"""The execution of a schedule: each micro-batch runs on the heads that its row names, and on no others."""

from .frozen_cache import FrozenCache
from .intercept import get_runtime
from .open_cache import frozen_cache, open_cache
from .plan import Plan, compile_plan
from .runtime import Runtime


__all__ = ["FrozenCache", "Plan", "Runtime", "compile_plan", "frozen_cache", "get_runtime", "open_cache"]
