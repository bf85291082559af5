"""Adapters that are refused when they are made: what could not train, stand beside others, or be loaded again."""

import types

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload, dispatch_model
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.scores import weight_magnitude
from d2ft_peft.tuners.adapter_checks import is_dense
from tests.models import TINY
from tests.tuners.cases import adapted, config_for, fresh, logits, same, train_briefly


class Quantized(torch.Tensor):
    """A stand-in for torchao's int8 weights: a tensor class of its own in an ordinary nn.Linear."""


def quantized(kind):
    model = fresh("llama")
    linear = model.model.layers[1].mlp.up_proj
    if kind == "subclass":
        linear.weight = nn.Parameter(linear.weight.data.as_subclass(Quantized), requires_grad=False)
    else:
        linear.weight = nn.Parameter(linear.weight.data.to(kind), requires_grad=False)
    return model


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["subclass", torch.int8, torch.float8_e4m3fn])
def test_weights_that_cannot_be_cut_are_refused(kind):
    where = "the weight of model.layers.1.mlp.up_proj is a .*, which cannot be "
    with pytest.raises(ValueError, match=where + "cut into heads as policy='bilevel' does; choose policy='exact_"):
        get_peft_model(quantized(kind), D2FTConfig(r=4, policy="bilevel", subnets="heads"))
    with pytest.warns(UserWarning, match="the subnets are the 3 whole blocks .* because heads are not cut: " + where):
        model = get_peft_model(quantized(kind), D2FTConfig(r=4, policy="bilevel"))
    assert get_runtime(model).partitions["default"].num_scheduled == 3
    with pytest.raises(ValueError, match=where + "fine-tuned; set r"):
        get_peft_model(quantized(kind), D2FTConfig(policy="all_full"))


class QuantLinear(nn.Linear):
    """A stand-in for GPTQ's and AWQ's layers: integers, scales, a forward of its own. PEFT takes it for a linear."""

    def __init__(self, dense: nn.Linear):
        super().__init__(dense.in_features, dense.out_features, bias=False)
        scales = dense.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scales", scales)
        self.register_buffer("qweight", (dense.weight.detach() / scales).round().to(torch.int8))
        del self.weight
        self.weight = types.SimpleNamespace(shape=(self.out_features, self.in_features))  # as GPTQ's

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scales)


def with_quant_linears(dense=False):
    model = fresh("llama")
    for block in model.model.layers:
        layer = QuantLinear(block.mlp.up_proj)
        if dense:
            block.mlp.up_proj.weight.data.copy_(layer.qweight * layer.scales)
        else:
            block.mlp.up_proj = layer
    return model


def test_quantized_layers_of_an_unknown_kind_run_whole():
    """Whole samples under the default policy, whole blocks under one that would cut heads."""
    with pytest.raises(
        ValueError, match="up_proj is a QuantLinear, which cannot be cut into heads as policy='bilevel'"
    ):
        get_peft_model(with_quant_linears(), D2FTConfig(r=4, policy="bilevel", subnets="heads"))
    with pytest.warns(UserWarning, match="the subnets are the 3 whole blocks .*up_proj is a QuantLinear"):
        ours = get_peft_model(with_quant_linears(), D2FTConfig(r=4, policy="bilevel", target_modules=["q_proj"]))
    twin = D2FTConfig(r=4, policy="bilevel", target_modules=["q_proj"], subnets="blocks")
    whole = get_peft_model(with_quant_linears(), D2FTConfig(r=4, target_modules=["q_proj"]))
    with get_runtime(whole).use(compile_plan(get_runtime(whole).partitions["default"], [2] * 6)):
        same(whole.train()(**TINY["llama"].batch()).loss, with_quant_linears(dense=True)(**TINY["llama"].batch()).loss)
    losses = []
    for model in (ours, get_peft_model(with_quant_linears(dense=True), twin)):
        runtime = get_runtime(model.train())
        with runtime.use(compile_plan(runtime.partitions["default"], [2, 0, 2])):
            losses.append(model(**TINY["llama"].batch()).loss)
    same(*losses)
    for model in (ours, whole):
        with pytest.raises(
            ValueError, match="up_proj is a QuantLinear, whose weights D2FT cannot read; choose a score"
        ):
            weight_magnitude(model, get_runtime(model).partitions["default"])


