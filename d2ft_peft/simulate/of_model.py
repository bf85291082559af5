"""Reads a workload off a transformers model, which may lie on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..costs.probe import probe_model
from ..partition import partition_model
from ..value_checks import check
from .workload import Workload


def workload_of_model(model: nn.Module, batch: dict[str, Any], **kwargs: Any) -> Workload:
    """What one sample of a model costs.

        with torch.device("meta"):                                # no weights, so any size will do
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            ids = torch.ones(1, 4096, dtype=torch.long)
            batch = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
        workload = workload_of_model(model, batch, bytes_per_number=2)

    Args:
        model: The transformers model, without an adapter.
        batch: A batch on the same device; its first sample is looked at.
        kwargs: ``bytes_per_number``, ``lora_rank``, ``state_bytes`` of `Workload`.
    """
    partition = partition_model(model)
    if partition.several:
        raise ValueError(
            f"model_type={partition.model_type!r} has several stacks of blocks, or cross attention; the simulator "
            "knows models whose blocks all see the same rows."
        )
    check(isinstance(batch, Mapping) and len(batch) > 0, "batch", batch, "must be a dictionary of the model's inputs")
    probe = probe_model(model, partition, batch)
    workload = Workload(
        partition,
        tokens=probe.sequence_length,
        below=sum(entry.flops for entry in probe.below),
        # Experts run where a sample lives, as the head does.
        above=sum(entry.flops for entries in (probe.above, *probe.inside.values()) for entry in entries),
        **kwargs,
    )
    boundary = sum(p.numel() for p in model.parameters()) - workload.head_parameters
    return replace(workload, boundary_parameters=boundary)
