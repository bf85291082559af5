"""One stream to the cloud: messages there and back, for one micro-batch."""

from __future__ import annotations

import queue
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import grpc

from ..wire import protocol
from ..wire.frames import FrameError, Reader, Writer
from ..wire.messages import Message


if TYPE_CHECKING:
    from .link import Link


class Broken(Exception):
    """A stream ended before its time; what was asked on it is asked again."""


class Stream:
    """One micro-batch's stream: messages to the cloud and back.

    Closed when nobody refers to it any more, and with it what the cloud keeps for it.
    """

    def __init__(self, call: Any, metadata: tuple, link: Link):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._frames = call(_until_none(self._queue), metadata=metadata)
        self._writer, self._reader = Writer(link.packing), Reader(protocol.MESSAGE_BYTES)
        self._link, self._sent = link, 0
        self.is_open = True
        self._closing = weakref.finalize(self, _cancel, self._queue, self._frames)

    def send(self, message: Message) -> None:
        """Send a message; returns before it has arrived."""
        for frame in self._writer.frames(message):
            self._sent += len(frame)
            self._link.traffic.sent += len(frame)
            self._queue.put(frame)

    def finish(self) -> None:
        """Say that no more messages follow."""
        self._queue.put(None)

    def receive(self) -> Message:
        """The next message.

        Raises:
            Broken, grpc.RpcError: If there is none, by whatever went wrong.
        """
        self._link.traffic.round_trips += 1
        while True:
            try:
                frame = self._link.next_frame(self._frames, self._sent)
                if frame is None:
                    raise Broken("the stream ended early")
                message = taken(self._reader, frame)
            except (Broken, grpc.RpcError):
                self.close()
                raise
            if message is not None:
                self._sent = 0
                return message

    def close(self) -> None:
        """Break off."""
        self.is_open = False
        self._closing()


def taken(reader: Reader, frame: bytes) -> Message | None:
    """The message that a frame completes, or None.

    Raises:
        Broken: If the frame was damaged or moved on its way.
        WireError: If it is not of the protocol.
    """
    try:
        return reader.take(frame)
    except FrameError as error:
        raise Broken(str(error)) from error


def _until_none(items: queue.SimpleQueue) -> Iterator[bytes]:
    yield from iter(items.get, None)


def _cancel(items: queue.SimpleQueue, call: Any) -> None:
    items.put(None)
    call.cancel()