@pytest.mark.parametrize("policy", [None, "all_full", "fewer_samples", "importance", "selective_backprop"])
def test_whole_projections_of_such_weights_train_under_lora(policy):
    model = get_peft_model(quantized("subclass"), D2FTConfig(r=4, policy=policy)).train()
    runtime = get_runtime(model)
    with runtime.use(compile_plan(runtime.partitions["default"], [2] * runtime.partitions["default"].num_scheduled)):
        model(**TINY["llama"].batch()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_weights_that_accelerate_offloads_are_not_trained_and_not_sliced():
    """It lends them to the forward pass of their layer: a copy would be lent the original's, and learn nothing."""
    where = r"the weight of model.layers.0.self_attn.q_proj is offloaded by accelerate"
    with pytest.raises(ValueError, match=where + ".*cannot be fine-tuned; set r .LoRA., or load the model without"):
        get_peft_model(cpu_offload(fresh("llama"), execution_device="cpu"), D2FTConfig())
    with pytest.warns(UserWarning, match="the subnets are the 3 whole blocks .* heads are not cut: " + where):
        get_peft_model(cpu_offload(fresh("llama"), execution_device="cpu"), D2FTConfig(r=4, policy="bilevel"))


@pytest.mark.parametrize("subnets", ["heads", "blocks"])
def test_hooks_of_accelerate_run_as_ever(subnets):
    names = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in range(3)),
    ]
    base = dispatch_model(fresh("llama"), dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    entered, hook = [], base.model.layers[1]._hf_hook
    enter, plain = hook.pre_forward, adapted("llama", "lora", subnets=subnets, init_lora_weights=False)
    hook.pre_forward = lambda *args, **kwargs: entered.append(1) or enter(*args, **kwargs)
    torch.manual_seed(0)
    model = get_peft_model(base, config_for("lora", subnets=subnets, init_lora_weights=False))
    losses = []
    for one in (model, plain):
        runtime = get_runtime(one.train())
        if one is plain:
            set_peft_model_state_dict(plain, get_peft_model_state_dict(model))
        row = [2, *[1] * (runtime.partitions["default"].num_scheduled - 1)]
        with runtime.use(compile_plan(runtime.partitions["default"], row)):
            losses.append(one(**TINY["llama"].batch()).loss)
    same(*losses)
    assert entered == [1]


def test_such_weights_are_no_hindrance_to_inference():
    get_peft_model(quantized("subclass"), D2FTConfig(r=4, inference_mode=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_plain_weights_are_dense(dtype):
    assert is_dense(nn.Linear(2, 2, dtype=dtype).weight)


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("where", ["mlp", "self_attn", "up_proj"])
def test_an_adapter_that_replaces_projections_stands_alone(mode, where):
    targets = ["q_proj"] if where != "self_attn" else ["up_proj"]
    alone = config_for(mode, target_modules=targets, modules_to_save=[where])
    model = adapted("llama", mode, target_modules=targets)
    expected = logits(model, "llama")
    with pytest.raises(ValueError, match=rf"'other' cannot stand beside .*modules_to_save=\['{where}'\] of 'other'"):
        model.add_adapter("other", alone)
    same(logits(model, "llama"), expected)
    train_briefly(model, "llama")
    model = get_peft_model(fresh("llama"), alone)
    with pytest.raises(ValueError, match=rf"'other' cannot stand beside .*modules_to_save=\['{where}'\] of 'default'"):
        model.add_adapter("other", config_for(mode, target_modules=targets))


def glm4_moe():
    torch.manual_seed(0)
    return tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, intermediate_size=48,
        moe_intermediate_size=16, num_hidden_layers=2, vocab_size=64, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, first_k_dense_replace=1, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def test_targets_that_peft_takes_for_experts_are_refused(tmp_path):
    """By default they are left alone, and the adapter loads in stock PEFT with the same logits."""
    attention = ["k_proj", "o_proj", "q_proj", "v_proj"]
    with pytest.raises(ValueError, match=r"an expert of model_type='glm4_moe'.*set target_modules=\['k_proj', "):
        get_peft_model(glm4_moe(), D2FTConfig(r=4, target_modules=[*attention, "down_proj"]))
    with pytest.warns(UserWarning, match="LoRA leaves down_proj, gate_proj, up_proj of model_type='glm4_moe' alone"):
        model = get_peft_model(glm4_moe(), D2FTConfig(r=4))
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} == set(attention)
    train_briefly(model, "llama")
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(glm4_moe(), tmp_path), "llama"), logits(model, "llama"))
    get_peft_model(glm4_moe(), D2FTConfig())


@pytest.mark.quick(1)
@pytest.mark.parametrize("family", ["Ernie4_5_Moe", "ExaoneMoe", "DeepseekV3"])
def test_dense_first_layers_of_other_families_load_in_stock_peft_too(family, tmp_path):
    """PEFT would take their gate, up and down projections for experts'."""
    config = getattr(tf, f"{family}Config")(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, intermediate_size=48,
        moe_intermediate_size=16, num_hidden_layers=2, vocab_size=64, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, q_lora_rank=12, kv_lora_rank=10, qk_rope_head_dim=4, qk_nope_head_dim=6,
        v_head_dim=8, n_group=1, topk_group=1, first_k_dense_replace=1, moe_layer_start_index=1,
        **{name: 4 for name in ("n_routed_experts", "moe_num_experts", "num_experts")},
    )  # fmt: skip
    model_class = getattr(tf, f"{family}ForCausalLM")

    def build():
        torch.manual_seed(0)
        return model_class(config)

    assert any(branch.name == "ffn" for branch in partition_model(build()).branches)
    with pytest.warns(UserWarning, match="LoRA leaves .*gate_proj.* alone"):
        model = get_peft_model(build(), D2FTConfig(r=4))
    train_briefly(model, "llama")
    model.save_pretrained(tmp_path)
    same(logits(PeftModel.from_pretrained(build(), tmp_path), "llama"), logits(model, "llama"))
