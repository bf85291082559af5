"""Finds out which rows of the last block a model's loss reads: by looking at gradients, and by trying."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..batches import some_samples
from ..costs import inference
from ..engine import Runtime
from ..engine.read_rows import IGNORED, RULES, Counted, Reading, Rule
from ..engine.unread_rows import UnreadRows
from ..partition import Partition, base_model
from ..processes import is_sharded


logger = logging.getLogger(__name__)

# By how much gradients may differ where the order of their sums does: relative to each, and to all together.
_TOLERANCES = {torch.float64: (1e-8, 1e-12), torch.float32: (2e-3, 1e-5)}
_COARSE = (5e-2, 1e-3)

_SAMPLES = 3


class UnreadRule:
    """The rule by which a model's loss reads rows of its last block, found at the first batch.

    Args:
        model: The adapted model.
        runtime: Its state.
        partition: Its subnets.
        enabled: Whether to look for one at all.

    Attributes:
        labels: Whether rules by labels are allowed: the logits of rows without a label are then of no use.
        head: Whether the language model's head may leave rows out, too: the outputs then hold no other logits.
        searched: Whether the model was looked at.
        found: What leaves rows out, or None.
    """

    def __init__(self, model: nn.Module, runtime: Runtime, partition: Partition, enabled: bool):
        self.model, self.runtime, self.partition = model, runtime, partition
        self.labels = self.head = False
        self.searched, self.found = not enabled, None
        if runtime.unread is not None:  # of a former planner
            runtime.unread.remove()

    def find(self, batch: dict[str, Any]) -> None:
        """Look at the model once, with the first samples of a batch that has labels. It is left as it was, but for
        the rule that holds."""
        if self.searched or not any(name in batch for name in ("labels", "shift_labels")):
            return
        self.searched = True
        if self.runtime.shortcut == "mean":
            logger.info("all rows of the last block run: shortcut='mean' looks at them.")
            return
        if is_sharded(self.model):
            logger.info("all rows of the last block run: what is spread over processes is not tried out in parts.")
            return
        try:
            with self._undisturbed():
                self.found = self._search(batch)
        except Exception as error:  # the batch is not what the model takes, or its loss is none of its own
            self._remove_trial()
            logger.info("all rows of the last block run: trying which of them the loss reads failed (%s).", error)
            return
        if self.found is None:
            logger.info("all rows of the last block run: no rule says which of them the loss reads.")
            return
        self.found.install()
        also = " and of the head" if self.found.head else ""
        logger.info("rows of the last block%s that no loss reads are left out: rule %r.", also, self.found.rule.name)

    def close(self) -> None:
        """Leave nothing on the model."""
        if self.found is not None and self.runtime.unread is self.found:
            self.found.remove()
        self.found = None

    @contextmanager
    def counting(self, batch: dict[str, Any], items: int | None, shifts: bool) -> Iterator[None]:
        """Around a forward pass on a batch whose labels were counted on the host, so that the device is not asked.

        Args:
            batch: The batch.
            items: Labels that carry loss, or None.
            shifts: Whether each row's first label was left out.
        """
        labels, rule = batch.get("labels"), self.found and self.found.rule
        counted = rule is not None and rule.reads_labels and rule.shifts == shifts and items is not None
        if not counted or not isinstance(labels, Tensor) or "shift_labels" in batch:
            yield
            return
        self.found.counted = Counted(labels, labels._version, items)
        try:
            yield
        finally:
            self.found.counted = None

    @contextmanager
    def _undisturbed(self) -> Iterator[None]:
        devices = {p.device for p in self.model.parameters() if p.device.type == "cuda"}
        with torch.random.fork_rng(devices=devices), torch.enable_grad(), inference(self.model):
            yield

    def _search(self, batch: dict[str, Any]) -> UnreadRows | None:
        base = base_model(self.model)
        device = next(base.parameters()).device
        for ragged in (True, False):  # some attention makes no number of rows that attend to nothing
            probe = send_to_device(probe_batch(base, batch, ragged), device)
            expected, read_BT = self._run(probe, look=True)
            if all(value.isfinite().all() for value in expected):
                break
        if read_BT is None:
            return None
        for rule in RULES:
            allowed = self.labels or not rule.reads_labels
            if not (allowed and _covers(rule, probe, base.config, read_BT) and self._ignores_others(rule, probe)):
                continue
            for head in (True, False) if rule.reads_labels and self.head else (False,):
                if self._holds(rule, head, probe, expected):
                    return UnreadRows(base, self.runtime, self.partition, rule, head)
        return None

    def _ignores_others(self, rule: Rule, batch: dict[str, Any]) -> bool:
        """Whether the loss stays if noise stands, after attention and after the last block, in the rows that a rule
        says are not read. Gradients do not show what was detached, nor in few digits what counts for little."""
        base, last = base_model(self.model), len(self.partition.blocks) - 1
        reading = Reading(rule, batch, base.config)
        noise = [0.0]

        def replace(module: nn.Module, args: tuple, output: Any) -> Any:
            hidden, *others = output if isinstance(output, tuple) else (output,)
            rows = reading.rows(hidden)
            if rows is None:
                return output
            drawn = torch.randn_like(hidden).flatten(0, 1) * noise[0]
            drawn = drawn.index_copy(0, rows.index, rows.take(hidden)[0]).view(hidden.shape)
            return (drawn, *others) if isinstance(output, tuple) else drawn

        rows = [branch.row for branch in self.partition.branches if branch.block == last and branch.row is not None]
        attention = [row.name for row in rows[:1]]
        modules = [base.get_submodule(name) for name in (*attention, self.partition.blocks[last])]
        handles = [module.register_forward_hook(replace) for module in modules]
        try:
            with torch.no_grad():
                losses = []
                for noise[0] in (0.0, 100.0):
                    losses.append(base(**batch).loss)
        finally:
            for handle in handles:
                handle.remove()
        quiet, noisy = losses
        exact = torch.finfo(quiet.dtype).eps > torch.finfo(torch.float32).eps
        return bool((quiet - noisy).abs() <= (0.0 if exact else 4 * torch.finfo(quiet.dtype).eps) * quiet.abs())

    def _holds(self, rule: Rule, head: bool, batch: dict[str, Any], expected: list[Tensor]) -> bool:
        """Whether loss and gradients stay what they are, and rows are really left out."""
        trial = UnreadRows(base_model(self.model), self.runtime, self.partition, rule, head)
        trial.probing = True
        trial.install()
        try:
            values, _ = self._run(batch)
            return trial.leaves_out and _agree(values, expected)
        except Exception:
            if not head:
                raise
            return False  # a loss that is not made by `loss_function` meets fewer logits than labels
        finally:
            trial.remove()

    def _remove_trial(self) -> None:
        if self.runtime.unread is not None:
            self.runtime.unread.remove()

    def _run(self, batch: dict[str, Any], look: bool = False) -> tuple[list[Tensor], Tensor | None]:
        """Loss and gradients; with `look`, whether each row that leaves the last block has a gradient, [B, T]."""
        seen: list[Tensor] = []

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            seen.append(hidden)

        block = base_model(self.model).get_submodule(self.partition.blocks[-1])
        handle = block.register_forward_hook(note) if look else None
        try:
            loss = base_model(self.model)(**batch).loss
        finally:
            if handle is not None:
                handle.remove()
        looks = [hidden for hidden in seen if hidden.requires_grad and hidden.ndim == 3]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(loss, [*looks, *parameters], allow_unused=True)
        of_rows, gradients = gradients[: len(looks)], gradients[len(looks) :]
        read = (of_rows[0] != 0).any(-1) if len(of_rows) == 1 and of_rows[0] is not None else None
        zeros = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        return [loss.detach(), *zeros], read


def _covers(rule: Rule, batch: dict[str, Any], config: Any, read_BT: Tensor) -> bool:
    """Whether the rows of a rule are all that have a gradient."""
    rows = Reading(rule, batch, config).rows(read_BT[..., None])
    if rows is None or (rule.varies and (rows.each == rows.each[0]).all()):
        return False
    unread = read_BT.flatten().clone()
    unread[rows.index] = False
    return not unread.any()


def _agree(values: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether a loss and gradients are the same but for the order of sums."""
    total = torch.stack([gradient.double().norm() for gradient in expected[1:]]).norm()
    for value, target in zip(values, expected, strict=True):
        relative, absolute = _TOLERANCES.get(target.dtype, _COARSE)
        difference, size = (value - target).double().norm(), target.double().norm()
        if not difference <= relative * size + absolute * (total if target.ndim else size):
            return False
    return True


