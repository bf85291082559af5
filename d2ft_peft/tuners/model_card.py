"""What a D2FT adapter's model card says about loading it."""

from __future__ import annotations

import os

from huggingface_hub import ModelCard


_FULL_NOTE = """<!-- d2ft -->
> This adapter holds weights fully fine-tuned by D2FT. Install the package and import it before you load the adapter:
>
> ```
> pip install d2ft_peft
> ```
> ```python
> import d2ft_peft  # registers the adapter type with PEFT
> ```
"""

_LORA_NOTE = """<!-- d2ft -->
> This is a plain LoRA adapter, trained by D2FT: it loads, merges and serves with PEFT alone.
"""


def mark_model_card(directory: str | os.PathLike, is_lora: bool) -> None:
    """Tag the card in `directory` with ``d2ft`` and say on top how to load the adapter. A file without
    a card's metadata, such as a project's README, stays as it is.

    Args:
        directory: Folder of the saved adapter.
        is_lora: Which of the two variants the adapter is.
    """
    path = os.path.join(directory, "README.md")
    if not os.path.isfile(path):
        return
    card = ModelCard.load(path, ignore_metadata_errors=True)
    if not card.data.to_dict():
        return
    tags = list(card.data.tags or [])
    # PEFT tags the adapters of its own type LORA, which this one becomes on disk.
    card.data.tags = sorted({*tags, "d2ft", *(["lora"] if is_lora else [])})
    if "<!-- d2ft -->" not in card.text:
        card.text = "\n" + (_LORA_NOTE if is_lora else _FULL_NOTE) + card.text
    card.save(path)
