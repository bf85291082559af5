"""The link to the cloud: one session, kept up; whatever breaks is made anew and done again."""

from __future__ import annotations

import contextlib
import json
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from ..wire import protocol
from ..wire.credentials import Certificates
from ..wire.frames import FrameError, Reader, Writer
from ..wire.messages import Message, WireError, read_json


T = TypeVar("T")
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0


class CloudError(RuntimeError):
    """The cloud refused, or could not be reached for longer than the edge is patient."""


class Broken(Exception):
    """A stream ended before its time; what was asked on it is asked again."""


@dataclass
class Traffic:
    """What crossed so far.

    Attributes:
        sent: Bytes to the cloud, of frames.
        received: Bytes from the cloud.
        round_trips: How often the edge waited for an answer.
        replays: How often a micro-batch, or a part of one, was done again.
    """

    sent: int = 0
    received: int = 0
    round_trips: int = 0
    replays: int = 0


class Link:
    """A session with a cloud.

    Args:
        address: ``"host:port"``.
        wish: What the session is opened with, see docs/dlora_protocol.md.
        packing: How hidden states and gradients are packed.
        certificates: For TLS; None connects without.
        token: What the server knows the edge by.
        patience: Seconds after which a cloud that gives no answer is given up.
    """

    def __init__(
        self, address: str, wish: dict[str, Any], packing: str = "none", certificates: Certificates | None = None,
        token: str | None = None, patience: float = 600.0,
    ):  # fmt: skip
        self.address, self.wish, self.packing, self.patience = address, wish, packing, patience
        self.traffic = Traffic()
        self.told: dict[str, Any] = {}
        self.install: Callable[[], Message | None] = lambda: None
        self._token = {} if token is None else {protocol.TOKEN_KEY: f"Bearer {token}"}
        self._lock = threading.RLock()
        self._session: str | None = None
        self._installed = False
        options = protocol.CHANNEL_OPTIONS
        if certificates is None:
            self._channel = grpc.insecure_channel(address, options)
        else:
            self._channel = grpc.secure_channel(address, certificates.of_edge(), options)
        self._watch = _Watch()
        weakref.finalize(self, _close, self._channel, self._watch)

    def open(self) -> dict[str, Any]:
        """Open the session if there is none; what the server told of itself.

        Raises:
            CloudError: If it refuses, or cannot be reached.
        """
        self.replaying(lambda: None)
        return self.told

    def replaying(self, attempt: Callable[[], T]) -> T:
        """Do something that needs the session until it succeeds.

        Args:
            attempt: Is called again, from its start, after whatever may pass.

        Raises:
            CloudError: If it was refused for good, or `patience` is at its end.
        """
        pause, since = _FIRST_PAUSE, time.monotonic()
        while True:
            try:
                self._ensure_session()
                return attempt()
            except (grpc.RpcError, Broken) as error:
                pause = self._after(error, pause, since)
                self.traffic.replays += 1

    def call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """One question with one answer, as JSON objects."""
        return self.replaying(lambda: self._call(name, request))

    def factors(self, names: list[str]) -> list[Message]:
        """Frozen factors of projections, one message for each."""

        def attempt() -> list[Message]:
            call = self._channel.unary_stream(protocol.method(protocol.FACTORS))
            reader, found = Reader(protocol.MESSAGE_BYTES), []
            for frame in call(_json({"names": names}), metadata=self._metadata(), timeout=self.patience):
                self.traffic.received += len(frame)
                if (message := _taken(reader, frame)) is not None:
                    found.append(message)
            return found

        return self.replaying(attempt)

    def stream(self) -> Stream:
        """A new stream of the session; to be used within `replaying`."""
        return Stream(self._channel.stream_stream(protocol.method(protocol.MICRO_BATCH)), self._metadata(), self)

    def stale(self) -> None:
        """What `install` hands over has changed."""
        with self._lock:
            self._installed = False

    def close(self) -> None:
        """End the session, if it is still there, and the connection."""
        if self._session is not None:
            with contextlib.suppress(grpc.RpcError):  # the server lets go of it by itself
                self._channel.unary_unary(protocol.method(protocol.CLOSE))(b"{}", metadata=self._metadata(), timeout=5)
            self._session = None
        _close(self._channel, self._watch)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple({**self._token, protocol.SESSION_KEY: self._session or ""}.items())

    def _call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        data = _json(request)
        call = self._channel.unary_unary(protocol.method(name))
        answer = call(data, metadata=self._metadata(), timeout=protocol.seconds_for(len(data)))
        self.traffic.sent += len(data)
        self.traffic.received += len(answer)
        self.traffic.round_trips += 1
        try:
            return read_json(answer)
        except WireError as error:
            raise CloudError(f"{self.address}: {error}") from error

    def _ensure_session(self) -> None:
        with self._lock:
            if self._session is None:
                self.told = self._call(protocol.OPEN, self.wish)
                self._session, self._installed = self.told["session"], False
            if not self._installed:
                message = self.install()
                if message is not None:
                    frames = list(Writer().frames(message))
                    size = sum(map(len, frames))
                    call = self._channel.stream_unary(protocol.method(protocol.INSTALL))
                    call(iter(frames), metadata=self._metadata(), timeout=protocol.seconds_for(size))
                    self.traffic.sent += size
                self._installed = True

    def _after(self, error: grpc.RpcError | Broken, pause: float, since: float) -> float:
        """Wait before the next attempt, or give up; the next pause."""
        status = error.code() if isinstance(error, grpc.RpcError) else None
        details = error.details() if isinstance(error, grpc.RpcError) else str(error)
        if status is not None and status not in protocol.RETRIED:
            raise CloudError(f"{self.address} refuses: {details} ({status.name})") from error
        if status is grpc.StatusCode.NOT_FOUND:
            with self._lock:
                self._session = None
        asked = _asked_seconds(error)
        if time.monotonic() - since > self.patience:
            raise CloudError(
                f"{self.address} gave no answer for {self.patience:g} s ({details}); start the server again and resume "
                "from the last checkpoint, or raise patience."
            ) from error
        time.sleep(asked if asked is not None else pause * random.uniform(0.5, 1.0))
        return min(2 * pause, _LONGEST_PAUSE)


