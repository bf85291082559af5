"""Heads of quantized weights: a plan runs on them as on the dense weights that they stand for."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, Olmo2Config, Olmo2ForCausalLM, TrainingArguments

from d2ft_peft import D2FTConfig, D2FTTrainer
from d2ft_peft.costs import cost_model, probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.dequantize import keep_unpacked, quantized_weight
from d2ft_peft.engine.plan import Heads
from d2ft_peft.engine.subset_linear import HeadAxis, SubsetLayer, select, subset_linears
from d2ft_peft.partition import FeatureLayout
from d2ft_peft.scores import weight_magnitude
from d2ft_peft.tuners import check_trains
from tests.quantized_models import KINDS, batch, dense_twin, quantized


LORA = {"r": 4, "lora_alpha": 8, "init_lora_weights": False}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
each_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.quick(1)
# Blocks of two subnets each: all of one operation, mixtures, and subnets of which one part alone runs.
ROWS = {"mixed": [2, 0, 1, 2, 0, 1], "half": [2, 0, 0, 2, 2, 0], "forward only": [1, 1, 2, 2, 1, 0]}


def adapted(model, **kwargs):
    torch.manual_seed(3)
    return get_peft_model(model, D2FTConfig(**LORA, **{"policy": "bilevel", "subnets": "heads", **kwargs})).train()


def run(model, row):
    """Logits and the gradients of LoRA's factors under a row."""
    runtime = get_runtime(model)
    with runtime.use(compile_plan(runtime.partitions["default"], row)):
        outputs = model(**batch())
        outputs.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return outputs.logits.detach(), {name: grad for name, grad in grads.items() if grad is not None}


@each_kind
@some_kinds
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_plan_runs_as_on_the_dense_weights(kind, row, checkpointing):
    base = quantized(kind)
    ours, twin = adapted(copy.deepcopy(base)), adapted(dense_twin(base))
    if checkpointing:
        for model in (ours, twin):
            prepare_model_for_kbit_training(model.base_model.model, True, {"use_reentrant": False})
            model.base_model.set_requires_grad("default")
    (logits, grads), (expected, expected_grads) = (run(model, ROWS[row]) for model in (ours, twin))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected_grads.keys() and any(grad.any() for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=1e-5, atol=1e-7, msg=name)


@each_kind
@some_kinds
def test_where_all_subnets_are_full_it_is_peft_to_the_bit(kind):
    base = quantized(kind)
    ours = adapted(copy.deepcopy(base))
    torch.manual_seed(3)
    plain = get_peft_model(base, LoraConfig(**LORA, target_modules=TARGETS)).train()
    logits, grads = run(ours, [2] * 6)
    outputs = plain(**batch())
    outputs.loss.backward()
    expected = {name: p.grad for name, p in plain.named_parameters() if p.requires_grad}
    assert logits.equal(outputs.logits)
    assert grads.keys() == expected.keys() and all(grads[name].equal(expected[name]) for name in grads)


@each_kind
@some_kinds
def test_costs_and_magnitudes_are_those_of_the_dense_weights(kind):
    base = quantized(kind)
    models = adapted(copy.deepcopy(base)), adapted(dense_twin(base))
    partitions = [get_runtime(model).partitions["default"] for model in models]
    probes = [probe_model(model, partition, batch()) for model, partition in zip(models, partitions, strict=True)]
    costs = [cost_model(*of_model) for of_model in zip(models, partitions, probes, strict=True)]
    np.testing.assert_allclose(costs[0].costs, costs[1].costs, rtol=1e-12)
    magnitudes = [weight_magnitude(*of_model) for of_model in zip(models, partitions, strict=True)]
    np.testing.assert_allclose(*magnitudes, rtol=1e-6)


