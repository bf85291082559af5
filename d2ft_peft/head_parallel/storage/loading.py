"""Loading of a model of which no process ever holds more than its own heads.

transformers builds the model on the meta device and reads one tensor of the checkpoint after the other; here it reads
of a projection the slices of the rank's heads only. Names of old checkpoints are translated by transformers.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...partition import partition_model
from ...tuners.adapter_checks import check_one_stack
from ...tuners.config import D2FTConfig
from ...whole_files import reading
from ..exchange.mesh import replicas
from ..placement import place_subnets
from .shard import Shard, shards_of


# Initializations of LoRA that do not look at the weights, of which a rank has a part.
_INITIALIZATIONS = (True, False, "gaussian", "orthogonal")


def load_head_parallel(
    model_class: Any, path: str, config: D2FTConfig, mesh: DeviceMesh | None = None, **kwargs: Any
) -> PeftModel:
    """A pre-trained model adapted by D2FT, of which this process reads its own heads; the rest it reads whole.

    Give the result to `D2FTTrainer` or `HeadParallel`. Every process calls it with the same arguments, after
    ``accelerate.PartialState()`` or ``TrainingArguments``, and with the same seed: what a checkpoint lacks (a new task
    head) and the adapter start at random.

    Args:
        model_class: A transformers model class, or an Auto class.
        path: A local folder, or a model id on the Hub, with weights in safetensors.
        config: The adapter's configuration, with ``head_parallel=True``.
        mesh: The one that `HeadParallel` will get.
        kwargs: See `transformers.PreTrainedModel.from_pretrained`.

    Returns:
        What ``get_peft_model(model_class.from_pretrained(path), config)`` returns, with parts in the place of the
        projections' weights.

    Raises:
        ValueError: If there are no processes to share the model, or the checkpoint cannot be read in parts, or lacks a
            file, or has a damaged one.
        ImportError: If the installed transformers lacks what reading in parts relies on.
    """
    if not (dist.is_available() and dist.is_initialized() and config.head_parallel):
        raise ValueError(
            f"head_parallel={config.head_parallel}: a model is loaded in parts for D2FTConfig(head_parallel=True), by "
            "processes that torchrun or accelerate launch started and accelerate.PartialState() brought together."
        )
    if config.is_lora and config.init_lora_weights not in _INITIALIZATIONS:
        raise ValueError(
            f"init_lora_weights={config.init_lora_weights!r} looks at whole weights, of which this process loads a "
            f"part; use one of {', '.join(map(repr, _INITIALIZATIONS))}, or load the model whole."
        )
    _private("modeling_utils", "PreTrainedModel._load_pretrained_model")
    if hasattr(model_class, "_model_mapping"):
        own = {name: kwargs[name] for name in ("revision", "subfolder", "cache_dir", "token") if name in kwargs}
        class_of = _private("models.auto.auto_factory", "_get_model_class")
        model_class = class_of(AutoConfig.from_pretrained(path, **own), model_class._model_mapping)
    facts = {"heads_per_subnet": config.heads_per_subnet, "ranks": replicas(mesh)}
    loads_parts = type(model_class.__name__, (_LoadsParts, model_class), facts)
    model = loads_parts.from_pretrained(path, **kwargs)
    model.__class__ = model_class
    convolutions = [module for module in model.modules() if isinstance(module, Conv1D)] if config.is_lora else []
    for module in convolutions:  # PEFT takes a Conv1D's widths from its weight, or from here (DeepSpeed's)
        module.weight.ds_shape = torch.Size((module.nx, module.nf))
    adapted = get_peft_model(model, config)
    for module in convolutions:
        del module.weight.ds_shape
    return adapted


def _private(module: str, name: str) -> Any:
    """Something of transformers that is no part of its interface; looked up when it is needed, not on import."""
    try:
        return attrgetter(name)(importlib.import_module(f"transformers.{module}"))
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"load_head_parallel uses transformers.{module}.{name}, which transformers {transformers.__version__} does "
            "not have; load the model whole, and let HeadParallel cut it, or install transformers 5.23."
        ) from error


class _LoadsParts:
    """Stands before a model's class while it is loaded."""

    heads_per_subnet: int
    ranks: np.ndarray

    @classmethod
    def _load_pretrained_model(
        cls,
        model: PreTrainedModel,
        state_dict: Any,
        checkpoint_files: Sequence[str] | None,
        load_config: Any,
        *args: Any,
    ) -> Any:
        if not checkpoint_files or not all(file.endswith(".safetensors") for file in checkpoint_files):
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path!r} has no weights in safetensors, the one format that can "
                "be read in parts; convert it with model.save_pretrained."
            )
        partition = partition_model(model, cls.heads_per_subnet)
        check_one_stack(partition)
        size, rank = cls.ranks.shape[1], int(np.argwhere(cls.ranks == dist.get_rank())[0, 1])
        shards = _cut_empty(model, shards_of(model, partition, place_subnets(partition, size)), rank)
        with contextlib.ExitStack() as stack:
            sources, paths = {}, {}
            for path in checkpoint_files:
                file = stack.enter_context(reading(path))
                for key in file.keys():  # noqa: SIM118 - no dictionary
                    sources[key], paths[key] = file.get_slice(key), path
            for key, shard in _of_heads(sources, model, shards, load_config).items():
                sources[key] = _Part(paths[key], key, shard, rank)
            info, offloaded = super()._load_pretrained_model(model, sources, None, load_config, *args)
        missing = sorted(shards.keys() & (info.missing_keys | {name for name, *_ in info.mismatched_keys}))
        if missing:
            raise ValueError(
                f"{load_config.pretrained_model_name_or_path!r} does not fit {cls.__name__}: {len(missing)} weights of "
                f"projections (e.g. {missing[0]}) are missing or have another shape; all of them are needed."
            )
        return info, offloaded


