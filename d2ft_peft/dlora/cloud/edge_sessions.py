"""What a server knows of an edge: which blocks it wants run, and copies of adapters that it handed over.

All of it can be made again by the edge at any time, so a server that was restarted has lost nothing.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..blocks import check_span
from ..wire.compression import PACKINGS
from ..wire.messages import DTYPES, Message, WireError
from ..wire.protocol import VERSION, Limits
from .base_model import BaseModel
from .span_model import SpanModel
from .turns import Refused, Room


_MOST_RANK = 1024


@dataclass
class EdgeSession:
    """One edge.

    Attributes:
        name: Random name, by which the edge refers to it.
        edge: Random name that the edge gave itself: it has one session at a time.
        token: The token that it was opened with.
        span: Indices of the blocks that run here.
        targets: Paths of projections in the span that have adapters.
        rank: Width at which projections cross, or None where whole hidden states do.
        with_head: Whether final norm and head run here too.
        packing: How hidden states and gradients are packed.
        streams: Micro-batches in flight.
        copies: Adapters that were handed over, by path.
        version: Which ones, by the edge's count.
        last_used: When the edge was heard of, by `time.monotonic`.
    """

    name: str
    edge: str
    token: str | None
    span: range
    targets: frozenset[str]
    rank: int | None
    with_head: bool
    packing: str
    streams: Room
    copies: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    version: int = 0
    last_used: float = field(default_factory=time.monotonic)
    _idle: list[SpanModel] = field(default_factory=list)

    @contextmanager
    def span_model(self, base: BaseModel) -> Iterator[SpanModel]:
        """A span model that no other micro-batch is using."""
        try:
            model = self._idle.pop()
        except IndexError:
            model = SpanModel(base, self.span, self.targets)
        yield model
        self._idle.append(model)  # one that was broken off is not used again

    def install(self, message: Message, base: BaseModel) -> None:
        """Take over copies of adapters, in place of all former ones.

        Raises:
            WireError: If they do not fit.
        """
        names, version = message.fields.get("names"), message.fields.get("version")
        if message.kind != "copies" or not isinstance(names, list) or type(version) is not int or version < 1:
            raise WireError("copies come with a list of names and a version from 1 on")
        if not all(isinstance(name, str) for name in names) or len(set(names)) != len(names):
            raise WireError("names are strings, each there once")
        if not self.targets.issuperset(names) or len(message.tensors) != 2 * len(names):
            raise WireError("copies are of adapters that the session was opened with, two factors for each")
        copies = {}
        for number, name in enumerate(names):
            layer_in, layer_out = widths(base, name)
            a, b = message.tensors.get(f"a{number}"), message.tensors.get(f"b{number}")
            if a is None or b is None or not a.is_floating_point() or not b.is_floating_point():
                raise WireError(f"copy {number} lacks a factor")
            rank = a.shape[0] if a.ndim == 2 else -1
            if not 0 < rank <= _MOST_RANK or a.shape != (rank, layer_in) or b.shape != (layer_out, rank):
                raise WireError(f"factors of copy {number} have shapes {list(a.shape)} and {list(b.shape)}")
            # Cloned: what came in is a view of the whole message.
            copies[name] = tuple(part.to(base.model.device, base.dtype).clone() for part in (a, b))
        self.copies, self.version = copies, version


class UnknownSession(Exception):
    """There is no such session (any more), or it is not all there."""


class OtherModel(Exception):
    """The edge has another base model, or speaks another version."""


class EdgeSessions:
    """The sessions of a server.

    Args:
        base: The base model.
        limits: What is admitted.
    """

    def __init__(self, base: BaseModel, limits: Limits):
        self.base, self.limits = base, limits
        self._sessions: dict[str, EdgeSession] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, wish: dict[str, Any], token: str | None) -> EdgeSession:
        """Open a session.

        Args:
            wish: Fields of the call, see docs/dlora_protocol.md.
            token: The token that came with it.

        Raises:
            WireError: If the fields make no sense.
            OtherModel: If the edge has another base model, or speaks another version.
            Refused: If there are too many sessions.
        """
        if wish.get("protocol") != VERSION:
            raise OtherModel(f"this server speaks version {VERSION} of the protocol, not {wish.get('protocol')!r:.20}")
        _check_base(self.base, wish.get("base"))
        blocks, with_head = wish.get("edge_blocks"), wish.get("with_head")
        if not isinstance(blocks, list) or len(blocks) != 2 or type(with_head) is not bool:
            raise WireError("edge_blocks are two numbers, with_head is true or false")
        try:
            span = check_span(tuple(blocks), self.base.depth)
        except ValueError as error:
            raise WireError(str(error)) from None
        if with_head and span.stop != self.base.depth:
            raise WireError("with the head in the cloud the edge owns no upper blocks")
        if with_head and self.base.model.get_output_embeddings() is None:
            raise WireError("the base model has no head that predicts tokens")
        edge = wish.get("edge")
        if not isinstance(edge, str) or not 16 <= len(edge) <= 64:
            raise WireError("edge is a random name of 16 to 64 characters")
        packing, rank = wish.get("packing"), wish.get("rank")
        if packing not in PACKINGS or not (rank is None or (type(rank) is int and 0 < rank <= _MOST_RANK)):
            raise WireError(f"packing is one of {PACKINGS}, rank a number up to {_MOST_RANK} or null")
        targets = _targets(self.base, span, wish.get("targets"), rank)
        session = EdgeSession(
            secrets.token_hex(16), edge, token, span, targets, rank, with_head, packing,
            Room("micro-batches in flight", self.limits.streams),
        )  # fmt: skip
        with self._lock:
            # An edge whose answer was lost asks again, and must not fill the server with what it will never use.
            for name in [name for name, s in self._sessions.items() if s.edge == edge and s.token == token]:
                del self._sessions[name]
            if len(self._sessions) >= self.limits.sessions:
                raise Refused(f"{len(self._sessions)} edges have a session, which is the limit", 5.0)
            self._sessions[session.name] = session
        return session

    def get(self, name: str | None, token: str | None) -> EdgeSession:
        """A session that is open.

        Raises:
            UnknownSession: If there is none of that name, or it belongs to another token.
        """
        session = self._sessions.get(name or "")
        if session is None or session.token != token:
            raise UnknownSession("this server does not know that session; open one")
        session.last_used = time.monotonic()
        return session

    def close(self, session: EdgeSession) -> None:
        """Forget a session."""
        with self._lock:
            self._sessions.pop(session.name, None)

    def close_idle(self) -> int:
        """Forget sessions that were silent for too long and have nothing in flight; how many."""
        before = time.monotonic() - self.limits.idle_seconds
        idle = [s for s in list(self._sessions.values()) if s.last_used < before and not s.streams.used]
        for session in idle:
            self.close(session)
        return len(idle)


def widths(base: BaseModel, name: str) -> tuple[int, int]:
    """Width of a projection's input and output."""
    for group in base.groups:
        if name in group.names:
            return group.in_features, group.out_features[group.names.index(name)]
    raise WireError(f"{name[:100]!r} is no projection of the base model's blocks")


def _check_base(base: BaseModel, theirs: Any) -> None:
    if not isinstance(theirs, dict) or not all(isinstance(theirs.get(part), str) for part in base.prints):
        raise WireError("base is an object with the hashes of configuration and weights")
    for part, ours in base.prints.items():
        if theirs[part] != ours:
            raise OtherModel(
                f"the server holds {base.name!r}, the edge another model: their {part} differ "
                f"({ours[:12]} and {theirs[part][:12]}); load the same checkpoint on both sides"
            )
    if theirs.get("dtype") not in (None, *DTYPES):
        raise WireError("the dtype of hidden states is unknown")


def _targets(base: BaseModel, span: range, names: Any, rank: int | None) -> frozenset[str]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise WireError("targets is a list of paths of projections")
    there = {name: group for group in base.groups if group.block in span for name in group.names}
    for name in names:
        if name not in there:
            raise WireError(f"{name[:100]!r} is no projection of the blocks {span.start} to {span.stop - 1}")
        if rank is not None and rank > min(widths(base, name)):
            raise WireError(f"rank {rank} is above the width of {name[:100]!r}")
    return frozenset(names)
