"""Sends conversations with a server in which something is wrong, the same ones for the same seed."""

from __future__ import annotations

import json
import random
import struct
import time
from collections import Counter
from typing import Any

import torch

from d2ft_peft.dlora import BaseModel
from d2ft_peft.dlora.wire.messages import DTYPES, Message, encode

from .raw_edge import RawEdge, frame_of


_LENGTH = struct.Struct("<I")


class Fuzzer(RawEdge):
    """Sends valid conversations after one of their messages was changed.

    Attributes:
        sent: Messages that the server got to see, the changed ones included.
        answers: How many calls ended with which status.
        leaks: Sentences that tell of the server's inside.
    """

    def __init__(self, address: str, model: BaseModel, seed: int):
        super().__init__(address, model)
        self.random = random.Random(seed)
        self.sent, self.seconds = 0, 0.0
        self.answers: Counter[str] = Counter()
        self.leaks: list[str] = []
        self.alive = [name for name in self.targets if ".1." in name and ("q_proj" in name or "up_proj" in name)]
        self._known = [(method, list(map(_taken_apart, messages))) for method, messages in self._conversations()]

    def send(self, messages: int) -> None:
        """Send at least so many messages."""
        began, until = time.monotonic(), self.sent + messages
        while self.sent < until:
            if not self.session or self.random.random() < 0.02:
                self.open(edge="z" * 32, with_head=self.random.random() < 0.2, rank=self.random.choice([None, None, 4]))
            self._converse()
        self.seconds += time.monotonic() - began

    def _converse(self) -> None:
        method, messages = self.random.choice(self._known)
        pieces = [(json.loads(head), payload) for head, payload in messages]
        place = self.random.randrange(len(pieces))
        frames = []
        for number, (header, payload) in enumerate(pieces):
            data = _joined(header, payload)
            if number == place:
                frames.extend(self._changed(header, payload, number))
            else:
                frames.append(frame_of(data, number))
        self.sent += place + 1
        answer = self.call(method, frames, session=None if self.random.random() < 0.97 else "0" * 32)
        self.answers[answer.status.name] += 1
        sentence = answer.sentence or ""
        if any(part in sentence for part in ("Traceback", ".py", "site-packages", "could not run", "/work", "Error")):
            self.leaks.append(f"{method}: {sentence}: {frames[place][:300]!r}")
        if answer.status.name in ("UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED"):
            self.leaks.append(f"{method}: {answer.status.name} {sentence}: {frames[place][:300]!r}")

    def _conversations(self) -> list[tuple[str, list[Message]]]:
        wide = torch.zeros(2, 3, self.model.width, dtype=torch.float64)
        up = torch.zeros(2, 3, 48, dtype=torch.float64)
        more = {"mask": torch.ones(2, 3, dtype=torch.bool), "positions": torch.arange(3)[None]}
        labels = {"labels": torch.zeros(2, 3, dtype=torch.int64)}
        train = self.forward("train", (2, 3), more, alive=self.alive, hidden_gradient=True)
        answers = [Message("answer", {}, {"0": part}) for part in (wide, up)]
        backward = Message("backward", {}, {"out": wide})
        cached = [self.forward("cached", (2, 3)), self.forward("cached", (2, 1), rows=[1, 0], length=2)]
        factor = {"a0": torch.zeros(4, 32), "b0": torch.zeros(32, 4)}
        state = {"active": [0, 1], "known": [None, None, None], "decisions": 0}
        seen = {"change": [1.0, 2.0, None], "gradient": None}
        question = {"rule": {"active": 2, "idle": "last"}, "state": state, "observations": seen}
        return [
            ("MicroBatch", [train, *answers, backward, *answers[::-1]]),
            ("MicroBatch", [train, *answers, backward]),
            ("MicroBatch", [self.forward("infer", (2, 3), more, alive=[], skipped=[0])]),
            ("MicroBatch", [self.forward("train", (2, 3), {**more, **labels}, items=3)]),
            ("MicroBatch", [self.forward("infer", (2, 3), keep=1)]),
            ("MicroBatch", cached),
            ("Install", [Message("copies", {"names": self.alive[:1], "version": 3}, factor)]),
            ("Decide", [Message("decide", question)]),
            ("Factors", [Message("factors", {"names": self.alive})]),
            ("Open", [Message("open", self.wish(edge="y" * 32))]),
        ]

    def _changed(self, header: dict[str, Any], payload: bytes, number: int) -> list[bytes]:
        draw = self.random
        whole = frame_of(_joined(header, payload), number)
        how = draw.randrange(10)
        if how == 0:
            return []
        if how == 1:
            return [whole, whole]
        if how == 2:
            place = draw.randrange(len(whole))
            return [whole[:place] + bytes([draw.randrange(256)]) + whole[place + 1 :]]
        if how == 3:
            return [draw.randbytes(draw.randrange(200))]
        if how == 4:
            return [frame_of(draw.randbytes(draw.randrange(1, 200)), number)]
        if how == 5:
            return [frame_of(_joined(header, payload), draw.choice([number, 0, 1 << 31]), draw.choice([0, 1, 1 << 40]))]
        if how == 6:
            payload = payload[: draw.randrange(len(payload) + 1)] + draw.randbytes(draw.choice([0, 0, 8]))
        elif how == 7 and header["tensors"]:
            self._change_tensor(draw.choice(header["tensors"]))
        elif how == 8 and payload:
            floats = [float("nan"), float("inf"), 1e308, -1.0, 0.0]
            payload = struct.pack("<d", draw.choice(floats)) * (len(payload) // 8) + payload[len(payload) // 8 * 8 :]
        else:
            self._change_field(header)
        return [frame_of(_joined(header, payload), number)]

    def _change_tensor(self, spec: list) -> None:
        draw = self.random
        place = draw.randrange(4)
        choices = (
            ["hidden", "mask", "", "0", "given0", "labels", self._json()], [*DTYPES, "c64", self._json()],
            [[2, 3, 32], [], [0, 3, 32], [1 << 40], [3, 2, 32], [6, 32], self._json()],
            ["none", "bf16", "int8", "zip", self._json()],
        )  # fmt: skip
        spec[place] = draw.choice(choices[place])

    def _change_field(self, fields: dict[str, Any], depth: int = 0) -> None:
        name = self.random.choice([*fields, "alive", "copies", "given", "version", "skipped", "items", "x"])
        inner = fields.get(name)
        if isinstance(inner, dict) and inner and depth < 3 and self.random.random() < 0.7:
            self._change_field(inner, depth + 1)
        elif self.random.random() < 0.2:
            fields.pop(name, None)
        else:
            fields[name] = self._json()

    def _json(self, depth: int = 0) -> Any:
        draw = self.random
        simple = [
            None, True, False, 0, 1, -1, 2, 1 << 31, 1 << 63, 10**40, 0.5, float("nan"), float("inf"), -1e308, "", "x",
            "train", "f64", *self.alive, "x" * 300, "\x00\ud800",
        ]  # fmt: skip
        kind = draw.random()
        if depth > 3 or kind < 0.6:
            return draw.choice(simple)
        if kind < 0.85:
            return [self._json(depth + 1) for _ in range(draw.randrange(4))]
        return {str(draw.choice(simple)): self._json(depth + 1) for _ in range(draw.randrange(3))}


def _taken_apart(message: Message) -> tuple[bytes, bytes]:
    data = b"".join(encode(message))
    (length,) = _LENGTH.unpack_from(data)
    return data[4 : 4 + length], data[4 + length :]


def _joined(header: Any, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    return _LENGTH.pack(len(text)) + text + payload
