"""Rows that no loss reads are left out of the last block and of the language model's head.

The blocks' own code needs all rows, so shapes stay: rows are gathered where expensive modules are entered (query and
output projections, FFN, head), and put at their places in zeros where they are left. Keys and values are computed of
all rows. A row that is not read holds what nobody looks at, and its gradient is zero.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..partition import Branch, Partition
from .intercept import Intercept
from .read_rows import READ_BY_RULES, Counted, Reading, Rows, Rule
from .runtime import Runtime


_HEAD = "head"


class UnreadRows:
    """Leaves out the rows that a rule says are not read, in forward passes that are to be trained.

    It applies where every head of a branch is FULL; elsewhere the plan is followed as ever.

    Args:
        base: The transformers model.
        runtime: Its state.
        partition: Its subnets.
        rule: Which rows are read.
        head: Whether the language model's head leaves rows out, too: `loss_function` then gets the logits [1, M, V] of
            the rows that are read, and so does whoever looks at the outputs.

    Attributes:
        probing: Whether it applies to every forward pass, plan or not: so it is tried.
        counted: What is known of the next batch's labels on the host.
        leaves_out: Whether the last forward pass left rows out, of the head as well if it was to.
    """

    def __init__(self, base: nn.Module, runtime: Runtime, partition: Partition, rule: Rule, head: bool):
        self.base, self.runtime, self.partition, self.rule, self.head = base, runtime, partition, rule, head
        self.probing = self.leaves_out = False
        self.counted: Counted | None = None
        self._names = list(inspect.signature(type(base).forward).parameters)[1:]
        self._interceptions: list[Intercept] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._loss: LossOfRows | None = None
        self._head_name: str | None = None

    def install(self) -> None:
        """Take the place of what the last block, and the head, do."""
        last = len(self.partition.blocks) - 1
        for index, branch in enumerate(self.partition.branches):
            if branch.block == last:
                self._intercept(branch, index)
        if self.head:
            self._intercept_head()
        for interception in self._interceptions:
            interception.install()
        self._handles = [
            self.base.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.base.register_forward_hook(self._leave, always_call=True),
        ]
        self.runtime.unread = self

    def remove(self) -> None:
        """Leave the model as it was."""
        for interception in reversed(self._interceptions):
            interception.remove()
        for handle in self._handles:
            handle.remove()
        if self._loss is not None:
            self._loss.remove()
        self._interceptions, self._handles, self._loss = [], [], None
        self.runtime.unread = self.runtime.reading = None

    def _intercept(self, branch: Branch, index: int) -> None:
        if branch.row is None:  # nobody knows which of a whole block's rows read others
            return
        region = self.base.get_submodule(branch.region)

        def rows(name: str, **kwargs: Any) -> RowsForward:
            return RowsForward(self.base.get_submodule(name), self.runtime, name, index, region, **kwargs)

        if branch.name != "ffn":
            # The query comes first; a model in which it does not is found out.
            if len(branch.columns) > 1 and branch.columns[0].layout.parts == 1:
                self._interceptions.append(rows(branch.columns[0].name))
            self._interceptions += [rows(branch.row.name), AttentionOfRows(region, self.runtime, branch.region, index)]
        elif branch.row_inside and branch.residual:  # the region is given more than what its projections read
            columns = [rows(column.name, puts=False) for column in branch.columns]
            self._interceptions += [*columns, rows(branch.row.name, takes=False)]
        elif branch.row_inside:
            self._interceptions.append(rows(branch.region, covers=branch.projections))
        else:
            self._interceptions += [
                rows(branch.region, puts=False, covers=branch.columns),
                rows(branch.row.name, takes=False),
            ]

    def _intercept_head(self) -> None:
        module = self.base.get_output_embeddings()
        name = next((name for name, other in self.base.named_modules() if other is module), None)
        if module is None or name is None:
            return
        self._head_name = name
        self._interceptions.append(RowsForward(module, self.runtime, name, _HEAD, None, puts=False))
        self._loss = LossOfRows(self.base, self.runtime)

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        runtime, inputs = self.runtime, {**dict(zip(self._names, args, strict=False)), **kwargs}
        planned = runtime.trains and runtime.plan is not None
        applies = (planned or self.probing) and not self._shows_hidden_states(inputs)
        seen = {name: inputs.get(name) for name in READ_BY_RULES}
        runtime.reading = Reading(self.rule, seen, module.config, self.counted) if applies else None

    def _shows_hidden_states(self, inputs: dict[str, Any]) -> bool:
        """Whether the caller, or a loss that balances experts, looks at more than the logits."""
        names = ("output_hidden_states", "output_attentions", "output_router_logits")
        config = self.base.config
        return any(getattr(config, n, None) if inputs.get(n) is None else inputs[n] for n in names)

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        reading, self.runtime.reading = self.runtime.reading, None
        unread = reading.unread if reading is not None else set()
        self.leaves_out = bool(unread) and (not self.head or self._head_name in unread)


class RowsForward(Intercept):
    """Runs a module on the rows that are read.

    Args:
        module, runtime: See `Intercept`.
        name: Path of the module.
        index: Index of its branch, or what stands for the head.
        region: The branch's region, whose mode says whether the plan applies; None for the head.
        takes: Whether rows are gathered before it; else it meets what another module left open.
        puts: Whether its output is made whole; else that is left to a later one.
        covers: Projections within the module.
    """

    def __init__(
        self, module: nn.Module, runtime: Runtime, name: str, index: Any, region: nn.Module | None,
        takes: bool = True, puts: bool = True, covers: tuple = (),
    ):  # fmt: skip
        super().__init__(module, runtime)
        self.index, self.region, self.takes, self.puts = index, region, takes, puts
        self.names = [projection.name for projection in covers] or [name]

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reading = self.runtime.reading
        if reading is None or not args:
            return self.original(*args, **kwargs)
        x, *others = args
        if self.takes:
            rows = reading.rows(x) if _is_whole(self.runtime, self.index, self.region) else None
        else:
            rows = reading.open.pop(self.index, None)
        if rows is None:
            return self.original(*args, **kwargs)
        reading.unread.update(self.names)
        out = self.original(rows.take(x) if self.takes else x, *others, **kwargs)
        if self.puts:
            return rows.put(out)
        reading.open[self.index] = rows
        return out


class AttentionOfRows(Intercept):
    """Attends with the one query of each sample that is read, where scaled_dot_product_attention does it."""

    def __init__(self, module: nn.Module, runtime: Runtime, name: str, index: int):
        super().__init__(module, runtime)
        self.name, self.index = name, index

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reading = self.runtime.reading
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = reading.rows(x) if reading and _is_whole(self.runtime, self.index, self.module) else None
        if rows is None or rows.each is None:
            return self.original(*args, **kwargs)
        with _OneQuery(rows, lambda: reading.unread.add(self.name)):
            return self.original(*args, **kwargs)


class _OneQuery(TorchFunctionMode):
    def __init__(self, rows: Rows, note: Callable[[], None]):
        super().__init__()
        self.rows, self.note = rows, note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        attends = func is F.scaled_dot_product_attention
        return (self._attend if attends else func)(*args, **(kwargs or {}))

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs):
        samples, tokens = self.rows.shape
        fits = query.ndim == 4 and query.shape[::2] == key.shape[::2] == (samples, tokens)
        if not fits or (attn_mask is not None and attn_mask.ndim != 4):
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **kwargs)
        self.note()
        at = self.rows.each.view(-1, 1, 1, 1)
        if is_causal:
            attn_mask = torch.arange(tokens, device=at.device) <= at
        elif attn_mask is not None and attn_mask.shape[2] > 1:
            attn_mask = attn_mask.expand(samples, -1, -1, -1)
            attn_mask = attn_mask.gather(2, at.expand(-1, attn_mask.shape[1], 1, attn_mask.shape[3]))
        one = query.gather(2, at.expand(-1, query.shape[1], 1, query.shape[3]))
        out = F.scaled_dot_product_attention(one, key, value, attn_mask, dropout_p, False, **kwargs)
        whole = out.new_zeros(*query.shape[:3], out.shape[3])
        return whole.scatter(2, at.expand(-1, *out.shape[1:]), out)


class LossOfRows:
    """Stands in for a model's `loss_function`: takes the logits of the rows that are read, with their labels."""

    def __init__(self, base: nn.Module, runtime: Runtime):
        self.base, self.runtime, self.own = base, runtime, base.loss_function
        self._previous = base.__dict__.get("_loss_function")
        base.loss_function = self

    def remove(self) -> None:
        """Give the model its own loss function back."""
        if self.base.__dict__.get("_loss_function") is not self:
            return  # somebody gave the model another one
        if self._previous is None:
            del self.base._loss_function
        else:
            self.base._loss_function = self._previous

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reading = self.runtime.reading
        rows = reading and reading.open.pop(_HEAD, None)
        if rows is None:
            return self.own(*args, **kwargs)
        if "labels" in kwargs:
            kwargs["labels"] = rows.targets
        else:
            args = (args[0], rows.targets, *args[2:])
        if reading.rule.shifts:
            kwargs["shift_labels"] = rows.targets
        return self.own(*args, **kwargs)


def _is_whole(runtime: Runtime, index: Any, region: nn.Module | None) -> bool:
    """Whether every head of a branch is FULL."""
    return region is None or runtime.plan is None or not region.training or runtime.plan.cells[index] is None
