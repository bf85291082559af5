"""A learning rate of its own for the new head, which short fine-tuning spends its time on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..engine import get_runtime
from ..partition import base_model
from ..planning.schedule_maker import active_adapter
from .step_rate import check_steps_by_groups


if TYPE_CHECKING:
    from ..tuners import D2FTConfig

_MARK = "head_learning_rate_factor"


def head_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """What an adapter trains of the head.

    That is what ``modules_to_save`` trains, and with ``train_boundary=True`` the last linear layer after the blocks:
    the one whose output are the logits.

    Args:
        model: The adapted model.
        adapter: Name of the adapter.

    Returns:
        The parameters; none if the head is not trained, or shares its weight with the embedding.
    """
    config, base = model.peft_config[adapter], base_model(model)
    modules: list[nn.Module] = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    if config.train_boundary:
        modules += _last_linear(base, get_runtime(model).partitions[adapter].blocks)
    embeddings = {id(p) for m in base.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return [parameter for key, parameter in found.items() if key not in embeddings]


def _last_linear(base: nn.Module, blocks: tuple[str, ...]) -> list[nn.Linear]:
    inside = tuple(f"{block}." for block in blocks)
    names = [name for name, _ in base.named_modules()]
    after = max(position for position, name in enumerate(names) if name.startswith(inside))
    trained = [
        module for name, module in list(base.named_modules())[after + 1 :]
        if isinstance(module, nn.Linear) and any(p.requires_grad for p in module.parameters())
    ]  # fmt: skip
    return trained[-1:]


def give_head_its_rate(optimizer: torch.optim.Optimizer, model: nn.Module, was_given: bool, optim: str) -> None:
    """Move the head's parameters to groups of their own, whose learning rate is a multiple of the others'.

    Everything else of a group, such as its weight decay, stays as it is. The new groups come last: what the Trainer
    logs is the rate of the first. Schedulers multiply the rates of all groups.

    Args:
        optimizer: An optimizer that has not stepped yet, or one that was divided before.
        model: The adapted model.
        was_given: Whether the optimizer was made by somebody else.
        optim: Its kind, as ``TrainingArguments.optim`` has it.

    Raises:
        ValueError: If there is no head that is trained, or the optimizer's rates are not those of its groups.
    """
    adapter = active_adapter(model)
    config: D2FTConfig = model.peft_config[adapter]
    factor = getattr(config, _MARK, 1.0)
    if factor == 1 or any(_MARK in group for group in optimizer.param_groups):
        return

    def require(condition: bool, why: str) -> None:
        if not condition:
            raise ValueError(f"{_MARK}={factor!r} {why}.")

    require(
        not was_given,
        "does not reach an optimizer that you made yourself; leave it out, and give the head's parameters a group "
        "with a learning rate of its own there",
    )
    check_steps_by_groups(_MARK, factor, optim)
    head = {id(parameter) for parameter in head_parameters(model, adapter)}
    require(
        bool(head),
        f"finds no head that adapter {adapter!r} trains for itself; name it in modules_to_save, or set "
        "train_boundary=True (full fine-tuning). A head that shares its weight with the embedding has none",
    )
    groups = list(optimizer.param_groups)
    require(
        head <= {id(p) for group in groups for p in group["params"] if group.get("lr") is not None},
        "finds no learning rate for the head in the optimizer's groups; choose another optimizer",
    )
    for group in groups:
        chosen = [parameter for parameter in group["params"] if id(parameter) in head]
        if chosen:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in head]
            optimizer.add_param_group({**group, "params": chosen, "lr": group["lr"] * factor, _MARK: factor})
