"""What head-parallel execution needs of processes and model; what is missing is said before anything is cut."""

from __future__ import annotations

import torch.distributed as dist
from torch import nn

from ..partition import Partition


def check_processes() -> None:
    """Refuse to start without a process group."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "head-parallel execution needs processes: start with torchrun or accelerate launch, and create "
            "accelerate.PartialState() first."
        )


def check_model(model: nn.Module, size: int) -> None:
    """Refuse a model that was not adapted for `size` processes that share out its heads."""
    configs = getattr(model, "peft_config", {})
    config = next(iter(configs.values()), None)
    if len(configs) != 1 or not getattr(config, "head_parallel", False):
        raise ValueError(
            f"{type(model).__name__} has adapters {list(configs)}; HeadParallel needs exactly one, made by "
            "get_peft_model(model, D2FTConfig(head_parallel=True, ...))."
        )
    if config.num_devices not in (None, size) or len(config.device_capacities or range(size)) != size:
        raise ValueError(
            f"num_devices={config.num_devices} and device_capacities={config.device_capacities} do not fit {size} "
            "processes that share out the heads, which are the devices under head_parallel=True; leave num_devices "
            "out, and give one capacity per process."
        )


def check_branches(partition: Partition) -> None:
    """Refuse a model of whose heads more is needed than rows and projections."""
    attending = {branch.block for branch in partition.branches if branch.name == "attention"}
    if len(attending) < len(partition.blocks):
        raise ValueError(
            f"head_parallel=True cannot share out the heads of model_type={partition.model_type!r}: some of its blocks "
            "have no attention that is cut; use data parallelism."
        )
    for branch in partition.branches:
        names = ", ".join(entry.name for entry in branch.per_head)
        reasons = {
            f"its {branch.region} reads {names}, of which every rank would need its heads' part": branch.per_head,
            f"its {branch.region} adds {branch.residual!r} to its output itself": branch.residual,
            f"the heads of its {branch.region} have {', '.join(branch.whole)} in common": branch.whole,
            f"it applies the activation between {branch.region} and {branch.row.name} itself": branch.joined,
        }
        for reason, applies in reasons.items():
            if applies:
                raise ValueError(
                    f"head_parallel=True cannot share out the heads of model_type={partition.model_type!r}: {reason}; "
                    "use data parallelism."
                )


def check_whole(whole: bool, scores: tuple[str, ...]) -> None:
    """Refuse scores that take a pass before training of a model that was loaded in parts."""
    if scores and not whole:
        raise ValueError(
            f"the scores {', '.join(scores)} take a pass over the data on the whole model, of which this rank has "
            "loaded a part; choose backward_score='weight_magnitude', or load the model whole."
        )


def check_mode(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Refuse a step of a model that does not train, or that would run its blocks twice."""
    if not model.training:
        raise ValueError("model.training=False: forward_backward trains; call model.train() first.")
    if any(getattr(block, "gradient_checkpointing", False) for block in blocks):
        raise ValueError(
            "gradient checkpointing would repeat every exchange in backward and is not available under "
            "head_parallel=True; call model.gradient_checkpointing_disable()."
        )


def check_overlap(overlap: int) -> None:
    """Refuse what is no number of waves."""
    if not isinstance(overlap, int) or overlap < 0:
        raise ValueError(f"overlap={overlap!r} must be a number of waves, or 0 to wait for all rows.")
