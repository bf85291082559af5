"""The span as a part of the edge's model: an autograd function whose forward and backward run in the cloud."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...partition.body import bound_arguments, find_body
from ..blocks import Passage, find_cache, read_rows, write_rows
from ..wire.messages import Message
from .across_link import check_arguments
from .link import Link
from .local_adapters import Alive, LocalAdapters
from .planned_blocks import PlannedBlocks, planned_blocks
from .random_state import RandomState
from .remote_pass import CachedPasses, RemotePass
from .sample_cache import SampleCache


T = TypeVar("T")


@dataclass
class Head:
    """What the cloud is asked for where it has the head, and what it answered.

    Attributes:
        labels: Labels [batch, tokens], for a loss.
        items: What the summed loss is divided by.
        keep: Number of last tokens whose logits are wanted instead, 0 for all.
        out: The loss, or the logits.
    """

    labels: Tensor | None = None
    items: float = 1.0
    keep: int = 0
    out: Tensor | None = None


class RemoteSpan:
    """Runs the blocks that the cloud owns, in the place of the first of them.

    Args:
        link: The link to the cloud.
        adapters: The adapters of the span.
        span: Indices of its blocks.
        returns_tuple: Whether a block returns a tuple.
        in_flight: Parts that a batch is cut into, which are on their way at the same time.
        noise: Standard deviation of what is added to hidden states that leave the edge, in units of each token's own
            root mean square.
        cache: Keeps on disk what is the same in every epoch; None keeps nothing.

    Attributes:
        head: What the next pass asks of the head in the cloud; None where the head is here.
        active_modules: How many modules were trained in the last pass.
    """

    def __init__(
        self, link: Link, adapters: LocalAdapters, span: range, returns_tuple: bool = False, in_flight: int = 1,
        noise: float = 0.0, cache: SampleCache | None = None,
    ):  # fmt: skip
        self.link, self.adapters, self.span = link, adapters, span
        self.noise, self.cache = noise, cache
        self.head: Head | None = None
        self.active_modules = 0
        self._returns_tuple, self.in_flight = returns_tuple, in_flight
        self._mask: Tensor | None = None
        self._positions: Tensor | None = None
        self._has_cache = self._entered = False
        self._planned = PlannedBlocks()
        self._caches: weakref.WeakKeyDictionary[Cache, CachedPasses] = weakref.WeakKeyDictionary()
        self._threads = ThreadPoolExecutor(in_flight, "d2ft-in-flight") if in_flight > 1 else None
        self._handed: dict[str, Any] = {}
        self._version = 0
        link.install = lambda: self.adapters.copies(list(self._handed), self._version)

    def attach(self, model: nn.Module, stack: str) -> None:
        """Take the place of the skeleton blocks of a model."""
        blocks = model.get_submodule(stack)
        for index in self.span:
            blocks[index].run = self if index == self.span.start else Passage(index, self._returns_tuple).forward
        self._model = model
        self.body = find_body(model, stack)
        self.body.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.body.register_forward_hook(self._exit, always_call=True)

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Hidden states [batch, tokens, width] after the whole span, from the arguments of a block."""
        if not self._entered:
            raise ValueError("the model's blocks were run by something else than its forward; call that.")
        hidden = args[0] if args else kwargs.pop("hidden_states")
        cache = find_cache(args, kwargs)
        if cache is not None and not torch.is_grad_enabled():
            out = self._cached(hidden, cache)
        else:
            self._has_cache = cache is not None
            out = self._uncached(hidden)
            if cache is not None:  # its length is all that anybody reads in a pass of training
                self._check_begun(cache)
                write_rows(cache, self.span.start, hidden.shape[0], hidden.shape[1])
        if self.head is not None:
            self.head.out, out = out, hidden
        return (out,) if self._returns_tuple else out

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Note mask and positions as the model got them: what its blocks get is made of these, in the cloud too."""
        given = bound_arguments(type(module).forward, (module, *args), kwargs)
        check_arguments(given, module)
        if self.head is None and self.link.wish["with_head"]:
            raise ValueError(
                "hidden states are asked for, and the span ends with the head in the cloud: who computes a loss from "
                "them (TRL's trainers do) needs head='edge'."
            )
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise ValueError(
                f"attention_mask has {getattr(mask, 'ndim', 'no')} axes; give one of [batch, tokens], from which the "
                "cloud makes its own."
            )
        positions = given.get("position_ids")
        if positions is not None and positions.ndim != 2:
            raise ValueError(f"position_ids have {positions.ndim} axes; those of [1 or batch, tokens] cross.")
        self._mask, self._positions = mask, positions
        self._entered = True

    def _exit(self, module: nn.Module, args: tuple, out: Any) -> None:
        self._entered = False

    def _uncached(self, hidden: Tensor) -> Tensor:
        hidden = self._noised(hidden)
        self._planned = planned_blocks(self._model, self.span, *hidden.shape[:2])
        alive = self.adapters.alive(training=torch.is_grad_enabled())
        alive = self._planned.of(alive, self.adapters.block_of)
        self.active_modules = len(alive.trained)
        self._hand_over(alive)
        if torch.is_grad_enabled() and (hidden.requires_grad or alive.trained):
            if self.head is not None and self.head.labels is None:
                raise ValueError(
                    "labels are missing: the head in the cloud computes the loss, and no logits with gradients come "
                    "back; for a loss of another kind (label smoothing, compute_loss_func, TRL's) use head='edge'."
                )
            return _Span.apply(self, alive, hidden, *self.adapters.parameters(alive.trained))
        if self.cache is not None and self.head is None and not self.adapters.ever:
            return self.cache.outputs(hidden, self._mask, self._positions, lambda rows: self._run(hidden, rows, alive))
        return self._run(hidden, slice(None), alive)

    def _run(self, hidden: Tensor, rows: Any, alive: Alive) -> Tensor:
        """A pass of some rows that nobody trains."""
        with torch.no_grad():
            passes = self.begin(hidden.detach(), rows, alive, "infer", False)
            return self.joined(self.each(RemotePass.forward, passes), hidden)

    def begin(self, hidden: Tensor, rows: Any, alive: Alive, mode: str, needs_grad: bool) -> list[RemotePass]:
        """The passes of some rows of a batch, none of them sent yet."""
        indices = torch.arange(hidden.shape[0])[rows]
        random = RandomState(hidden)
        keeps = self.cache is not None and not needs_grad and self.head is None
        passes = []
        for part in indices.tensor_split(min(self.in_flight, len(indices))):
            request = self._request(hidden, part, alive, mode, {"hidden_gradient": needs_grad})
            one = RemotePass(self.link, self.adapters, alive, request, random)
            if keeps and (group := self.adapters.lowest_group()) is not None:
                self.cache.bind(one, group, hidden[part], _rows_of(self._mask, part), _rows_of(self._positions, part))
            passes.append(one)
        return passes

    def each(self, do: Callable[[RemotePass], T], passes: Sequence[RemotePass]) -> list[T]:
        """Do something with all passes, at the same time if there are several."""
        if self._threads is None or len(passes) == 1:
            return [do(one) for one in passes]
        grad = torch.is_grad_enabled()

        def run(one: RemotePass) -> T:
            with torch.set_grad_enabled(grad):
                return do(one)

        return list(self._threads.map(run, passes))

    def joined(self, outs: list[Tensor], hidden: Tensor) -> Tensor:
        """Outputs of the parts as one; losses of parts add up, since all were divided by the same number."""
        if outs[0].ndim == 0:
            return torch.stack(outs).sum(0).to(hidden.device)
        return torch.cat(outs).to(hidden.device, hidden.dtype)

    def _cached(self, hidden: Tensor, cache: Cache) -> Tensor:
        """More tokens for a key/value cache."""
        index, rows = self.span.start, hidden.shape[0]
        length = cache.get_seq_length(index)
        if cache not in self._caches:
            self._check_begun(cache)
        passes = self._caches.setdefault(cache, CachedPasses(self.link, self.adapters))
        self._planned = PlannedBlocks()
        alive = self.adapters.alive(training=False)
        self._hand_over(alive)
        with torch.no_grad():
            part = torch.arange(rows)
            fields = {"rows": read_rows(cache, index) if length else part.tolist(), "length": length}
            request = self._request(self._noised(hidden), part, alive, "cached", fields)
            out = self.joined([passes.forward(request, alive)], hidden)
        write_rows(cache, index, rows, hidden.shape[1])
        return out

    def _check_begun(self, cache: Cache) -> None:
        if cache.get_seq_length(self.span.start):
            raise ValueError(
                "past_key_values holds tokens of which the cloud has no keys and values that a pass with gradients, or "
                "after one of training, could go on from; begin with an empty cache, under torch.no_grad()."
            )

    def _request(self, hidden: Tensor, part: Tensor, alive: Alive, mode: str, fields: dict[str, Any]) -> Message:
        tensors = {"hidden": hidden.detach()[part.to(hidden.device)]}
        if self._mask is not None:
            tensors["mask"] = _rows_of(self._mask, part).bool()
        if self._positions is not None:
            tensors["positions"] = _rows_of(self._positions, part).long()
        fields = {"mode": mode, "alive": list(alive.exchanged), "has_cache": self._has_cache, **fields}
        if alive.copied:
            fields |= {"copies": list(alive.copied), "version": self._version}
        if mode == "train" and (frozen := [name for name in alive.exchanged if name not in alive.trained]):
            fields["frozen"] = frozen
        fields |= self._planned.fields()
        if self.head is not None:
            fields |= {"items": self.head.items, "keep": self.head.keep}
            if self.head.labels is not None:
                tensors["labels"] = self.head.labels[part.to(self.head.labels.device)].long()
        return Message("forward", fields, tensors)

    def _noised(self, hidden: Tensor) -> Tensor:
        if not self.noise:
            return hidden
        # Autograd sees that larger states get larger noise: adapters on the edge would else grow them to drown it.
        square = hidden.float().square().mean(-1, keepdim=True)
        scale = self.noise * square.clamp(min=torch.finfo(torch.float32).tiny).sqrt()
        return hidden + (scale * torch.randn_like(hidden, dtype=torch.float32)).to(hidden.dtype)

    def _hand_over(self, alive: Alive) -> None:
        """Let the cloud have copies of what was killed, before a pass counts on them."""
        for name in alive.trained:  # fused optimizers change weights without counting their versions
            self._handed.pop(name, None)
        wanted = {name: self.adapters.identity(name) for name in alive.copied}
        if not wanted.items() <= self._handed.items():
            self._handed, self._version = wanted, self._version + 1
            self.link.stale()


class _Span(torch.autograd.Function):
    """Gradients of hidden states and of the adapters' parameters, from the cloud and from here."""

    @staticmethod
    def forward(ctx, span, alive, hidden, *parameters):
        ctx.span, ctx.parameters, ctx.place = span, parameters, (hidden.device, hidden.dtype)
        ctx.passes = span.begin(hidden, slice(None), alive, "train", ctx.needs_input_grad[2])
        return span.joined(span.each(RemotePass.forward, ctx.passes), hidden)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        if not ctx.passes:
            raise RuntimeError("backward went through blocks in the cloud a second time; run the forward pass again.")
        cuts = [len(one.request.tensors["hidden"]) for one in ctx.passes]
        grads = grad.split(cuts) if grad.ndim else [grad] * len(cuts)
        pairs = dict(zip(map(id, ctx.passes), grads, strict=True))
        with _unhooked(ctx.parameters):
            found = ctx.span.each(lambda one: one.backward(pairs[id(one)]), ctx.passes)
        ctx.passes = []
        hidden = None
        if ctx.needs_input_grad[2]:
            hidden = torch.cat([part for part, _ in found]).to(*ctx.place)
        sums = []
        for parameter in ctx.parameters:
            parts = [of_part[id(parameter)] for _, of_part in found if id(parameter) in of_part]
            sums.append(sum(parts[1:], parts[0]) if parts else None)
        return None, None, hidden, *sums


@contextmanager
def _unhooked(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let hooks of parameters rest: they are for whole gradients, once, when autograd goes on with them."""
    hooks = [parameter._backward_hooks for parameter in parameters]
    for parameter in parameters:
        parameter._backward_hooks = None
    try:
        yield
    finally:
        for parameter, of_it in zip(parameters, hooks, strict=True):
            parameter._backward_hooks = of_it


def _rows_of(tensor: Tensor | None, part: Tensor) -> Tensor | None:
    """Some rows; a tensor that is the same for all rows has but one."""
    if tensor is None or tensor.shape[0] == 1:
        return tensor
    return tensor[part.to(tensor.device)]
