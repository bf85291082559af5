"""DistributedDataParallel after some parameters were frozen or thawed."""

from __future__ import annotations

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def rebuild_reducer(ddp: DistributedDataParallel) -> None:
    """Let gradients be reduced of the parameters that are trainable now, and of no others.

    DistributedDataParallel notes these once, in its constructor; here the part of it that does so runs again, as it
    does when one is unpickled (``DistributedDataParallel.__setstate__``). Not while a backward pass runs. The old
    reducer goes away with its hooks.
    """
    parameters, sparse = ddp._build_params_for_reducer()
    names = ddp._build_debug_param_to_name_mapping(parameters)
    ddp._ddp_init_helper(parameters, sparse, names, ddp.static_graph)
    if ddp.static_graph:
        ddp._static_graph_delay_allreduce_enqueued = False  # the first pass of a reducer reduces at its end
        ddp.reducer._set_static_graph()
        ddp.logger._set_static_graph()
    for hook, state in ddp._comm_hooks:
        dist._register_comm_hook(ddp.reducer, state, hook)
