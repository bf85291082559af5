"""Counts what the collectives of a rank move, by purpose."""

from __future__ import annotations

from collections import Counter


FORWARD = ("dispatch", "combine")
BACKWARD = ("combine backward", "dispatch backward")


class Traffic:
    """Bytes that one rank hands to collectives for other ranks, and gets from others.

    What a rank keeps for itself is not counted. An all-reduce counts its payload once in each direction, whatever
    algorithm the backend uses.

    Attributes:
        sent: Bytes by purpose: ``"dispatch"``, ``"combine"``, ``"combine backward"``, ``"dispatch backward"`` (rows
            of hidden states and their gradients), ``"gradients"`` (parameters that are on all ranks),
            ``"gradients of heads"`` (between replicas), ``"check"``, ``"inference"``, ``"gather"`` (saving).
        received: The same for what comes in.
        axes: Bytes sent and received by axis: ``"heads"`` (between ranks that share out a replica's heads), ``"data"``
            (between replicas), ``"all"`` (sums over both).
        steps: Number of optimizer steps counted.
    """

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self.axes: Counter[str] = Counter()
        self.steps = 0

    def count(self, purpose: str, axis: str, sent: int, received: int) -> None:
        """Add one collective's bytes."""
        self.axes[axis] += sent + received
        self.sent[purpose] += sent
        self.received[purpose] += received

    @property
    def rows(self) -> int:
        """Bytes of rows, sent and received, forward and backward: what replaces tensor parallelism's exchanges."""
        return sum(self.sent[purpose] + self.received[purpose] for purpose in (*FORWARD, *BACKWARD))

    def reset(self) -> None:
        """Start counting anew."""
        self.sent.clear()
        self.received.clear()
        self.axes.clear()
        self.steps = 0

    def __str__(self) -> str:
        purposes = sorted(self.sent | self.received)
        lines = [f"{'bytes in ' + str(self.steps) + ' steps':<20}{'sent':>14}{'received':>14}"]
        lines += [f"{purpose:<20}{self.sent[purpose]:>14,}{self.received[purpose]:>14,}" for purpose in purposes]
        return "\n".join(lines)
