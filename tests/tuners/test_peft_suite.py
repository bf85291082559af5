"""What PEFT's users do with an adapter, on plain LoRA as control and on both variants of D2FT beside it."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import (
    LoraConfig,
    PeftModel,
    convert_to_lora,
    get_base_model_state_dict,
    get_model_status,
    get_peft_model,
    inject_adapter_in_model,
    prepare_model_for_kbit_training,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from transformers import AutoModelForCausalLM

from d2ft_peft import D2FTConfig
from tests.models import TINY
from tests.tuners.cases import close, differs, fresh, logits, plain_model, same, state, train_briefly, trainable


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8}
COLUMNS = ["plain", "lora", "full"]
each_column = pytest.mark.parametrize("column", COLUMNS)
each_variant = pytest.mark.parametrize("column", ["lora", "full"])


def config(column: str, **kwargs):
    if column == "plain":
        return LoraConfig(**{"target_modules": TARGETS, **LORA, **kwargs})
    return D2FTConfig(**(LORA if column == "lora" else {}), **kwargs)


def shake(model, seed: int = 0):
    """Move what trains, as training would; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in trainable(model).values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.add_(0.1 * noise.to(parameter.dtype))
    return model


def adapted(column: str, name: str = "llama", seed: int = 0, **kwargs):
    return shake(get_peft_model(fresh(name), config(column, **kwargs)), seed)


def two_adapters(column: str):
    model = adapted(column)
    model.add_adapter("other", config(column))
    model.set_adapter("other")
    shake(model, seed=1)
    return model


def base_logits():
    return logits(plain_model("llama"), "llama")


def gradients(model, name: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**TINY[name].batch()).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in trainable(model).items()}


# --- training without a plan


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|gradient_checkpointing_enable).*:FutureWarning")
@pytest.mark.quick(4)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
@each_variant
def test_checkpointed_training_without_a_plan_warns_once_with_the_same_gradients(column, name, reentrant):
    model = adapted(column, name)
    with pytest.warns(UserWarning, match="training forward without a schedule"):
        expected = gradients(model, name)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for key, gradient in gradients(model, name).items():
        close(gradient, expected[key])


@pytest.mark.filterwarnings("ignore:.*(is_gradient_checkpointing|gradient_checkpointing_enable).*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@each_variant
def test_the_first_warning_may_come_from_a_checkpointed_pass(column, reentrant):
    model = adapted(column)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gradients(model, "llama")
        gradients(model, "llama")
    assert len([one for one in caught if "without a schedule" in str(one.message)]) == 1


@pytest.mark.filterwarnings("ignore:.*(activation_checkpointing|gradient_checkpointing|requires_grad=True).*")
@each_column
def test_prepare_model_for_kbit_training(column):
    base = prepare_model_for_kbit_training(fresh("llama"))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    model = get_peft_model(base, config(column))
    model.enable_input_require_grads()
    embedded = model.get_input_embeddings()(TINY["llama"].batch()["input_ids"])
    assert embedded.requires_grad
    if column != "plain":
        before = logits(model, "llama")
        train_briefly(model, "llama")
        differs(logits(model, "llama"), before)


@pytest.mark.filterwarnings("ignore:.*without a schedule.*")
@each_column
def test_only_the_active_adapter_is_updated(column):
    model = two_adapters(column)
    before = state(model)
    gradients(model, "llama")
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved and all(".other." in key for key in moved)


# --- merging and combining


@each_column
def test_safe_merge_finds_nans(column):
    model = adapted(column)
    next(iter(trainable(model).values())).data[0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"):
        model.merge_and_unload(safe_merge=True)


@each_column
def test_an_adapter_that_is_merged_is_saved_as_itself(column, tmp_path):
    model = adapted(column)
    expected = logits(model, "llama")
    model.merge_adapter()
    model.save_pretrained(tmp_path)
    close(logits(PeftModel.from_pretrained(fresh("llama"), tmp_path), "llama"), expected)


@each_column
def test_a_merged_base_has_the_adapters_weights(column):
    """Where inference engines take them from."""
    model = adapted(column)
    expected = model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    before = plain_model("llama").model.layers[0].mlp.up_proj.weight
    model.merge_adapter()
    merged = dict(model.named_parameters())["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"]
    close(merged, before + expected)
    model.unmerge_adapter()
    close(get_base_model_state_dict(model)["model.layers.0.mlp.up_proj.weight"], before)


def test_copies_cannot_be_merged_together_and_the_error_says_what_can():
    with pytest.raises(ValueError, match=r"merges one at a time: make one of them by model.add_weighted_adapter"):
        two_adapters("full").merge_and_unload(adapter_names=["default", "other"])


@pytest.mark.quick(1)
@pytest.mark.parametrize(("column", "kind"), [("plain", "cat"), ("lora", "cat"), ("full", "linear")])
def test_a_weighted_adapter_is_the_weighted_sum_of_changes(column, kind):
    model = two_adapters(column)
    model.add_weighted_adapter(["default", "other"], [0.5, -2.0], "sum", combination_type=kind)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        first, second = (layer.get_delta_weight(name) for name in ("default", "other"))
        close(layer.get_delta_weight("sum"), 0.5 * first - 2.0 * second)
    model.set_adapter("sum")
    expected = logits(model, "llama")
    close(logits(model.merge_and_unload(), "llama"), expected)


def test_a_weighted_adapter_of_different_targets_changes_what_each_changes():
    model = adapted("full", target_modules=["q_proj", "up_proj"])
    model.add_adapter("other", config("full", target_modules=["up_proj", "down_proj"]))
    model.set_adapter("other")
    shake(model, seed=1)
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    block = model.base_model.model.model.layers[0]
    same(block.self_attn.q_proj.get_delta_weight("sum"), block.self_attn.q_proj.get_delta_weight("default"))
    same(block.mlp.down_proj.get_delta_weight("sum"), block.mlp.down_proj.get_delta_weight("other"))
    both = [block.mlp.up_proj.get_delta_weight(name) for name in ("default", "other")]
    close(block.mlp.up_proj.get_delta_weight("sum"), sum(both))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"adapters": ["default", "nobody"]}, "adapters names 'nobody'; the model has"),
        ({"weights": [1.0]}, r"weights=\[1.0\] must be as many as adapters"),
        ({"adapter_name": "other"}, "adapter_name='other' is an adapter already"),
        ({"combination_type": "ties", "density": 0.5}, r"combination_type='ties' with \['density'\] is for LoRA"),
    ],
)
def test_a_weighted_adapter_that_cannot_be_is_refused(arguments, message):
    model = two_adapters("full")
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(
            **{"adapters": ["default", "other"], "weights": [1, 1], "adapter_name": "sum", **arguments}
        )
    assert sorted(model.peft_config) == ["default", "other"]


