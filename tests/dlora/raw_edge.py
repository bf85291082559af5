"""An edge that says whatever it is told to say."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import torch

from d2ft_peft.dlora import BaseModel
from d2ft_peft.dlora.wire import protocol
from d2ft_peft.dlora.wire.frames import Reader
from d2ft_peft.dlora.wire.messages import Message, encode


@dataclass
class Answer:
    """How a call ended.

    Attributes:
        status: Its status.
        sentence: What came with it.
        messages: What was answered before.
    """

    status: grpc.StatusCode
    sentence: str
    messages: list[Message]

    @property
    def kinds(self) -> list[str]:
        return [message.kind for message in self.messages]


class RawEdge:
    """Speaks to a server frame by frame.

    Args:
        address: Of the server.
        model: Its base model.
        token: What to call with.
    """

    def __init__(self, address: str, model: BaseModel, token: str | None = None):
        self.address, self.model, self.token = address, model, token
        self.channel = grpc.insecure_channel(address, protocol.CHANNEL_OPTIONS)
        self.session = ""

    def __enter__(self) -> RawEdge:
        return self

    def __exit__(self, *error) -> None:
        self.channel.close()

    def wish(self, **fields: Any) -> dict[str, Any]:
        """What a session is opened with."""
        return {
            "protocol": protocol.VERSION, "base": {**self.model.prints, "dtype": "f64"}, "edge_blocks": [0, 0],
            "targets": self.targets, "rank": None, "with_head": False, "packing": "none", "edge": "e" * 32, **fields,
        }  # fmt: skip

    @property
    def targets(self) -> list[str]:
        return [name for group in self.model.groups for name in group.names]

    def open(self, **fields: Any) -> Answer:
        """Open a session, and use it from here on."""
        answer = self.call("Open", [framed(Message("open", self.wish(**fields)))])
        if answer.status is grpc.StatusCode.OK:
            self.session = answer.messages[0].fields["session"]
        return answer

    def call(self, method: str, frames: Iterable[bytes], session: str | None = None) -> Answer:
        """Send some frames, and take all that comes back."""
        metadata = [(protocol.SESSION_KEY, self.session if session is None else session)]
        if self.token is not None:
            metadata.append((protocol.TOKEN_KEY, f"Bearer {self.token}"))
        reader, messages = Reader(1 << 30), []
        call = self.channel.stream_stream(protocol.method(method))(iter(frames), metadata=metadata, timeout=60)
        try:
            for frame in call:
                if frame and (message := reader.take(frame)) is not None:
                    messages.append(message)
        except grpc.RpcError as error:
            return Answer(error.code(), error.details(), messages)
        return Answer(call.code(), call.details(), messages)

    def stream(self, *messages: Message) -> Answer:
        """One micro-batch's stream."""
        return self.call("MicroBatch", numbered(messages))

    def forward(self, mode: str = "train", shape: Any = (2, 5), tensors: Any = None, **fields: Any) -> Message:
        """A micro-batch's first message."""
        hidden = torch.ones(*shape, self.model.width, dtype=torch.float64)
        return Message("forward", {"mode": mode, "alive": [], **fields}, {"hidden": hidden, **(tensors or {})})


def framed(message: Message, number: int = 0) -> bytes:
    """A message as one frame."""
    return frame_of(b"".join(encode(message)), number)


def numbered(messages: Iterable[Message]) -> Iterator[bytes]:
    """Messages as the frames of a stream."""
    return (framed(message, number) for number, message in enumerate(messages))


def frame_of(
    data: bytes, number: int = 0, total: int | None = None, magic: bytes = b"D2FT", version: int = protocol.VERSION
) -> bytes:
    """A frame whose checksum is right, whatever else is wrong with it."""
    prefix = struct.pack("<4sIIQ", magic, version, number, len(data) if total is None else total)
    return prefix + struct.pack("<I", zlib.crc32(data, zlib.crc32(prefix))) + data


def message_of(header: Any, payload: bytes = b"", length: int | None = None) -> bytes:
    """The bytes of a message with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text) if length is None else length) + text + payload
