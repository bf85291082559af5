"""Whole blocks as subnets: for models whose blocks cannot be cut into heads, or are not to be. A model without blocks
that can be told apart is one subnet."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from .gauges import Stack
from .partition import Branch, Partition, Subnet


ASKED = "as asked for"
_LISTS = (nn.ModuleList, nn.Sequential)


def partition_into_blocks(model: nn.Module, why: str = ASKED) -> Partition:
    """Make every block of a model one subnet.

    The blocks are those of the list that holds most of the model's parameters: an ``nn.ModuleList`` (or
    ``nn.Sequential``) of modules that run one after the other on hidden states. An encoder-decoder has two such lists;
    where a list holds stages of different widths, the blocks are those within the stages. That they really run so shows
    at the first look at a batch (`probe_model`).

    Args:
        model: The model, with or without PEFT layers in it; it need not be a transformers model.
        why: Why its blocks are not cut into heads.

    A model without such a list, or whose list holds one block several times, or is one of several that take turns
    (XLM's attention and feed-forward networks), is one subnet: what is around the list, or else the whole model.
    """
    names = _find_blocks(model)
    if not names:
        why = f"{why}; {type(model).__name__} has no list of two or more blocks that run one after the other"
        names = [_one_subnet(model)]
    return Partition(
        model_type=getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__,
        branches=tuple(Branch("block", index, name) for index, name in enumerate(names)),
        subnets=tuple(Subnet(index, index, (0,)) for index in range(len(names))),
        blocks=tuple(names),
        boundary=tuple(boundary(model, "", set(names))),
        heads_per_subnet=1,
        stacks=(Stack(names[0].rpartition(".")[0], 0, len(names)),),
        why_whole=why,
    )


def modules_with_weights(module: nn.Module, name: str) -> list[str]:
    """Paths of the smallest modules that hold a module's parameters, and can be exchanged for others.

    Args:
        module: The module.
        name: Its path.
    """
    if next(module.parameters(), None) is None:
        return []
    if hasattr(module, "base_layer") or next(module.parameters(recurse=False), None) is not None:
        return [name]
    children = ((f"{name}.{child}".lstrip("."), part) for child, part in module.named_children())
    return [path for child, part in children for path in modules_with_weights(part, child)]


def boundary(module: nn.Module, prefix: str, owned: set[str]) -> list[str]:
    """Largest modules with parameters and without what subnets own, and those with parameters of their own beside it.

    Args:
        module: The module that is looked at.
        prefix: Its path.
        owned: Paths of the modules whose weights are the subnets'.
    """
    if prefix in owned or next(module.parameters(), None) is None:
        return []
    is_list = isinstance(module, nn.ModuleList | nn.ModuleDict)  # is looked into by its owner, and never called
    if prefix and not is_list and not any(name.startswith(prefix + ".") for name in owned):
        return [prefix]
    own = [prefix] if next(module.parameters(recurse=False), None) is not None else []
    children = module.named_children()
    return own + [path for name, child in children for path in boundary(child, f"{prefix}.{name}".lstrip("."), owned)]


def boundary_below(base: nn.Module, partition: Partition, stack: Stack | None = None) -> tuple[str, ...]:
    """Boundary modules on the way into a stack (the first one by default): in the model's own order those before its
    blocks, back to the blocks of another stack."""
    order = {name: place for place, (name, _) in enumerate(base.named_modules(remove_duplicate=False))}
    first = order[partition.blocks[0 if stack is None else stack.first]]
    before = [name for name in partition.blocks if order[name] < first]
    last, inside = max(map(order.get, before), default=-1), tuple(f"{name}." for name in before)
    return tuple(
        name for name in partition.boundary if last < order[name] < first and not f"{name}.".startswith(inside)
    )


def boundary_parameters(base: nn.Module, partition: Partition, name: str) -> list[nn.Parameter]:
    """Parameters of a boundary module; of one that holds subnets only its own."""
    return list(base.get_submodule(name).parameters(recurse=not holds_subnets(partition, name)))


def holds_subnets(partition: Partition, name: str) -> bool:
    """Whether a boundary module is listed for parameters of its own, beside projections of subnets that it holds."""
    prefix = f"{name}." if name else ""
    return any(owned.startswith(prefix) for owned in partition.owned)


def _find_blocks(model: nn.Module) -> list[str]:
    """Paths of the blocks; none where there are not two of their own, or others run between them."""
    lists = lists_of_blocks(model)
    by_size = sorted(lists, key=lambda name: -size_of(model.get_submodule(name)))
    two_stacks = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    chosen = [name for name in lists if name in by_size[: 2 if two_stacks else 1]]
    if any(_takes_turns(model, name, lists) for name in chosen):
        return []
    names = [path for name in chosen for path in _blocks_of(model.get_submodule(name), name)]
    blocks = [model.get_submodule(name) for name in names]
    return names if len(set(blocks)) == len(blocks) > 1 else []


def _takes_turns(model: nn.Module, name: str, lists: list[str]) -> bool:
    """Whether a list has another one beside it, of as many modules and of a size that counts."""
    blocks, beside = model.get_submodule(name), name.rpartition(".")[0]
    others = [model.get_submodule(n) for n in lists if n != name and n.rpartition(".")[0] == beside]
    return any(len(other) == len(blocks) and 10 * size_of(other) > size_of(blocks) for other in others)


def _one_subnet(model: nn.Module) -> str:
    """Path of the module that runs the only list of blocks, if that is most of the model; else of the model: ""."""
    lists = sorted(lists_of_blocks(model, "", like=True), key=lambda name: -size_of(model.get_submodule(name)))
    path = lists[0] if lists else ""
    while isinstance(model.get_submodule(path), nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    tables = sum(size_of(module) for module in model.modules() if isinstance(module, nn.Embedding))
    return path if 2 * size_of(model.get_submodule(path)) >= size_of(model) - tables else ""


def _blocks_of(blocks: nn.Module, name: str) -> list[str]:
    """Paths of a list's blocks, or of those within its stages."""
    children = [(f"{name}.{index}", child) for index, child in blocks._modules.items()]
    alike = all(_shapes(a) == _shapes(b) for (_, a), (_, b) in pairwise(children))
    within = [] if alike else [lists_of_blocks(child, path, like=True) for path, child in children]
    if not within or not all(within):
        return [path for path, _ in children]
    stages = [path for paths in within for path in paths]
    return [f"{stage}.{index}" for stage in stages for index in _at(blocks, name, stage)._modules]


def _at(module: nn.Module, prefix: str, path: str) -> nn.Module:
    return module.get_submodule(path.removeprefix(prefix + "."))


def lists_of_blocks(module: nn.Module, prefix: str = "", like: bool = False) -> list[str]:
    """Paths of the lists of blocks in a module that are in no other such list, in its order."""
    found = []
    for name, child in module.named_children():
        path = f"{prefix}.{name}".lstrip(".")
        if _is_list_of_blocks(child, like):
            found.append(path)
        else:
            found += lists_of_blocks(child, path, like)
    return found


def _is_list_of_blocks(module: nn.Module, like: bool) -> bool:
    """Whether a module is a list of at least two modules that are themselves made of others.

    Args:
        module: The module.
        like: Whether they must be of one class, as in ``nn.Sequential``, which may hold anything.
    """
    if not isinstance(module, _LISTS) or len(module) < (1 if like else 2):
        return False
    children = list(module._modules.values())  # repeated ones as well
    one_class = len({type(child) for child in children}) == 1
    composed = all(size_of(child) and next(child.children(), None) is not None for child in children)
    return composed and (one_class or not (like or isinstance(module, nn.Sequential)))


def _shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return sorted(tuple(parameter.shape) for parameter in module.parameters())


def size_of(module: nn.Module) -> int:
    """Number of its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())
