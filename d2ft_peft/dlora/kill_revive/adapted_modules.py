"""The modules that can be killed and revived: what a PEFT method trains in each layer, found by structure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class AdaptedModule:
    """One adapted layer.

    Attributes:
        name: Of the layer within the base model, as in ``model.layers.5.self_attn.q_proj``.
        layer: The layer that PEFT put there.
        parameters: What is trained in it.
        adapters: The adapters that were active in it when it was found.
    """

    name: str
    layer: BaseTunerLayer
    parameters: tuple[nn.Parameter, ...]
    adapters: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters)


def unwrap(model: nn.Module) -> tuple[nn.Module, DistributedDataParallel | None]:
    """The model as PEFT made it, and what runs it in several processes, if anything does.

    Raises:
        ValueError: If it is wrapped in something whose parameters cannot be frozen one by one.
    """
    ddp = None
    while True:
        if isinstance(model, DistributedDataParallel):
            ddp = model
        elif isinstance(model, (FSDPModule, FullyShardedDataParallel, nn.DataParallel)) or (
            type(model).__name__ == "DeepSpeedEngine"
        ):
            raise ValueError(
                f"model is wrapped in {type(model).__name__}, whose parameters Kill-and-Revive cannot freeze one by "
                "one; use one process, or DistributedDataParallel."
            )
        elif not hasattr(model, "_orig_mod"):  # of torch.compile
            break
        model = model.module if isinstance(model, DistributedDataParallel) else model._orig_mod
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise ValueError(
            "model has parameters that are spread over devices (DTensor), as FSDP2 and tensor parallelism make them; "
            "Kill-and-Revive needs whole ones: use one process, or DistributedDataParallel."
        )
    return model, ddp


def base_of(model: nn.Module) -> nn.Module:
    """The transformers model with the adapted layers in it, in which modules have the names they had before PEFT."""
    tuner = getattr(model, "base_model", None)
    return tuner.model if isinstance(tuner, BaseTuner) else model


def find_modules(model: nn.Module) -> list[AdaptedModule]:
    """All adapted layers with something to train, in the order of the model.

    Raises:
        ValueError: If there is none, or their parameters do not belong to one layer each.
    """
    _check_method(model)
    base = base_of(model)
    layers = {name: layer for name, layer in base.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, wrapper in base.named_modules():
        if isinstance(wrapper, AuxiliaryTrainingWrapper):  # modules_to_save, trainable_token_indices: always trained
            layers = {k: v for k, v in layers.items() if k != name and not k.startswith(f"{name}.")}
    found = []
    for name, layer in layers.items():
        parameters = tuple(p for p in _own_parameters(layer) if p.requires_grad)
        if parameters:
            found.append(AdaptedModule(name, layer, parameters, tuple(layer.active_adapters)))
    if not found:
        raise ValueError(_why_none(model, bool(layers)))
    _check_not_shared(found)
    return found


def train_only(modules: Sequence[AdaptedModule], active: Sequence[int]) -> bool:
    """Make these modules trainable and no others; whether that changed anything."""
    changed, active = False, set(active)
    for index, module in enumerate(modules):
        for parameter in module.parameters:
            if parameter.requires_grad != (index in active):
                changed = True
                parameter.requires_grad_(index in active)
            if index not in active:
                parameter.grad = None
    return changed


def _own_parameters(layer: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of a layer and of what it holds, without those of adapted layers within."""
    seen = set()
    stack = [layer]
    while stack:
        module = stack.pop()
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield parameter
        stack += [
            child for child in module.children() if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper))
        ]


def _check_method(model: nn.Module) -> None:
    """Raise ValueError where something else decides on parts of a model as well."""
    configs = getattr(model, "peft_config", {}).values()
    allocates = callable(getattr(getattr(model, "base_model", None), "update_and_allocate", None))
    if allocates and any(getattr(config, "use_asa", True) for config in configs):  # AdaMSS can do without
        raise ValueError(
            f"{type(model.base_model).__name__} cannot be killed in parts: after each step its update_and_allocate "
            "reads a gradient of every module and moves ranks between them, which is a choice of its own; use a method "
            "without it, such as LoRA."
        )
    if any(getattr(config, "head_parallel", False) for config in configs):
        raise ValueError(
            "head_parallel=True puts the parts of a module on different processes, which must not choose apart; use "
            "head_parallel=False."
        )


def _why_none(model: nn.Module, has_layers: bool) -> str:
    configs = getattr(model, "peft_config", None)
    if not configs:
        return "model has no adapter; make it with get_peft_model before Kill-and-Revive."
    names = ", ".join(str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values())
    if has_layers:
        return f"no layer of the active adapter ({names}) has a trainable parameter; load it with is_trainable=True."
    return (
        f"{names} puts no modules into layers that could be killed one by one; use a method that does, such as LoRA, "
        "IA3 or OFT."
    )


def _check_not_shared(modules: list[AdaptedModule]) -> None:
    """Raise ValueError if two layers train the same numbers, be it as one parameter or as two views of a storage."""
    owner: dict[int, str] = {}
    for module in modules:
        for parameter in module.parameters:
            other = owner.setdefault(parameter.data_ptr() or id(parameter), module.name)
            if other != module.name:
                raise ValueError(
                    f"{other} and {module.name} share a trainable parameter of shape {tuple(parameter.shape)}: neither "
                    "can be killed without the other. Use a method whose layers have parameters of their own, such as "
                    "LoRA, and do not tie adapters."
                )
