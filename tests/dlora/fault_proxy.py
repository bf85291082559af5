"""A proxy between edges and a cloud that forwards bytes, and breaks what it forwards by a plan."""

from __future__ import annotations

import random
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc

from d2ft_peft.dlora.wire import protocol


FAULTS = (
    "lost before",  # the call never arrives
    "lost within",  # broken off after some frames
    "half-open",  # from some frame on nothing passes, and nobody says so
    "slow",
    "doubled",
    "swapped",  # a frame comes after the one that followed it
    "damaged",  # a bit is another one
    "dropped",  # one frame is missing
    "before backward",  # broken off between forward and backward
    "refused",  # no room; try again
    "restarted",  # the server is another one from here on, and knows nothing
)


@dataclass
class Fault:
    """What happens to one call.

    Attributes:
        kind: One of `FAULTS`.
        upward: Whether it happens to frames of the edge.
        frame: To which of them.
    """

    kind: str
    upward: bool = True
    frame: int = 0


class Plan:
    """Draws faults for calls, the same ones for the same seed.

    Args:
        share: How many of the calls have one.
        seed: Of all draws.
        kinds: Which ones.
        most: No more than so many.
    """

    def __init__(self, share: float = 0.3, seed: int = 0, kinds: tuple[str, ...] = FAULTS, most: float = float("inf")):
        self.share, self.kinds, self.most = share, kinds, most
        self.drawn = 0
        self._random = random.Random(seed)

    def __call__(self, method: str) -> Fault | None:
        """The fault of the next call of a method, or None."""
        if self._random.random() >= self.share or self.drawn >= self.most:
            return None
        self.drawn += 1
        # Early frames more often, since many streams are short.
        frame = int(self._random.paretovariate(0.7)) - 1
        return Fault(self._random.choice(self.kinds), self._random.random() < 0.5, frame % 40)


class FaultProxy:
    """Serves on a port of its own, and passes every call on to a server.

    Args:
        address: Of the server.
        plan: Returns the fault of a call, given the name of its method.
        restart: Ends the server, and starts another one in its place.

    Attributes:
        injected: How many faults of which kind happened to which method.
        open_calls: Calls that are being passed on now.
    """

    def __init__(
        self, address: str, plan: Callable[[str], Fault | None], restart: Callable[[], None] = lambda: None,
        wait: float = 0.002,
    ):  # fmt: skip
        self.plan, self.restart, self.wait = plan, restart, wait
        self.injected: Counter[tuple[str, str]] = Counter()
        self.open_calls = 0
        self._lock = threading.Lock()
        self._channel = grpc.insecure_channel(address, protocol.CHANNEL_OPTIONS)
        self._pool = ThreadPoolExecutor(64, "fault-proxy")
        self._server = grpc.server(self._pool, options=protocol.SERVER_OPTIONS)
        self._server.add_generic_rpc_handlers([self])
        self.address = f"localhost:{self._server.add_insecure_port('localhost:0')}"

    def __enter__(self) -> FaultProxy:
        self._server.start()
        return self

    def __exit__(self, *error) -> None:
        self._server.stop(0).wait()
        self._channel.close()
        self._pool.shutdown()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        """Every call is passed on as a stream each way; that it carries one frame only does not matter."""
        path, metadata = details.method, details.invocation_metadata
        return grpc.stream_stream_rpc_method_handler(
            lambda frames, context: self._relay(path, metadata, frames, context)
        )

    def _relay(self, path, metadata, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        method = path.rpartition("/")[2]
        with self._lock:
            fault = self.plan(method)
            self.open_calls += 1
        relay = _Relay(self, method, fault, context)
        try:
            relay.before()
            relay.call = call = self._channel.stream_stream(path)(relay.upward(frames), metadata=_passed_on(metadata))
            context.add_callback(call.cancel)
            if relay.broken.is_set():
                call.cancel()
            yield from relay.downward(call)
            context.set_trailing_metadata(call.trailing_metadata())
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):  # the edge has gone
                raise
            context.set_trailing_metadata(error.trailing_metadata() or ())
            context.abort(error.code(), error.details())
        finally:
            if relay.call is not None:
                relay.call.cancel()
            with self._lock:
                self.open_calls -= 1

    def count(self, method: str, kind: str) -> None:
        with self._lock:
            self.injected[method, kind] += 1


class _Relay:
    """One call on its way through, and what happens to it."""

    def __init__(self, proxy: FaultProxy, method: str, fault: Fault | None, context: grpc.ServicerContext):
        self.proxy, self.method, self.fault, self.context = proxy, method, fault, context
        self.call = None
        self.silent, self.broken = threading.Event(), threading.Event()

    def before(self) -> None:
        """What happens to the call as a whole."""
        kind = self.fault.kind if self.fault else None
        if kind == "lost before":
            self._happens()
            self.context.abort(grpc.StatusCode.UNAVAILABLE, "lost before it arrived")
        if kind == "refused":
            self._happens()
            self.context.set_trailing_metadata([(protocol.RETRY_KEY, "0.05")])
            self.context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room; try again in 0.05 s")

    def upward(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """Frames to the server."""
        try:
            yield from self._through(frames, upward=True)
        except (_Lost, grpc.RpcError):  # raised in here it would be nobody's
            self.broken.set()
            if self.call is not None:
                self.call.cancel()

    def downward(self, frames: Iterator[bytes]) -> Iterator[bytes]:
        """Frames to the edge."""
        try:
            yield from self._through(frames, upward=False)
        except (_Lost, grpc.RpcError):
            if not self.silent.is_set():
                if self.broken.is_set():
                    self.context.abort(grpc.StatusCode.UNAVAILABLE, "lost on the way")
                raise
        while self.silent.is_set() and self.context.is_active():
            time.sleep(0.005)

    def _through(self, frames: Iterator[bytes], upward: bool) -> Iterator[bytes]:
        held, number = [], 0
        for frame in frames:
            if self.silent.is_set():
                continue
            if not frame or not self._is_due(upward, number, frame):
                yield from (frame, *held)
                held = []
            elif self.fault.kind == "swapped":
                self._happens()
                held.append(frame)
            else:
                self._happens()
                yield from self._faulty(frame)
            number += bool(frame)
        yield from held

    def _is_due(self, upward: bool, number: int, frame: bytes) -> bool:
        if self.fault is None:
            return False
        if self.fault.kind == "before backward":
            return upward and b'"kind":"backward"' in frame[:200]
        return self.fault.upward is upward and self.fault.frame == number

    def _faulty(self, frame: bytes) -> Iterator[bytes]:
        kind = self.fault.kind
        if kind in ("lost within", "before backward"):
            self.broken.set()
            raise _Lost
        if kind == "restarted":
            self.proxy.restart()
        elif kind == "half-open":
            self.silent.set()
        elif kind == "slow":
            time.sleep(self.proxy.wait)
        elif kind == "doubled":
            yield frame
        elif kind == "damaged":
            bit = zlib.crc32(frame) % (8 * len(frame))
            frame = frame[: bit // 8] + bytes([frame[bit // 8] ^ 1 << bit % 8]) + frame[bit // 8 + 1 :]
        elif kind == "dropped" and self.method != protocol.MICRO_BATCH:  # the only one of its call
            self.silent.set()
        if kind not in ("half-open", "dropped"):
            yield frame

    def _happens(self) -> None:
        self.proxy.count(self.method, self.fault.kind)


class _Lost(Exception):
    """The connection is gone."""


def _passed_on(metadata):
    return tuple((name, value) for name, value in metadata if name in (protocol.SESSION_KEY, protocol.TOKEN_KEY))
