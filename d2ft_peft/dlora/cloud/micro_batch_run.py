"""One stream: a micro-batch forward and backward, or a key/value cache and what is generated with it.

The graph between forward and backward lives as long as its stream, and so does a cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from ..wire.frames import FrameError
from ..wire.messages import Message, WireError
from .base_model import BaseModel
from .edge_sessions import EdgeSession, UnknownSession
from .span_model import Pass, SpanModel, answer_widths, checked
from .turns import Room, Turns


_TENSORS = ("hidden", "mask", "positions", "labels")
_IGNORED = -100
"""A label that nobody predicts."""
_MOST_ITEMS = 1 << 53
"""Whole numbers above it are no floating-point numbers."""


class MicroBatchRun:
    """Serves one stream of a session.

    Args:
        base: The base model.
        session: Whose stream it is.
        span: A span model for this stream alone.
        turns: Whose turn it is to compute.
        room: Tokens in flight.
        receive: Returns the edge's next message, or None at the end of the stream.
        send: Sends the edge a message.
    """

    def __init__(
        self, base: BaseModel, session: EdgeSession, span: SpanModel, turns: Turns, room: Room,
        receive: Callable[[], Message | None], send: Callable[[Message], None],
    ):  # fmt: skip
        self.base, self.session, self.span = base, session, span
        self.turns, self.room = turns, room
        self.receive, self.send = receive, send
        self.tokens = 0
        self.cache: Cache | None = None
        self.rows = 0
        self._copies, self._version = session.copies, session.version

    def serve(self) -> None:
        """Answer what comes in until the stream ends."""
        try:
            while (message := self.receive()) is not None:
                if message.kind != "forward":
                    raise WireError(f"a stream goes on with forward, not {message.kind[:20]!r}")
                self._forward(message)
        finally:
            self.room.give_back(self.tokens)
            self.tokens = 0

    def _forward(self, message: Message) -> None:
        mode = message.fields.get("mode")
        if mode not in ("train", "infer", "cached"):
            raise WireError("mode is train, infer or cached")
        hidden = _checked_hidden(message, self.base)
        if self.cache is not None and mode != "cached":
            raise WireError("a stream that holds a cache goes on with it")
        self._take_room(hidden, mode, message.fields)
        with self.turns.held(self.session.name):
            now, arguments = self._pass(message, hidden)
            if mode == "train":
                answer = self._train(now, hidden, message, arguments)
            else:
                with torch.no_grad():
                    answer = Message("output", {}, {"out": self._infer(now, hidden, message, mode, arguments)})
        if mode != "cached":  # before the edge is told, so that there is room for what it sends next
            self.room.give_back(self.tokens)
            self.tokens = 0
        if answer is not None:
            self.send(answer)

    def _take_room(self, hidden: Tensor, mode: str, fields: dict[str, Any]) -> None:
        batch, tokens = hidden.shape[:2]
        seen, length = 0 if self.cache is None else self.cache.get_seq_length(), fields.get("length")
        if type(length) is int and 0 <= length < seen:  # the rest is cropped
            seen = length
        if seen + tokens > most_tokens(self.base):
            raise WireError(
                f"a row has {seen + tokens} tokens; the base model knows {most_tokens(self.base)} positions"
            )
        # Of a cache all tokens count, and as often as its rows are repeated.
        needed = batch * (seen + tokens) if mode == "cached" else batch * tokens
        if needed > self.tokens:
            self.room.take(needed - self.tokens, self.tokens)
            self.tokens = needed

    def _train(self, now: Pass, hidden: Tensor, message: Message, arguments: dict[str, Any]) -> Message | None:
        needed = message.fields.get("hidden_gradient") is True
        with torch.enable_grad():
            hidden.requires_grad_(needed)
            if self.session.with_head:
                labels, items = _checked_labels(message, hidden, self.base), message.fields["items"]
                out = self.span.run_head(now, hidden, labels, items, **arguments)
            else:
                # Packed rows are recognized by their positions, but not where a cache is begun.
                begun = DynamicCache(config=self.base.model.config) if message.fields.get("has_cache") is True else None
                out = self.span.run(now, hidden, begun, **arguments)
        self.send(Message("output", {}, {"out": out.detach()}))
        with self.turns.lent(self.session.name):
            backward = self.receive()
        if backward is None:
            return None  # the edge needed the output only
        if backward.kind != "backward":
            raise WireError(f"after a training pass comes backward, not {backward.kind[:20]!r}")
        (grad,) = checked(list(backward.tensors.values()), [out.shape], out)
        if out.requires_grad:
            out.backward(grad)
        return Message("done", {}, {"hidden": hidden.grad} if needed else {})

    def _infer(self, now: Pass, hidden: Tensor, message: Message, mode: str, arguments: dict[str, Any]) -> Tensor:
        if mode == "cached":
            self._align_cache(message.fields, hidden.shape[0])
        if not self.session.with_head:
            return self.span.run(now, hidden, self.cache, **arguments)
        if "labels" in message.tensors:
            return self.span.run_head(
                now, hidden, _checked_labels(message, hidden, self.base), message.fields["items"], **arguments
            )
        keep = message.fields.get("keep")
        if type(keep) is not int or not 0 <= keep <= hidden.shape[1]:
            raise WireError("keep is the number of last tokens whose logits are returned, 0 for all")
        return self.span.run_logits(now, hidden, self.cache, keep, **arguments)

    def _align_cache(self, fields: dict[str, Any], batch: int) -> None:
        """Reorder, repeat and crop the cache as the edge did with its own part of it."""
        rows, length = fields.get("rows"), fields.get("length")
        if self.cache is None:
            self.cache = DynamicCache(config=self.base.model.config)
        elif (
            not isinstance(rows, list)
            or not all(type(row) is int and 0 <= row < self.rows for row in rows)
            or type(length) is not int
            or not 0 <= length <= self.cache.get_seq_length()
            or len(rows) != batch
        ):
            raise WireError("rows are those of the cache, one for each row of the batch; length is at most its own")
        else:
            if rows != list(range(self.rows)):
                self.cache.batch_select_indices(torch.tensor(rows, device=self.base.model.device))
            if length < self.cache.get_seq_length():
                self.cache.crop(length - self.cache.get_seq_length())
        self.rows = batch

    def _pass(self, message: Message, hidden: Tensor) -> tuple[Pass, dict[str, Any]]:
        fields = message.fields
        alive, frozen, copies = (_listed(fields, name, str) for name in ("alive", "frozen", "copies"))
        skipped, constant = (frozenset(_listed(fields, name, int)) for name in ("skipped", "constant"))
        if not self.session.targets.issuperset(alive) or set(alive) & set(copies):
            raise WireError("alive projections are some of the session's targets, and are not copies as well")
        if copies and fields.get("version") != self._version:
            raise UnknownSession("this server does not have these copies of killed adapters; open a session anew")
        if not set(copies) <= self._copies.keys():
            raise WireError("copies are some of those that were installed")
        rank = self.session.rank
        factors = {} if rank is None else {name: self.base.factors(name, rank) for name in alive}
        now = Pass(
            frozenset(alive), frozenset(frozen), {name: self._copies[name] for name in copies}, factors,
            skipped, constant, self._ask, self.send, self._given(message, hidden, frozenset(alive)),
        )  # fmt: skip
        return now, _arguments(message, hidden, self.base, self.cache)

    def _given(self, message: Message, hidden: Tensor, alive: frozenset[str]) -> dict[int, list[Tensor]]:
        """Answers that came with the question, by number of the group."""
        number, groups = message.fields.get("given"), self.base.groups
        tensors = [tensor for name, tensor in message.tensors.items() if name not in _TENSORS]
        if number is None:
            if tensors:
                raise WireError(f"tensors are {', '.join(_TENSORS)}, and answers where a group is given")
            return {}
        if type(number) is not int or not 0 <= number < len(groups):
            raise WireError("given is the number of a group")
        widths = answer_widths(groups[number], alive, self.session.rank)
        return {number: checked(tensors, [(*hidden.shape[:2], width) for width in widths.values()], hidden)}

    def _ask(self, question: Message) -> Message:
        self.send(question)
        with self.turns.lent(self.session.name):
            answer = self.receive()
        if answer is None:
            raise FrameError("the stream ended where an answer was due")
        if answer.kind != "answer":
            raise WireError(f"a question is answered with answer, not {answer.kind[:20]!r}")
        return answer


def most_tokens(base: BaseModel) -> int:
    """The longest row that the base model has positions for."""
    return getattr(base.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 31


def _listed(fields: dict[str, Any], name: str, kind: type) -> list:
    value = fields.get(name, [])
    if not isinstance(value, list) or not all(type(item) is kind for item in value):
        raise WireError(f"{name} is a list of {'numbers' if kind is int else 'strings'}")
    return value


def _checked_hidden(message: Message, base: BaseModel) -> Tensor:
    hidden = message.tensors.get("hidden")
    if hidden is None or hidden.ndim != 3 or hidden.shape[-1] != base.width or not hidden.numel():
        shape = None if hidden is None else list(hidden.shape)
        raise WireError(f"hidden states have shape {shape}; [batch, tokens, {base.width}] is needed, none empty")
    if not hidden.is_floating_point():
        raise WireError("hidden states are floating-point numbers")
    return hidden.to(base.model.device, base.dtype)


def _checked_labels(message: Message, hidden: Tensor, base: BaseModel) -> Tensor:
    labels, items = message.tensors.get("labels"), message.fields.get("items")
    if labels is None or labels.dtype is not torch.int64 or labels.shape != hidden.shape[:2]:
        raise WireError(f"labels are int64 of shape {list(hidden.shape[:2])}")
    vocabulary = base.model.config.get_text_config().vocab_size
    if ((labels != _IGNORED) & ((labels < 0) | (labels >= vocabulary))).any():
        raise WireError(f"labels are {_IGNORED}, or from 0 to {vocabulary - 1}")
    if type(items) not in (int, float) or not 0 < items < _MOST_ITEMS:
        raise WireError("items is what the summed loss is divided by, above zero")
    return labels.to(hidden.device)


def _arguments(message: Message, hidden: Tensor, base: BaseModel, cache: Cache | None) -> dict[str, Any]:
    """Mask and positions, in bounds."""
    batch, tokens = hidden.shape[:2]
    mask, positions = message.tensors.get("mask"), message.tensors.get("positions")
    found: dict[str, Any] = {}
    if mask is not None:
        if mask.dtype is not torch.bool or mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
            raise WireError(f"a mask is bool [{batch}, at least {tokens}]")
        seen = 0 if cache is None else cache.get_seq_length()
        if mask.shape[1] > tokens + seen:
            raise WireError(f"a mask is bool [{batch}, at most {tokens + seen}]")
        found["attention_mask"] = mask.to(hidden.device, torch.int64)
    if positions is not None:
        if positions.dtype is not torch.int64 or positions.shape not in ((1, tokens), (batch, tokens)):
            raise WireError(f"positions are int64 [1 or {batch}, {tokens}]")
        if positions.min() < 0 or positions.max() >= most_tokens(base):
            raise WireError(f"positions are from 0 to {most_tokens(base) - 1}")
        found["position_ids"] = positions.to(hidden.device)
    return found
