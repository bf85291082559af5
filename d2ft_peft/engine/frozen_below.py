"""Below the lowest block that learns from a micro-batch nothing is kept for a backward pass, and none runs.

Autograd does so by itself, unless something made the embeddings' output require a gradient:
``enable_input_require_grads``, which PEFT, TRL and the Trainer call for gradient checkpointing, does. The gradients of
all parameters are the same without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..partition import Partition
from .frozen_cache import map_tensors
from .intercept import Intercept
from .plan import Plan
from .runtime import Runtime


class BlockForward(Intercept):
    """Runs a block without autograd where nothing in it, or below it, learns; cuts the graph where learning begins.

    Attributes:
        index: Index of the block.
    """

    def __init__(
        self,
        module: nn.Module,
        runtime: Runtime,
        index: int,
        branches: dict[int, tuple[nn.Module, Sequence[nn.Module]]],
    ):
        """`branches`: region and projections (whole ones too) of each branch of the block, by its index."""
        super().__init__(module, runtime)
        self.index = index
        self._branches = {number: (region, _parts(modules)) for number, (region, modules) in branches.items()}
        of_branches = {id(part) for _, parts in self._branches.values() for part in parts}
        self._rest = [part for part in module.modules() if id(part) not in of_branches]
        self._entered = False

    def learns(self, plan: Plan | None) -> bool:
        """Whether a micro-batch can change anything of the block under `plan`; None stands for all FULL."""
        if _trains(self._rest):
            return True
        for number, (region, parts) in self._branches.items():
            cell = plan.cells[number] if plan is not None and region.training else None
            if (cell is None or cell.full) and _trains(parts):
                return True
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.around(self.original, args, kwargs)

    def around(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the block by `run`, its own forward or a checkpoint of it."""
        if self._is_within():
            return run(*args, **kwargs)
        below, args, kwargs = self._enter(args, kwargs)
        if below is None:
            return self.runtime.cache.left_out(self.index, args, kwargs)
        if not below:
            return self._run(run, args, kwargs)
        # The block's regions follow the plan all the same: the pass is one that is trained, only not here.
        self.runtime.grad_at_entry = True
        try:
            with torch.no_grad():
                output = self._run(run, args, kwargs)
        finally:
            self.runtime.grad_at_entry = None
        if self.runtime.cache is not None:
            self.runtime.cache.ran(self.index, output)
        return output

    def _run(self, run: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        self._entered = True
        try:
            return run(*args, **kwargs)
        finally:
            self._entered = False

    @torch.compiler.disable
    def _is_within(self) -> bool:
        """Whether the block runs outside of a plan, or what is to be done was done around its checkpoint."""
        runtime = self.runtime
        return self._entered or runtime.grad_at_entry is not None or runtime.plan is None or not runtime.trains

    @torch.compiler.disable
    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> tuple[bool | None, tuple, dict[str, Any]]:
        """Whether the block is below all that learns, None if it does not run at all; and its arguments."""
        runtime = self.runtime
        if self.index == 0:
            runtime.learns_below = False
        if runtime.learns_below or self.index > runtime.cut:
            return False, args, kwargs
        tracked = [value for value in tensors_in((args, kwargs)) if value.requires_grad]
        if tracked and _reach_what_learns(tracked, runtime.embedded):
            runtime.learns_below = True
            return False, args, kwargs
        if self.index == runtime.cut and tracked:
            args, kwargs = map_tensors(Tensor.detach, (args, kwargs))
        below: bool | None = self.index < runtime.cut
        if runtime.cache is not None:
            left_out, args, kwargs = runtime.cache.enter(self.index, args, kwargs)
            below = None if left_out else below
        return below, args, kwargs


class NoteEmbedded:
    """Forward hook of the input embeddings: what they return has no gradient that anybody asked for, even where it is
    made to require one.

    Args:
        runtime: Where it is noted.
    """

    def __init__(self, runtime: Runtime):
        self.runtime = runtime

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        runtime = self.runtime
        if isinstance(output, Tensor) and runtime.plan is not None and runtime.trains:
            runtime.embedded.append(output)


def install_entries(model: nn.Module, runtime: Runtime, partition: Partition) -> None:
    """Put a `BlockForward` before every block, and note what the input embeddings return."""
    for index, block in enumerate(runtime.blocks):
        branches = {
            number: (
                model.get_submodule(branch.region),
                [model.get_submodule(name) for name in branch.targets],
            )
            for number, branch in enumerate(partition.branches)
            if branch.block == index
        }
        entry = BlockForward(block, runtime, index, branches)
        entry.install()
        runtime.entries.append(entry)
    for embeddings in _input_embeddings(model):
        embeddings.register_forward_hook(NoteEmbedded(runtime))


def _input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules whose output `PreTrainedModel.enable_input_require_grads` makes require a gradient."""
    found = {}
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                embeddings = module.get_input_embeddings()
            except NotImplementedError:
                continue
            if isinstance(embeddings, nn.Module):
                found[id(embeddings)] = embeddings
    return list(found.values())


def _reach_what_learns(tracked: list[Tensor], embedded: list[Tensor]) -> bool:
    """Whether a gradient of these tensors would arrive anywhere but at the output of frozen embeddings."""
    leaves = [value for value in tracked if value.grad_fn is None]
    nodes, seen = [value.grad_fn for value in tracked if value.grad_fn is not None], set()
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        nodes += [following for following, _ in node.next_functions if following is not None]
    known = {id(value) for value in embedded if not value._backward_hooks}
    return any(id(leaf) not in known for leaf in leaves)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, such as the arguments of a block."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for value in values:
            yield from tensors_in(value)
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))


def _parts(modules: Iterable[nn.Module]) -> list[nn.Module]:
    return [part for module in modules for part in module.modules()]


def _trains(parts: Iterable[nn.Module]) -> bool:
    return any(p is not None and p.requires_grad for part in parts for p in part._parameters.values())
