"""Head-parallel execution: the subnets of a model live on different processes, and rows travel to them."""

from .calibrate import balanced_capacities, calibrate
from .exchange.traffic import Traffic
from .execution import HeadParallel
from .placement import place_subnets
from .storage.loading import load_head_parallel


__all__ = ["HeadParallel", "Traffic", "balanced_capacities", "calibrate", "load_head_parallel", "place_subnets"]
