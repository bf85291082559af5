"""What a head-parallel run writes and reads: whole tensors under their ordinary names, whatever the number of ranks.

The adapter is written by PEFT. The optimizer's state is one safetensors file with the shapes that one process would
have: a key is a parameter's name and the name of the state, ``...q_proj.lora_A.default.weight.exp_avg``; the settings
of its parameter groups are JSON in the file's metadata. Each rank reads the slices of its own heads.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from ...whole_files import damaged, reading, replacing
from ..exchange.ranks import Ranks
from .shard import Shard


OPTIMIZER_FILE = "optimizer.safetensors"
_TORCH_OPTIMIZER_FILE = "optimizer.pt"  # what a Trainer on one process writes


def save_optimizer(
    optimizer: torch.optim.Optimizer, model: nn.Module, directory: str | os.PathLike, shards: list[Shard], ranks: Ranks
) -> None:
    """Write an optimizer's state on rank 0, gathered; every rank calls it.

    Args:
        optimizer: Made after the model was cut.
        model: The cut model.
        directory: The folder.
        shards: Its cut parameters.
        ranks: The processes.

    Raises:
        ValueError: If the optimizer keeps something that is neither a number nor of its parameter's shape.
    """
    by_parameter = {id(shard.tensor): shard for shard in shards}
    groups, tensors, others = [], {}, {}
    for group, named in _named_groups(optimizer, model):
        groups.append({**_settings(group), "params": [name for name, _ in named]})
        for name, parameter in named:
            for kind, value in optimizer.state[parameter].items():
                key = f"{name}.{kind}"
                if not isinstance(value, Tensor):
                    others[key] = value
                elif value.shape == parameter.shape:
                    shard = by_parameter.get(id(parameter))
                    tensors[key] = value if shard is None else gathered(value, shard, ranks)
                elif value.numel() == 1:
                    tensors[key] = value
                else:
                    name_of_optimizer = type(getattr(optimizer, "optimizer", optimizer)).__name__
                    raise ValueError(
                        f"{name_of_optimizer} keeps {kind!r} of shape {list(value.shape)} for {name}, which has shape "
                        f"{list(parameter.shape)} on this rank: checkpoints here hold what is kept for every "
                        "weight on its own (SGD, Adam, AdamW); choose such an optimizer, or set save_only_model=True."
                    )
    if ranks.is_first:
        whole = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        metadata = {"groups": json.dumps(groups), "others": json.dumps(others)}
        with replacing(os.path.join(directory, OPTIMIZER_FILE)) as path:
            save_file(whole, path, metadata)
    ranks.barrier("while saving")


def gathered(value: Tensor, shard: Shard, ranks: Ranks) -> Tensor | None:
    """The whole of what every rank has a part of, on the first rank; None on the others.

    Args:
        value: This rank's part, of the shape of the shard's tensor.
        shard: The parameter that it is or belongs to.
        ranks: The processes.
    """
    parts = ranks.to_first(value, [shard.shape(len(heads)) for heads in shard.heads])
    return None if parts is None else shard.join(parts)


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    directory: str | os.PathLike,
    shards: Sequence[Shard] = (),
    rank: int = 0,
) -> None:
    """Let an optimizer continue from a folder that ranks (or a Trainer on one process) wrote.

    Args:
        optimizer: Over the same parameters in the same groups as the one that was saved.
        model: The model, cut or whole.
        directory: The folder.
        shards: The parameters that are cut on this rank.
        rank: This rank.

    Raises:
        ValueError: If the folder has no optimizer's state, a damaged one, or one of other parameters.
    """
    named_groups = [named for _, named in _named_groups(optimizer, model)]
    names = {id(parameter): name for named in named_groups for name, parameter in named}
    cut = {names[id(shard.tensor)]: shard for shard in shards if id(shard.tensor) in names}
    if os.path.isfile(os.path.join(directory, OPTIMIZER_FILE)):
        groups, state = _read(os.path.join(directory, OPTIMIZER_FILE), cut, rank)
    else:
        groups, state = _read_torch(os.path.join(directory, _TORCH_OPTIMIZER_FILE), named_groups, cut, rank)
    wanted = [[name for name, _ in named] for named in named_groups]
    if [group["params"] for group in groups] != wanted:
        raise ValueError(
            f"the optimizer's state in {os.fspath(directory)!r} is of other parameters than this optimizer's "
            f"{sum(map(len, wanted))} in {len(wanted)} groups; make the model, the adapter and the optimizer as they "
            "were when it was saved."
        )
    parameters = {name: parameter for named in named_groups for name, parameter in named}
    for name, of_one in state.items():
        for kind, value in of_one.items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameters[name].shape:
                raise ValueError(
                    f"{name}.{kind} in {os.fspath(directory)!r} has shape {list(value.shape)} where the parameter has "
                    f"{list(parameters[name].shape)} on this rank; continue with the model that was saved."
                )
    indices = {name: index for index, name in enumerate(name for named in wanted for name in named)}
    groups = [{**group, "params": [indices[name] for name in group["params"]]} for group in groups]
    optimizer.load_state_dict({"state": {indices[name]: of_one for name, of_one in state.items()},
                               "param_groups": groups})  # fmt: skip


def _read(path: str, cut: dict[str, Shard], rank: int) -> tuple[list[dict], dict[str, dict]]:
    """Groups and state by parameter's name, of a rank, from what `save_optimizer` wrote."""
    state: dict[str, dict[str, Any]] = {}
    with reading(path) as file:
        metadata = file.metadata() or {}
        if not metadata.keys() >= {"groups", "others"}:
            raise ValueError(f"{path!r} was not written by HeadParallel.save_optimizer: it names no parameter groups.")
        for key in file.keys():  # noqa: SIM118 - no dictionary
            name, _, kind = key.rpartition(".")
            source = file.get_slice(key)
            of_heads = name in cut and cut[name].is_whole(source.get_shape())
            value = cut[name].part(source, rank) if of_heads else file.get_tensor(key)
            state.setdefault(name, {})[kind] = value
    for key, value in json.loads(metadata["others"]).items():
        name, _, kind = key.rpartition(".")
        state.setdefault(name, {})[kind] = value
    groups = json.loads(metadata["groups"])
    # JSON has no tuples (Adam's betas).
    return [{k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in g.items()} for g in groups], state