class Stream:
    """One micro-batch's stream: messages to the cloud and back.

    Closed when nobody refers to it any more, and with it what the cloud keeps for it.
    """

    def __init__(self, call: Any, metadata: tuple, link: Link):
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._frames = call(_until_none(self._queue), metadata=metadata)
        self._writer, self._reader = Writer(link.packing), Reader(protocol.MESSAGE_BYTES)
        self._traffic, self._watch, self._sent = link.traffic, link._watch, 0
        self.is_open = True
        self._closing = weakref.finalize(self, _cancel, self._queue, self._frames)

    def send(self, message: Message) -> None:
        """Send a message; returns before it has arrived."""
        for frame in self._writer.frames(message):
            self._sent += len(frame)
            self._traffic.sent += len(frame)
            self._queue.put(frame)

    def finish(self) -> None:
        """Say that no more messages follow."""
        self._queue.put(None)

    def receive(self) -> Message:
        """The next message.

        Raises:
            Broken, grpc.RpcError: If there is none, by whatever went wrong.
        """
        self._traffic.round_trips += 1
        while True:
            with self._watch.over(self._frames, protocol.seconds_for(self._sent)):
                try:
                    frame = next(self._frames)
                except StopIteration:
                    self.is_open = False
                    raise Broken("the stream ended early") from None
                except grpc.RpcError:
                    self.is_open = False
                    raise
            self._traffic.received += len(frame)
            try:
                message = _taken(self._reader, frame)
            except Broken:
                self.close()
                raise
            if message is not None:
                self._sent = 0
                return message

    def close(self) -> None:
        """Break off."""
        self.is_open = False
        self._closing()


class _Watch:
    """Cancels calls whose answer does not come: one thread for all of them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until: dict[int, tuple[float, Any]] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    class _Over:
        def __init__(self, watch: _Watch, call: Any, seconds: float):
            self.watch, self.call, self.seconds = watch, call, seconds

        def __enter__(self) -> None:
            self.watch._until[id(self)] = (time.monotonic() + self.seconds, self.call)
            self.watch._run()

        def __exit__(self, *error: Any) -> None:
            self.watch._until.pop(id(self), None)

    def over(self, call: Any, seconds: float) -> _Over:
        """Watch over a call for as long as the context lasts."""
        return self._Over(self, call, seconds)

    def end(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        if self._thread is not None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="d2ft-deadlines", daemon=True)
                self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            now = time.monotonic()
            for until, call in list(self._until.values()):
                if until < now:
                    call.cancel()


def _taken(reader: Reader, frame: bytes) -> Message | None:
    try:
        return reader.take(frame)
    except FrameError as error:
        raise Broken(str(error)) from error
    except WireError as error:
        raise CloudError(f"the cloud sent what is not of the protocol: {error}") from error


def _asked_seconds(error: Any) -> float | None:
    """After how long the server asked to try again."""
    for name, value in getattr(error, "trailing_metadata", lambda: None)() or ():
        if name == protocol.RETRY_KEY:
            try:
                return min(max(float(value), 0.05), 60.0)
            except ValueError:
                return None
    return None


def _until_none(items: queue.SimpleQueue) -> Iterator[bytes]:
    yield from iter(items.get, None)


def _cancel(items: queue.SimpleQueue, call: Any) -> None:
    items.put(None)
    call.cancel()


def _close(channel: grpc.Channel, watch: _Watch) -> None:
    watch.end()
    channel.close()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
