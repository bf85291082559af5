"""What one sample shows of a model: lengths, and the FLOPs of what runs outside of the subnets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ..engine.row_counts import Lengths
from ..partition import Branch, Partition


class Entry(NamedTuple):
    """What one module outside of the subnets computes for one sample.

    Attributes:
        flops: FLOPs of its forward pass.
        trains: Whether a weight of its own trains.
        scales: Whether it works on every position, so that its FLOPs follow the length of the sequence.
        name: Path of the module.
        gauge: Of a model with several stacks, the gauge whose rows they follow.
        products: The part of `flops` that multiplies activations with one another, as attention does: backward it
            takes twice as many, whether or not anything trains.
    """

    flops: float
    trains: bool
    scales: bool = True
    name: str = ""
    gauge: int = 0
    products: float = 0.0


@dataclass
class Probe:
    """What one sample shows of a model.

    Attributes:
        sequence_length: Tokens that reach the blocks; of several stacks those of the first that reads token ids.
        below: What runs before the blocks (embeddings).
        inside: What runs in each block outside of its subnets (experts, routers), by the index of the block.
        above: What runs after the blocks (task head).
        unreached: Projections of subnets that the forward pass did not call.
        lengths: Of a model with several stacks, what came by each gauge per sample, see `RowCounts`; else empty.
        disorder: Where blocks are subnets as a whole: why their inputs cannot stand in for their outputs; or empty.
        idle: Stacks that the forward pass did not reach, as a tower without an image: of those nothing is known.
        follows: Which of them follow the length of a sample's token ids: those of towers for images and sound do not.
    """

    sequence_length: int = 0
    below: list[Entry] = field(default_factory=list)
    inside: dict[int, list[Entry]] = field(default_factory=dict)
    above: list[Entry] = field(default_factory=list)
    unreached: tuple[str, ...] = ()
    lengths: Lengths = ()
    follows: tuple[bool, ...] = ()
    disorder: str = ""
    idle: tuple[str, ...] = ()

    def at(self, tokens: int | Lengths) -> Probe:
        """The probe of a sample of another (padded) length, or with this at its gauges."""
        if isinstance(tokens, tuple):
            lengths, length = tokens, self.sequence_length
            factors = [_ratio(new, old) for new, old in zip(lengths, self.lengths or lengths, strict=True)]
        else:
            factor, length = tokens / self.sequence_length, tokens
            factors = [factor if follows else 1.0 for follows in self.follows or (True,)]
            lengths = tuple((n, tokens * by) for (n, tokens), by in zip(self.lengths, factors, strict=False))

        def scaled(entries: list[Entry]) -> list[Entry]:
            # Where nothing comes by a gauge, what is around that stack does not run either.
            return [
                e._replace(flops=e.flops * by, products=e.products * by) if e.scales or not by else e
                for e, by in ((e, factors[e.gauge]) for e in entries)
            ]

        inside = {block: scaled(entries) for block, entries in self.inside.items()}
        below, above = scaled(self.below), scaled(self.above)
        return replace(self, sequence_length=length, below=below, inside=inside, above=above, lengths=lengths)

    def rows_of(self, partition: Partition, branch: Branch) -> Rows:
        """On how many rows a branch works, per sample."""
        if not self.lengths:
            return Rows(self.sequence_length, self.sequence_length, self.sequence_length)
        stack = partition.stack_of(branch.block)
        of_stack = {g.other: self.lengths[place] for place, g in enumerate(partition.gauges) if g.stack == stack}
        sequences, tokens = of_stack[False]
        if branch.name != "cross_attention":
            return Rows(sequences * tokens, tokens, 0.0)
        others, other = of_stack[True]
        # A pass without encoder goes past cross attention.
        return Rows(sequences * tokens if others else 0.0, other, others * other)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds; JSON-friendly."""
        inside = [[block, entries] for block, entries in self.inside.items()]
        several = {"lengths": self.lengths, "follows": self.follows} if self.lengths else {}
        return {
            "sequence_length": self.sequence_length, "below": self.below, "inside": inside, "above": self.above,
        } | several  # fmt: skip

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Probe:
        """Read `state` back."""

        def entries(values: list) -> list[Entry]:
            return [Entry(*value) for value in values]

        inside = {block: entries(values) for block, values in state["inside"]}
        lengths = tuple((n, tokens) for n, tokens in state.get("lengths", ()))
        return cls(
            state["sequence_length"], entries(state["below"]), inside, entries(state["above"]), lengths=lengths,
            follows=tuple(state.get("follows", ())),
        )  # fmt: skip


class Rows(NamedTuple):
    """On how many rows a branch works for one sample.

    Attributes:
        own: Rows of its stack.
        attended: Rows that each of them attends to.
        other: Rows that cross attention reads.
    """

    own: float
    attended: float
    other: float


def _ratio(new: tuple[float, float], old: tuple[float, float]) -> float:
    return new[0] * new[1] / (old[0] * old[1]) if old[0] * old[1] else 1.0
