"""Whether two sides mean the same base model: a hash of its configuration, and one of a sample of every weight.

Both sides read their own copy of the checkpoint's files, and of every tensor only a few bytes, so that an edge never
reads the weights of blocks that it does not own. Fine-tuning changes nearly every number of a weight; a copy that
differs outside of the sample only is not told apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from ...whole_files import reading


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ROWS, _BYTES = 8, 256
_NOT_THE_MODEL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"}
_OF_THE_TASK = {"id2label", "label2id", "problem_type", "num_labels"}
_OF_THE_TOKENIZER = {"bos_token_id", "eos_token_id", "pad_token_id"}


def fingerprint(base: str, config: PretrainedConfig, **hub: Any) -> dict[str, str]:
    """SHA-256 of the architecture and of a sample of every weight of a checkpoint, in hexadecimal.

    Args:
        base: A folder, or a model id on the Hub, with weights in safetensors.
        config: Its configuration.
        hub: ``revision``, ``token``, ``cache_dir``, ... of transformers' `from_pretrained`.

    Raises:
        ValueError: If there are no weights in safetensors.
    """
    left_out = _NOT_THE_MODEL | _OF_THE_TASK | _OF_THE_TOKENIZER
    facts = {name: value for name, value in config.to_dict().items() if name not in left_out}
    of_config = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    of_weights = hashlib.sha256()
    for line in sorted(line for path in weight_files(base, **hub) for line in _samples(path)):
        of_weights.update(line)
    return {"config": of_config.hexdigest(), "weights": of_weights.hexdigest()}


def weight_files(base: str, **hub: Any) -> list[str]:
    """Paths of a checkpoint's safetensors files; fetched from the Hub where they are not here."""
    quiet = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    single = cached_file(base, _SINGLE, **hub, **quiet)
    if single is not None:
        return [single]
    index = cached_file(base, _INDEX, **hub, **quiet)
    if index is None:
        raise ValueError(
            f"base={base!r} has no weights in safetensors ({_SINGLE}), of which both sides read their own part; "
            "convert it with model.save_pretrained."
        )
    return get_checkpoint_shard_files(base, index, **hub)[0]


def _samples(path: str) -> list[bytes]:
    """One line for every tensor of a file: its name, dtype and shape, and a hash of some of its bytes."""
    lines = []
    # Only to check the header: read through this map of the file, all that lies near would be resident.
    with reading(path):
        pass
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, spec in header.items():
            shape, (begin, end) = spec["shape"], spec["data_offsets"]
            rows = shape[0] if shape else 1
            chosen = sorted({row * (rows - 1) // max(_ROWS - 1, 1) for row in range(_ROWS)}) if rows else []
            some = hashlib.sha256()
            for row in chosen:
                size = (end - begin) // rows
                file.seek(8 + length + begin + row * size)
                some.update(file.read(min(size, _BYTES)))
            lines.append(f"{name} {spec['dtype']} {shape} {some.hexdigest()}\n".encode())
    return lines


def name_of(base: str) -> str:
    """What to call a base model: its Hub id, or the name of its folder."""
    return os.path.basename(os.path.normpath(base)) if os.path.isdir(base) else base
