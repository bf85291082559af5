"""The stacks of blocks in a model, in the order in which they run, and which of them are scheduled."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

from .architecture import Architecture
from .branches import has_module
from .find_architecture import find_architecture
from .whole_blocks import lists_of_blocks, size_of


# Towers that see inputs of their own, and whose outputs meet after the last block of both.
_SIDE_BY_SIDE = frozenset({
    "align", "altclip", "chinese_clip", "clap", "clip", "clipseg", "clvp", "groupvit", "metaclip_2", "owlv2",
    "owlvit", "siglip", "siglip2", "vision-text-dual-encoder", "x_clip",
})  # fmt: skip


@dataclass(frozen=True)
class FoundStack:
    """A stack of blocks that can be cut.

    Attributes:
        name: Path of the module that holds the blocks.
        blocks: The blocks.
        architecture: What is in each.
        config: Configuration of the part of the model that it belongs to.
        reads: See `Stack`.
    """

    name: str
    blocks: nn.ModuleList
    architecture: Architecture
    config: Any
    reads: Literal["inputs", "before", "states"]


def find_stacks(model: nn.Module, chosen: str | Sequence[str] | None = None) -> list[FoundStack]:
    """The stacks that are to be scheduled, in the order in which they run.

    Args:
        model: The transformers model.
        chosen: Paths of stacks, or of modules around them; what is around a path may be left out (``"decoder"``,
            ``"vision_tower"``). None is every stack of a model with one configuration, of encoder-decoders and of
            towers side by side (CLIP), and the language model alone of one that has towers before it.

    Raises:
        ValueError: If there is none, or `chosen` names something else; the message lists those that there are.
    """
    found, refused = [], {}
    parts = _parts(model)
    for prefix, part in parts:
        try:
            found += _stacks_of(prefix, part)
        except ValueError as error:
            refused[prefix] = error
    if len(parts) == 1 and refused:
        raise next(iter(refused.values()))
    found = _related(model, found)
    if chosen is not None:
        return _chosen(model, found, [chosen] if isinstance(chosen, str) else list(chosen), refused)
    default = _default(model, found, refused)
    if not default:
        raise ValueError(
            f"no stack of {type(model).__name__} can be cut into heads: "
            + "; ".join(f"{prefix}: {error}" for prefix, error in refused.items())
        )
    return default


def _parts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The model, or where it is put together of several with configurations of their own, those: path and module."""
    config = getattr(model, "config", None)
    inner = list(_inner(model, "", config)) if getattr(config, "sub_configs", None) else []
    return inner or [("", model)]


def _inner(module: nn.Module, prefix: str, config: Any) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name == "d2ft_layers":  # an adapter's copies of what stands beside them
            continue
        path = f"{prefix}.{name}".lstrip(".")
        own = getattr(child, "config", None)
        if isinstance(child, PreTrainedModel) and type(own) is not type(config):
            nested = list(_inner(child, path, own)) if getattr(own, "sub_configs", None) else []
            yield from nested or [(path, child)]
        else:
            yield from _inner(child, path, config)


def _stacks_of(prefix: str, part: nn.Module) -> list[FoundStack]:
    """The stacks of a model with one configuration."""
    architectures = find_architecture(part)
    several = isinstance(architectures, tuple)
    found = []
    for architecture in architectures if several else (architectures,):
        lists = _lists_of_blocks(part, architecture)
        if len(lists) > 1 or (not lists and not several):
            raise ValueError(
                f"expected one stack of blocks named {architecture.blocks!r} in {type(part).__name__}, found "
                f"{len(lists)} ({', '.join(name for name, _ in lists) or 'none'}); describe the stacks one by one "
                "with d2ft_peft.register_architecture."
            )
        for name, blocks in lists:
            reads = "states" if architecture.cross_attention is not None else "inputs"
            found.append(FoundStack(f"{prefix}.{name}".lstrip("."), blocks, architecture, part.config, reads))
    if not found:
        raise ValueError(f"{type(part).__name__} holds none of the stacks that its model type promises.")
    return found