def test_adapters_with_modules_of_their_own_are_not_added_up():
    model = adapted("full", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"adapters \['default'\] have modules_to_save, which cannot be added up"):
        model.add_weighted_adapter(["default"], [1.0], "half")


# --- batches of several adapters


def mixed(batch: dict) -> tuple[dict, list[str]]:
    return {name: value for name, value in batch.items() if name != "labels"}, ["other", "__base__", "default"]


@each_column
def test_every_sample_of_a_mixed_batch_has_its_adapter(column):
    model = two_adapters(column)
    inputs, names = mixed(TINY["llama"].batch())
    with torch.no_grad():
        out = model.eval()(**inputs, adapter_names=names).logits
    close(out[1], base_logits()[1])
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        close(out[row], logits(model, "llama")[row])


@pytest.mark.quick(1)
@each_column
def test_a_mixed_batch_generates_with_beams(column):
    model = two_adapters(column)
    inputs, names = mixed(TINY["llama"].batch())
    settings = {"max_new_tokens": 4, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    together = model.eval().generate(**inputs, **settings, adapter_names=names)
    for row, name in ((0, "other"), (2, "default")):
        model.set_adapter(name)
        alone = model.eval().generate(**{key: value[row : row + 1] for key, value in inputs.items()}, **settings)
        same(together[row, : alone.shape[1]], alone[0])


@pytest.mark.parametrize("name", ["bert", "gpt2", "vit"])
def test_a_mixed_batch_goes_through_everything_that_trains(name):
    """Embeddings and norms too, some of which see no batch."""
    model = get_peft_model(fresh(name), D2FTConfig(train_boundary=True))
    expected = logits(shake(model), name)[1]
    inputs = {key: value for key, value in TINY[name].batch().items() if key != "labels"}
    with torch.no_grad():
        out = model.eval()(**inputs, adapter_names=["__base__", "default", "__base__"]).logits
    close(out[1], expected)
    close(out[[0, 2]], logits(plain_model(name), name)[[0, 2]])


@each_column
def test_mixed_batches_that_cannot_be_are_refused(column):
    model = two_adapters(column)
    inputs, names = mixed(TINY["llama"].batch())
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        model.train()(**inputs, adapter_names=names)
    with pytest.raises(ValueError, match="nobody"):
        model.eval()(**inputs, adapter_names=["nobody", *names[1:]])
    with pytest.raises(ValueError, match="adapter_names"):
        model.eval()(**inputs, adapter_names=names[:2])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        model.eval()(**inputs, adapter_names=names)


# --- saving and loading


@pytest.mark.quick(1)
@each_column
def test_low_cpu_mem_usage_allocates_nothing_before_it_loads(column, tmp_path):
    model = adapted(column)
    model.save_pretrained(tmp_path)
    on_meta = inject_adapter_in_model(config(column), fresh("llama"), low_cpu_mem_usage=True)
    assert all(parameter.device.type == "meta" for parameter in trainable(on_meta).values())
    loaded = PeftModel.from_pretrained(fresh("llama"), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"} and trainable(loaded)
    same(logits(loaded, "llama"), logits(model, "llama"))
    loaded.load_adapter(tmp_path, "other", low_cpu_mem_usage=True)
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu"}


def test_low_cpu_mem_usage_keeps_the_dtype_of_the_base(tmp_path):
    """Also of embeddings, which are copied as one."""
    adapted("full", "vit", train_boundary=True).save_pretrained(tmp_path)
    base = fresh("vit").to(torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


@pytest.mark.quick(2)
@pytest.mark.parametrize("autocast", [True, False])
@each_column
def test_the_dtype_of_an_adapter_on_a_half_precision_base(column, autocast):
    """LoRA's factors in float32 unless told otherwise; a copy in the dtype of what it stands in for."""
    model = get_peft_model(fresh("llama").to(torch.bfloat16), config(column), autocast_adapter_dtype=autocast)
    expected = torch.float32 if autocast and column != "full" else torch.bfloat16
    assert {parameter.dtype for parameter in trainable(model).values()} == {expected}
    if column != "plain":
        train_briefly(model, "llama")
    assert logits(model, "llama").isfinite().all()


@each_column
def test_an_adapter_is_loaded_over_another(column, tmp_path):
    model = adapted(column)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    shake(model, seed=3)
    model.load_adapter(tmp_path, "default")
    same(logits(model, "llama"), expected)


@pytest.mark.quick(1)
@each_column
def test_folders_devices_and_training_are_as_asked_for(column, tmp_path):
    model = adapted(column)
    model.save_pretrained(tmp_path / "adapter" / "sub")
    arguments = {"subfolder": "sub", "torch_device": "cpu"}
    frozen = PeftModel.from_pretrained(fresh("llama"), tmp_path / "adapter", **arguments)
    assert not trainable(frozen) and frozen.peft_config["default"].inference_mode
    trains = PeftModel.from_pretrained(fresh("llama"), tmp_path / "adapter", **arguments, is_trainable=True)
    assert trainable(trains).keys() == trainable(model).keys()
    same(logits(frozen, "llama"), logits(model, "llama"))


@pytest.mark.quick(1)
@each_column
def test_transformers_loads_and_switches_it_without_peft(column, tmp_path):
    trained = adapted(column)
    trained.save_pretrained(tmp_path / "adapter")
    expected = logits(trained, "llama")
    fresh("llama").save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapter"))
    close(logits(model, "llama"), expected)
    model.disable_adapters()
    close(logits(model, "llama"), base_logits())
    model.enable_adapters()
    close(logits(model, "llama"), expected)


@each_column
def test_the_base_is_read_and_written_through_the_adapter(column):
    model, base = adapted(column), plain_model("llama").state_dict()
    for key, value in get_base_model_state_dict(model).items():
        same(value, base[key])
    result = set_base_model_state_dict(model, {key: value + 1 for key, value in base.items()})
    assert not result.missing_keys and not result.unexpected_keys
    close(get_base_model_state_dict(model)["model.embed_tokens.weight"], base["model.embed_tokens.weight"] + 1)


def test_full_fine_tuning_converts_to_lora():
    model = adapted("full")
    lora, weights = convert_to_lora(model, rank=16)
    assert model.supports_lora_conversion() and type(lora) is LoraConfig
    converted = get_peft_model(fresh("llama"), lora)
    assert not set_peft_model_state_dict(converted, weights).unexpected_keys
    k_proj = [one.base_model.model.model.layers[0].self_attn.k_proj for one in (model, converted)]
    close(*(layer.get_delta_weight("default") for layer in k_proj))


@pytest.mark.parametrize(("name", "kwargs"), [("bert", {}), ("llama", {"train_boundary": True})])
def test_what_is_no_change_of_a_matrix_does_not_convert_to_lora(name, kwargs):
    model = adapted("full", name, **kwargs)
    assert not model.supports_lora_conversion()
    with pytest.raises(TypeError, match=r"do not support LoRA conversion: .*D2FTLayer"):
        convert_to_lora(model, rank=4)


# --- status and switches


@each_column
def test_status(column):
    model = two_adapters(column)
    status = get_model_status(model)
    assert status.peft_types == {
        name: {"plain": "LORA", "lora": "D2FT_LORA", "full": "D2FT"}[column] for name in ("default", "other")
    }
    assert (status.active_adapters, status.merged_adapters) == (["other"], [])
    assert status.requires_grad == {"default": False, "other": True}
    assert status.num_adapter_layers == len(model.get_layer_status()) == 21
    model.merge_adapter()
    assert get_model_status(model).merged_adapters == ["other"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@each_variant
def test_layers_say_how_many_features_they_have(column, name):
    model = adapted(column, name)
    for layer in (module for module in model.modules() if isinstance(module, BaseTunerLayer)):
        base = layer.get_base_layer()
        expected = tuple(base.weight.shape) if name == "gpt2" else (base.in_features, base.out_features)
        assert (layer.in_features, layer.out_features) == expected


@each_column
def test_gradients_are_switched_by_name(column):
    model = two_adapters(column)
    model.set_requires_grad("other", False)
    assert not trainable(model)
    model.set_requires_grad(["default", "other"])
    assert {name.split(".")[-2] for name in trainable(model)} == {"default", "other"}
    model.set_adapter("default", inference_mode=True)
    assert not trainable(model) and model.active_adapters == ["default"]


@each_column
def test_the_last_adapter_can_be_deleted_and_an_unknown_one_cannot(column):
    model = adapted(column)
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    model.delete_adapter("default")
    assert model.active_adapters == [] and not model.peft_config
    inputs, _ = mixed(TINY["llama"].batch())
    same(model.base_model(**inputs).logits, base_logits())


@each_column
def test_disable_adapter_ends_with_an_error_too(column):
    model = adapted(column)
    expected = logits(model, "llama")
    with pytest.raises(KeyError), model.disable_adapter():
        same(logits(model, "llama"), base_logits())
        raise KeyError
    same(logits(model, "llama"), expected)
    with disable_input_dtype_casting(model):
        same(logits(model, "llama"), expected)


@each_variant
def test_it_does_not_mix_with_other_methods(column):
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        get_peft_model(fresh("llama"), config(column), mixed=True)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        adapted(column).add_adapter("other", config("plain"))


# --- names of modules


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"target_modules": ["query", "value"]},
            r"names no module of LlamaForCausalLM; the projections .* are q_proj,",
        ),
        (
            {"target_modules": "q_proj"},
            r"'q_proj' \(a string is a regular expression for whole paths\) names no module",
        ),
        (
            {"modules_to_save": ["classifier"]},
            "'classifier' names no module of LlamaForCausalLM; it has model, lm_head",
        ),
        ({"modules_to_save": ["lm_head", "score"]}, "'score' names no module of LlamaForCausalLM"),
        ({"modules_to_save": "lm_head"}, "modules_to_save='lm_head' must be a list of names of modules, or None"),
        ({"modules_to_save": [1]}, r"modules_to_save=\[1\] must be a list of names of modules"),
        ({"target_modules": [3]}, r"target_modules=\[3\] must be a list of names of modules \(or a string"),
        ({"exclude_modules": 5}, r"exclude_modules=5 must be a list of names of modules"),
    ],
)
@each_variant
def test_names_that_name_nothing_are_refused(column, kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(fresh("llama"), config(column, **kwargs))


def test_targets_that_are_not_there_are_refused_beside_a_boundary_that_is():
    with pytest.raises(NoMatchingPeftModuleError, match="names no module of LlamaForCausalLM"):
        get_peft_model(fresh("llama"), D2FTConfig(train_boundary=True, target_modules=["query"]))


@pytest.mark.parametrize("name", ["bert", "vit"])
@each_variant
def test_heads_that_peft_names_for_a_task_may_be_missing(column, name):
    """PEFT names ``classifier`` and ``score``, of which a model has one."""
    model = get_peft_model(fresh(name), config(column, task_type="SEQ_CLS"))
    assert any("classifier.modules_to_save.default" in key for key in trainable(model))
