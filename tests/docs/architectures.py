"""Writes docs/architectures.md from the tests' tiny models: ``python -m tests.docs.architectures``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2ft_peft import partition_model
from d2ft_peft.partition import Partition
from d2ft_peft.partition.architecture import _REFUSED, known_architecture
from d2ft_peft.partition.stacks import find_stacks
from tests.models import TINY
from tests.partition.test_decoders import DENSE, EXPERTS, build
from tests.zoo import ZOO
from tests.zoo_decoders import DECODERS
from tests.zoo_stacks import ENCODER_DECODERS, PAIRS, REFUSED, T5S, TOWERS, VISION_LANGUAGE


PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
HEAD = """\
# Architectures

Which models can be cut into heads, what of their blocks runs whole, and where D2FT knows it from. This page is made by
`python -m tests.docs.architectures` from the tiny models of the tests: every row that is cut is held against the
reference twin, outputs and every gradient, in float64 (float32 where a model's own code knows no float64), under random
schedules with all three operations, in full fine-tuning and LoRA.

D2FT asks three things in turn. A *table* of what shapes cannot tell (fused projections, sinks, ALiBi), to which
`d2ft_peft.register_architecture` adds. The *plan* for tensor parallelism that transformers ships for many decoders.
Else the *structure*: the list of blocks, query, key, value and output projections, and an FFN, by names and shapes.
What is found this way is tried before it is believed: the block's own code, with random stand-ins for its weights, must
return the same on some of its heads as the whole block with the other heads masked. What fails is refused, with the
reason; where only the FFN is not found, a warning names what runs whole in its place.

- **Cut** is what subnets share: heads of attention, and the same share of the FFN.
- **Runs whole** are the other layers with matrices in a block: they run in every micro-batch, and train if you say so.
- Embeddings, norms and task heads are never cut.
- Of a model with several stacks, `D2FTConfig(stacks=...)` chooses which are cut; without it an encoder-decoder is cut
  whole, and of a language model with towers the language model alone. Where by default a tower would be cut and the
  larger rest would not be, nothing is: whole blocks are the subnets, unless `stacks` names the tower.
"""
COLUMNS = ("Family", "`model_type`", "Cut", "Runs whole", "Known from")


OTHERS = """\
Known, and refused with these words. Their [whole blocks](bases.md#whole-blocks) are subnets, as are those of the rows
above that say *no*, and of every type that this page does not name and whose heads are not found."""


def page() -> str:
    """The text of the page."""
    sections = {
        "Text encoders": [row("BERT", TINY["bert"].build)],
        "Vision": [row("ViT", TINY["vit"].build)],
        "Speech": [],
    }
    refused = []
    for animal in ZOO.values():
        sections.get(animal.group.capitalize(), refused).append(row(animal.family, animal.build))
    decoders = {name: recipe.build for name, recipe in {"gpt2": TINY["gpt2"], **DECODERS}.items()}
    decoders = {name: partial(build, name, torch.float32) for name in (*DENSE, *EXPERTS)} | decoders
    sections["Decoders"] = sorted([*(row(name, make) for name, make in decoders.items()), *refused])
    several = {
        "Encoder-decoders": {**ENCODER_DECODERS, **T5S, **PAIRS},
        "Vision, sound and language": {**VISION_LANGUAGE, **TOWERS, **REFUSED},
    }
    for title, recipes in several.items():
        sections[title] = [row(name, recipe.build, recipe.stacks, of_stacks=True) for name, recipe in recipes.items()]
    listed = {one[1] for rows in sections.values() for one in rows}
    others = [(f"`{name}`", reason) for name, reason in sorted(_REFUSED.items()) if f"`{name}`" not in listed]
    parts = [HEAD]
    for title, rows in sections.items():
        parts.append("\n".join((f"## {title}\n", *_table(COLUMNS, rows), "")))
    parts.append("\n".join((f"## Others that are not cut\n\n{OTHERS}\n", *_table(("`model_type`", "Why"), others), "")))
    return "\n".join(parts)


def row(family: str, make: Callable[[], nn.Module], stacks: Any = None, of_stacks: bool = False) -> tuple[str, ...]:
    """One line of the table; with the stacks that are cut, where there are several."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make()
        model_type = f"`{model.config.model_type}`"
        try:
            partition = partition_model(model, stacks=stacks)
        except ValueError as error:
            return family, model_type, "no", _reason(str(error)), "-"
    branches = {"attention": "attention", "ffn": "FFN"}
    cut = ", ".join(text for branch, text in branches.items() if branch in {b.name for b in partition.branches})
    if of_stacks:
        names = dict.fromkeys(block.rpartition(".")[0].removeprefix("model.") for block in partition.blocks)
        cut += " of " + ", ".join(f"`{name}`" for name in names)
    sources = dict.fromkeys(_source(stack.config) for stack in find_stacks(model, stacks))
    return family, model_type, cut, ", ".join(_whole(model, partition)) or "-", ", ".join(sources)


def _reason(message: str) -> str:
    """What stands in the way, of a model of several parts in the first, without how else it could be described."""
    reason = message.partition("cannot be partitioned into heads: ")[2] or message
    for end in (". To schedule", "; describe", ".; "):
        reason = reason.partition(end)[0]
    return reason.rstrip(".")


def _whole(model: nn.Module, partition: Partition) -> Iterator[str]:
    """Layers with matrices in a block that no head owns; blocks may differ."""
    seen: dict[str, None] = {}
    holders = tuple(name for name in partition.boundary if any(p.startswith(f"{name}.") for p in partition.projections))
    for name in (name for name in partition.boundary if name not in holders):  # those have biases or sinks of their own
        block = next((block for block in partition.blocks if name.startswith(f"{block}.")), None)
        if block is not None and any(p.ndim > 1 and min(p.shape) > 1 for p in model.get_submodule(name).parameters()):
            seen[f"`{name.removeprefix(block + '.')}`"] = None
    for branch in partition.branches:
        seen |= {f"`{name.removeprefix(partition.blocks[branch.block] + '.')}`": None for name in branch.whole}
    return iter(seen)


def _source(config: Any) -> str:
    if known_architecture(config.model_type, config) is not None:
        return "table"
    return "plan" if getattr(config, "base_model_tp_plan", None) else "structure"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(columns) + " |"
    yield "|" + " :-- |" * len(columns)
    for cells in rows:
        yield "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page())
