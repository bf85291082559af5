"""The blocks that the cloud runs for an edge, and the exchanges on the way through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..blocks import Passage, plain_facts
from ..wire.messages import Message, WireError, numbered
from .base_model import BaseModel, Group


@dataclass
class Pass:
    """What one micro-batch asks of the span.

    Attributes:
        alive: Projections whose adapters live on the edge and take part, by path.
        frozen: Those of them that do not learn: where no other one is below, backward need not go there.
        copies: Frozen adapters that take part here, A [r, in] and B [out, r] by path.
        factors: Frozen A and B of projections that cross at width r, by path; empty where whole hidden states cross.
        skipped: Indices of blocks that only the residual stream passes.
        constant: Indices of blocks whose contribution is a constant for autograd.
        ask: Sends a message to the edge and returns its answer.
        tell: Sends a message to the edge.
        given: Answers that came with the question, by index of the group: its input is known to the edge.
        pending: Answers of the current group that were not used yet, by path.
    """

    alive: frozenset[str]
    frozen: frozenset[str]
    copies: dict[str, tuple[Tensor, Tensor]]
    factors: dict[str, tuple[Tensor, Tensor]]
    skipped: frozenset[int]
    constant: frozenset[int]
    ask: Callable[[Message], Message]
    tell: Callable[[Message], None]
    given: dict[int, list[Tensor]] = field(default_factory=dict)
    pending: dict[str, Tensor] = field(default_factory=dict)


class SpanModel:
    """A copy of the base model's modules, its tensors shared, cut to a span; runs one micro-batch at a time.

    Args:
        base: The base model.
        span: Indices of the blocks that run here.
        targets: Paths of the projections that may have an adapter.
    """

    def __init__(self, base: BaseModel, span: range, targets: frozenset[str]):
        self.base, self.span = base, span
        self.model = base.copy()
        self.now: Pass | None = None
        self._hidden: Tensor | None = None
        self._out: Tensor | None = None
        blocks = self.model.get_submodule(base.stack)
        for index in range(len(blocks)):
            passage = Passage(index, base.returns_tuple, plain_facts(blocks[index]))
            if index not in span:
                blocks[index] = passage
            else:
                blocks[index].forward = _Planned(self, blocks[index], passage)
        blocks[span.start].register_forward_pre_hook(self._enter, with_kwargs=True)
        blocks[span.stop - 1].register_forward_hook(self._leave)
        for number, group in enumerate(base.groups):
            if group.block not in span:
                continue
            for name in targets.intersection(group.names):
                self.model.get_submodule(name).register_forward_hook(_Adapted(self, number, group, name))

    def run(self, now: Pass, hidden: Tensor, cache: Cache | None = None, **arguments: Any) -> Tensor:
        """Hidden states [batch, tokens, width] after the span, with the graph that backward needs.

        Args:
            now: The micro-batch's pass.
            hidden: Hidden states before the span.
            cache: Key/value cache of earlier tokens.
            arguments: ``attention_mask`` [batch, tokens], ``position_ids``, as the model's body takes them.
        """
        self._run(self.base.body(self.model), now, hidden, cache, arguments)
        return self._taken()

    def run_head(self, now: Pass, hidden: Tensor, labels: Tensor, items: int, **arguments: Any) -> Tensor:
        """The loss of a span that ends with the model's head, summed over tokens and divided by `items`.

        Args:
            now, hidden, arguments: See `run`.
            labels: Labels as the model's own loss takes them.
            items: What the sum is divided by.
        """
        head = {"labels": labels, "num_items_in_batch": items}
        outputs = self._run(self.model, now, hidden, None, {**arguments, **head})
        self._taken()
        return outputs.loss

    def run_logits(self, now: Pass, hidden: Tensor, cache: Cache | None, keep: int, **arguments: Any) -> Tensor:
        """Logits [batch, keep, vocabulary] of the last `keep` tokens (all of them for 0) of a span that ends with the
        model's head."""
        outputs = self._run(self.model, now, hidden, cache, {**arguments, "logits_to_keep": keep})
        self._taken()
        return outputs.logits

    def _run(self, module: nn.Module, now: Pass, hidden: Tensor, cache: Cache | None, arguments: dict) -> Any:
        self.now, self._hidden = now, hidden
        known = {name: value for name, value in arguments.items() if value is not None}
        if cache is not None:
            known["past_key_values"] = cache
        if not self.base.takes_pixels:
            known["use_cache"] = cache is not None
        try:
            return module(**self.base.dummy_inputs(hidden), **known)
        finally:
            self.now = self._hidden = None

    def _taken(self) -> Tensor:
        out, self._out = self._out, None
        return out

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if args:
            return (self._hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._hidden}

    def _leave(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._out = out[0] if type(out) is tuple else out


class _Planned:
    """A block's forward, in full, as a constant for autograd, or only the residual stream, as the pass says."""

    def __init__(self, span: SpanModel, block: nn.Module, passage: Passage):
        self.span, self.block, self.passage = span, block, passage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        now, index = self.span.now, self.passage.index
        if index in now.skipped:
            return self.passage(*args, **kwargs)
        if index not in now.constant or not torch.is_grad_enabled():
            return type(self.block).forward(self.block, *args, **kwargs)
        with torch.no_grad():
            out = type(self.block).forward(self.block, *args, **kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        value = _Through.apply(hidden, out[0] if type(out) is tuple else out)
        return (value, *out[1:]) if type(out) is tuple else value


class _Through(torch.autograd.Function):
    """The output of a block whose own contribution has no gradient: what comes back passes on to its input."""

    @staticmethod
    def forward(ctx, hidden, out):
        return out.view_as(out)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Adapted:
    """Adds to a projection's output what its adapter makes of its input, wherever that adapter is."""

    def __init__(self, span: SpanModel, number: int, group: Group, name: str):
        self.span, self.number, self.group, self.name = span, number, group, name

    def __call__(self, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        now = self.span.now
        if self.name in now.copies:
            a, b = now.copies[self.name]
            out = out + (args[0] @ a.T) @ b.T
        if self.name in now.alive:
            if self.name not in now.pending:
                self._exchange(now, args[0])
            out = out + now.pending.pop(self.name)
        return out

    def _exchange(self, now: Pass, x: Tensor) -> None:
        """One exchange for all projections of the group that are alive."""
        rank = now.factors[self.name][0].shape[0] if now.factors else None
        widths = answer_widths(self.group, now.alive, rank)
        inputs = [x @ now.factors[name][0].T for name in widths] if now.factors else [x]
        learns = torch.is_grad_enabled() and not now.frozen.issuperset(widths)
        anchor = x.new_zeros((), requires_grad=learns)
        answers = _Exchange.apply(now, self.number, _answers(now, self.number, inputs, widths), anchor, *inputs)
        for name, answer in zip(widths, answers, strict=True):
            now.pending[name] = answer @ now.factors[name][1].T if now.factors else answer


class _Exchange(torch.autograd.Function):
    """What the adapters of a group make of their input, computed by the edge; backward likewise.

    The anchor makes backward pass here even where the input needs no gradient: adapters that learn do. The answers are
    there already: a forward that raises keeps the graph before it for ever.
    """

    @staticmethod
    def forward(ctx, now, number, answers, anchor, *inputs):
        ctx.now, ctx.number, ctx.shapes = now, number, [value.shape for value in inputs]
        return tuple(answers)

    @staticmethod
    def backward(ctx, *grads):
        needed = any(ctx.needs_input_grad[4:])
        question = Message("gradient", {"group": ctx.number, "answer": needed}, numbered(grads))
        if not needed:
            ctx.now.tell(question)
            return None, None, None, None, *[None] * len(ctx.shapes)
        answers = list(ctx.now.ask(question).tensors.values())
        return None, None, None, None, *checked(answers, ctx.shapes, grads[0])


def answer_widths(group: Group, alive: frozenset[str], rank: int | None) -> dict[str, int]:
    """Widths of the answers of a group, by path of the projection."""
    widths = dict(zip(group.names, group.out_features, strict=True))
    return {name: width if rank is None else rank for name, width in widths.items() if name in alive}


def _answers(now: Pass, number: int, inputs: list[Tensor], widths: dict[str, int]) -> list[Tensor]:
    """Answers of a group: those that came with the question, or what the edge says now."""
    answers = now.given.pop(number, None)
    if answers is None:
        question = Message("exchange", {"group": number}, numbered(inputs))
        answers = list(now.ask(question).tensors.values())
    return checked(answers, [(*inputs[0].shape[:-1], width) for width in widths.values()], inputs[0])


def checked(tensors: list[Tensor], shapes: list[Any], like: Tensor) -> list[Tensor]:
    """Tensors that came in, on the device and in the type of `like`, if they have the shapes that they must have.

    Raises:
        WireError: If not.
    """
    found = [tuple(tensor.shape) for tensor in tensors]
    if found != [tuple(shape) for shape in shapes] or not all(tensor.is_floating_point() for tensor in tensors):
        raise WireError(f"an answer holds tensors of shapes {found[:4]}, not {[tuple(shape) for shape in shapes][:4]}")
    return [tensor.to(like.device, like.dtype) for tensor in tensors]
