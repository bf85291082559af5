"""What a `LoraConfig` can ask for runs head by head as well: equal to plain LoRA under masks, in float64."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.reference import reference_forward
from tests.tuners.test_equality import LORA, assert_same_gradients, random_rows, step


FIELDS = {
    "ranks and scales by module": {"rank_pattern": {"fc1": 2, "q_proj": 3}, "alpha_pattern": {"o_proj": 9}},
    "rsLoRA": {"use_rslora": True},
    "a bias in B": {"lora_bias": True},
    "all biases": {"bias": "all"},
    "the biases of adapted layers": {"bias": "lora_only"},
    "some blocks": {"layers_to_transform": [1, 2], "layers_pattern": "layers"},
    "without some modules": {"exclude_modules": ["q_proj", "fc2"]},
    "a head of its own": {"modules_to_save": ["classifier"]},
}
TEXT_FIELDS = {
    "tokens": {"trainable_token_indices": [5, 6, 7, 8]},
    "ranks and scales by module": {"rank_pattern": {"up_proj": 2, "k_proj": 3}, "alpha_pattern": {"o_proj": 9}},
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VIT, LLAMA = [*ATTENTION, "fc1", "fc2"], [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def pair(name, fields, targets):
    """A D2FT model and plain LoRA with the same weights."""
    base, models = TINY[name].build().double(), []
    for cls in (D2FTConfig, LoraConfig):
        torch.manual_seed(7)
        models.append(get_peft_model(copy.deepcopy(base), cls(**LORA, **fields, target_modules=targets)).train())
    ours, theirs = (dict(model.named_parameters()) for model in models)
    assert ours.keys() == theirs.keys()
    for parameter_name, parameter in theirs.items():
        ours[parameter_name].data.copy_(parameter.data)
    return models


def assert_equal_under_plans(model, twin, batch, seed, n):
    base = twin.base_model.model
    partition = partition_model(base)
    for row in random_rows(partition, seed=seed, n=n):
        with reference_forward(base, partition, row):
            expected = step(twin, batch)
        with get_runtime(model).use(compile_plan(partition, row)):
            outputs = step(model, batch)
        torch.testing.assert_close(outputs.logits, expected.logits)
        assert_same_gradients(model, twin, "lora")


@pytest.mark.quick(3)
@pytest.mark.parametrize(
    ("name", "fields", "targets"),
    [*(pytest.param("vit", fields, VIT, id=f"vit, {key}") for key, fields in FIELDS.items()),
     *(pytest.param("llama", fields, LLAMA, id=f"llama, {key}") for key, fields in TEXT_FIELDS.items())],
)  # fmt: skip
def test_fields_of_lora_equal_plain_lora_under_masks(name, fields, targets):
    model, twin = pair(name, fields, targets)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    assert_equal_under_plans(model, twin, batch, seed=3, n=2)


def test_two_active_adapters_add_up():
    model, twin = pair("llama", {}, LLAMA)
    for one, cls in ((model, D2FTConfig), (twin, LoraConfig)):
        torch.manual_seed(8)
        one.add_adapter("other", cls(**{**LORA, "r": 2}, target_modules=["q_proj", "down_proj"]))
        one.double().base_model.set_adapter(["default", "other"])
    assert_equal_under_plans(model, twin, TINY["llama"].batch(), seed=4, n=1)
