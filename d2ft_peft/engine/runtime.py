"""The one mutable object that all D2FT modules of a model share: the current plan, and what was executed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..partition import Gauge, Partition
from .checkpointing import bind_checkpointing
from .feature_mean import FeatureMean
from .plan import Cell, Heads, Plan
from .read_rows import Reading
from .row_counts import RowCounts
from .token_choice import TokenChoice, TokenPass


if TYPE_CHECKING:
    from .unread_rows import UnreadRows


@dataclass
class Run:
    """One pass through a region: what its projections compute.

    Attributes:
        heads: Heads that run: the FULL or the FORWARD_ONLY ones.
        with_bias: Whether this pass adds what belongs to no head: the row-parallel bias and the skipped heads' mean.
        scale: Factor on the heads' contributions (``shortcut="rescale"``).
        skipped: Heads whose mean stands in for them (``shortcut="mean"``).
        x: Input of the column-parallel projections, once the first has met it.
        outputs: What they computed together and was not asked for yet, by projection.
    """

    heads: Heads
    with_bias: bool = True
    scale: float = 1.0
    skipped: Heads = Heads()
    x: Tensor | None = None
    outputs: dict[Any, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Follow:
    """What a row-parallel projection outside of its region has yet to do.

    Attributes:
        full: Pass over the FULL heads; its input is what the region returned. None if there are none.
        forward_only: Pass over the FORWARD_ONLY heads, or None.
        output: Output of the region's FORWARD_ONLY pass, or None where it follows that of the FULL pass on
            the last axis.
        nothing: Pass over no head, if none is active.
        returned: What the region returned, and its version: the row-parallel projection must meet it untouched. None
            where something that works feature by feature lies between.
    """

    full: Run | None
    forward_only: Run | None
    output: Tensor | None
    nothing: Run | None
    returned: tuple[Tensor, int] | None = None


class Runtime:
    """What the D2FT modules of one model share while they run.

    A plan applies to forward passes that are to be trained: in train mode, with gradients enabled where the model, or
    the checkpointing of a block, is entered. Every other forward pass within a micro-batch (generation, evaluation, the
    reference pass of a preference loss) runs the whole model, with its cache, and leaves no trace here. A region that
    is itself in eval mode while its model trains runs whole, and is reported as FULL.

    Attributes:
        partitions: Partition of each adapter, by adapter name.
        shortcut: What stands in for skipped heads: ``"zero"``, ``"mean"`` or ``"rescale"``.
        plan: The current micro-batch's plan, or None outside of a micro-batch.
        run: The pass of the region that is running, or None outside of one.
        follow: What row-parallel projections outside of their regions have yet to do, by branch.
        executed: What each branch did in the planned forward passes of the last micro-batch, by branch; None for all
            FULL.
        passes: Samples and tokens per sample at the first region, one entry for each planned forward pass of the
            micro-batch, and the tokens that passed the middle blocks where they were chosen; recomputation is no pass
            of its own. Of a model with several stacks, what each of them saw (`RowCounts`).
        gauges: Places at which rows are counted.
        readings: Which rows their loss reads, by forward pass; None where all are taken to be read.
        reading: The same of the forward pass that is running.
        unread: Leaves out the rows that no loss reads, or None.
        tokens: How the current micro-batch's tokens are chosen, or None if every block sees all of them.
        token_pass: Which tokens the running forward pass, or the one that is recomputed, has chosen.
        model: The model whose train mode says whether a forward pass is to be trained.
        grad_at_entry: Whether gradients were enabled where the checkpointing of the running block was entered, or None
            outside of one: reentrant checkpointing runs the block itself without.
        cut: Index of the lowest block that learns under the plan; their number if none does.
        learns_below: Whether anything below the blocks was found to learn in the running forward pass.
        embedded: What the input embeddings returned in the planned forward passes of the micro-batch.
        cache: Keeps what the frozen lower blocks return (`FrozenCache`), or None.
        driven: Whether a D2FT trainer drives the model, so that a forward without a plan is an error.
        touch_gradients: Whether every trainable parameter must receive a gradient (DistributedDataParallel).
        after_backward: Called when this process is through with the backward pass of a micro-batch, before it waits
            for the gradients of others.
    """

    def __init__(self) -> None:
        self.partitions: dict[str, Partition] = {}
        self.shortcut = "zero"
        self.plan: Plan | None = None
        self.run: Run | None = None
        self.follow: dict[int, Follow] = {}
        self.executed: dict[int, Cell | None] = {}
        self.readings: list[Reading | None] = []
        self.reading: Reading | None = None
        self.unread: UnreadRows | None = None
        self.passes: list[Any] = []
        self.gauges: tuple[Gauge, ...] = (Gauge(0, 0),)
        self.tokens: TokenChoice | None = None
        self.token_pass: TokenPass | None = None
        self.model: nn.Module | None = None
        self.grad_at_entry: bool | None = None
        self.driven = False
        self.touch_gradients = False
        self.after_backward: Callable[[], None] | None = None
        self.means: dict[int, FeatureMean] = {}
        self.blocks: list[nn.Module] = []
        self.entries: list[Any] = []  # a `BlockForward` for each block
        self.cut = 0
        self.learns_below = False
        self.embedded: list[Tensor] = []
        self.cache: Any = None
        self._warned = False

    @contextmanager
    def use(self, plan: Plan, tokens: TokenChoice | None = None) -> Iterator[None]:
        """Run one micro-batch, forward and backward, under `plan`, on chosen tokens where `tokens` says how."""
        previous = self.plan, self.tokens
        for mean in self.means.values():
            mean.commit()
        self.executed.clear()
        self.passes.clear()
        self.readings.clear()
        if self.cache is not None:
            self.cache.passes.clear()
        self.follow.clear()
        self.plan, self.tokens, self.token_pass = plan, tokens, None
        self.cut = next((entry.index for entry in self.entries if entry.learns(plan)), len(self.entries))
        for block in self.blocks:
            bind_checkpointing(block, self)
        try:
            yield
        except BaseException:
            # What a broken pass showed is no mean of a micro-batch.
            for mean in self.means.values():
                mean.discard()
            raise
        finally:
            self.plan, self.tokens = previous
            self.token_pass = None
            self.follow.clear()
            self.embedded.clear()

    def count_rows(self, place: int, sequences: int | None, tokens: int) -> None:
        """A planned forward pass comes by a gauge with so many sequences, and tokens of each; see `RowCounts.add`."""
        several = len(self.gauges) > 1
        if not several or not self.passes or self.passes[-1].is_over_before(place):
            self.passes.append(RowCounts(self.gauges) if several else (sequences, tokens))
            self.readings.append(self.reading)
            self.token_pass = None if self.tokens is None else self.tokens.new_pass()
        if several:
            self.passes[-1].add(place, sequences, tokens)

    def note_kept(self, kept: int) -> None:
        """So many tokens of a sample pass a middle block."""
        self.passes[-1] = (*self.passes[-1][:2], kept)

    @property
    def trains(self) -> bool:
        """Whether the running forward pass is to be trained, and so follows the plan."""
        grad = torch.is_grad_enabled() if self.grad_at_entry is None else self.grad_at_entry
        return grad and (self.model is None or self.model.training)

    def warn_unplanned(self) -> None:
        """A training forward without a plan must not pass in silence: D2FT would silently do nothing.

        Raises:
            RuntimeError: If a D2FT trainer drives the model.
        """
        if self.driven:
            raise RuntimeError(
                "a D2FT model ran a training forward without a plan although a D2FT trainer drives it: run it under "
                "the trainer's training_step, or call model.eval() first."
            )
        if not self._warned:
            self._warned = True
            warnings.warn(
                "a D2FT model runs a training forward without a schedule: every subnet is FULL and nothing is saved. "
                "Train with D2FTTrainer, D2FTCallback or D2FTPlanner.micro_batch.",
                stacklevel=3,
            )
