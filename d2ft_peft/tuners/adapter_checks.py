"""What keeps an adapter from being made: the model's weights, its other adapters, what PEFT could not load again."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, TaskType
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..engine.dequantize import quantized_weight
from ..partition import Partition, holds_subnets, is_plain_linear, unwrap
from ..schedule import policy_facts
from .config import D2FTConfig


# Heads that PEFT names in modules_to_save for a task, whether or not the model has them.
_HEADS_OF_TASKS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}


def check_names(model: nn.Module, partition: Partition, config: D2FTConfig) -> None:
    """Refuse names of modules that the model does not have: nothing of what they ask for would happen.

    Raises:
        ValueError: If ``target_modules`` names no module at all, or an entry of ``modules_to_save`` none.
    """
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    targets, cls = config.target_modules, type(model).__name__
    leaves = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in partition.projections)) or "in its blocks"
    if targets and not _names_any(names, targets):
        pattern = " (a string is a regular expression for whole paths)" if isinstance(targets, str) else ""
        raise NoMatchingPeftModuleError(
            f"target_modules={targets!r}{pattern} names no module of {cls}; the projections of its heads are {leaves}: "
            "give a list of some of them, or leave target_modules out for all."
        )
    unasked = _HEADS_OF_TASKS.get(config.task_type, set())
    for saved in config.modules_to_save or ():
        if saved not in unasked and not any(name.endswith(saved) for name in names):
            children = ", ".join(
                name for name, child in model.named_children() if any(True for _ in child.parameters())
            )
            raise ValueError(
                f"modules_to_save={config.modules_to_save!r}: {saved!r} names no module of {cls}; it has {children}, "
                "and what is inside of them."
            )


def _names_any(names: Iterable[str], targets: str | Iterable[str]) -> bool:
    if isinstance(targets, str):
        is_all = targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        return is_all or any(re.fullmatch(targets, name) for name in names)
    return any(f".{name}".endswith(f".{target}") for name in names for target in targets)


def check_beside_others(
    config: D2FTConfig, adapter_name: str, others: Mapping[str, D2FTConfig], partition: Partition
) -> None:
    """Refuse an adapter that cannot stand beside those of the model.

    Args:
        config: Configuration of the new adapter.
        adapter_name: Its name.
        others: Configurations of the adapters that the model has, by name; at least one.
        partition: The subnets.

    Raises:
        ValueError: If one of them trains the base in place, or replaces modules that hold projections as a whole.
    """
    for name, other in others.items():
        if other.stacks != config.stacks:
            raise ValueError(
                f"adapter {adapter_name!r} cannot stand beside {name!r}: stacks={config.stacks!r} and "
                f"{other.stacks!r} differ, and with them where the heads are; give both the same, or each a model of "
                "its own."
            )
    for name, candidate in {adapter_name: config, **others}.items():
        if not candidate.keep_base:
            raise ValueError(
                f"adapter {adapter_name!r} cannot stand beside {sorted(others)}: keep_base=False of {name!r} trains "
                "the base itself, which the others build on; use keep_base=True for all of them."
            )
        replaced = _replaced_containers(candidate, partition)
        if replaced:
            raise ValueError(
                f"adapter {adapter_name!r} cannot stand beside {sorted(others)}: modules_to_save={replaced} of "
                f"{name!r} replaces modules that hold projections of subnets, and the adapters would then differ in "
                "where the heads are; name the projections in target_modules, or give each adapter a model of its own."
            )


def _replaced_containers(config: D2FTConfig, partition: Partition) -> list[str]:
    """Entries of ``modules_to_save`` that name a projection of a subnet (or a whole block), or a module around one."""
    return [
        saved
        for saved in config.modules_to_save or ()
        if any(f".{saved}." in f".{owned}." for owned in partition.owned)
    ]


def places_of_modules(model: nn.Module) -> Counter[int]:
    """In how many places of a model each of its modules stands, by id."""
    return Counter(id(child) for parent in model.modules() for child in parent._modules.values())


def check_one_place(module: nn.Module, name: str, places: Counter[int]) -> None:
    """Refuse to copy a module that stands in several places: the others would go on without the copy.

    Raises:
        ValueError: With its name.
    """
    if places[id(module)] > 1:
        raise ValueError(
            f"{name} is one module in {places[id(module)]} places of the model, and a trained copy would stand in one "
            "of them; hold it once and call it several times, leave it out of target_modules, or train LoRA (r=...)."
        )


def check_one_stack(partition: Partition) -> None:
    """Refuse to share out over processes the heads of blocks that do not see the same rows.

    Raises:
        ValueError: With the stacks that there are.
    """
    if partition.several:
        raise ValueError(
            f"head_parallel=True shares out the heads of one stack of blocks, and model_type={partition.model_type!r} "
            f"has several or cross attention ({', '.join(stack.name for stack in partition.stacks)}); name a single "
            "one without cross attention in `stacks`, or leave head_parallel out."
        )


def check_stacks(partition: Partition, config: D2FTConfig) -> None:
    """Refuse what needs blocks that all see the same rows, and numbers of blocks where stacks have each their own.

    Raises:
        ValueError: With the stacks that there are.
    """
    if config.head_parallel:
        check_one_stack(partition)
    if config.layers_to_transform is not None and len(partition.stacks) > 1:
        raise ValueError(
            f"layers_to_transform={config.layers_to_transform!r} numbers the blocks of one stack, and "
            f"{', '.join(stack.name for stack in partition.stacks)} are scheduled; choose one in `stacks`, or name "
            "projections in target_modules."
        )


def check_weights(model: nn.Module, partition: Partition, config: D2FTConfig) -> None:
    """Refuse to train weights that cannot be, or to slice those that cannot be cut into heads.

    Such are quantized ones: layers of other classes than ``nn.Linear`` (bitsandbytes, HQQ, GPTQ), or tensors of other
    classes in an ordinary one (torchao). They run as a whole, so LoRA works where projections or blocks do; those whose
    dense weight can be read are cut as well.

    Raises:
        ValueError: If full fine-tuning, or a policy that cuts projections, meets such a weight.
    """
    if config.inference_mode:
        return
    if not config.is_lora:
        names = partition.owned
        found = next(filter(None, (_not_trainable(model.get_submodule(name), name) for name in names)), None)
        if found:
            raise ValueError(
                f"{found}, which cannot be fine-tuned; set r (LoRA), or load the model without quantization and "
                "offloading."
            )
        return
    why = why_not_sliced(model, partition, config, dequantize=True)
    if why:
        raise ValueError(
            f"{why}; choose policy='exact_first', 'all_full', 'fewer_samples', 'importance' or 'selective_backprop', "
            "which run whole projections, or subnets='blocks', or load the model without quantization and offloading."
        )


def why_not_sliced(model: nn.Module, partition: Partition, config: D2FTConfig, dequantize: bool) -> str:
    """Why projections cannot be run on some of their heads, as the policy does; empty if they can, or need not.

    Args:
        model: The model.
        partition: Its heads.
        config: The adapter's configuration.
        dequantize: Whether heads of quantized weights are cut where it is known how to make them dense.
    """
    if config.inference_mode or config.policy == "all_full" or policy_facts(config.policy).rows != "micro_batches":
        return ""
    for name in partition.projections:
        layer = unwrap(model.get_submodule(name))
        found = _not_dense(layer, name)
        if found and not config.head_parallel and not _is_offloaded(layer) and quantized_weight(layer):
            if dequantize:
                continue
            return f"{found}, whose blocks run faster than its heads; subnets='heads' cuts it as {config.policy!r} does"
        if found:
            return f"{found}, which cannot be cut into heads as policy={config.policy!r} does"
    return ""


def _not_dense(layer: nn.Module, name: str) -> str:
    """What a linear layer is if it has no dense weight of its own to slice; else an empty string."""
    weight = getattr(layer, "weight", None)
    if type(layer) is not Conv1D and not is_plain_linear(layer):
        return f"{name} is a {type(layer).__name__}"
    if not is_dense(weight):
        return f"the weight of {name} is a {type(weight.data).__name__} of {weight.dtype}"
    return f"the weight of {name} is offloaded by accelerate" if _is_offloaded(layer) else ""


def _is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps a module's weights elsewhere and lends them for its forward pass."""
    return hasattr(module, "_hf_hook") and any(p.is_meta for p in module.parameters(recurse=False))


