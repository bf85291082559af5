"""What a training step of DLoRA (arXiv 2404.05182) moves between edge and cloud, and what is left for the edge to do.

Numbers only, for decoders of Llama's shape. Frame headers, masks and positions are not counted: a few hundred bytes a
message, and a few bytes a token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple


class Group(NamedTuple):
    """Projections of a block that share their input, with its width and theirs; an exchange is of one group."""

    names: tuple[str, ...]
    width: int
    outs: tuple[int, ...]


@dataclass(frozen=True)
class LlamaShape:
    """Sizes of a decoder.

    Attributes:
        depth: Blocks.
        width: Features of a hidden state.
        key_width: Features of all keys of a token.
        intermediate: Width of the FFN.
        vocabulary: Rows of the embedding and of the head.
    """

    depth: int
    width: int
    key_width: int
    intermediate: int
    vocabulary: int

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of a block, in the order in which they run."""
        d, k, f = self.width, self.key_width, self.intermediate
        return (
            Group(("q_proj", "k_proj", "v_proj"), d, (d, k, k)),
            Group(("o_proj",), d, (d,)),
            Group(("gate_proj", "up_proj"), d, (f, f)),
            Group(("down_proj",), f, (d,)),
        )

    @property
    def block_parameters(self) -> int:
        """Weights of a block, norms included."""
        return sum(group.width * sum(group.outs) for group in self.groups) + 2 * self.width


LLAMA_7B = LlamaShape(32, 4096, 4096, 11008, 32000)
LLAMA_70B = LlamaShape(80, 8192, 1024, 28672, 32000)


@dataclass(frozen=True)
class Placement:
    """Who owns what, and how it crosses.

    Attributes:
        alive: Modules within the cloud's blocks that train, by block and name: ``(3, "q_proj")``.
        rank: Rank of the adapters.
        edge_blocks: Numbers of the lowest and of the uppermost blocks that the edge owns.
        trains_below: Whether something below the cloud's blocks trains, so that their input needs a gradient.
        core: Whether cores of rank x rank cross, instead of hidden states.
        packing: How hidden states and gradients cross, see `d2ft_peft.dlora.connect`.
        number_bytes: Bytes of a number that is not packed.
        head_in_cloud: Whether final norm, head and loss are the cloud's.
    """

    alive: Collection[tuple[int, str]]
    rank: int = 8
    edge_blocks: tuple[int, int] = (0, 0)
    trains_below: bool = False
    core: bool = False
    packing: str = "none"
    number_bytes: int = 2
    head_in_cloud: bool = False

    def packed(self, features: int) -> int:
        """Bytes of that many numbers of one token."""
        if self.packing == "int8":
            return features + 4
        return features * (2 if self.packing == "bf16" else self.number_bytes)


@dataclass(frozen=True)
class Phase:
    """A forward or a backward pass: bytes to and from the cloud, and round trips, one after the other."""

    up: float
    down: float
    trips: int

    def times(self, tokens: float) -> Phase:
        """The phase for that many tokens, if this one is of one."""
        return Phase(self.up * tokens, self.down * tokens, self.trips)


@dataclass(frozen=True)
class HomeLink:
    """A full-duplex link.

    Attributes:
        up: Mbit/s to the cloud.
        down: Mbit/s from it.
        round_trip: Seconds to the cloud and back.
    """

    up: float
    down: float
    round_trip: float

    def seconds(self, phase: Phase, in_flight: int | None = 1) -> float:
        """The shortest time in which a phase can be over, computation left out.

        The parts of a batch that are in flight share the link. Two things bound the phase from below: the bytes of the
        busier direction, with one round trip that nothing can hide; and what one part does after the other, which is
        all its round trips and its own bytes in both directions. None as `in_flight` leaves the second out, as any
        number of parts would.
        """
        if not phase.trips:
            return 0.0
        up, down = phase.up / (self.up * 125_000), phase.down / (self.down * 125_000)
        busier = max(up, down) + self.round_trip
        if in_flight is None:
            return busier
        return max(busier, phase.trips * self.round_trip + (up + down) / in_flight)


