"""What must hold when training begins: the adapter trains, and D2FT still stands before the model's modules."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..engine.dequantize import keep_unpacked
from ..engine.intercept import Intercept, get_runtime
from ..partition import base_model


def check_trains(model: nn.Module) -> None:
    """Refuse to train a model whose adapter would not learn.

    Raises:
        ValueError: If the adapter is disabled or merged, no parameter requires a gradient, one has no memory, or 4 bit
            weights were packed for inference.
    """
    keep_unpacked(model)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if any(layer.disable_adapters for layer in layers):
        raise ValueError(
            "the adapter is disabled, so nothing trains; call model.base_model.enable_adapter_layers(), or leave "
            "disable_adapter()."
        )
    merged = sorted({name for layer in layers for name in getattr(layer, "merged_adapters", ())})
    if merged:
        raise ValueError(f"adapter {', '.join(merged)} is merged, so nothing trains; call model.unmerge_adapter().")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            "no parameter requires a gradient, so nothing trains; load the adapter with is_trainable=True, or call "
            "model.set_adapter('default')."
        )
    empty = [name for name, p in model.named_parameters() if p.requires_grad and p.is_meta]
    if empty:
        raise ValueError(
            f"{len(empty)} parameters that are to be trained (e.g. {empty[0]}) are on the meta device: a device_map "
            "offloads them to the CPU or to disk, where no gradient reaches them, or weights were never loaded; load "
            "the model with a device_map that names devices only, or without one, before you wrap it."
        )


def check_intercepted(model: nn.Module) -> None:
    """See to it that D2FT stands before every region and projection of a model.

    Kernels that are patched in after the model was wrapped (liger) give modules a forward of their own: D2FT then takes
    its place before that one again. Whether such a forward still calls the projections shows in `probe_model`.

    Raises:
        ValueError: If modules that hold layers of the adapter were exchanged, or forwards lie so that D2FT cannot take
            its place again.
    """
    runtime, base = get_runtime(model), base_model(model)
    partition = next(iter(runtime.partitions.values()))
    names = [*partition.owned, *(branch.region for branch in partition.branches)]
    names += [f"{b.region}.{e.name}" for b in partition.branches for e in b.per_head if e.kind == "module"]
    standing = {name: _interception(base.get_submodule(name)) for name in names}
    lost = [name for name, found in standing.items() if found is None]
    tuner = getattr(model, "base_model", None)
    targets = getattr(tuner, "targeted_module_names", [])
    exchanged = [name for name in targets if not isinstance(base.get_submodule(name), BaseTunerLayer)]
    if exchanged:
        raise ValueError(
            f"{len(exchanged)} modules (e.g. {exchanged[0]}) are no layers of the adapter any more: something replaced "
            "them after get_peft_model; apply kernels such as liger's to the model before you wrap it."
        )
    if not lost:
        return
    covered = [n for n, f in standing.items() if f is not None and base.get_submodule(n).__dict__["forward"] is not f]
    if covered or not hasattr(tuner, "_install_interceptions"):
        raise ValueError(
            f"{len(lost)} modules (e.g. {lost[0]}) were given a forward of their own after get_peft_model, which D2FT "
            "does not stand before; patch kernels into the model before you wrap it."
        )
    tuner._remove_interceptions()
    tuner._install_interceptions(partition)


def _interception(module: nn.Module) -> Intercept | None:
    """The interception that a call of the module meets, also under forwards that were wrapped around it."""
    forward: Any = module.__dict__.get("forward")
    while forward is not None and not isinstance(forward, Intercept):
        forward = getattr(forward, "__wrapped__", None)
    return forward
