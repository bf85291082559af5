"""Names, version and limits of the protocol, the same ones on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc

from ...value_checks import check, is_integer, is_positive


VERSION = 1
"""Raised with every change after which an older peer would misread what it gets."""

SERVICE = "d2ft_peft.dlora.v1.Cloud"
OPEN, MICRO_BATCH, INSTALL, FACTORS, DECIDE, CLOSE = "Open", "MicroBatch", "Install", "Factors", "Decide", "Close"
ANSWERS = {OPEN: "opened", INSTALL: "installed", DECIDE: "decided", CLOSE: "closed"}
"""Kind of the message that a call is answered with; a call's own kind is its name."""

SESSION_KEY, TOKEN_KEY, RETRY_KEY = "d2ft-session", "authorization", "d2ft-retry-after"

CHUNK_BYTES = 1 << 20
"""Longest part of a message that one frame carries; no gRPC message is longer than this and the frame's prefix."""

HEADER_BYTES = 1 << 16
"""Longest JSON of a message or of a call."""

MESSAGE_BYTES = 1 << 30
"""Longest message after its chunks are put together, where nothing sets a lower limit."""

FIRST_ANSWER_SECONDS = 30.0
SLOWEST_BYTES_PER_SECOND = 1 << 14
"""A peer is waited for this long, and as much longer as its bytes take over the slowest link that is put up with."""

STILL_AT_IT = b""
"""What a server sends on a stream instead of a frame, so that an edge goes on waiting while it computes or queues."""

RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,  # connection lost, server not there (yet)
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,  # by our own deadline, or by a server that stops
        grpc.StatusCode.ABORTED,  # frames out of order
        grpc.StatusCode.DATA_LOSS,  # a frame that is damaged
        grpc.StatusCode.NOT_FOUND,  # the session is gone: opened anew first
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # after the time that the server names
        grpc.StatusCode.UNKNOWN,  # a proxy that broke off
        grpc.StatusCode.INTERNAL,  # HTTP/2 broken off within a message
    }
)
"""What a micro-batch is replayed after; any other status is final."""

_STREAM_WINDOW = 1 << 22
"""Bytes of a stream that may be under way unread: 250 Mbit/s over 130 ms, with one micro-batch in flight. What gRPC
measures for itself instead starts at 64 kB and follows single messages badly: each of them then takes one round trip
more, and its probes can end a lossy connection (too_many_pings)."""

_CONNECTION = [
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", _STREAM_WINDOW),
    ("grpc.http2.max_frame_size", CHUNK_BYTES),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.max_send_message_length", CHUNK_BYTES + 1024),
    ("grpc.max_receive_message_length", CHUNK_BYTES + 1024),
    ("grpc.max_metadata_size", 1 << 14),
]

CHANNEL_OPTIONS = [
    *_CONNECTION,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),  # replays are ours: only the edge knows what a micro-batch is
]
SERVER_OPTIONS = [
    *_CONNECTION,
    ("grpc.so_reuseport", 0),  # a port that is taken is an error
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),  # an edge that breaks off many streams pings for each hundredth of them
]


def method(name: str) -> str:
    """Path of one of the service's calls."""
    return f"/{SERVICE}/{name}"


def seconds_for(num_bytes: int) -> float:
    """How long an answer is waited for, given the bytes of the question and of the answer."""
    return FIRST_ANSWER_SECONDS + num_bytes / SLOWEST_BYTES_PER_SECOND


def seconds_until_still_at_it() -> float:
    """After how long a server says so."""
    return FIRST_ANSWER_SECONDS / 3


@dataclass(frozen=True)
class Limits:
    """What a server admits; told to every edge when it opens a session.

    Attributes:
        sessions: Edges at a time.
        streams: Micro-batches in flight of one edge.
        tokens: Tokens in flight of all edges together, those in key/value caches included.
        message_bytes: Longest message.
        idle_seconds: A session, or a micro-batch, that is silent for longer is let go.
    """

    sessions: int = 64
    streams: int = 32
    tokens: int = 1 << 20
    message_bytes: int = MESSAGE_BYTES
    idle_seconds: float = 900.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            fits = is_positive(value) and (name == "idle_seconds" or is_integer(value))
            kind = "" if name == "idle_seconds" else "whole "
            check(fits, name, value, f"must be above zero, a finite {kind}number; leave it out for the default")

    def as_json(self) -> dict[str, Any]:
        """The limits as a JSON object."""
        return dict(vars(self))
