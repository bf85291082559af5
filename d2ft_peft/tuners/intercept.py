"""Forward of regions and projections under a plan, put before the modules' own forward.

An interception is an attribute of the module instance: state-dict keys, class and parameters stay as they are, and it
travels with deepcopy and pickle, because it holds the module and the runtime by reference.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ..partition import Branch, Projection
from .layer import D2FTLayer
from .plan import Cell, Heads
from .runtime import FeatureMean, Follow, Run, Runtime
from .subset_linear import HeadAxis, subset_linear


class Intercept:
    """Stands before the forward of one module.

    Attributes:
        module: The module.
        runtime: The state shared by all D2FT modules of the model.
    """

    def __init__(self, module: nn.Module, runtime: Runtime):
        self.module, self.runtime = module, runtime
        self._previous = None

    def install(self) -> None:
        """Take the place of the module's forward."""
        self._previous = self.module.__dict__.get("forward")
        self.module.forward = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self._previous is None:
            del self.module.forward
        else:
            self.module.forward = self._previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        # Looked up on the class: a bound method would come back from pickle as this interception.
        return type(self.module).forward(self.module, *args, **kwargs)


class RegionForward(Intercept):
    """Runs a region once for the FULL heads and once, outside of autograd, for the FORWARD_ONLY heads.

    Nothing of the second pass enters the graph: neither the projections nor attention nor the activation. Where the
    row-parallel projection is inside the region the two outputs are added; where it follows outside, it adds them.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, branch: Branch, index: int):
        super().__init__(module, runtime)
        self.branch, self.index = branch, index
        self.row: ProjectionForward | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cell = self.runtime.cell(self.index) if self.module.training else None
        if cell is None:
            return self.original(*args, **kwargs)
        args, kwargs = _without_cache(args, kwargs)
        full = forward_only = None
        # FULL first: under autocast the second pass may reuse casts of weights, and those must carry gradients.
        if cell.full:
            full = self._pass(self._run_of(cell, cell.full), args, kwargs)
        if cell.forward_only:
            with torch.no_grad():
                run = self._run_of(cell, cell.forward_only, with_bias=not cell.full)
                forward_only = self._pass(run, args, kwargs)
        if not self.branch.row_inside:
            self._leave_to_row(cell, forward_only)
        if full is None and forward_only is None:
            return self._nothing(cell, args, kwargs)
        if full is None or forward_only is None:
            return forward_only if full is None else full
        return _add(full, forward_only) if self.branch.row_inside else full

    def _run_of(self, cell: Cell, heads: Heads, with_bias: bool = True) -> Run:
        shortcut = self.runtime.shortcut
        scale = cell.num_heads / cell.num_active if shortcut == "rescale" and cell.num_active else 1.0
        return Run(heads, with_bias, scale, cell.skipped if shortcut == "mean" else Heads())

    def _pass(self, run: Run, args: tuple, kwargs: dict) -> Any:
        dense = {name: getattr(self.module, name) for name in self.branch.scaled_attributes}
        for name, value in dense.items():
            setattr(self.module, name, value // self.branch.heads * len(run.heads))
        self.runtime.run = run
        try:
            return self.original(*args, **kwargs)
        finally:
            self.runtime.run = None
            for name, value in dense.items():
                setattr(self.module, name, value)

    def _leave_to_row(self, cell: Cell, forward_only: Any) -> None:
        self.runtime.follow[self.index] = Follow(
            full=self._run_of(cell, cell.full) if cell.full else None,
            forward_only=self._run_of(cell, cell.forward_only, with_bias=not cell.full) if cell.forward_only else None,
            output=forward_only[0] if isinstance(forward_only, tuple) else forward_only,
            nothing=None if cell.num_active else self._run_of(cell, Heads()),
        )

    def _nothing(self, cell: Cell, args: tuple, kwargs: dict) -> Any:
        """Output of a region in which no head runs."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if self.branch.row_inside:
            out = self.row.constant(x, self._run_of(cell, Heads()))
        else:
            out = x.new_zeros(*x.shape[:-1], 0)
        return (out, None) if self.branch.name == "attention" else out


def _add(full: Any, forward_only: Any) -> Any:
    """Sum of two passes; attention weights, where they are returned, are those of the FULL heads."""
    if isinstance(full, tuple):
        return (full[0] + forward_only[0], *full[1:])
    return full + forward_only


