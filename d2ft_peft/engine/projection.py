"""Forward of a projection on the heads of a pass: a linear layer, D2FT's trainable copy, or PEFT's LoRA."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..partition import Projection
from .dequantize import quantized_weight
from .feature_mean import FeatureMean
from .intercept import Intercept
from .plan import Heads
from .runtime import Follow, Run, Runtime
from .subset_linear import HeadAxis, SubsetLayer, subset_linears


class ProjectionForward(Intercept):
    """Runs a projection on the heads of the current pass.

    Attributes:
        projection: The projection.
        index: Index of its branch.
        inside: Whether it is part of its branch's region.
        head_axis: Which features of its weight belong to heads.
        lora_axis: Which features of LoRA's B (column-parallel) or A (row-parallel) do.
        siblings: The column-parallel projections of the branch that share its input; itself included.
    """

    def __init__(self, module: nn.Module, runtime: Runtime, projection: Projection, index: int, inside: bool):
        super().__init__(module, runtime)
        self.projection, self.index, self.inside = projection, index, inside
        self.head_axis = HeadAxis(projection.kind, projection.layout, projection.transposed)
        self.lora_axis = HeadAxis(projection.kind, projection.layout)
        self.siblings: tuple[ProjectionForward, ...] = ()

    def remove(self) -> None:
        """Give the module its own forward back, and let go of the siblings, which know this one in turn."""
        super().remove()
        self.siblings = ()

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.inside:
            return self._outside(x, *args, **kwargs)
        run = self.runtime.run
        if run is None:
            return self._whole(x, *args, **kwargs)
        return self._column(x, run) if self.projection.kind == "column" else self._row(x, run)

    @torch.compiler.disable
    def _outside(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        follow = self.runtime.follow.pop(self.index, None)
        return self._whole(x, *args, **kwargs) if follow is None else self._after_region(x, follow)

    def _whole(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self._observe(x, None)
        return self.original(x, *args, **kwargs)

    def _row(self, x: Tensor, run: Run) -> Tensor:
        self._observe(x, run)
        return self._add_mean(_subset((self,), x * run.scale if run.scale != 1.0 else x, run)[0], run)

    def _after_region(self, x: Tensor, follow: Follow) -> Tensor:
        if follow.returned is not None and not _is_untouched(x, *follow.returned):
            raise ValueError(
                f"what {self.projection.name} takes is not what the region before it returned: something lies between "
                "the two, which FORWARD_ONLY heads would go past. If it works on each feature alone (an activation), "
                "say joined=True in the model's BranchSpec; else make it part of the region."
            )
        if follow.nothing is not None:
            return self.constant(x, follow.nothing)
        output = follow.output
        if follow.forward_only is not None and output is None:
            width = self.projection.layout.size // self.projection.layout.heads
            first = 0 if follow.full is None else len(follow.full.heads) * width
            x, output = x[..., :first], x[..., first:].detach()
        out = None if follow.full is None else self._row(x, follow.full)
        if follow.forward_only is not None:
            with torch.no_grad():
                constant = self._row(output, follow.forward_only)
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
        if mean is not None and self.module.training and self.runtime.plan is not None and self.runtime.trains:
            heads = Heads(tuple(range(self.projection.layout.heads))) if run is None else run.heads
            if heads:
                mean.observe(heads, x)

    def _add_mean(self, out: Tensor, run: Run) -> Tensor:
        if not run.skipped or not run.with_bias:
            return out
        with torch.no_grad():
            features = self.runtime.means[self.index].features(run.skipped).to(out)
            (contribution,) = _subset((self,), features, Run(run.skipped, with_bias=False))
        return out + contribution

    def _column(self, x: Tensor, run: Run) -> Tensor:
        """Column-parallel projections share their input: the first that is asked for computes all of them."""
        if run.x is None or (run.x is not x and not run.outputs):
            run.x, run.outputs = x, dict(zip(self.siblings, _subset(self.siblings, x, run), strict=True))
        if run.x is x and self in run.outputs:
            return run.outputs.pop(self)
        return _subset((self,), x, run)[0]


def _is_untouched(x: Tensor, returned: Tensor, version: int) -> bool:
    if x.data_ptr() == returned.data_ptr() and x.shape == returned.shape:
        return returned._version == version
    # Whoever casts inputs (mixed precision of FSDP) hands over another tensor.
    same_shape = x.shape == returned.shape
    return same_shape and torch.allclose(x.detach().float(), returned.detach().float(), rtol=1e-2, atol=1e-2)


def _subset(projections: tuple[ProjectionForward, ...], x: Tensor, run: Run) -> list[Tensor]:
    """Outputs of projections that share their input, on the heads of a pass."""
    layers = [_active_layer(projection.module) for projection in projections]
    subset_layers, low_rank = [], []
    for projection, layer in zip(projections, layers, strict=True):
        base = layer
        if isinstance(layer, LoraLayer):
            base = layer.get_base_layer()
            if not layer.disable_adapters and not layer.merged:
                low_rank += [(projection, layer, name) for name in layer.active_adapters if name in layer.lora_A]
        with_bias = run.with_bias or projection.projection.kind == "column"
        weight = quantized_weight(base) or base.weight
        subset_layers.append(SubsetLayer(weight, base.bias if with_bias else None, projection.head_axis))
    outputs = list(subset_linears(x, subset_layers, run.heads))
    return _add_low_rank(outputs, projections, low_rank, x, run) if low_rank else outputs


def _add_low_rank(
    outputs: list[Tensor],
    projections: tuple[ProjectionForward, ...],
    low_rank: list[tuple[ProjectionForward, LoraLayer, str]],
    x: Tensor,
    run: Run,
) -> list[Tensor]:
    """Add what LoRA adds: heads own rows of B in a column-parallel layer, columns of A in a row-parallel one."""
    if projections[0].projection.kind == "column":
        hidden = _hidden(low_rank, x)
    for i, (projection, layer, name) in enumerate(low_rank):
        place = projections.index(projection)
        lora_B, scaling, out = layer.lora_B[name], layer.scaling[name], outputs[place]
        bias = None if lora_B.bias is None else lora_B.bias * scaling
        if projection.projection.kind == "column":
            low = SubsetLayer(lora_B.weight, bias, projection.lora_axis, addend=out)
            (outputs[place],) = subset_linears(hidden[i], [low], run.heads)
        else:
            A = SubsetLayer(layer.lora_A[name].weight, None, projection.lora_axis)
            (low,) = subset_linears(_lora_input(layer, name, x), [A], run.heads)
            low = nn.functional.linear(low * scaling, lora_B.weight, bias if run.with_bias else None)
            outputs[place] = out + low.to(out.dtype)
    return outputs


def _hidden(low_rank: list[tuple[ProjectionForward, LoraLayer, str]], x: Tensor) -> list[Tensor]:
    """Scaled products of x with the factors A; in one product where all see the same x and are scaled alike."""
    factors = [layer.lora_A[name].weight for _, layer, name in low_rank]
    scalings = [layer.scaling[name] for _, layer, name in low_rank]
    inputs = [_lora_input(layer, name, x) for _, layer, name in low_rank]
    alike = all(given is inputs[0] for given in inputs) and len({A.dtype for A in factors}) == len(set(scalings)) == 1
    if alike:
        together = nn.functional.linear(inputs[0], torch.cat(factors) * scalings[0])
        return list(together.split([len(A) for A in factors], -1))
    return [nn.functional.linear(given, A * s) for given, A, s in zip(inputs, factors, scalings, strict=True)]


def _lora_input(layer: LoraLayer, name: str, x: Tensor) -> Tensor:
    return layer.lora_dropout[name](layer._cast_input_dtype(x, layer.lora_A[name].weight.dtype))


def _active_layer(module: nn.Module) -> nn.Module:
    own = getattr(module, "active_layer", None)  # the full variant's layer holds several
    return module if own is None else own()
