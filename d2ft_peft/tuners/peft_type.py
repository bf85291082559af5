"""Registration of D2FT with PEFT.

`peft.utils.register_peft_method` accepts members of PEFT's closed `PeftType` enum only. PEFT itself looks methods up
in three mappings, which take any key; transformers asks the key for its ``.value``, hence an enum of our own.
"""

from __future__ import annotations

from enum import StrEnum

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING


class D2FTType(StrEnum):
    """The two variants of D2FT as PEFT types; both are configured by `D2FTConfig`."""

    D2FT = "D2FT"
    """Full fine-tuning of the subnets."""
    D2FT_LORA = "D2FT_LORA"
    """LoRA on the subnets; on disk it is a plain LoRA adapter."""

    def __str__(self) -> str:
        # As PEFT's own types print: it reports what stands behind the point.
        return f"{type(self).__name__}.{self.name}"


def register(peft_type: D2FTType, config_cls: type, tuner_cls: type) -> None:
    """Make `get_peft_model`, saving, loading and the Auto classes know a variant.

    Registering the same classes again changes nothing, so that a reload of the package is harmless.

    Raises:
        ValueError: If PEFT already has another method or another prefix under this name.
    """
    for mapping, value in (
        (PEFT_TYPE_TO_CONFIG_MAPPING, config_cls),
        (PEFT_TYPE_TO_TUNER_MAPPING, tuner_cls),
        (PEFT_TYPE_TO_PREFIX_MAPPING, tuner_cls.prefix),
    ):
        known = mapping.get(peft_type, value)
        if _name(known) != _name(value):
            raise ValueError(f"PEFT already has a method {peft_type.value!r} ({known!r}); cannot register {value!r}.")
        mapping[peft_type] = value


def _name(registered: type | str) -> str:
    return f"{registered.__module__}.{registered.__qualname__}" if isinstance(registered, type) else registered
