"""A message: a JSON header and tensors, as bytes.

    u32 length of the header | header, JSON | bytes of the tensors, one after the other

The header's ``kind`` says what it is, ``tensors`` lists name, dtype, shape and packing of each tensor; whatever else is
in it are the message's own fields. Nothing is allocated by what a header declares: the bytes are there already, and
the shapes must account for each of them.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compression import PACKINGS, pack, packed_bytes, unpack
from .protocol import HEADER_BYTES


DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "bool": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LENGTH = struct.Struct("<I")
_MOST_TENSORS, _MOST_AXES = 1024, 4


class WireError(Exception):
    """What came in is not what the protocol says; the text may be shown to the peer."""


@dataclass(frozen=True)
class Message:
    """What one side tells the other.

    Attributes:
        kind: What it is, by docs/dlora_protocol.md.
        fields: Its other fields, all of them JSON.
        tensors: Its tensors by name.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def numbered(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Tensors of a message that are known by their order: "0", "1", ..."""
    return {str(number): tensor for number, tensor in enumerate(tensors)}


def encode(message: Message, packing: str = "none") -> list[memoryview]:
    """The message's bytes, in pieces.

    Args:
        message: The message.
        packing: How its floating-point tensors of at least two axes are packed: a name of `compression.PACKINGS`.
    """
    specs, pieces = [], []
    for name, tensor in message.tensors.items():
        tensor = tensor.detach()
        how = packing if tensor.is_floating_point() and tensor.ndim > 1 else "none"
        specs.append([name, _NAMES[tensor.dtype], list(tensor.shape), how])
        pieces.extend(pack(tensor, how))
    header = json.dumps({"kind": message.kind, **message.fields, "tensors": specs}, separators=(",", ":")).encode()
    if len(header) > HEADER_BYTES:
        raise ValueError(f"the header of {message.kind!r} has {len(header)} bytes; at most {HEADER_BYTES} may be sent.")
    return [memoryview(_LENGTH.pack(len(header)) + header), *pieces]


def decode(data: bytearray) -> Message:
    """The message that some bytes hold.

    Raises:
        WireError: If they hold none.
    """
    header, payload = _header(data)
    kind, specs = header.pop("kind", None), header.pop("tensors", None)
    if not isinstance(kind, str) or not isinstance(specs, list) or len(specs) > _MOST_TENSORS:
        raise WireError("a header needs a kind and a list of at most 1024 tensors")
    tensors: dict[str, Tensor] = {}
    for spec in specs:
        name, dtype, shape, packing = _checked(spec)
        size = packed_bytes(shape, dtype, packing)
        if size > len(payload) or name in tensors:
            raise WireError(f"tensor {name[:20]!r} takes {size} bytes, {len(payload)} are left, or it is there twice")
        tensors[name] = unpack(payload[:size], shape, dtype, packing)
        payload = payload[size:]
    if len(payload):
        raise WireError(f"{len(payload)} bytes belong to no tensor")
    return Message(kind, header, tensors)


def _header(data: bytearray) -> tuple[dict[str, Any], memoryview]:
    if len(data) < _LENGTH.size:
        raise WireError("a message is shorter than its prefix")
    (length,) = _LENGTH.unpack_from(data)
    if length > min(HEADER_BYTES, len(data) - _LENGTH.size):
        raise WireError(f"a header declares {length} bytes; that is more than there are, or than {HEADER_BYTES}")
    view = memoryview(data)
    return _read_json(bytes(view[_LENGTH.size : _LENGTH.size + length])), view[_LENGTH.size + length :]


def _read_json(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise WireError("what should be JSON is not") from None
    if not isinstance(found, dict):
        raise WireError("what should be a JSON object is not")
    return found


def _checked(spec: Any) -> tuple[str, torch.dtype, tuple[int, ...], str]:
    if not isinstance(spec, list) or len(spec) != 4:
        raise WireError("a tensor is declared by name, dtype, shape and packing")
    name, dtype, shape, packing = spec
    if not isinstance(name, str) or not isinstance(dtype, str) or not isinstance(packing, str):
        raise WireError("name, dtype and packing of a tensor are strings")
    if dtype not in DTYPES or packing not in PACKINGS:
        raise WireError(f"dtype {dtype[:20]!r} or packing {packing[:20]!r} is unknown")
    if not isinstance(shape, list) or len(shape) > _MOST_AXES:
        raise WireError(f"a shape is a list of at most {_MOST_AXES} sizes")
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(max(size, 1) for size in shape) > 1 << 40:
        raise WireError("sizes are whole numbers from zero on, and their product is bounded")
    if packing != "none" and (not DTYPES[dtype].is_floating_point or len(shape) < 2):
        raise WireError(f"only floating-point tensors of two axes or more are packed, not {dtype} {shape}")
    return name, DTYPES[dtype], tuple(shape), packing