def _not_trainable(module: nn.Module, name: str) -> str:
    """What in a module has no gradient for want of a dense floating weight; an empty string if all has."""
    for path, part in module.named_modules():
        if path.startswith("d2ft_layers") or ".d2ft_layers" in path:
            continue
        found = next((p for p in part.parameters(recurse=False) if not is_dense(p)), None)
        where = f"{name}.{path}".rstrip(".")
        if found is not None:
            return f"the weight of {where} is a {type(found.data).__name__} of {found.dtype}"
        if _is_offloaded(part):  # a copy would be lent the original's weights, and learn nothing
            return f"the weight of {where} is offloaded by accelerate (device_map)"
        if hasattr(part, "in_features") and getattr(part, "weight", None) is None and not hasattr(part, "base_layer"):
            return f"{where} is a {type(part).__name__} without a weight"
    return ""


def is_dense(weight: torch.Tensor | None) -> bool:
    """Whether a weight is a dense floating tensor, whole or sharded (`DTensor`): what can be sliced by heads."""
    if not isinstance(weight, torch.Tensor):  # none, or what stands for one (GPTQ's metadata)
        return False
    plain = type(weight.data) in (torch.Tensor, nn.Parameter, DTensor)
    return plain and weight.is_floating_point() and weight.dtype.itemsize > 1 and weight.layout == torch.strided


