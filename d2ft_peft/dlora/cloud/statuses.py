"""How a call ends that goes wrong: a status and a sentence, and nothing of what went wrong inside."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..wire import protocol
from ..wire.frames import FrameError
from ..wire.messages import WireError
from .edge_sessions import OtherModel, UnknownSession
from .turns import NeverFits, Refused


logger = logging.getLogger(__name__)
_LONGEST_SENTENCE = 500


class NotAdmitted(Exception):
    """The call came without a token that the server knows."""


_STATUS = {
    Refused: grpc.StatusCode.RESOURCE_EXHAUSTED,
    FrameError: grpc.StatusCode.ABORTED,
    WireError: grpc.StatusCode.INVALID_ARGUMENT,
    NotAdmitted: grpc.StatusCode.UNAUTHENTICATED,
    UnknownSession: grpc.StatusCode.NOT_FOUND,
    OtherModel: grpc.StatusCode.FAILED_PRECONDITION,
    NeverFits: grpc.StatusCode.FAILED_PRECONDITION,
}
"""What a call ends with; a subclass stands before its parent."""


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
    if isinstance(error, grpc.RpcError):
        raise error  # the edge went away; gRPC knows
    if isinstance(error, Refused):
        context.set_trailing_metadata([(protocol.RETRY_KEY, f"{error.seconds:g}")])
    for kind, status in _STATUS.items():
        if isinstance(error, kind):
            context.abort(status, str(error)[:_LONGEST_SENTENCE])
    logger.error("a call failed", exc_info=error)
    context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"the server could not run this ({type(error).__name__})")
