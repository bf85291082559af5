"""PEFT's ways to begin LoRA, under D2FT: the same start, the same training, a plain adapter on disk."""

import copy

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, initialize_lora_eva_weights
from transformers import Trainer

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples, trained


WAYS = {
    "pissa": {"init_lora_weights": "pissa"},
    "eva": {"init_lora_weights": "eva", "eva_config": EvaConfig()},
    "rslora": {"use_rslora": True, "init_lora_weights": "gaussian"},
}


def begin(base, cls, way, **config):
    torch.manual_seed(5)
    model = get_peft_model(copy.deepcopy(base), cls(r=4, lora_alpha=6, **WAYS[way], **config))
    if way == "eva":
        batch = TINY["llama"].batch(4)
        batch.pop("labels")
        initialize_lora_eva_weights(model, [batch] * 3, show_progress_bar=False)
    return model


def logits(model):
    with torch.no_grad():
        return model.eval()(**TINY["llama"].batch(4)).logits


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage=False")
@pytest.mark.parametrize("way", WAYS)
def test_they_begin_train_and_load_as_under_lora(tmp_path, way):
    base = TINY["llama"].build()
    plain = begin(base, LoraConfig, way, target_modules=list(partition_model(base).projections))
    ours = begin(base, D2FTConfig, way, policy="all_full")
    assert_equal(trained(ours), trained(plain))
    assert torch.equal(logits(ours), logits(plain))
    torch.testing.assert_close(logits(ours), logits(base), rtol=1e-5, atol=1e-6)
    args = arguments(tmp_path / "run")
    Trainer(model=plain, args=args, train_dataset=samples("llama")).train()
    D2FTTrainer(model=ours, args=args, train_dataset=samples("llama")).train()
    assert_equal(trained(ours), trained(plain))
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert loaded.peft_config["default"].peft_type == "LORA"
    torch.testing.assert_close(logits(loaded), logits(ours), rtol=1e-5, atol=1e-6)


def test_an_adapter_that_changed_its_base_is_converted_to_one_that_leaves_it_alone(tmp_path):
    """By ``path_initial_model_for_weight_conversion`` of PEFT: LoRA of twice the rank on the base as it was."""
    base = TINY["llama"].build()
    model = begin(base, D2FTConfig, "pissa", compute_budget=0.5)
    model.save_pretrained(tmp_path / "initial")
    D2FTTrainer(model=model, args=arguments(tmp_path / "run"), train_dataset=samples("llama")).train()
    before = logits(model)
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    assert torch.equal(logits(model), before) and list(model.peft_config) == ["default"]
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "lora")
    config = loaded.peft_config["default"]
    assert (config.peft_type, config.r, config.init_lora_weights) == ("LORA", 8, True)
    torch.testing.assert_close(logits(loaded), before, rtol=1e-5, atol=1e-5)
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(base))
