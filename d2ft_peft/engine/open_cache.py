"""Opens a cache of frozen blocks: what it depends on, and where there can be none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..hidden_states import bytes_of
from ..partition import Partition, base_model, boundary_below, boundary_parameters, parts_elsewhere
from ..partition.body import find_body
from .frozen_cache import FrozenCache
from .intercept import get_runtime
from .row_store import RowStore


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_NOT_THE_FORWARD = {"_name_or_path", "transformers_version", "id2label", "label2id", "problem_type", "use_cache"}


def open_cache(
    model: nn.Module, directory: str, gigabytes: float = 8.0, dtype: str | None = None, sharers: int = 1,
    samples: int | None = None,
) -> FrozenCache:  # fmt: skip
    """Keep what comes out of the frozen lower blocks of a model, until `FrozenCache.close`.

    Args:
        model: A model that D2FT was applied to.
        directory: Folder of the cache; what was kept there for the same weights is found again.
        gigabytes: Most bytes in it, in units of 1e9.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps the bits.
        sharers: Processes that fill the folder together.
        samples: Samples that this process meets in an epoch, where that is known.

    Raises:
        ValueError: If no block below the lowest that learns is frozen, or one of them draws at random.
    """
    runtime, base = get_runtime(model), base_model(model)
    if parts_elsewhere(model) or not runtime.entries:
        raise ValueError("cache_frozen needs the model's blocks here; DLoRA's connect has a cache_dir of its own.")
    cut = next((entry.index for entry in runtime.entries if entry.learns(None)), len(runtime.entries))
    partition = next(iter(runtime.partitions.values()))
    if not partition.cuts_heads:
        raise ValueError(
            "cache_frozen keeps what blocks return of each sample wherever its padding is, and what whole blocks do "
            f"with padding is not known (they are not cut into heads: {partition.why_whole}); leave cache_frozen out."
        )
    if partition.several:
        raise ValueError(
            "cache_frozen keeps what the lower blocks of one stack return, and "
            f"model_type={partition.model_type!r} has several, or cross attention; leave cache_frozen out, or name a "
            "single stack in `stacks`."
        )
    body = find_body(base, partition.blocks[0].rpartition(".")[0])
    blocks = [base.get_submodule(name) for name in partition.blocks]
    above = {id(part) for block in blocks[cut:] for part in block.modules()}
    frozen = [part for block in blocks[:cut] for part in block.modules()]
    _check(base, cut, body, above, partition)

    def open_store(width: int, of_model: torch.dtype) -> RowStore:
        about = _about(body, frozen, cut)
        kept = of_model if dtype is None else DTYPES[dtype]
        return RowStore(directory, about, width, kept, int(gigabytes * 1e9), sharers)

    return FrozenCache(runtime, body, cut, open_store, samples)


@contextmanager
def frozen_cache(model: nn.Module, directory: str, **options: Any) -> Iterator[FrozenCache]:
    """`open_cache` around a training loop."""
    cache = open_cache(model, directory, **options)
    try:
        yield cache
    finally:
        cache.close()


def _check(base: nn.Module, cut: int, body: nn.Module, above: set[int], partition: Partition) -> None:
    if cut == 0:
        raise ValueError(
            "cache_frozen keeps what frozen blocks return, and the lowest block learns; restrict the adapter to upper "
            "blocks with layers_to_transform, or leave cache_frozen out."
        )
    if cut == len(partition.blocks):
        raise ValueError(
            "cache_frozen feeds the lowest block that learns, and no block does; train the head on kept features."
        )
    for name in boundary_below(base, partition):
        if any(parameter.requires_grad for parameter in boundary_parameters(base, partition, name)):
            raise ValueError(
                f"cache_frozen: {name or 'a parameter of the model itself'} learns, so that what frozen blocks return "
                "changes; leave one of the two out."
            )
    for name, part in body.named_modules():
        random = None if id(part) in above else _random(part)
        if random is not None:
            raise ValueError(
                f"cache_frozen: {name or 'the model'} has {random} > 0 and draws at random in training, so that no two "
                "epochs are alike there; set the model's dropout to 0 (hidden_dropout_prob, "
                "attention_probs_dropout_prob, attention_dropout, ... in from_pretrained), or leave cache_frozen out."
            )


def _random(part: nn.Module) -> str | None:
    """The attribute by which a module draws at random in training, or takes statistics of the batch."""
    if isinstance(part, nn.modules.batchnorm._BatchNorm):
        return "momentum" if part.momentum else None
    names = ["p"] if isinstance(part, nn.modules.dropout._DropoutNd) else []
    names += [name for name in vars(part) if "drop" in name or "jitter" in name]
    return next((name for name in names if type(value := getattr(part, name, 0)) in (int, float) and value > 0), None)


def _about(body: nn.Module, frozen: list[nn.Module], cut: int) -> str:
    """A hash of all that the frozen blocks' output depends on besides the embeddings' output, in hexadecimal."""
    facts = {name: value for name, value in body.config.to_dict().items() if name not in _NOT_THE_FORWARD}
    device = next(body.parameters()).device.type
    versions = transformers.__version__, torch.__version__, body.config._attn_implementation, device, cut
    digest = hashlib.blake2b(json.dumps([facts, versions], sort_keys=True, default=str).encode(), digest_size=32)
    for part in frozen:
        if isinstance(part, BaseTunerLayer):
            digest.update(str((part.active_adapters, part.disable_adapters, getattr(part, "scaling", None))).encode())
        for name, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
            digest.update(f"{type(part).__name__} {name} {value.dtype} {list(value.shape)}".encode())
            digest.update(bytes_of(value))
    return digest.hexdigest()
