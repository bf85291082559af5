"""The contract with PEFT's registries, on which saving, loading and transformers' own PEFT integration rest."""

import json
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from packaging.version import parse
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from transformers import AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

from d2ft_peft import D2FTConfig, D2FTType, register
from d2ft_peft.engine import get_runtime
from d2ft_peft.tuners import D2FTLoraModel, D2FTModel
from tests.tuners.cases import config_for, fresh, logits, same, trained


EXPECTED = {
    "D2FT": (D2FTConfig, D2FTModel, "d2ft_"),
    "D2FT_LORA": (D2FTConfig, D2FTLoraModel, "lora_"),
}
MAPPINGS = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)


def entries() -> dict[str, tuple]:
    return {kind: tuple(mapping[kind] for mapping in MAPPINGS) for kind in EXPECTED}


@pytest.mark.parametrize("kind", D2FTType)
def test_the_three_mappings_know_both_types(kind):
    assert tuple(mapping[kind] for mapping in MAPPINGS) == EXPECTED[kind.value]
    # A type is looked up by the member, and by the string that adapter_config.json holds.
    assert tuple(mapping[kind.value] for mapping in MAPPINGS) == EXPECTED[kind.value]
    assert json.loads(json.dumps(kind)) == kind.value


def test_registering_again_changes_nothing():
    sizes = [len(mapping) for mapping in MAPPINGS]
    register(D2FTType.D2FT, D2FTConfig, D2FTModel)
    assert [len(mapping) for mapping in MAPPINGS] == sizes
    assert entries() == EXPECTED


@pytest.mark.thorough
def test_a_reload_is_harmless():
    """In a process of its own: a reload leaves two classes of every name behind."""
    program = """
import importlib, d2ft_peft
from peft import PeftConfig
from tests.test_peft_type import MAPPINGS
sizes = [len(mapping) for mapping in MAPPINGS]
importlib.reload(importlib.import_module("d2ft_peft.tuners.peft_type"))
importlib.reload(d2ft_peft)
assert [len(mapping) for mapping in MAPPINGS] == sizes
assert PeftConfig.from_peft_type(peft_type="D2FT").peft_type == "D2FT"
"""
    root = Path(__file__).parents[1]
    process = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_another_method_under_our_name_is_refused():
    class Foreign(D2FTModel):
        pass

    with pytest.raises(ValueError, match="PEFT already has a method 'D2FT' .*; cannot register .*Foreign"):
        register(D2FTType.D2FT, D2FTConfig, Foreign)
    assert entries() == EXPECTED


def test_another_prefix_under_our_name_is_refused(monkeypatch):
    monkeypatch.setattr(D2FTModel, "prefix", "other_")
    with pytest.raises(ValueError, match="PEFT already has a method 'D2FT' .*cannot register 'other_'"):
        register(D2FTType.D2FT, D2FTConfig, D2FTModel)


@pytest.mark.skipif(
    parse(peft.__version__) < parse(MIN_PEFT_VERSION),
    reason=f"this transformers refuses every adapter of PEFT {peft.__version__}: it asks for {MIN_PEFT_VERSION}",
)
@pytest.mark.parametrize("mode", ["full", "boundary", "lora"])
def test_transformers_own_integration(mode, tmp_path):
    """``PreTrainedModel.add_adapter`` and ``load_adapter`` look types up by ``.value`` and derive the prefix."""
    model = fresh("llama")
    model.add_adapter(config_for(mode))
    assert get_runtime(model).partitions.keys() == {"default"}

    adapter = trained("llama", mode)
    adapter.save_pretrained(tmp_path / "adapter")
    fresh("llama").save_pretrained(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded.load_adapter(str(tmp_path / "adapter"))
    same(logits(loaded, "llama"), logits(adapter, "llama"))