def _cut_empty(model: PreTrainedModel, shards: list[Shard], rank: int) -> dict[str, Shard]:
    """Cut a model on the meta device; its cut parameters by name.

    Layers go on naming their whole width, by which partition and adapters are made.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_name = {names[id(shard.tensor)]: shard for shard in shards}
    for shard in shards:
        shard.tensor.data = shard.part(shard.tensor.data, rank)
    return by_name


def _of_heads(
    sources: dict[str, Any], model: PreTrainedModel, shards: dict[str, Shard], load_config: Any
) -> dict[str, Shard]:
    """Which of the checkpoint's tensors belong to heads."""
    names = ("WeightRenaming", "WeightConverter", "rename_source_key")
    renaming, converter, rename_source_key = (_private("core_model_loading", name) for name in names)
    mapping = load_config.weight_mapping or []
    renamings = [entry for entry in mapping if isinstance(entry, renaming)]
    converters = [entry for entry in mapping if isinstance(entry, converter)]
    known, prefix, found = model.state_dict(), model.base_model_prefix, {}
    for key in sources:
        name, converted = rename_source_key(key, renamings, converters, prefix, known)
        if name not in known and key in known:
            name, converted = key, None
        if name in shards:
            if converted is not None:
                raise ValueError(
                    f"{key!r} is computed into {name!r} when it is loaded (by {converted!r}), which needs all "
                    "of it; load this model whole, and let HeadParallel cut it."
                )
            found[key] = shards[name]
    return found


@dataclass
class _Part:
    """Stands in for a slice of a safetensors file, and gives a rank's part of it, whatever is asked for."""

    path: str
    key: str
    shard: Shard
    rank: int

    def __getitem__(self, index: Any) -> Tensor:
        # Opened anew: as long as a file is open, the pages that were read from it stay mapped.
        with reading(self.path) as file:
            return self.shard.part(file.get_slice(self.key), self.rank)
