"""Head-parallel execution: the subnets of a model live on different processes, and rows travel to them."""

from .head_parallel import HeadParallel
from .loading import load_head_parallel
from .placement import place_subnets
from .traffic import Traffic


__all__ = ["HeadParallel", "Traffic", "load_head_parallel", "place_subnets"]
