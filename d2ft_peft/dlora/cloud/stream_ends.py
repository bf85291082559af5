"""Both ends of an edge's stream, as the server sees them: what comes in is counted, what goes out is waited for."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator

from ..wire.frames import FrameError, Reader
from ..wire.messages import Message
from ..wire.protocol import STILL_AT_IT, seconds_until_still_at_it
from .turns import Room


class Outgoing:
    """Frames on their way to an edge, put here by the thread that computes and taken by gRPC's.

    Without bound, since whoever computes must not wait while it holds a turn; it waits in `until_taken` before it
    serves on, so an edge that does not read gets no second answer.

    Attributes:
        is_waited_for: Whether the edge waits for an answer, and is told when that takes long.
    """

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._changed = threading.Condition()
        self.is_waited_for = True
        self._ended = False
        self._error: Exception | None = None

    def put(self, frame: bytes) -> None:
        """Send a frame."""
        with self._changed:
            self._frames.append(frame)
            self._changed.notify_all()

    def end(self, error: Exception | None = None) -> None:
        """No more follows; what was put before goes out first."""
        with self._changed:
            self._ended, self._error = True, self._error or error
            self._changed.notify_all()

    def until_taken(self) -> None:
        """Wait until everything has gone out, or nobody takes it any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or not self._frames)

    def __iter__(self) -> Iterator[bytes]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ended or self._frames, seconds_until_still_at_it())
                if not self._frames and not self._ended:
                    frame = STILL_AT_IT
                elif not self._frames:
                    error, self._error = self._error, None
                    if error is not None:
                        raise error
                    return
                else:
                    frame = self._frames.popleft()
                    self._changed.notify_all()
            if frame != STILL_AT_IT or self.is_waited_for:
                yield frame


class Incoming:
    """Messages out of the frames that an edge sends.

    Args:
        frames: The frames.
        message_bytes: Longest message that is accepted.
        arriving: Bytes of messages of all edges that are not complete yet.
    """

    def __init__(self, frames: Iterator[bytes], message_bytes: int, arriving: Room):
        self._frames, self._reader, self._arriving = frames, Reader(message_bytes), arriving

    def receive(self, heard: Callable[[], None]) -> Message | None:
        """The next message, or None at the end of the stream.

        Args:
            heard: Is called when a frame has come.

        Raises:
            WireError: If something else came in.
            Refused: If too many messages are on their way.
        """
        held = 0
        try:
            for frame in self._frames:
                heard()
                self._arriving.take(len(frame))
                held += len(frame)
                if (message := self._reader.take(frame)) is not None:
                    return message
        finally:
            self._arriving.give_back(held)
        if self._reader.is_within:
            raise FrameError("the stream ended within a message")
        return None
