"""The gRPC service: who calls is checked, what is called is run, and nothing of what goes wrong inside leaves it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc

from ...value_checks import check, is_integer
from ..wire import protocol
from ..wire.credentials import Certificates, check_binding, is_admitted
from ..wire.frames import FrameError, Writer, from_frame, to_frame
from ..wire.messages import Message, WireError
from ..wire.protocol import Limits
from .base_model import BaseModel
from .decisions import decide
from .edge_sessions import EdgeSession, EdgeSessions
from .micro_batch_run import MicroBatchRun
from .statuses import NotAdmitted, answering, for_the_edge, streaming
from .stream_ends import Incoming, Outgoing
from .turns import Room, Turns


_SPARE_CALLS = 64
"""Calls at a time besides micro-batches; above that, gRPC itself answers that there is no room."""
_ARRIVING = 4
"""Messages of the greatest length that may be on their way at the same time."""


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
        self.arriving = Room("bytes of messages on their way", _ARRIVING * self.limits.message_bytes)
        self.sessions = EdgeSessions(base, self.limits)
        self.turns = Turns(compute_at_once)
        self._ended = threading.Event()
        self._server: grpc.Server | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._heard: dict[grpc.ServicerContext, float] = {}

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
        check(is_integer(port) and 0 <= port < 2**16, "port", port, "must be from 0 to 65535; 0 takes a free one")
        check_binding(host, certificates is not None, insecure)
        calls = self.limits.sessions * self.limits.streams
        workers = min(calls, 1024) + _SPARE_CALLS
        pool = ThreadPoolExecutor(workers, "d2ft-cloud")
        server = grpc.server(pool, options=protocol.SERVER_OPTIONS, maximum_concurrent_rpcs=workers)
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
        self._server, self._pool = server, pool
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
            self._pool.shutdown(wait=False)

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        return {
            protocol.OPEN: grpc.unary_unary_rpc_method_handler(answering(self._open)),
            protocol.DECIDE: grpc.unary_unary_rpc_method_handler(answering(self._decide)),
            protocol.CLOSE: grpc.unary_unary_rpc_method_handler(answering(self._close)),
            protocol.INSTALL: grpc.stream_unary_rpc_method_handler(answering(self._install)),
            protocol.FACTORS: grpc.unary_stream_rpc_method_handler(streaming(self._factors)),
            protocol.MICRO_BATCH: grpc.stream_stream_rpc_method_handler(streaming(self._micro_batch)),
        }

    def _open(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        session = self.sessions.open(from_frame(request, "open"), self._token(context))
        told = {
            "protocol": protocol.VERSION,
            "session": session.name,
            "depth": self.base.depth,
            "limits": self.limits.as_json(),
        }
        groups = [
            {"number": number, "block": group.block, "names": [name for name in group.names if name in session.targets]}
            for number, group in enumerate(self.base.groups)
            if session.targets.intersection(group.names)
        ]
        return to_frame(
            protocol.ANSWERS[protocol.OPEN],
            {**told, "name": self.base.name, "returns_tuple": self.base.returns_tuple, "groups": groups},
        )

    def _close(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        from_frame(request, "close")
        self.sessions.close(self._session(context))
        return to_frame(protocol.ANSWERS[protocol.CLOSE], {})

    def _decide(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self._session(context)
        return to_frame(protocol.ANSWERS[protocol.DECIDE], decide(from_frame(request, "decide")))

    def _install(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        session = self._session(context)
        with session.streams.held():
            with self._watched(context) as heard:
                message = Incoming(frames, self.limits.message_bytes, self.arriving).receive(heard)
            if message is None:
                raise FrameError("the stream ended before a message")
            session.install(message, self.base)
        return to_frame(protocol.ANSWERS[protocol.INSTALL], {"version": session.version})

    def _factors(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        session, names = self._session(context), from_frame(request, "factors").get("names")
        if session.rank is None or not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise WireError("factors are of a session with a rank, for a list of names")
        if not session.targets.issuperset(names) or len(set(names)) != len(names):
            raise WireError("factors are of the session's targets, each asked for once")
        writer = Writer()

        def work(outgoing: Outgoing) -> None:
            for name in names:
                with self.turns.held(session.name):
                    a, b = self.base.factors(name, session.rank)
                for frame in writer.frames(Message("factors", {"name": name}, {"a": a, "b": b})):
                    outgoing.put(frame)
                with self._watched(context):
                    outgoing.until_taken()

        yield from self._worked(session, context, work)

    def _micro_batch(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        session = self._session(context)
        writer, incoming = Writer(session.packing), Incoming(frames, self.limits.message_bytes, self.arriving)

        def work(outgoing: Outgoing) -> None:
            def send(message: Message) -> None:
                for frame in writer.frames(message):
                    outgoing.put(frame)

            def receive() -> Message | None:
                with self._watched(context) as heard:
                    outgoing.until_taken()
                    outgoing.is_waited_for = False
                    session.last_used = time.monotonic()
                    message = incoming.receive(heard)
                outgoing.is_waited_for = True
                return message

            with session.span_model(self.base) as span:
                MicroBatchRun(self.base, session, span, self.turns, self.room, receive, send).serve()

        yield from self._worked(session, context, work)

    def _worked(
        self, session: EdgeSession, context: grpc.ServicerContext, work: Callable[[Outgoing], None]
    ) -> Iterator[bytes]:
        """What work sends, done in a thread of its own: gRPC's passes it on meanwhile."""
        outgoing = Outgoing()

        def run() -> None:
            try:
                work(outgoing)
                outgoing.end()
            except Exception as error:  # the thread's only way out
                outgoing.end(for_the_edge(error))
            finally:
                session.streams.give_back(1)

        session.streams.take(1)
        try:
            threading.Thread(target=run, name="d2ft-cloud-stream", daemon=True).start()
        except RuntimeError:  # no more threads
            session.streams.give_back(1)
            raise
        context.add_callback(outgoing.end)
        return iter(outgoing)

    def _token(self, context: grpc.ServicerContext) -> str | None:
        metadata = dict(context.invocation_metadata())
        token = metadata.get(protocol.TOKEN_KEY)
        if not is_admitted(token, self._tokens):
            raise NotAdmitted("this server admits edges with a token that it knows; give token=")
        return token if self._tokens is not None else None

    def _session(self, context: grpc.ServicerContext) -> EdgeSession:
        token = self._token(context)
        return self.sessions.get(dict(context.invocation_metadata()).get(protocol.SESSION_KEY), token)

    @contextmanager
    def _watched(self, context: grpc.ServicerContext) -> Iterator[Callable[[], None]]:
        """End the call if its edge is waited for in vain; what is yielded says that it was heard of."""

        def heard() -> None:
            self._heard[context] = time.monotonic()

        heard()
        try:
            yield heard
        finally:
            self._heard.pop(context, None)

    def _let_go(self) -> None:
        """Let go of sessions and streams that fell silent."""
        while not self._ended.wait(min(5.0, self.limits.idle_seconds / 4)):
            before = time.monotonic() - self.limits.idle_seconds
            for context, heard in list(self._heard.items()):
                if heard < before:
                    context.cancel()
            self.sessions.close_idle()