def _lists_of_blocks(model: nn.Module, architecture: Architecture) -> list[tuple[str, nn.ModuleList]]:
    """The ModuleLists of the model whose children hold the architecture's projections."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and (name == architecture.blocks or name.endswith("." + architecture.blocks))
        and any(has_module(block, architecture.attention.row) for block in module)
    ]


def _related(model: nn.Module, found: list[FoundStack]) -> list[FoundStack]:
    """Stacks in the order in which they run, with what each reads of the others."""
    text = _text_config(model)
    if text is not None:  # towers make what the language model reads
        found = sorted(found, key=lambda stack: stack.config is text)
    side_by_side = getattr(model.config, "model_type", None) in _SIDE_BY_SIDE
    related = []
    for stack in found:
        reads = stack.reads
        if reads == "inputs" and stack.config is text and related and not side_by_side:
            reads = "before"
        related.append(FoundStack(stack.name, stack.blocks, stack.architecture, stack.config, reads))
    return related


def _text_config(model: nn.Module) -> Any:
    """Configuration of the language model within a model that is more than that, or None."""
    config = getattr(model, "config", None)
    if not getattr(config, "sub_configs", None) or getattr(config, "is_encoder_decoder", False):
        return None
    text = config.get_text_config()
    return None if text is config else text


def _default(model: nn.Module, found: list[FoundStack], refused: dict[str, ValueError]) -> list[FoundStack]:
    text = _text_config(model)
    if text is None or model.config.model_type in _SIDE_BY_SIDE:
        if getattr(model.config, "sub_configs", None):
            _check_covers(model, found, refused)
        return found
    of_text = [stack for stack in found if stack.config is text]
    if not of_text and found:
        raise ValueError(
            f"the language model of {type(model).__name__} cannot be cut into heads: "
            + "; ".join(f"{prefix}: {error}" for prefix, error in refused.items())
            + f" To schedule another of its stacks, name it in `stacks`: {', '.join(stack.name for stack in found)}."
        )
    return of_text


def _check_covers(model: nn.Module, found: list[FoundStack], refused: dict[str, ValueError]) -> None:
    """Refuse to schedule some tower of a model by default, and nothing of what else computes much.

    Raises:
        ValueError: With the stacks that can be cut.
    """
    names = {stack.name for stack in found}
    covered = sum(size_of(stack.blocks) for stack in found)
    others = [
        name
        for name in lists_of_blocks(model)
        if 2 * size_of(model.get_submodule(name)) >= covered
        and not any(f"{stack}.".startswith(f"{name}.") or name.startswith(f"{stack}.") for stack in names)
    ]
    if others and found:
        why = [str(error) for prefix, error in refused.items() if f"{others[0]}.".startswith(f"{prefix}.")]
        why = why or ["only parts with a configuration of their own are looked at"]
        raise ValueError(
            f"{others[0]} of {type(model).__name__} cannot be cut into heads ({'; '.join(why)}). To schedule others "
            f"of its stacks, name them in `stacks`: {', '.join(stack.name for stack in found)}."
        )


def _chosen(
    model: nn.Module, found: list[FoundStack], chosen: list[str], refused: dict[str, ValueError]
) -> list[FoundStack]:
    for name in chosen:
        if not any(_names(name, stack.name) for stack in found):
            reasons = [f"{prefix}: {error}" for prefix, error in refused.items() if _names(name, prefix)]
            raise ValueError(
                f"stacks={chosen!r} names {name!r}, which is no stack of {type(model).__name__} that can be cut "
                f"into heads; its stacks are {', '.join(stack.name for stack in found) or 'none'}."
                + "".join(f" ({reason})" for reason in reasons)
            )
    return [stack for stack in found if any(_names(name, stack.name) for name in chosen)]


def _names(given: str, path: str) -> bool:
    """Whether a name is a path, or some successive parts of it."""
    return f".{given}." in f".{path}."
