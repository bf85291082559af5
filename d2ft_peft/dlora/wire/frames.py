"""Messages cut into frames, and put together again.

    "D2FT" | u32 version | u32 number of the frame in its stream | u64 length of the whole message
    | u32 CRC-32 of all before it and of the bytes | bytes

A frame carries at most `CHUNK_BYTES`. Frames are numbered from zero in each direction of a stream; one that is missing,
there twice, out of order or damaged ends the stream, and the edge replays the micro-batch. Calls that are no streams
carry one frame each way.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import Any

from .messages import Message, WireError, decode, encode
from .protocol import CHUNK_BYTES, HEADER_BYTES, VERSION


_PREFIX, _CHECKSUM = struct.Struct("<4sIIQ"), struct.Struct("<I")
_BEFORE = _PREFIX.size + _CHECKSUM.size
_MAGIC = b"D2FT"


class FrameError(WireError):
    """A frame was lost, doubled, moved or damaged on its way: sending it all again may help."""


class OtherVersion(WireError):
    """The peer speaks another version of the protocol."""


class Writer:
    """Cuts the messages of one direction of a stream.

    Args:
        packing: How hidden states and gradients are packed.
    """

    def __init__(self, packing: str = "none"):
        self.packing = packing
        self._next = 0

    def frames(self, message: Message) -> Iterator[bytes]:
        """The frames of the next message."""
        pieces = encode(message, self.packing)
        total = sum(piece.nbytes for piece in pieces)
        room, parts = CHUNK_BYTES, []
        for piece in pieces:
            while len(piece):
                parts.append(piece[:room])
                piece, room = piece[room:], room - len(parts[-1])
                if not room:
                    yield self._frame(total, parts)
                    room, parts = CHUNK_BYTES, []
        if parts:
            yield self._frame(total, parts)

    def _frame(self, total: int, parts: list[memoryview]) -> bytes:
        data = b"".join(parts)
        prefix = _PREFIX.pack(_MAGIC, VERSION, self._next, total)
        self._next += 1
        return prefix + _CHECKSUM.pack(zlib.crc32(data, zlib.crc32(prefix))) + data


class Reader:
    """Puts the messages of one direction of a stream together.

    Args:
        message_bytes: Longest message that is accepted.
    """

    def __init__(self, message_bytes: int):
        self.message_bytes = message_bytes
        self._next = 0
        self._total = 0
        self._data: bytearray | None = None

    @property
    def is_within(self) -> bool:
        """Whether a message has begun, and not ended."""
        return self._data is not None

    def take(self, frame: bytes) -> Message | None:
        """Take the next frame; the message that it completes, or None.

        Raises:
            WireError: If it is not the next frame, or not one at all.
        """
        if not _BEFORE < len(frame) <= _BEFORE + CHUNK_BYTES:
            raise FrameError(f"a frame of {len(frame)} bytes")
        magic, version, number, total = _PREFIX.unpack_from(frame)
        part = memoryview(frame)[_BEFORE:]
        (checksum,) = _CHECKSUM.unpack_from(frame, _PREFIX.size)
        if magic != _MAGIC or checksum != zlib.crc32(part, zlib.crc32(frame[: _PREFIX.size])):
            raise FrameError("a frame that is damaged, or none at all")
        if version != VERSION:
            raise OtherVersion(f"a frame of version {version} of the protocol; this is version {VERSION}")
        if number != self._next:
            raise FrameError(f"frame {number} where {self._next} was next")
        if self._data is None:
            if total > self.message_bytes:
                raise WireError(f"a message of {total} bytes; at most {self.message_bytes} are accepted")
            # Grows with what arrives: what is declared allocates nothing.
            self._data, self._total = bytearray(), total
        self._next += 1
        self._data += part
        if total != self._total or len(self._data) > total:
            raise WireError("frames of one message disagree on its length")
        if len(self._data) < total:
            return None
        data, self._data = self._data, None
        return decode(data)


def to_frame(kind: str, fields: dict[str, Any]) -> bytes:
    """A message without tensors, as the one frame of a call."""
    return b"".join(Writer().frames(Message(kind, fields)))


def from_frame(frame: bytes, kind: str) -> dict[str, Any]:
    """The fields of a message that came as the one frame of a call.

    Raises:
        WireError: If it is not one of that kind.
    """
    message = Reader(2 * HEADER_BYTES).take(frame)
    if message is None or message.kind != kind or message.tensors:
        raise WireError(f"this call carries one frame, with a message of kind {kind!r} and no tensors")
    return message.fields