def probe_batch(base: nn.Module, batch: dict[str, Any], ragged: bool = True) -> dict[str, Any]:
    """A few samples of a batch, made as various as batches may be: every other label ignored.

    Args:
        base: The transformers model.
        batch: A collated batch.
        ragged: Whether samples are padded on the left and on the right, too, where the batch is nothing but tokens.
    """
    takes = inspect.signature(type(base).forward).parameters
    batch = {name: value for name, value in batch.items() if name in takes or name == "shift_labels"}
    few = some_samples(batch, slice(_SAMPLES))
    few = {name: value.clone() if isinstance(value, Tensor) else value for name, value in few.items()}
    ids, mask = few.get("input_ids"), few.get("attention_mask")
    simple = few.keys() <= {"input_ids", "attention_mask", "token_type_ids", "labels"}
    simple = ragged and simple and all(isinstance(value, Tensor) for value in few.values())
    pad = getattr(base.config.get_text_config(), "pad_token_id", None)
    if simple and pad is not None and ids is not None and mask is not None and mask.shape == ids.shape:
        few = _ragged({name: value[torch.arange(_SAMPLES) % len(ids)] for name, value in few.items()}, pad)
    for name in ("labels", "shift_labels"):
        labels = few.get(name)
        if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
            _ignore_some(labels)
    return few


def _ragged(few: dict[str, Tensor], pad: int) -> dict[str, Tensor]:
    """Padding after the second sample, and before the third."""
    fill, mask = {"input_ids": pad, "labels": IGNORED}, few["attention_mask"].bool()
    for sample, left in ((1, False), (2, True)):
        real = mask[sample]
        kept = int(real.sum()) - int(real.sum()) // 3
        for name, value in few.items():
            if value.shape == mask.shape:
                row, tokens = value[sample][real][:kept], value.shape[1]
                value[sample] = fill.get(name, 0)
                value[sample, slice(tokens - kept, None) if left else slice(kept)] = row
    return few


def _ignore_some(labels: Tensor) -> None:
    """Ignore every other label in place, where any is left."""
    some = labels.clone()
    some[:, ::2] = IGNORED
    if (some[:, 1:] != IGNORED).any():
        labels.copy_(some)
