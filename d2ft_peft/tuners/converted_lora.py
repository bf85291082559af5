"""LoRA that began by changing the base (PiSSA, OLoRA, CorDA), written as one that leaves it as it is."""

from __future__ import annotations

import os
from typing import Any

from peft import PeftModel, load_peft_weights, set_peft_model_state_dict
from torch import Tensor

from .config import D2FTConfig


def subtract_initial_adapter(
    peft_model: PeftModel, path: str | os.PathLike, state_dict: dict[str, Tensor], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """The trained adapter minus the one that training began with, as a LoRA of twice the rank.

    PEFT does so with the initial adapter loaded beside the trained one, which it refuses here: on disk that is a plain
    LoRA adapter, and in the model it is one of D2FT.

    Args:
        peft_model: The trained model.
        path: Where it was saved before the first step.
        state_dict: The trained adapter.
        kwargs: What ``save_pretrained`` was given besides.
    """
    path = os.fspath(path)
    name = os.path.basename(path.rstrip(os.sep))
    config = D2FTConfig.from_pretrained(path)
    config.init_lora_weights = True  # any other would look at a base that was changed already
    peft_model.add_adapter(name, config)
    try:
        set_peft_model_state_dict(peft_model, load_peft_weights(path, device="cpu"), adapter_name=name)
        return peft_model.base_model.subtract_mutated_init(state_dict, name, kwargs)
    finally:
        peft_model.delete_adapter(name)