def _read_torch(
    path: str, named_groups: list[list[tuple[str, nn.Parameter]]], cut: dict[str, Shard], rank: int
) -> tuple[list[dict], dict[str, dict]]:
    """The same from what torch saved on one process, which numbers parameters by their order."""
    if not os.path.isfile(path):
        raise ValueError(
            f"{os.path.dirname(path)!r} has neither {OPTIMIZER_FILE} nor {_TORCH_OPTIMIZER_FILE}: no optimizer can "
            "continue from it; name a checkpoint's folder, or start anew from its adapter."
        )
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(damaged(path, error)) from error
    names = [name for named in named_groups for name, _ in named]
    count = sum(len(group["params"]) for group in saved["param_groups"])
    names += [""] * (count - len(names))
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    state = {}
    for index, of_one in saved["state"].items():
        name = names[index]
        state[name] = {}
        for kind, value in of_one.items():
            of_heads = name in cut and isinstance(value, Tensor) and cut[name].is_whole(value.shape)
            state[name][kind] = cut[name].part(value, rank) if of_heads else value
    return groups, state


def load_adapter(model: nn.Module, directory: str | os.PathLike, shards: Sequence[Shard], rank: int) -> None:
    """Let a cut model take the weights of an adapter that PEFT saved, of which each rank reads its own part.

    Args:
        model: The cut model.
        directory: The folder.
        shards: Its cut parameters.
        rank: This rank.

    Raises:
        ValueError: If the folder has no adapter in safetensors, a damaged one, or one with other tensors.
    """
    path = os.path.join(directory, SAFETENSORS_WEIGHTS_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"{os.fspath(directory)!r} has no {SAFETENSORS_WEIGHTS_NAME}; name the folder of an adapter.")
    by_parameter = {id(shard.tensor): shard for shard in shards}
    known = get_peft_model_state_dict(model, state_dict=model.state_dict(keep_vars=True))
    with reading(path) as file, torch.no_grad():
        differing = sorted(set(file.keys()) ^ known.keys())
        if differing:
            raise ValueError(
                f"the adapter in {os.fspath(directory)!r} does not fit this model: {len(differing)} tensors, among "
                f"them {differing[0]}, are in one of them only; load it with the configuration that it was saved with."
            )
        for key, value in known.items():
            shard, source = by_parameter.get(id(value)), file.get_slice(key)
            expected = list(value.shape if shard is None else shard.shape(shard.layout.heads))
            if source.get_shape() != expected:
                raise ValueError(
                    f"{key} in {os.fspath(directory)!r} has shape {source.get_shape()}, and {expected} in this model; "
                    "load it with the configuration that it was saved with."
                )
            value.copy_(file.get_tensor(key) if shard is None else shard.part(source, rank))


def _named_groups(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Iterator[tuple[dict[str, Any], list[tuple[str, nn.Parameter]]]]:
    """Each parameter group with its parameters and their names in the model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        yield group, [(names[id(parameter)], parameter) for parameter in group["params"]]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A group's learning rate and so on, as JSON has them."""
    plain = {key: value for key, value in group.items() if key != "params"}
    return {key: value.item() if isinstance(value, Tensor) else value for key, value in plain.items()}
