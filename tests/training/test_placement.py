"""Where weights lie, and in which types: D2FT with every subnet FULL does what PEFT's LoRA does; what cannot train says
so."""

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from peft import LoraConfig, get_peft_model
from transformers import Trainer

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model
from d2ft_peft.engine.plan import Heads
from d2ft_peft.engine.subset_linear import HeadAxis, SubsetLayer, subset_linears
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples, trained


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def mixed(model):
    """Half precision, with norms and head in full."""
    model.bfloat16()
    for module in (model.model.norm, model.lm_head, *(layer.input_layernorm for layer in model.model.layers)):
        module.float()


def tied(model):
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight


def resized(model):
    model.resize_token_embeddings(70, mean_resizing=False)


def dispatched(model):
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)


CASES = {
    "bfloat16": (torch.nn.Module.bfloat16, None, {}, {}),
    "float16": (torch.nn.Module.half, None, {}, {}),
    "some layers in float32, under autocast": (mixed, None, {}, {"bf16": True}),
    "tied head, saved": (tied, None, {"modules_to_save": ["lm_head"]}, {}),
    "resized before, embeddings saved": (resized, None, {"modules_to_save": ["embed_tokens", "lm_head"]}, {}),
    "resized after": (None, resized, {}, {}),
    "new tokens": (None, None, {"trainable_token_indices": [3, 5]}, {}),
    "dispatched before": (dispatched, None, {}, {}),
    "dispatched after": (None, dispatched, {}, {}),
}


def adapted(case, cls, **config):
    before, after, fields, _ = CASES[case]
    model = TINY["llama"].build(0)
    if before:
        before(model)
    torch.manual_seed(5)
    model = get_peft_model(model, cls(r=4, init_lora_weights=False, **fields, **config))
    if after:
        torch.manual_seed(6)
        after(model)
    return model


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_lora_does(tmp_path, case):
    args = arguments(tmp_path, max_steps=2, **CASES[case][3])
    plain = adapted(case, LoraConfig, target_modules=PROJECTIONS)
    ours = adapted(case, D2FTConfig, policy="all_full", skip_unread_rows=False)
    for cls, model in ((Trainer, plain), (D2FTTrainer, ours)):
        cls(model=model, args=args, train_dataset=samples("llama")).train()
    assert_equal(trained(ours), trained(plain))


@pytest.mark.quick(1)
@pytest.mark.parametrize("config", [{"r": 4}, {}])
def test_heads_of_a_dispatched_model_run_as_those_of_one_that_lies_in_one_place(tmp_path, config):
    found = []
    for place in (None, dispatched):
        model = TINY["llama"].build(0)
        if place:
            place(model)
        torch.manual_seed(5)
        model = get_peft_model(model, D2FTConfig(policy="random", compute_budget=0.5, **config))
        D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples("llama")).train()
        found.append(trained(model))
    assert_equal(*found)


@pytest.mark.parametrize("config", [{"r": 4}, {}])
def test_training_of_offloaded_weights_is_refused(tmp_path, config):
    model = TINY["llama"].build(0)
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path / "weights"))
    says = "are on the meta device: a device_map offloads them .* names devices only" if config else "is offloaded by"
    with pytest.raises(ValueError, match=says):
        model = get_peft_model(model, D2FTConfig(**config))
        D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples("llama")).train()


def test_heads_of_an_offloaded_base_are_refused():
    model = TINY["llama"].build(0)
    cpu_offload(model, execution_device="cpu")
    projection = next(iter(partition_model(model).projections.values()))
    layer = SubsetLayer(model.get_submodule(projection.name).weight, None, HeadAxis(projection.kind, projection.layout))
    with pytest.raises(ValueError, match="is on the meta device .* its heads cannot be taken"):
        subset_linears(torch.ones(1, projection.in_features), [layer], Heads((0,)))
