"""Which rows (token positions) of a model's last block its loss reads: rules, and what they find in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


IGNORED = -100
"""The label that carries no loss, torch's and transformers' own."""

READ_BY_RULES = ("input_ids", "labels", "shift_labels")
"""What rules look at of all that enters a model."""

# With more rows than this share little is saved, and to gather and to scatter has its price.
_MOST = 0.8


@dataclass(frozen=True, eq=False)
class Rows:
    """Some rows of a [B, T, ...] tensor.

    Attributes:
        index: Their places among all B * T, in order, int64 [M].
        shape: B and T.
        each: Position of the one row of each sample, int64 [B]; None where samples differ in how many they have.
        targets: Label of each row, [1, M]; None under rules that read no labels.
    """

    index: Tensor
    shape: tuple[int, int]
    each: Tensor | None = None
    targets: Tensor | None = None

    def take(self, x: Tensor) -> Tensor:
        """The rows of x [B, T, I] as [1, M, I]."""
        return x.flatten(0, 1).index_select(0, self.index)[None]

    def put(self, values: Tensor) -> Tensor:
        """Values [1, M, O] at their places in zeros [B, T, O]."""
        whole = values.new_zeros(self.shape[0] * self.shape[1], values.shape[-1])
        return whole.index_copy(0, self.index, values[0]).view(*self.shape, -1)


class Counted(NamedTuple):
    """How many labels of a batch carry loss, counted on the host.

    Attributes:
        labels: The labels as they go into the model.
        version: Of that tensor when they were counted: a change in place counts anew.
        items: Their number.
    """

    labels: Tensor
    version: int
    items: int


class Entrance(NamedTuple):
    """What a rule looks at.

    Attributes:
        inputs: What entered the model.
        shape: B and T of the last block.
        device: Where its rows are.
        config: The model's configuration.
    """

    inputs: Mapping[str, Any]
    shape: tuple[int, int]
    device: torch.device
    config: Any


@dataclass(frozen=True)
class Rule:
    """How a model chooses the rows that its loss reads.

    Attributes:
        name: For logs.
        find: Gives positions [B], or labels [B, T] of which those that carry loss are read; None where it does not
            apply.
        reads_labels: Whether it gives labels. The logits of the other rows are then of no use.
        varies: Whether positions follow the padding: samples on which they are all the same then prove nothing.
        shifts: Whether a row's label is that of the next row in the batch.
    """

    name: str
    find: Callable[[Entrance], Tensor | None]
    reads_labels: bool = False
    shifts: bool = False
    varies: bool = False


def _first(entrance: Entrance) -> Tensor | None:
    return torch.zeros(entrance.shape[0], dtype=torch.int64, device=entrance.device)


def _last_token(entrance: Entrance) -> Tensor | None:
    """The rightmost token that is no padding, as sequence classification on decoders takes it."""
    ids, (samples, tokens) = entrance.inputs.get("input_ids"), entrance.shape
    if not isinstance(ids, Tensor) or tuple(ids.shape) != (samples, tokens):
        return None
    pad = getattr(entrance.config.get_text_config(), "pad_token_id", None)
    if pad is None:
        return torch.full((samples,), tokens - 1, device=entrance.device)
    return (torch.arange(tokens, device=ids.device) * (ids != pad)).argmax(-1)


def _shifted_labels(entrance: Entrance) -> Tensor | None:
    """Each row predicts the next row's label."""
    given, labels = entrance.inputs.get("shift_labels"), entrance.inputs.get("labels")
    if isinstance(given, Tensor):
        return given
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:] if isinstance(labels, Tensor) else None


def _labels(entrance: Entrance) -> Tensor | None:
    labels = entrance.inputs.get("labels")
    return labels if isinstance(labels, Tensor) else None


RULES = (
    Rule("first", _first),
    Rule("last_token", _last_token, varies=True),
    Rule("shifted_labels", _shifted_labels, reads_labels=True, shifts=True),
    Rule("labels", _labels, reads_labels=True),
)


@dataclass
class Reading:
    """The rows that the loss reads of one forward pass.

    Attributes:
        rule: Finds them.
        inputs: What entered the model.
        config: The model's configuration.
        counted: What is known of the labels on the host, or None.
        unread: Names of the modules that left the other rows out.
        open: Rows of modules whose output still holds these rows only, by who is to make it whole.
    """

    rule: Rule
    inputs: Mapping[str, Any]
    config: Any
    counted: Counted | None = None
    unread: set[str] = field(default_factory=set)
    open: dict[Any, Rows] = field(default_factory=dict)
    _found: dict[tuple[int, int], Rows | None] = field(default_factory=dict)

    def rows(self, x: Any) -> Rows | None:
        """The rows of `x` that are read; None if that is not known of it, or leaves nothing worth leaving out."""
        if not isinstance(x, Tensor) or x.ndim != 3:
            return None
        samples, tokens = shape = tuple(x.shape[:2])
        if shape not in self._found:
            with torch.no_grad():
                self._found[shape] = self._find(samples, tokens, x.device)
        return self._found[shape]

    def _find(self, samples: int, tokens: int, device: torch.device) -> Rows | None:
        found = self.rule.find(Entrance(self.inputs, (samples, tokens), device, self.config))
        if found is None:
            return None
        found = found.to(device)
        if self.rule.reads_labels:
            return self._labelled(found, samples, tokens)
        if found.shape != (samples,) or samples > _MOST * samples * tokens:
            return None
        return Rows(torch.arange(samples, device=device) * tokens + found, (samples, tokens), each=found)

    def _labelled(self, labels: Tensor, samples: int, tokens: int) -> Rows | None:
        if tuple(labels.shape) != (samples, tokens) or labels.is_floating_point():
            return None
        ignored, known, given = (labels == IGNORED).flatten(), self.counted, self.inputs.get("labels")
        if known is not None and known.labels is given and known.version == given._version:
            # The device is not asked how many there are: nobody waits for it.
            index = ignored.to(torch.uint8).argsort(stable=True)[: known.items]
        else:
            index = ignored.logical_not().nonzero().squeeze(1)
        if not 0 < len(index) <= _MOST * len(ignored):
            return None
        return Rows(index, (samples, tokens), targets=labels.flatten().index_select(0, index)[None])

    @property
    def ran(self) -> tuple[frozenset[str], int] | None:
        """Which modules left rows out, and on how many they ran; None if none did."""
        count = next((len(rows.index) for rows in self._found.values() if rows is not None), 0)
        return (frozenset(self.unread), count) if self.unread else None
