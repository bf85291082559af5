"""How a call ends that goes wrong: a status and a sentence, and nothing of what went wrong inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..wire import protocol
from ..wire.frames import FrameError, OtherVersion
from ..wire.messages import WireError
from .edge_sessions import OtherModel, UnknownSession
from .turns import NeverFits, Refused


logger = logging.getLogger(__name__)
_LONGEST_SENTENCE = 500


class NotAdmitted(Exception):
    """The call came without a token that the server knows."""


class Failed(Exception):
    """Something went wrong inside, and the log says what."""


_STATUS = {
    Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FrameError: grpc.StatusCode.ABORTED,
    OtherVersion: grpc.StatusCode.FAILED_PRECONDITION,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    NotAdmitted: grpc.StatusCode.UNAUTHENTICATED,
    UnknownSession: grpc.StatusCode.NOT_FOUND,
    OtherModel: grpc.StatusCode.FAILED_PRECONDITION,
    NeverFits: grpc.StatusCode.FAILED_PRECONDITION,
    Failed: grpc.StatusCode.INVALID_ARGUMENT,
}
"""What a call ends with; a subclass stands before its parent."""


def for_the_edge(error: Exception) -> Exception:
    """An error without its traceback; one that is none of the edge's business is logged, and another one returned.

    Frames of a traceback hold a graph, and the graph holds what holds the error: no collector sees through that ring.
    """
    if not isinstance(error, (grpc.RpcError, *_STATUS)):
        logger.error("a call failed", exc_info=error)
        error = Failed(f"the server could not run this ({type(error).__name__})")
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def answering(handle: Callable[[Any, grpc.ServicerContext], bytes]) -> Callable[[Any, grpc.ServicerContext], bytes]:
    """A call with one answer, that ends with a status where something goes wrong."""

    def call(request: Any, context: grpc.ServicerContext) -> bytes:
        try:
            return handle(request, context)
        except Exception as error:
            _abort(context, error)

    return call


def streaming(
    handle: Callable[[Any, grpc.ServicerContext], Iterator[bytes]],
) -> Callable[[Any, grpc.ServicerContext], Iterator[bytes]]:
    """A call with a stream of answers, likewise."""

    def call(request: Any, context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            yield from handle(request, context)
        except Exception as error:
            _abort(context, error)

    return call


def _abort(context: grpc.ServicerContext, error: Exception) -> None:
    """End a call with a status and a sentence; details of what went wrong inside stay here."""
    error = for_the_edge(error)
    if isinstance(error, grpc.RpcError):
        raise error  # the edge went away; gRPC knows
    if isinstance(error, Refused):
        context.set_trailing_metadata([(protocol.RETRY_KEY, f"{error.seconds:g}")])
    status = next(status for kind, status in _STATUS.items() if isinstance(error, kind))
    # What an edge sent may stand in it, and is not always text.
    context.abort(status, str(error).encode("unicode_escape").decode()[:_LONGEST_SENTENCE])
