"""One pass of some rows through the span: forward and backward on one stream, anew from the start where it breaks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..wire.messages import Message, numbered
from .link import CloudError, Link
from .local_adapters import Alive, Asked, LocalAdapters, check_answerable
from .random_state import RandomState
from .stream import Stream


@dataclass(eq=False)
class RemotePass:
    """What one pass needs, so that it can be made anew.

    Attributes:
        link: The link to the cloud.
        adapters: The adapters of the span.
        alive: Which of them take part.
        request: The first message.
        random: Where the random generators stood before the pass.
        known: Inputs of the lowest group that are known here, by its number: they do not cross.
        keep: Called with number and inputs of a group that the cloud asked for.
    """

    link: Link
    adapters: LocalAdapters
    alive: Alive
    request: Message
    random: RandomState
    known: tuple[int, list[Tensor]] | None = None
    keep: Callable[[int, list[Tensor]], None] = lambda number, inputs: None
    _stream: Stream | None = None
    _asked: dict[int, Asked] = field(default_factory=dict)
    _rests: bool = False
    _lock: Any = field(default_factory=threading.Lock)

    @property
    def trains(self) -> bool:
        """Whether a backward pass may follow."""
        return self.request.fields["mode"] == "train"

    def forward(self) -> Tensor:
        """Output of the span."""

        def attempt() -> Tensor:
            self.random.restore()
            return self._forward()

        out = self.link.replaying(attempt)
        if self.trains:
            self._rests = True
            self.link.holding.add(self)
        return out

    def backward(self, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Gradient of the hidden states, if they need one, and those of parameters by their identity."""

        def attempt() -> tuple[Tensor | None, dict[int, Tensor]]:
            if self._stream is None or not self._stream.is_open:
                with self.random.again():
                    self._forward()
            return self._backward(grad)

        with self._lock:
            self._rests = False
        try:
            return self.link.replaying(attempt)
        finally:
            self.drop()

    def let_go(self) -> None:
        """Make room in the cloud, if this rests between forward and backward, which will begin anew then."""
        with self._lock:
            if self._rests:
                self.drop()

    def drop(self) -> None:
        """Let go of the graph, here and in the cloud."""
        if self._stream is not None:
            self._stream.close()
        self._stream, self._asked = None, {}

    def _forward(self) -> Tensor:
        self.drop()
        stream = self._stream = self.link.stream()
        stream.send(self._first_message())
        while True:
            message = stream.receive()
            if message.kind == "output":
                out = _only(message, "out")
                break
            self._answer(stream, message)
        if not self.trains:
            stream.finish()
            self.drop()
        return out

    def _first_message(self) -> Message:
        """The request, with the answer to the first question in it where that is known."""
        if self.known is None:
            return self.request
        number, inputs = self.known
        answers = self._answers(number, inputs)
        tensors = {f"given{index}": answer for index, answer in enumerate(answers)}
        fields = {**self.request.fields, "given": number}
        return Message(self.request.kind, fields, {**self.request.tensors, **tensors})

    def _answer(self, stream: Stream, message: Message) -> None:
        if message.kind != "exchange":
            raise CloudError(f"the cloud sent {message.kind[:20]!r} where a question or the output was due")
        number = check_answerable(message, self.adapters.groups)
        inputs = list(message.tensors.values())
        self.keep(number, inputs)
        stream.send(Message("answer", {}, numbered(self._answers(number, inputs))))

    def _answers(self, number: int, inputs: list[Tensor]) -> list[Tensor]:
        asked = Asked([], []) if self.trains else None
        names = self._names(number)
        if len(inputs) != (len(names) if self.adapters.crosses_at_rank else 1):
            raise CloudError(f"the cloud sent {len(inputs)} inputs for {len(names)} modules")
        answers = self.adapters.answer(names, inputs, asked, needs_grad=self.trains)
        if asked is not None:
            self._asked[number] = asked
        dtype = inputs[0].dtype
        return [answer.to(dtype) for answer in answers]

    def _backward(self, grad: Tensor) -> tuple[Tensor | None, dict[int, Tensor]]:
        stream, found = self._stream, {}
        stream.send(Message("backward", {}, {"out": grad}))
        while True:
            message = stream.receive()
            if message.kind == "done":
                break
            if message.kind != "gradient":
                raise CloudError(f"the cloud sent {message.kind[:20]!r} where a gradient was due")
            number = check_answerable(message, self.adapters.groups)
            needed = message.fields.get("answer") is True
            grads = [
                value.to(out.device, out.dtype)
                for value, out in zip(message.tensors.values(), self._asked[number].outputs, strict=True)
            ]
            answers = self.adapters.backward(self._names(number), self._asked[number], grads, needed, found)
            if needed:
                stream.send(Message("answer", {}, numbered(answers)))
        stream.finish()
        return message.tensors.get("hidden"), found

    def _names(self, number: int) -> list[str]:
        exchanged = set(self.alive.exchanged)
        return [name for name in self.adapters.groups[number] if name in exchanged]


class CachedPasses:
    """A stream whose cloud side holds a key/value cache; what was sent is kept, so that it can be filled again.

    Args:
        link: The link to the cloud.
        adapters: The adapters of the span.
    """

    def __init__(self, link: Link, adapters: LocalAdapters):
        self.link, self.adapters = link, adapters
        self._sent: list[tuple[Message, Alive]] = []
        self._stream: Stream | None = None

    def forward(self, request: Message, alive: Alive) -> Tensor:
        """Output for some more tokens."""
        self._sent.append((request, alive))

        def attempt() -> Tensor:
            pending = self._sent[-1:]
            if self._stream is None or not self._stream.is_open:
                self._stream, pending = self.link.stream(), self._sent
            return [self._pass(*entry) for entry in pending][-1]

        return self.link.replaying(attempt)

    def _pass(self, request: Message, alive: Alive) -> Tensor:
        one = RemotePass(self.link, self.adapters, alive, request, random=None)
        self._stream.send(request)
        while (message := self._stream.receive()).kind != "output":
            one._answer(self._stream, message)
        return _only(message, "out")


def _only(message: Message, name: str) -> Tensor:
    if list(message.tensors) != [name]:
        raise CloudError(f"the cloud sent {list(message.tensors)[:4]} where {name!r} was due")
    return message.tensors[name]
