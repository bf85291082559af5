"""Head-parallel execution: the subnets of a model live on different processes, and rows travel to them."""

from .calibrate import balanced_capacities, calibrate
from .head_parallel import HeadParallel
from .loading import load_head_parallel
from .placement import place_subnets
from .traffic import Traffic


__all__ = ["HeadParallel", "Traffic", "balanced_capacities", "calibrate", "load_head_parallel", "place_subnets"]
