"""keep_base=False: full fine-tuning in the memory of plain fine-tuning, with an adapter that loads to the bit."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from d2ft_peft import D2FTConfig, partition_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.tuners.cases import (
    MODULES_TO_SAVE,
    adapted,
    assert_plain,
    differs,
    fresh,
    logits,
    mixed_row,
    same,
    train_briefly,
    trainable,
    trained,
)


MODES = ("full", "boundary")
each_kind = pytest.mark.parametrize("mode", MODES)


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in tensors}.values())


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", TINY)
@each_kind
def test_memory_is_that_of_plain_fine_tuning(name, mode):
    plain = fresh(name)
    expected = bytes_of(plain.state_dict().values())
    model = get_peft_model(plain, D2FTConfig(keep_base=False, train_boundary=mode == "boundary"))
    assert bytes_of(model.state_dict().values()) == expected
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in fresh(name).parameters())
    ours = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ours == sum(p.numel() for p in adapted(name, mode).parameters() if p.requires_grad)


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", TINY)
@each_kind
def test_gradients_are_those_beside_a_kept_base(name, mode):
    batch = TINY[name].batch()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    grads = []
    for keep_base in (True, False):
        model = adapted(name, mode, keep_base=keep_base).double().train()
        runtime = get_runtime(model)
        with runtime.use(compile_plan(runtime.partitions["default"], mixed_row(runtime.partitions["default"]))):
            model(**batch).loss.backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    kept, in_place = grads
    assert kept.keys() == in_place.keys() and kept
    for parameter, grad in kept.items():
        assert (grad is None) == (in_place[parameter] is None)
        if grad is not None:
            same(in_place[parameter], grad)


@pytest.mark.quick(4)
@pytest.mark.parametrize("name, mode", [(name, mode) for name in TINY for mode in MODES])
def test_the_adapter_loads_into_a_fresh_base_to_the_bit(name, mode, tmp_path):
    model = trained(name, mode, keep_base=False, modules_to_save=MODULES_TO_SAVE[name])
    expected = logits(model, name)
    differs(expected, logits(fresh(name), name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh(name), tmp_path, low_cpu_mem_usage=name in ("vit", "gpt2"))
    assert loaded.peft_config["default"].keep_base is False
    same(logits(loaded, name), expected)
    train_briefly(model, name)
    differs(logits(model, name), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    same(logits(model, name), expected)
    train_briefly(model, name)


@each_kind
def test_merging_gives_the_trained_plain_model(mode):
    model = trained("bert", mode, keep_base=False)
    expected = logits(model, "bert")
    merged = model.merge_and_unload()
    assert_plain(merged)
    assert list(merged.state_dict()) == list(fresh("bert").state_dict())
    same(logits(merged, "bert"), expected)


def test_what_needs_the_original_is_refused():
    model = trained("llama", "full", keep_base=False)
    expected, parameters = logits(model, "llama"), set(trainable(model))
    with pytest.raises(ValueError, match="'default' cannot be unloaded: keep_base=False trained the model's own"):
        model.unload()
    with pytest.raises(ValueError, match="cannot be disabled: keep_base=False"), model.disable_adapter():
        pass
    with pytest.raises(ValueError, match="cannot be deleted: keep_base=False"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match=r"'other' cannot stand beside \['default'\]: keep_base=False of 'default'"):
        model.add_adapter("other", D2FTConfig())
    same(logits(model, "llama"), expected)
    assert set(trainable(model)) == parameters
    train_briefly(model, "llama")


def test_it_cannot_be_the_second_adapter():
    model = adapted("llama", "full")
    with pytest.raises(ValueError, match=r"'other' cannot stand beside \['default'\]: keep_base=False of 'other'"):
        model.add_adapter("other", D2FTConfig(keep_base=False))
    train_briefly(model, "llama")


@pytest.mark.parametrize("name", [name for name in TINY if TINY[name].kind == "causal"])
def test_tied_weights_stay_tied(name, tmp_path):
    base = fresh(name, tie_word_embeddings=True)
    model = get_peft_model(copy.deepcopy(base), D2FTConfig(train_boundary=True, keep_base=False))
    train_briefly(model, name)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    same(logits(loaded, name), logits(model, name))
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight


def test_a_copy_is_independent_and_stays_in_place():
    model = trained("llama", "full", keep_base=False)
    expected, twin = logits(model, "llama"), copy.deepcopy(model)
    name = next(iter(partition_model(fresh("llama")).projections))
    layer = twin.base_model.model.get_submodule(name)
    assert layer.base_layer is layer.d2ft_layers["default"]
    train_briefly(twin, "llama")
    same(logits(model, "llama"), expected)
    assert torch.isfinite(logits(twin, "llama")).all()
