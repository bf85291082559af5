"""A model of which the edge holds only what it owns; of the cloud's blocks there are names and shapes.

transformers builds the model on the meta device and reads one tensor of the checkpoint after the other, and none of the
blocks that are taken out meanwhile. Put back, these have weights without memory: one zero, shown in the weight's shape.
PEFT adapts them as it adapts any layer, and what an adapted layer returns is what the adapter adds.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..blocks import check_span, find_stack, plain_facts


def load_skeleton(
    base: str, edge_blocks: tuple[int, int], model_class: Any, with_head: bool = False, **hub: Any
) -> tuple[PreTrainedModel, str, range]:
    """Load what the edge owns.

    Args:
        base: Folder or Hub id of a checkpoint in safetensors.
        edge_blocks: Numbers of the lowest and uppermost blocks that the edge owns.
        model_class: A transformers model class, or an Auto class.
        with_head: Whether final norm and head are the cloud's.
        hub: See `transformers.PreTrainedModel.from_pretrained`.

    Returns:
        The model; path of its stack of blocks; indices of those that the cloud owns.

    Raises:
        ValueError: If the model has no stack of blocks, or the edge would own all of them.
    """
    concrete = _concrete(model_class, AutoConfig.from_pretrained(base, **of_files(hub)))
    # Under the module's name too: weights of what is not transformers' own are not renamed on loading.
    own = {"edge_blocks": edge_blocks, "with_head": with_head, "__module__": concrete.__module__}
    loads = type(concrete.__name__, (_LoadsOwn, concrete), own)
    model = loads.from_pretrained(base, use_safetensors=True, **hub)
    model.__class__ = concrete
    stack, span, taken = model.__dict__.pop("_taken_out")
    for name, part in taken.items():
        _empty(part)
        model.set_submodule(name, Skeleton(part) if name.startswith(f"{stack}.") else part)
    model.requires_grad_(False)  # the base model's weights are frozen, on both sides
    return model, stack, span


_OF_FILES = ("revision", "subfolder", "cache_dir", "token", "local_files_only", "force_download", "proxies")


class Skeleton(nn.Module):
    """Stands in the place of a block that the cloud owns, with the block's modules under their own names."""

    def __init__(self, block: nn.Module):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        self.__dict__.update(plain_facts(block))
        self.run: Callable[..., Any] | None = None
        self.elsewhere = True  # by which costs are counted

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What stands here is run by whoever connects the model; arguments are those of a block."""
        return self.run(*args, **kwargs)


class _LoadsOwn:
    """Stands before a model's class while it is loaded."""

    edge_blocks: tuple[int, int]
    with_head: bool

    @classmethod
    def _load_pretrained_model(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        stack, blocks = find_stack(model)
        span = check_span(cls.edge_blocks, len(blocks))
        taken = {f"{stack}.{index}": blocks[index] for index in span}
        if cls.with_head and model.get_output_embeddings() is None:
            raise ValueError(f"head='cloud': {cls.__name__} has no head that predicts tokens; use head='edge'.")
        if cls.with_head and not model.config.get_text_config().tie_word_embeddings:  # a tied one is the embedding's
            taken[_head_of(model)] = model.get_output_embeddings()
        for name in taken:
            model.set_submodule(name, nn.Module())
        # What is left unread is no mistake of the checkpoint, and nothing is to be said of it.
        unread = [rf"(^|\.){re.escape(name.removeprefix(model.base_model_prefix + '.'))}\." for name in taken]
        model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *unread}
        model.__dict__["_taken_out"] = stack, span, taken
        return super()._load_pretrained_model(model, *args, **kwargs)


def _head_of(model: PreTrainedModel) -> str:
    head = model.get_output_embeddings()
    return next(name for name, module in model.named_modules() if module is head)


def _empty(module: nn.Module) -> None:
    """Give weights that nobody computes with here the memory of one number, and projections a forward that is zero."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(_shown(parameter), requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, _shown(buffer), persistent=False)
        part._apply = _KeepsEmpty(part)
        if isinstance(part, (nn.Linear, Conv1D)):
            part.forward = _Nothing(part.nf if isinstance(part, Conv1D) else part.out_features)


def _shown(tensor: Tensor) -> Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def is_empty(tensor: Tensor) -> bool:
    """Whether a weight is elsewhere: what is here is one number, in its shape."""
    return tensor.numel() > 1 and not any(tensor.stride())


class _KeepsEmpty:
    """A module's `_apply`: what moves or casts a model must not write out its empty weights."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if recurse:
            for child in self.module.children():
                child._apply(fn)
        for parameter in self.module.parameters(recurse=False):
            parameter.data = fn(parameter.data.new_zeros(())).expand(parameter.shape)
        for name, buffer in self.module.named_buffers(recurse=False):
            self.module.register_buffer(name, fn(buffer.new_zeros(())).expand(buffer.shape), persistent=False)
        return self.module


class _Nothing:
    """A projection's forward without its weight: zeros, in the output's shape."""

    def __init__(self, out_features: int):
        self.out_features = out_features

    def __call__(self, x: Tensor) -> Tensor:
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features)


def of_files(hub: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files are, for whoever reads some of them."""
    return {name: hub[name] for name in _OF_FILES if name in hub}


def _concrete(model_class: Any, config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that an Auto class would choose."""
    if isinstance(model_class, type) and issubclass(model_class, PreTrainedModel):
        return model_class
    named = getattr(transformers, (config.architectures or [""])[0], None)
    choices = getattr(model_class, "_model_mapping", {})
    if type(config) not in choices:
        raise ValueError(
            f"model_class={model_class!r} has no model for {type(config).__name__}; give a class that has one."
        )
    choice = choices[type(config)]
    if isinstance(choice, tuple):
        return named if named in choice else choice[0]
    return choice
