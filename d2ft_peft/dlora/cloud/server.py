"""The gRPC service: who calls is checked, what is called is run, and nothing of what goes wrong inside leaves it."""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from ..wire import protocol
from ..wire.credentials import Certificates, check_binding, is_admitted
from ..wire.frames import FrameError, Reader, Writer
from ..wire.messages import Message, WireError, read_json
from ..wire.protocol import Limits
from .base_model import BaseModel
from .decisions import decide
from .edge_sessions import EdgeSession, EdgeSessions
from .micro_batch_run import MicroBatchRun
from .turns import Refused, Room, Turns


logger = logging.getLogger(__name__)
_SPARE_CALLS = 64
"""Calls at a time besides micro-batches; above that, gRPC itself answers that there is no room."""


class Cloud:
    """Serves one base model to any number of edges.

        cloud = Cloud(BaseModel.load("meta-llama/Llama-3.2-1B"))
        cloud.start(port=50051)
        cloud.wait()

    Args:
        base: The base model.
        limits: What is admitted.
        memory_bytes: Most memory for graphs and caches of micro-batches in flight; lowers ``limits.tokens``.
        compute_at_once: How many micro-batches compute at a time.
        tokens: Tokens of the edges that are admitted; None admits everybody who reaches the port.
    """

    def __init__(
        self, base: BaseModel, limits: Limits | None = None, memory_bytes: int | None = None,
        compute_at_once: int = 1, tokens: frozenset[str] | None = None,
    ):  # fmt: skip
        self.base, self.limits, self._tokens = base, limits or Limits(), tokens
        most = self.limits.tokens if memory_bytes is None else memory_bytes // base.bytes_per_token
        if most < 1:
            raise ValueError(
                f"memory_bytes={memory_bytes} holds no token: one takes {base.bytes_per_token} bytes; give more."
            )
        self.room = Room("tokens in flight", min(most, self.limits.tokens))
        self.sessions = EdgeSessions(base, self.limits)
        self.turns = Turns(compute_at_once)
        self._ended = threading.Event()
        self._server: grpc.Server | None = None
        self._silent: dict[Any, float] = {}

    def start(
        self, port: int = 0, host: str = "localhost", certificates: Certificates | None = None, insecure: bool = False
    ) -> int:
        """Listen; returns the port.

        Args:
            port: Where to listen; 0 takes a free one.
            host: On which address.
            certificates: The server's certificate, for TLS; with an authority, edges need one too.
            insecure: Whether to listen without TLS where others can reach it.

        Raises:
            ValueError: If the address is not loopback and there is no TLS, or the port is taken.
        """
        check_binding(host, certificates is not None, insecure)
        calls = self.limits.sessions * self.limits.streams
        workers = min(calls, 1024) + _SPARE_CALLS
        server = grpc.server(
            ThreadPoolExecutor(workers, "d2ft-cloud"), options=protocol.SERVER_OPTIONS, maximum_concurrent_rpcs=workers
        )
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(protocol.SERVICE, self._handlers())])
        address = f"{host}:{port}"
        try:
            if certificates is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, certificates.of_server())
        except RuntimeError as error:
            raise ValueError(
                f"host={host!r}, port={port}: cannot listen there ({error}); take another port."
            ) from error
        self._server = server
        server.start()
        threading.Thread(target=self._let_go, name="d2ft-cloud-idle", daemon=True).start()
        return port

    def wait(self) -> None:
        """Serve until `stop` is called, or the process is told to end."""
        self._server.wait_for_termination()

    def stop(self, grace: float = 0.0) -> None:
        """Stop serving; micro-batches in flight get `grace` seconds, and are replayed by their edges after that."""
        self._ended.set()
        if self._server is not None:
            self._server.stop(grace).wait()

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            protocol.OPEN: grpc.unary_unary_rpc_method_handler(_answering(self._open)),
            protocol.DECIDE: grpc.unary_unary_rpc_method_handler(_answering(self._decide)),
            protocol.CLOSE: grpc.unary_unary_rpc_method_handler(_answering(self._close)),
            protocol.INSTALL: grpc.stream_unary_rpc_method_handler(_answering(self._install)),
            protocol.FACTORS: grpc.unary_stream_rpc_method_handler(self._factors),
            protocol.MICRO_BATCH: grpc.stream_stream_rpc_method_handler(self._micro_batch),
        }

    def _open(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        session = self.sessions.open(read_json(request), self._token(context))
        told = {
            "protocol": protocol.VERSION,
            "session": session.name,
            "depth": self.base.depth,
            "limits": self.limits.as_json(),
        }
        groups = [
            {"number": number, "names": [name for name in group.names if name in session.targets]}
            for number, group in enumerate(self.base.groups)
            if session.targets.intersection(group.names)
        ]
        return _json({**told, "name": self.base.name, "returns_tuple": self.base.returns_tuple, "groups": groups})

    def _close(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.sessions.close(self._session(context))
        return _json({})

    def _decide(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._session(context)
        return _json(decide(read_json(request)))

    def _install(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        session, reader = self._session(context), Reader(self.limits.message_bytes)
        for frame in frames:
            if (message := reader.take(frame)) is not None:
                session.install(message, self.base)
                return _json({"version": session.version})
        raise WireError("the stream ended within a message")

    def _factors(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        def frames() -> Iterator[bytes]:
            session, names = self._session(context), read_json(request).get("names")
            if session.rank is None or not isinstance(names, list) or not session.targets.issuperset(names):
                raise WireError("factors are of a session with a rank, names some of its targets")
            writer = Writer()
            for name in names:
                with self.turns.held(session.name):
                    a, b = self.base.factors(name, session.rank)
                yield from writer.frames(Message("factors", {"name": name}, {"a": a, "b": b}))

        yield from _guarded(frames(), context)

    def _micro_batch(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            session = self._session(context)
            session.streams.take(1)
        except Exception as error:
            _abort(context, error)
        outgoing: queue.SimpleQueue = queue.SimpleQueue()
        context.add_callback(lambda: outgoing.put(None))
        worker = threading.Thread(
            target=self._serve, args=(session, frames, context, outgoing), name="d2ft-micro-batch", daemon=True
        )
        worker.start()
        yield from _until_none(outgoing, context)

    def _serve(
        self, session: EdgeSession, frames: Iterator[bytes], context: grpc.ServicerContext, outgoing: queue.SimpleQueue
    ) -> None:
        """Run a stream in a thread of its own: what it sends on the way is passed on by gRPC's."""
        writer, reader = Writer(session.packing), Reader(self.limits.message_bytes)

        def send(message: Message) -> None:
            for frame in writer.frames(message):
                outgoing.put(frame)

        def receive() -> Message | None:
            self._silent[context] = time.monotonic()
            for frame in frames:
                session.last_used = self._silent[context] = time.monotonic()
                if (message := reader.take(frame)) is not None:
                    return message
            return None

        try:
            with session.span_model(self.base) as span:
                MicroBatchRun(self.base, session, span, self.turns, self.room, receive, send).serve()
            outgoing.put(None)
        except Exception as error:  # the thread's only way out
            outgoing.put(error)
        finally:
            self._silent.pop(context, None)
            session.streams.give_back(1)

    def _token(self, context: grpc.ServicerContext) -> str | None:
        metadata = dict(context.invocation_metadata())
        token = metadata.get(protocol.TOKEN_KEY)
        if not is_admitted(token, self._tokens):
            raise PermissionError("this server admits edges with a token that it knows; give token=")
        return token if self._tokens is not None else None

    def _session(self, context: grpc.ServicerContext) -> EdgeSession:
        token = self._token(context)
        return self.sessions.get(dict(context.invocation_metadata()).get(protocol.SESSION_KEY), token)

    def _let_go(self) -> None:
        """Let go of sessions and streams that fell silent."""
        while not self._ended.wait(min(5.0, self.limits.idle_seconds / 4)):
            before = time.monotonic() - self.limits.idle_seconds
            for context, heard in list(self._silent.items()):
                if heard < before:
                    context.cancel()
            self.sessions.close_idle()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _answering(handle: Callable[[Any, grpc.ServicerContext], bytes]) -> Callable[[Any, grpc.ServicerContext], bytes]:
    def call(request: Any, context: grpc.ServicerContext) -> bytes:
        try:
            return handle(request, context)
        except Exception as error:
            _abort(context, error)

    return call


def _guarded(frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    try:
        yield from frames
    except Exception as error:
        _abort(context, error)


def _until_none(outgoing: queue.SimpleQueue, context: grpc.ServicerContext) -> Iterator[bytes]:
    while (item := outgoing.get()) is not None:
        if isinstance(item, Exception):
            _abort(context, item)
        yield item


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with a status and a sentence; details of what went wrong inside stay here."""
    if isinstance(error, Refused):
        context.set_trailing_metadata([(protocol.RETRY_KEY, f"{error.seconds:g}")])
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    if isinstance(error, WireError):
        status = grpc.StatusCode.ABORTED if isinstance(error, FrameError) else grpc.StatusCode.INVALID_ARGUMENT
        context.abort(status, str(error))
    if isinstance(error, PermissionError):
        context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    if isinstance(error, KeyError):
        context.abort(grpc.StatusCode.NOT_FOUND, "this server does not know that session; open one")
    if isinstance(error, (LookupError, ValueError)):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    if not context.is_active():
        raise error  # the edge went away; gRPC knows
    logger.error("a call failed", exc_info=error)
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the server could not run this ({type(error).__name__})")
