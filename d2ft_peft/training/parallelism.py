"""Which ways of driving several processes D2FT can follow, and what it says of the others."""

from __future__ import annotations

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..planning import D2FTPlanner
from ..processes import is_sharded


_DATA_PARALLEL = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)

_REASONS = {
    DistributedType.DEEPSPEED: (
        "its engine reduces gradients and steps by rules of its own, and D2FT was never run with it; for ZeRO-2 and "
        "ZeRO-3 take FSDP2 instead, TrainingArguments(fsdp=True, fsdp_config={'version': 2}), for ZeRO-1 "
        "DistributedDataParallel"
    ),
    DistributedType.MEGATRON_LM: "it replaces the model by one of its own; use DistributedDataParallel or FSDP2",
    DistributedType.XLA: "it traces a step once, and each plan makes another; use DistributedDataParallel or FSDP2",
}

_AXES = {
    "tp_enabled": ("tensor parallelism", "it cuts weights by heads itself; head_parallel=True shares out heads"),
    "cp_enabled": ("context parallelism", "a process holds a part of each sequence; use FSDP2"),
    "sp_enabled": ("sequence parallelism", "a process holds a part of each sequence; use FSDP2"),
}


def check_parallelism(trainer: Trainer, model: nn.Module) -> None:
    """Refuse ways of driving several processes, or a model that is spread out, that D2FT does not follow.

    Args:
        trainer: The Trainer, before it wraps the model.
        model: The D2FT model.

    Raises:
        ValueError: If the way is not data parallelism, whole (DistributedDataParallel) or sharded (FSDP2).
    """
    if trainer.args.n_gpu > 1:
        raise ValueError("D2FT does not run under torch.nn.DataParallel; launch one process per GPU.")
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    if kind not in (*_DATA_PARALLEL, DistributedType.FSDP):
        reason = _REASONS.get(kind, "use DistributedDataParallel or FSDP2")
        raise ValueError(f"D2FT does not run under {kind.value}: {reason}.")
    if trainer.args.fsdp and trainer.args.fsdp_config.get("xla"):
        raise ValueError(f"D2FT does not run under fsdp_config['xla']: {_REASONS[DistributedType.XLA]}.")
    axes = getattr(accelerator, "parallelism_config", None)
    for name, (what, reason) in _AXES.items():
        if axes is not None and getattr(axes, name, False):
            raise ValueError(f"D2FT does not run under {what} (parallelism_config): {reason}.")
    if not is_sharded(model) and any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "D2FT does not run on a model that was loaded in parts (DTensor parameters, of tp_plan or a "
            "distributed_config): load it whole; head_parallel=True shares out its heads, "
            "TrainingArguments(fsdp=True) its parameters."
        )


def check_shardable(trainer: Trainer, planner: D2FTPlanner) -> None:
    """Refuse what cannot be done where processes meet in every block of every pass (FSDP).

    Args:
        trainer: The Trainer.
        planner: Its planner.

    Raises:
        ValueError: If processes would wait for each other for ever, or the model cannot be looked at in parts.
    """
    if trainer.accelerator.distributed_type != DistributedType.FSDP:
        return
    config, plugin = planner.config, trainer.accelerator.state.fsdp_plugin
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError(
            "D2FT does not run under FSDP1, whose flat parameters have no heads; set fsdp_config={'version': 2} "
            "(fsdp_version: 2 in a configuration of accelerate)."
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_config['activation_checkpointing'] renames the blocks that D2FT's plans name; use "
            "TrainingArguments(gradient_checkpointing=True)."
        )
    if config.is_auto:
        raise ValueError(
            "device_capacities='auto' does not run under FSDP: processes run different numbers of micro-batches, and "
            "in each of them sharded parameters are gathered from all processes; use DistributedDataParallel."
        )
    if config.cache_frozen is not None:
        raise ValueError(
            f"cache_frozen={config.cache_frozen!r} does not run under FSDP: where one process finds its samples in the "
            "cache it does not enter blocks in which the others wait for it; leave it out."
        )
    if scores := planner.source.before_training:
        raise ValueError(
            f"score {scores[0]!r} does not run under FSDP: it takes gradients of single samples, whose weights would "
            "be spread over the processes; choose backward_score='weight_magnitude' with num_full and "
            "num_forward_only, a score that follows training ('loss'), or a policy that reads none ('exact_first', "
            "'fewer_samples')."
        )