def _without_cache(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Training forwards fill a key/value cache that nobody reads; with some of the heads it would break."""
    kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
    return tuple(None if isinstance(value, Cache) else value for value in args), kwargs


class ProjectionForward(Intercept):
    """Runs a projection on the heads of the current pass: a linear layer, D2FT's trainable copy, or PEFT's LoRA."""

    def __init__(self, module: nn.Module, runtime: Runtime, projection: Projection, index: int, inside: bool):
        super().__init__(module, runtime)
        self.projection, self.index, self.inside = projection, index, inside
        self._head_axis = HeadAxis(projection.kind, projection.layout, projection.transposed)
        self._lora_axis = HeadAxis(projection.kind, projection.layout)

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.inside:
            follow = self.runtime.follow.pop(self.index, None)
            if follow is not None:
                return self._after_region(x, follow)
        run = self.runtime.run if self.inside else None
        if run is None:
            self._observe(x, None)
            return self.original(x, *args, **kwargs)
        return self._subset(x, run) if self.projection.kind == "column" else self._row(x, run)

    def _row(self, x: Tensor, run: Run) -> Tensor:
        self._observe(x, run)
        return self._add_mean(self._subset(x * run.scale if run.scale != 1.0 else x, run), run)

    def _after_region(self, x: Tensor, follow: Follow) -> Tensor:
        if follow.nothing is not None:
            return self.constant(x, follow.nothing)
        out = None if follow.full is None else self._row(x, follow.full)
        if follow.forward_only is not None:
            with torch.no_grad():
                constant = self._row(follow.output, follow.forward_only)
            out = constant if out is None else out + constant
        return out

    def constant(self, x: Tensor, run: Run) -> Tensor:
        """What a row-parallel projection returns if no head runs: nothing, or what the skipped heads' means give."""
        out = self._add_mean(x.new_zeros(*x.shape[:-1], self.projection.out_features), run)
        layer = _active_layer(self.module)
        bias = layer.get_base_layer().bias if isinstance(layer, LoraLayer) else layer.bias
        return out if not run.skipped or bias is None else out + bias.detach().to(out.dtype)

    def _observe(self, x: Tensor, run: Run | None) -> None:
        mean: FeatureMean | None = self.runtime.means.get(self.index) if self.projection.kind == "row" else None
        if mean is not None and self.module.training and self.runtime.plan is not None:
            heads = Heads(tuple(range(self.projection.layout.heads))) if run is None else run.heads
            if heads:
                mean.observe(heads, x)

    def _add_mean(self, out: Tensor, run: Run) -> Tensor:
        if not run.skipped or not run.with_bias:
            return out
        with torch.no_grad():
            mean = self.runtime.means[self.index].value.to(out)
            features = mean[run.skipped.index(out.device)].flatten()
            contribution = self._subset(features, Run(run.skipped, with_bias=False))
        return out + contribution

    def _subset(self, x: Tensor, run: Run) -> Tensor:
        layer = _active_layer(self.module)
        base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        with_bias = run.with_bias or self.projection.kind == "column"
        out = subset_linear(x, base.weight, base.bias if with_bias else None, self._head_axis, run.heads)
        if isinstance(layer, LoraLayer) and not layer.disable_adapters and not layer.merged:
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    out = self._add_lora(out, layer, adapter, x, run)
        return out

    def _add_lora(self, out: Tensor, layer: LoraLayer, adapter: str, x: Tensor, run: Run) -> Tensor:
        """Add the low-rank part: heads own rows of B in a column-parallel layer, columns of A in a row-parallel one."""
        lora_A, lora_B, scaling = layer.lora_A[adapter], layer.lora_B[adapter], layer.scaling[adapter]
        x = layer.lora_dropout[adapter](layer._cast_input_dtype(x, lora_A.weight.dtype))
        bias = None if lora_B.bias is None else lora_B.bias * scaling
        if self.projection.kind == "column":
            return subset_linear(lora_A(x) * scaling, lora_B.weight, bias, self._lora_axis, run.heads, addend=out)
        hidden = subset_linear(x, lora_A.weight, None, self._lora_axis, run.heads) * scaling
        return out + nn.functional.linear(hidden, lora_B.weight, bias if run.with_bias else None).to(out.dtype)


def _active_layer(module: nn.Module) -> nn.Module:
    return module.active_layer() if isinstance(module, D2FTLayer) else module


class TouchLoss:
    """Forward hook of the whole model: under a plan its loss always has a backward pass.

    In a micro-batch in which nothing is FULL no parameter may reach the loss. Under DistributedDataParallel every
    trainable parameter receives a gradient, zero where it was skipped: all ranks reduce the same buckets, and there is
    no need to look for unused parameters.
    """

    def __init__(self, model: nn.Module, runtime: Runtime):
        self.model, self.runtime = model, runtime

    def __call__(self, module: nn.Module, args: tuple, outputs: Any) -> Any:
        if not module.training or self.runtime.plan is None or not torch.is_grad_enabled():
            return outputs
        # The loss where the model computes it, else what the caller computes it from.
        is_tensor = isinstance(outputs, Tensor)
        named = {None: outputs} if is_tensor else outputs
        name, value = next((n, v) for n, v in named.items() if isinstance(v, Tensor) and v.is_floating_point())
        if self.runtime.touch_gradients:
            value = _Touch.apply(value, *(p for p in self.model.parameters() if p.requires_grad))
        elif not value.requires_grad:
            # Not a leaf itself: the Trainer scales losses in place.
            value = value.requires_grad_().clone()
        if is_tensor:
            return value
        outputs[name] = value
        return outputs


class _Touch(torch.autograd.Function):
    """Identity that hands every parameter a zero gradient."""

    @staticmethod
    def forward(ctx, value, *parameters):
        ctx.save_for_backward(*parameters)
        return value.clone()  # no view: the Trainer scales losses in place

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)