def crossing(shape: LlamaShape, placement: Placement) -> tuple[Phase, Phase]:
    """What crosses for one token, forward and backward, with everything that is in and out of the cloud's blocks."""
    packed, groups = placement.packed, _alive_groups(shape, placement)
    hidden = packed(shape.width)
    out = 0 if placement.head_in_cloud else hidden
    labels = 8 if placement.head_in_cloud else 0
    inputs = [sum(packed(size) for size in group.inputs) for group in groups]
    outputs = [sum(packed(size) for size in group.outputs) for group in groups]
    forward = Phase(hidden + labels + sum(outputs), out + sum(inputs), 1 + len(groups))
    if not groups and not placement.trains_below:
        return forward, Phase(0, 0, 0)
    # The input of the lowest group needs a gradient only for what lies below it.
    answered = inputs if placement.trains_below else inputs[1:]
    returned = hidden if placement.trains_below else 0
    return forward, Phase(out + sum(answered), returned + sum(outputs), 1 + len(answered))


@dataclass(frozen=True)
class EdgeWork:
    """FLOPs of the edge for one token, forward and backward, by who causes them."""

    adapters: float
    head: float
    blocks: float

    @property
    def total(self) -> float:
        return self.adapters + self.head + self.blocks


def edge_flops(shape: LlamaShape, placement: Placement, length: int) -> EdgeWork:
    """Matrix products on the edge for one token of a sequence of `length`.

    Adapters of the edge's own blocks are left out: few, and no part of what an exchange costs.
    """
    adapters, rank = 0.0, placement.rank
    for number, group in enumerate(_alive_groups(shape, placement)):
        answered = number > 0 or placement.trains_below
        for size in group.widths:
            if placement.core:
                adapters += 2 * rank * rank * (3 if answered else 2)
            else:
                # Forward, gradients of A and B, the gradient that A's needs, and the one that goes on below.
                adapters += 2 * rank * (2 * group.width + 3 * size + (group.width if answered else 0))
    head = 0 if placement.head_in_cloud else 2 * 2 * shape.width * shape.vocabulary
    below, above = placement.edge_blocks
    # Scores and their products with values, as PyTorch counts them (a causal mask saves nothing); backward twice that.
    attention = 4 * shape.width * length
    forward, backward = 2 * shape.block_parameters + attention, 2 * shape.block_parameters + 2 * attention
    blocks = below * (forward + placement.trains_below * backward) + above * (forward + backward)
    return EdgeWork(adapters, head, blocks)


@dataclass(frozen=True)
class EdgeMemory:
    """Bytes on the edge, by what they hold."""

    weights: float
    adapters: float
    kept: float
    logits: float

    @property
    def total(self) -> float:
        return self.weights + self.adapters + self.kept + self.logits


def edge_memory(shape: LlamaShape, placement: Placement, tokens: int, adapter_bytes: int = 4) -> EdgeMemory:
    """Bytes of tensors that the edge holds at least, in the step in which it trains `tokens` tokens at once.

    Weights of what it owns, without its blocks' activations; adapters with gradients and Adam's two moments; what is
    kept between an exchange's forward and backward; logits, their gradient and one copy in float32.
    """
    size = placement.number_bytes
    tables = 1 if placement.head_in_cloud else 2
    weights = tables * shape.vocabulary * shape.width + sum(placement.edge_blocks) * shape.block_parameters
    numbers, kept = 0, 0
    for group in _alive_groups(shape, placement):
        kept += sum(group.inputs) + sum(group.outputs)
        for width in group.widths:
            numbers += placement.rank**2 if placement.core else placement.rank * (group.width + width)
            kept += 0 if placement.core else placement.rank
    logits = 0 if placement.head_in_cloud else tokens * shape.vocabulary * (2 * size + 4)
    return EdgeMemory(weights * size, numbers * 4 * adapter_bytes, kept * size * tokens, logits)


class _Alive(NamedTuple):
    """A group's living modules: width of their input, of their outputs, and the sizes of what crosses for them."""

    width: int
    widths: list[int]
    inputs: list[int]
    outputs: list[int]


def _alive_groups(shape: LlamaShape, placement: Placement) -> list[_Alive]:
    below, above = placement.edge_blocks
    alive, found = set(placement.alive), []
    for block in range(below, shape.depth - above):
        for names, width, outs in shape.groups:
            widths = [out for name, out in zip(names, outs, strict=True) if (block, name) in alive]
            alive.difference_update((block, name) for name in names)
            if widths:
                ranks = [placement.rank] * len(widths)
                found.append(_Alive(width, widths, *((ranks, ranks) if placement.core else ([width], widths))))
    if alive:
        raise ValueError(
            f"alive={sorted(alive)[:4]}: no projection of that name in blocks {below} to {shape.depth - above - 1}."
        )
    return found
