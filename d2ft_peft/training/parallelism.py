"""Which ways of driving several processes D2FT can follow, and what it says of the others."""

from __future__ import annotations

from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from ..planning import D2FTPlanner
from ..processes import is_sharded


_SHARDING = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed"}
_FOLLOWED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, *_SHARDING)

_REASONS = {
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
        ValueError: If the way is not data parallelism, whole (DistributedDataParallel) or sharded (FSDP2, ZeRO).
    """
    if trainer.args.n_gpu > 1:
        raise ValueError("D2FT does not run under torch.nn.DataParallel; launch one process per GPU.")
    accelerator = trainer.accelerator
    kind = accelerator.distributed_type
    if kind not in _FOLLOWED:
        reason = _REASONS.get(kind, "use DistributedDataParallel or FSDP2")
        raise ValueError(f"D2FT does not run under {kind.value}: {reason}.")
    if trainer.args.fsdp and trainer.args.fsdp_config.get("xla"):
        raise ValueError(f"D2FT does not run under fsdp_config['xla']: {_REASONS[DistributedType.XLA]}.")
    axes = getattr(accelerator, "parallelism_config", None)
    for name, (what, reason) in _AXES.items():
        if axes is not None and getattr(axes, name, False):
            raise ValueError(f"D2FT does not run under {what} (parallelism_config): {reason}.")
    # Beside what is sharded at load time the Trainer averages whole parameters, such as an adapter's, only where the
    # last micro-batch of a step gives them a gradient.
    loaded = getattr(model, "is_distributed_loading_by_transformers", False)
    if loaded or (not is_sharded(model) and any(isinstance(parameter, DTensor) for parameter in model.parameters())):
        raise ValueError(
            "D2FT does not run on a model that was loaded in parts (DTensor parameters, of tp_plan or a "
            "distributed_config): load it whole; head_parallel=True shares out its heads, "
            "TrainingArguments(fsdp=True) its parameters."
        )


def check_shardable(trainer: Trainer, planner: D2FTPlanner) -> None:
    """Refuse what cannot be done where processes meet in every pass (FSDP, DeepSpeed's ZeRO).

    Args:
        trainer: The Trainer.
        planner: Its planner.

    Raises:
        ValueError: If processes would wait for each other for ever, or the model cannot be looked at in parts.
    """
    kind, config = trainer.accelerator.distributed_type, planner.config
    if kind not in _SHARDING:
        return
    name = _SHARDING[kind]
    if kind == DistributedType.FSDP:
        _check_fsdp(trainer)
    else:
        _check_deepspeed(trainer, planner)
    if config.is_auto:
        raise ValueError(
            f"device_capacities='auto' does not run under {name}: processes run different numbers of micro-batches, "
            "and in each of them all processes meet; use DistributedDataParallel."
        )
    if config.cache_frozen is not None:
        raise ValueError(
            f"cache_frozen={config.cache_frozen!r} does not run under {name}: where one process finds its samples in "
            "the cache it does not enter blocks in which the others wait for it; leave it out."
        )
    if scores := planner.source.before_training:
        raise ValueError(
            f"score {scores[0]!r} does not run under {name}: it takes gradients of single samples, whose weights would "
            "be spread over the processes; choose backward_score='weight_magnitude' with num_full and "
            "num_forward_only, a score that follows training ('loss'), or a policy that reads none ('exact_first', "
            "'fewer_samples')."
        )


def _check_fsdp(trainer: Trainer) -> None:
    plugin = trainer.accelerator.state.fsdp_plugin
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


def _check_deepspeed(trainer: Trainer, planner: D2FTPlanner) -> None:
    if trainer.model_wrapped is not trainer.model and trainer.accelerator.deepspeed_engine_wrapped is None:
        raise ValueError(
            "DeepSpeed's engine ended with the first call of train(), or was made to evaluate; make a new Trainer of "
            "the same model (the stock Trainer fails here as well)."
        )
    if shards_modules(trainer) and not planner.schedules_samples and planner.config.policy != "all_full":
        raise ValueError(
            f"policy={planner.config.policy!r} does not run under ZeRO-3, which gathers the weights of one linear "
            "layer at a time, while heads need those of several: choose a policy over samples ('exact_first', "
            "'fewer_samples', 'importance'), ZeRO-2, or FSDP2."
        )


def shards_modules(trainer: Trainer) -> bool:
    """Whether weights are gathered module by module (ZeRO-3), always in the same order."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and plugin.zero_stage == 3