def test_layers_that_are_computed_whole_cost_what_the_dense_ones_do(tmp_path):
    """OLMo 2 has a norm over all of its queries, which are therefore made whole; a packed weight has fewer entries."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    config = Olmo2Config(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    Olmo2ForCausalLM(config).save_pretrained(tmp_path)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    base = Olmo2ForCausalLM.from_pretrained(tmp_path, quantization_config=four_bit, dtype=torch.float32)
    costs = []
    for model in (adapted(copy.deepcopy(base)), adapted(dense_twin(base))):
        partition = get_runtime(model).partitions["default"]
        assert any(branch.whole for branch in partition.branches)
        costs.append(cost_model(model, partition, probe_model(model, partition, batch())))
    np.testing.assert_allclose(costs[0].shared_forward, costs[1].shared_forward, rtol=1e-12)
    np.testing.assert_allclose(costs[0].shared_backward, costs[1].shared_backward, rtol=1e-12)


@each_kind
@some_kinds
def test_the_trainer_trains_heads_as_on_the_dense_weights(kind, tmp_path):
    base, trained = quantized(kind), []
    data = [{name: value[0] for name, value in batch(1, seed).items()} for seed in range(16)]
    for model in (copy.deepcopy(base), dense_twin(base)):
        model = adapted(model, num_full=1, num_forward_only=1)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        args = TrainingArguments(
            str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=4, optim="sgd",
            learning_rate=0.1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
        )  # fmt: skip
        trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
        trainer.train()
        assert all(log["compute_ratio"] < 0.5 for log in trainer.state.log_history if "compute_ratio" in log)
        trained.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    ours, expected = trained
    assert any(not torch.equal(value, start[name]) for name, value in ours.items())
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)


PARTS = [(0,), (1, 2), (0, 2), (0, 1, 3)]


@each_kind
@some_kinds
@pytest.mark.parametrize("heads", PARTS)
def test_only_what_heads_use_becomes_dense(kind, heads):
    """Rows and columns of each layer, neighbours and others, are those of its whole weight."""
    base = quantized(kind)
    for layer in (base.model.layers[0].self_attn.o_proj, base.model.layers[0].mlp.up_proj):
        whole = dequantize_module_weight(copy.deepcopy(layer)).detach()
        for axis, size in enumerate(whole.shape):
            selection = select(FeatureLayout(4, size // 4), Heads(heads))
            part = quantized_weight(layer).take(selection, axis, torch.float32)
            torch.testing.assert_close(part, selection.take(whole, axis), rtol=1e-6, atol=0)


@some_kinds
@pytest.mark.parametrize("heads", PARTS)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("columns", "storage"), [(256, torch.uint8), (256, torch.bfloat16), (96, torch.uint8)])
def test_blocks_of_4_bit_weights_are_read_whole_or_by_part(heads, nested, quant_type, columns, storage):
    """Also where the columns of a head are not whole blocks of 64, and where rows are not (96)."""
    layer = four_bit(256, columns, compress_statistics=nested, quant_type=quant_type, quant_storage=storage)
    whole = dequantize_module_weight(copy.deepcopy(layer))
    for axis, size in ((0, 256), (1, columns)):
        selection = select(FeatureLayout(4, size // 4), Heads(heads))
        part = quantized_weight(layer).take(selection, axis, torch.float32)
        assert part.equal(selection.take(whole, axis))


def four_bit(rows, columns, **kwargs):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    dense = nn.Linear(columns, rows, bias=False)
    layer = bnb.nn.Linear4bit(columns, rows, bias=False, **kwargs)
    layer.load_state_dict(dense.state_dict())
    return layer.to("cpu")


@some_kinds
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("beside", ["the same", "another dtype", "a dense one"])
def test_a_layer_computes_in_the_dtype_that_it_says(beside, grad):
    """As the layer itself: input cast to it, output cast back, whatever shares its input."""
    layer = four_bit(64, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
    axis, heads = HeadAxis("column", FeatureLayout(4, 16)), Heads((1, 2))
    others = {
        "the same": four_bit(64, 64, compute_dtype=torch.bfloat16, quant_type="fp4"),
        "another dtype": four_bit(64, 64, compute_dtype=torch.float32, quant_type="nf4"),
        "a dense one": nn.Linear(64, 64),
    }
    layers = [layer, others[beside], layer]
    weights = [quantized_weight(one) or one.weight for one in layers]
    x = torch.randn(3, 64, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        outputs = subset_linears(x, [SubsetLayer(weight, None, axis) for weight in weights], heads)
    for one, out in zip(layers, outputs, strict=True):
        weight = one.weight if type(one) is nn.Linear else dequantize_module_weight(copy.deepcopy(one))
        dtype = torch.float32 if one is others[beside] and beside != "the same" else torch.bfloat16
        assert out.dtype == torch.float32
        assert out.equal(F.linear(x.to(dtype), weight[16:48].to(dtype)).float())


def test_a_weight_becomes_dense_again_in_backward_and_is_not_kept():
    layer, taken = quantized("nf4").model.layers[0].mlp.up_proj, []
    weight = quantized_weight(layer)

    def read(*args):
        taken.append(weight.read(*args))
        return taken[-1]

    x = torch.randn(5, 64, requires_grad=True)
    noted = SubsetLayer(weight._replace(read=read), None, HeadAxis("column", FeatureLayout(4, 32)))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        (out,) = subset_linears(x, [noted], Heads((0, 3)))
    assert len(taken) == 1 and not any(tensor.numel() >= taken[0].numel() for tensor in saved)
    out.sum().backward()
    assert len(taken) == 2
    torch.testing.assert_close(x.grad, taken[1].sum(0).expand(5, -1))


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", ["derived", "dynamic"])
def test_layers_that_compute_otherwise_are_not_cut(kind):
    """A class derived from bitsandbytes', and torchao's int8 weights that meet int8 activations."""
    model = quantized("nf4" if kind == "derived" else "torchao")
    layer = model.model.layers[1].mlp.up_proj
    if kind == "derived":
        layer.__class__ = type("Linear4bitOfMine", (type(layer),), {})
    else:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        holder = nn.Sequential(nn.Linear(64, 128))
        quantize_(holder, Int8DynamicActivationInt8WeightConfig(version=2))
        model.model.layers[1].mlp.up_proj = holder[0]
    assert quantized_weight(model.model.layers[1].mlp.up_proj) is None
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj is a .*, which cannot be cut into heads"):
        adapted(model)
    with pytest.warns(UserWarning, match="whole blocks"):
        adapted(model, subnets=None)


def packing(model):
    """The model as on a CPU with AVX512-BF16, where 4 bit weights are packed for inference."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
    return model


def test_an_evaluation_packs_no_4_bit_weights():
    ours, untouched = adapted(packing(quantized("nf4"))), adapted(quantized("nf4"))
    with torch.no_grad():
        ours.eval()(**batch())
    (_, grads), (_, expected) = (run(model.train(), ROWS["mixed"]) for model in (ours, untouched))
    assert grads.keys() == expected.keys() and all(grads[name].equal(expected[name]) for name in grads)


def test_packed_weights_are_refused_as_no_gradient_passes_them():
    model = quantized("nf4")
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    inference = get_peft_model(quantized("nf4"), D2FTConfig(r=4, inference_mode=True))
    for one in (model, inference):
        layer = next(m for name, m in one.named_modules() if name.endswith("layers.2.self_attn.v_proj"))
        layer = getattr(layer, "base_layer", layer)
        layer.weight.data, _ = _convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    with pytest.raises(
        ValueError, match="has packed the 4 bit weight of model.layers.2.self_attn.v_proj for inference"
    ):
        adapted(model)
    with pytest.raises(ValueError, match="has packed the 4 bit weight of .*v_proj.* no gradient passes it any more"):
        check_trains(inference)
    keep_unpacked(quantized("nf4"))
