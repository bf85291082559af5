"""The link to the cloud: one session, kept up; whatever breaks is made anew and done again."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
import secrets
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from ..wire import protocol
from ..wire.credentials import Certificates
from ..wire.frames import FrameError, Reader, Writer, from_frame, to_frame
from ..wire.messages import Message, WireError
from .deadlines import Deadlines
from .stream import Broken, Stream, taken


T = TypeVar("T")
logger = logging.getLogger(__name__)
_FIRST_PAUSE, _WORTH_TELLING, _LONGEST_PAUSE = 0.05, 1.0, 5.0
_RANDOM = random.Random()
"""Not the process's own, which a run may draw its samples from: a replay must not move those."""


class CloudError(RuntimeError):
    """The cloud refused, or could not be reached for longer than the edge is patient."""


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
        connections: How many connections micro-batches in flight are spread over.
    """

    def __init__(
        self, address: str, wish: dict[str, Any], packing: str = "none", certificates: Certificates | None = None,
        token: str | None = None, patience: float = 600.0, connections: int = 1,
    ):  # fmt: skip
        self.address, self.packing, self.patience = address, packing, patience
        self.wish = {**wish, "edge": secrets.token_hex(16)}
        self.traffic = Traffic()
        self.told: dict[str, Any] = {}
        self.install: Callable[[], Message | None] = lambda: None
        self.opened: Callable[[], None] = lambda: None
        """Is called whenever the session was opened anew."""
        self.holding: weakref.WeakSet[Any] = weakref.WeakSet()
        """Whoever has something in the cloud that can be made again: is asked to `let_go` when there is no room."""
        self._token = {} if token is None else {protocol.TOKEN_KEY: f"Bearer {token}"}
        self._lock = threading.RLock()
        self._session: str | None = None
        self._installed = False
        self._channels = [_channel(address, certificates) for _ in range(connections)]
        self._channel, self._next = self._channels[0], itertools.cycle(self._channels)
        self._watch = Deadlines()
        weakref.finalize(self, _close, self._channels, self._watch)

    def open(self, **wish: Any) -> dict[str, Any]:
        """Open the session if there is none; what the server told of itself.

        Args:
            wish: What is wished for otherwise than before: then the session is opened anew.

        Raises:
            CloudError: If it refuses, or cannot be reached.
        """
        if wish:
            with self._lock:
                self.wish, self._session = {**self.wish, **wish}, None
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
            session = None
            try:
                session = self._ensure_session()
                return attempt()
            except (grpc.RpcError, Broken) as error:
                pause = self._after(error, pause, since, session)
                self.traffic.replays += 1
            except WireError as error:
                raise CloudError(f"{self.address} sent what is not of the protocol: {error}") from error

    def call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        """One question with one answer, as JSON objects."""
        return self.replaying(lambda: self._call(name, request))

    def factors(self, names: list[str]) -> list[Message]:
        """Frozen factors of projections, one message for each."""
        return self.replaying(lambda: self.fetch_factors(names))

    def fetch_factors(self, names: list[str]) -> list[Message]:
        """The same, to be used within `replaying`."""
        call = self._channel.unary_stream(protocol.method(protocol.FACTORS))
        frames = call(to_frame("factors", {"names": names}), metadata=self._metadata())
        reader, found = Reader(protocol.MESSAGE_BYTES), []
        while (frame := self.next_frame(frames, 0)) is not None:
            if (message := taken(reader, frame)) is not None:
                found.append(message)
        if [message.fields.get("name") for message in found] != names:
            raise Broken("the stream of factors ended early")
        return found

    def next_frame(self, frames: Any, waited_bytes: int) -> bytes | None:
        """The next frame of a call, or None at its end.

        Args:
            frames: The call.
            waited_bytes: Bytes that have to cross before it can come.

        Raises:
            grpc.RpcError: If the call was broken off, or nothing came in time.
        """
        while True:
            with self._watch.over(frames, protocol.seconds_for(waited_bytes)):
                frame = next(frames, None)
            if frame != protocol.STILL_AT_IT:
                self.traffic.received += len(frame or b"")
                return frame

    def stream(self) -> Stream:
        """A new stream of the session; to be used within `replaying`."""
        call = next(self._next).stream_stream(protocol.method(protocol.MICRO_BATCH))
        return Stream(call, self._metadata(), self)

    def stale(self) -> None:
        """What `install` hands over has changed."""
        with self._lock:
            self._installed = False

    def close(self) -> None:
        """End the session, if it is still there, and the connection."""
        if self._session is not None:
            with contextlib.suppress(grpc.RpcError):  # the server lets go of it by itself
                call = self._channel.unary_unary(protocol.method(protocol.CLOSE))
                call(to_frame("close", {}), metadata=self._metadata(), timeout=5)
            self._session = None
        _close(self._channels, self._watch)

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        return tuple({**self._token, protocol.SESSION_KEY: self._session or ""}.items())

    def _call(self, name: str, request: dict[str, Any]) -> dict[str, Any]:
        data = to_frame(name.lower(), request)
        call = self._channel.unary_unary(protocol.method(name))
        answer = call(data, metadata=self._metadata(), timeout=protocol.seconds_for(len(data)))
        self.traffic.sent += len(data)
        self.traffic.received += len(answer or b"")
        self.traffic.round_trips += 1
        return _unpacked(answer, protocol.ANSWERS[name])

    def _ensure_session(self) -> str:
        """The session's name; opened, and given its copies, if it is not there."""
        with self._lock:
            if self._session is None:
                self.told = self._call(protocol.OPEN, self.wish)
                self._session, self._installed = str(self.told.get("session")), False
                try:
                    self.opened()
                except BaseException:
                    self._session = None  # not looked at yet
                    raise
            if not self._installed:
                message = self.install()
                if message is not None:
                    try:
                        self._install(message)
                    except grpc.RpcError as error:
                        self._forget(error, self._session)
                        raise
                self._installed = True
            return self._session

    def _install(self, message: Message) -> None:
        frames = list(Writer().frames(message))
        size = sum(map(len, frames))
        call = self._channel.stream_unary(protocol.method(protocol.INSTALL))
        answer = call(iter(frames), metadata=self._metadata(), timeout=protocol.seconds_for(size))
        self.traffic.sent += size
        if _unpacked(answer, protocol.ANSWERS[protocol.INSTALL]).get("version") != message.fields["version"]:
            raise Broken("other copies were installed")

    def _forget(self, error: Exception, session: str | None) -> None:
        """Open a session anew if this one is unknown, unless another thread has done so meanwhile."""
        if isinstance(error, grpc.RpcError) and error.code() is grpc.StatusCode.NOT_FOUND:
            with self._lock:
                if self._session == session:
                    self._session = None

    def _after(self, error: grpc.RpcError | Broken, pause: float, since: float, session: str | None) -> float:
        """Wait before the next attempt, or give up; the next pause."""
        status = error.code() if isinstance(error, grpc.RpcError) else None
        details = error.details() if isinstance(error, grpc.RpcError) else str(error)
        if status is not None and status not in protocol.RETRIED:
            raise CloudError(f"{self.address} refuses: {details} ({status.name})") from error
        self._forget(error, session)
        if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
            # What this edge keeps in the cloud may be what it waits for, or what another edge waits for that keeps
            # what this one waits for.
            for one in list(self.holding):
                one.let_go()
        logger.log(
            logging.INFO if pause < _WORTH_TELLING else logging.WARNING,
            "%s: %s; trying again, for up to %g s", self.address, details or status, self.patience,
        )  # fmt: skip
        asked = _asked_seconds(error)
        if time.monotonic() - since > self.patience:
            raise CloudError(
                f"{self.address} gave no answer for {self.patience:g} s ({details}); start the server again and resume "
                "from the last checkpoint, or raise patience."
            ) from error
        time.sleep(asked if asked is not None else pause * _RANDOM.uniform(0.5, 1.0))
        return min(2 * pause, _LONGEST_PAUSE)


def _unpacked(frame: bytes | None, kind: str) -> dict[str, Any]:
    if frame is None:
        raise Broken("the call ended without an answer")
    try:
        return from_frame(frame, kind)
    except FrameError as error:
        raise Broken(str(error)) from error


def _asked_seconds(error: Any) -> float | None:
    """After how long the server asked to try again."""
    for name, value in getattr(error, "trailing_metadata", lambda: None)() or ():
        if name == protocol.RETRY_KEY:
            try:
                return min(max(float(value), 0.05), 60.0)
            except ValueError:
                return None
    return None


def _channel(address: str, certificates: Certificates | None) -> grpc.Channel:
    """A connection of its own, made when it is first used."""
    if certificates is None:
        return grpc.insecure_channel(address, protocol.CHANNEL_OPTIONS)
    return grpc.secure_channel(address, certificates.of_edge(), protocol.CHANNEL_OPTIONS)


def _close(channels: list[grpc.Channel], watch: Deadlines) -> None:
    watch.end()
    for channel in channels:
        channel.close()
