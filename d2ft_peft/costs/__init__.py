"""What a model costs: the FLOPs of its subnets, as foreseen from its shapes and as counted while it runs."""

from .counter import flop_counter
from .flops import cost_model
from .inference import inference
from .probe import ProjectionsBypassed, probe_model, watch
from .seen import Entry, Probe


__all__ = ["Entry", "Probe", "ProjectionsBypassed", "cost_model", "flop_counter", "inference", "probe_model", "watch"]