def copied_boundary(model: nn.Module, partition: Partition, boundary: list[str]) -> list[str]:
    """The boundary modules that ``train_boundary`` copies; says where parameters per head (sinks) are left out.

    Raises:
        ValueError: If a module with parameters of its own holds projections of subnets.
    """
    holding = [name for name in boundary if holds_subnets(partition, name)]
    left = set()
    for name in holding:
        own = {parameter for parameter, _ in model.get_submodule(name).named_parameters(recurse=False)}
        known = {e.name for branch in partition.branches if branch.region == name for e in branch.per_head}
        if not own <= known:
            raise ValueError(
                f"train_boundary=True cannot copy {name or 'the model itself'!r}: it has parameters of its own and "
                "holds projections of subnets; name what else is to be trained in modules_to_save instead."
            )
        left |= own
    if holding:
        warnings.warn(
            f"train_boundary=True leaves {', '.join(sorted(left))} of {holding[0]} and others alone: they lie beside "
            "projections of subnets, in a module that cannot be copied.",
            stacklevel=2,
        )
    return [name for name in boundary if name not in holding]


def check_loads_in_peft(model: nn.Module, linears: Iterable[str], config: D2FTConfig) -> None:
    """Refuse LoRA on projections that PEFT, when it loads the adapter, would take for others.

    For some mixtures of experts PEFT reads ``gate_proj``, ``up_proj`` and ``down_proj`` as names of the experts,
    whether or not the model has dense layers of these names as well.

    Args:
        model: The model.
        linears: Paths of the linear layers that belong to subnets.
        config: The adapter's configuration.

    Raises:
        ValueError: If one that `config` targets is renamed so.
    """
    targeted = {name for name in linears if check_target_module_exists(config, name) is True}
    kept = {name for name in targeted if _keeps_target(model, name)}
    if kept != targeted:
        leaves = sorted({name.rpartition(".")[2] for name in kept})
        raise ValueError(
            f"target_modules names {min(targeted - kept)}, which PEFT takes for an expert of "
            f"model_type={model.config.model_type!r} when it loads the adapter: it would not be what was trained; "
            f"set target_modules={leaves}."
        )


def leave_out_what_peft_renames(model: nn.Module, config: D2FTConfig) -> None:
    """Target every projection but those that `check_loads_in_peft` would refuse, and say which are left out."""
    kept = {name for name in config.target_modules if _keeps_target(model, name)}
    left = {name.rpartition(".")[2] for name in config.target_modules - kept}
    if left and kept:
        warnings.warn(
            f"LoRA leaves {', '.join(sorted(left))} of model_type={model.config.model_type!r} alone: PEFT would take "
            "them for experts when it loads the adapter. Their heads are skipped and run like those of the others.",
            stacklevel=2,
        )
        config.target_modules = kept


def _keeps_target(model: nn.Module, name: str) -> bool:
    """Whether PEFT's conversion of LoRA configurations leaves this target alone."""
    stock = LoraConfig(target_modules=[name])
    try:
        convert_peft_config_for_transformers(stock, model, conversions=None)
    except ValueError:  # targets that it wants to fuse with others are targets that it renames
        return False
    return stock.target_modules == {name}
