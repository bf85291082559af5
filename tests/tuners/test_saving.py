"""Adapters on disk: what the files hold, who can load them, and what refuses to."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file

from d2ft_peft import D2FTConfig
from d2ft_peft.engine import get_runtime
from tests.models import TINY
from tests.tuners.cases import (
    CASES,
    MODULES_TO_SAVE,
    SOME_TARGETS,
    close,
    config_for,
    differs,
    each_mode,
    fresh,
    interceptions,
    logits,
    same,
    shared,
    train_briefly,
    trainable,
    trained,
)


WEIGHTS = "adapter_model.safetensors"
# PEFT saves every adapter for inference, and names the model's class beside it.
WRITTEN_BY_PEFT = {"inference_mode", "auto_mapping"}
LOCAL_BASE = pytest.mark.filterwarnings("ignore:the adapter's base model is the local path")


def saved_config(folder) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def load(name, folder, **kwargs):
    return PeftModel.from_pretrained(fresh(name), folder, **kwargs)


@pytest.mark.quick(5)
@pytest.mark.parametrize("name, mode", CASES)
def test_round_trip(name, mode, tmp_path):
    shared(name, mode).save_pretrained(tmp_path)
    loaded = load(name, tmp_path, adapter_name="other", low_cpu_mem_usage=name in ("vit", "gpt2"))
    same(logits(loaded, name), logits(shared(name, mode), name))


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", TINY)
def test_round_trip_of_modules_to_save(name, tmp_path):
    mode = {"vit": "full", "bert": "boundary"}.get(name, "lora")
    model = trained(name, mode, modules_to_save=MODULES_TO_SAVE[name])
    model.save_pretrained(tmp_path)
    same(logits(load(name, tmp_path, adapter_name="other"), name), logits(model, name))


@pytest.mark.quick(1)
@each_mode
def test_several_adapters_are_saved_side_by_side(mode, tmp_path):
    model = trained("llama", mode)
    model.add_adapter("other", config_for(mode, heads_per_subnet=2, target_modules=SOME_TARGETS["llama"]))
    model.set_adapter("other")
    train_briefly(model, "llama", adapter="other")
    model.save_pretrained(tmp_path)
    other = logits(model, "llama")
    model.set_adapter("default")
    same(logits(load("llama", tmp_path), "llama"), logits(model, "llama"))
    same(logits(load("llama", tmp_path / "other"), "llama"), other)
    assert D2FTConfig.from_pretrained(tmp_path / "other").heads_per_subnet == 2


@pytest.mark.quick(1)
@each_mode
def test_an_adapter_is_loaded_beside_another(mode, tmp_path):
    """A D2FT LoRA adapter is LORA on disk, so its D2FT config is named first."""
    model = trained("llama", mode, heads_per_subnet=2)
    model.save_pretrained(tmp_path)
    expected = logits(model, "llama")
    running = trained("llama", mode)
    if mode == "lora":
        running.add_adapter("other", D2FTConfig.from_pretrained(tmp_path))
    running.load_adapter(tmp_path, "other")
    running.set_adapter("other")
    same(logits(running, "llama"), expected)
    assert get_runtime(running).partitions["other"].heads_per_subnet == 2


@pytest.mark.quick(1)
@each_mode
def test_the_trainers_way_back_into_a_running_model(mode, tmp_path):
    """The Trainer resumes by loading into the adapter that is already there."""
    model = trained("bert", mode)
    model.save_pretrained(tmp_path)
    expected = logits(model, "bert")
    train_briefly(model, "bert")
    differs(logits(model, "bert"), expected)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    same(logits(model, "bert"), expected)
    train_briefly(model, "bert")


@each_mode
def test_state_dict_functions_of_peft(mode):
    model = shared("vit", mode)
    weights = get_peft_model_state_dict(model)
    assert not any("default" in key or "base_layer" in key for key in weights)
    other = get_peft_model(fresh("vit"), config_for(mode), adapter_name="other")
    result = set_peft_model_state_dict(other, weights, adapter_name="other")
    assert not result.unexpected_keys
    same(logits(other, "vit"), logits(model, "vit"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_tied_copies_come_back_tied(name, low_cpu_mem_usage, tmp_path):
    model = get_peft_model(fresh(name, tie_word_embeddings=True), config_for("boundary"))
    train_briefly(model, name)
    model.save_pretrained(tmp_path)
    assert not any("base_layer" in key for key in load_file(tmp_path / WEIGHTS))
    loaded = PeftModel.from_pretrained(
        fresh(name, tie_word_embeddings=True),
        tmp_path,
        is_trainable=True,
        low_cpu_mem_usage=low_cpu_mem_usage,
    )
    same(logits(loaded, name), logits(model, name))
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert embedding.weight is head.weight and head.weight.requires_grad
    train_briefly(loaded, name)
    train_briefly(model, name)
    same(logits(loaded, name), logits(model, name))


@pytest.mark.quick(1)
@LOCAL_BASE
@pytest.mark.parametrize(
    "name, task, auto",
    [
        ("llama", "CAUSAL_LM", AutoPeftModelForCausalLM),
        ("bert", "SEQ_CLS", AutoPeftModelForSequenceClassification),
    ],
)
@pytest.mark.parametrize("mode", ["boundary", "lora"])
def test_auto_classes(name, task, auto, mode, tmp_path):
    fresh(name).save_pretrained(tmp_path / "base")
    base = TINY[name].model.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, config_for(mode, task_type=task))
    train_briefly(model, name)
    model.save_pretrained(tmp_path / "adapter")
    loaded = auto.from_pretrained(tmp_path / "adapter", **({"num_labels": 5} if name == "bert" else {}))
    same(logits(loaded, name), logits(model, name))


@LOCAL_BASE
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_auto_class_without_a_task(mode, tmp_path):
    fresh("vit").save_pretrained(tmp_path / "base")
    model = get_peft_model(TINY["vit"].model.from_pretrained(tmp_path / "base"), config_for(mode))
    train_briefly(model, "vit")
    model.save_pretrained(tmp_path / "adapter")
    same(logits(AutoPeftModel.from_pretrained(tmp_path / "adapter"), "vit"), logits(model, "vit"))


@pytest.mark.quick(1)
@each_mode
def test_training_continues_from_disk(mode, tmp_path):
    model = trained("llama", mode, shortcut="rescale", heads_per_subnet=2)
    model.save_pretrained(tmp_path)
    loaded = load("llama", tmp_path, config=D2FTConfig.from_pretrained(tmp_path), is_trainable=True)
    assert get_runtime(loaded).shortcut == "rescale"
    assert trainable(loaded).keys() == trainable(model).keys()
    for further in (model, loaded):
        train_briefly(further, "llama")
    same(logits(loaded, "llama"), logits(model, "llama"))


def test_loading_for_inference_trains_nothing(tmp_path):
    shared("llama", "full").save_pretrained(tmp_path)
    assert not trainable(load("llama", tmp_path))


class TestLoraFolder:
    """The LoRA variant leaves a plain LoRA adapter behind."""

    OWN = {f.name for f in dataclasses.fields(D2FTConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}

    def test_config_is_peft_s_own(self, tmp_path):
        shared("llama", "lora").save_pretrained(tmp_path)
        written = saved_config(tmp_path)
        assert written["peft_type"] == "LORA"
        assert not self.OWN & written.keys()
        assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig

    def test_keys_are_peft_s_own(self, tmp_path):
        shared("llama", "lora").save_pretrained(tmp_path)
        keys = load_file(tmp_path / WEIGHTS)
        assert keys and all(key.endswith((".lora_A.weight", ".lora_B.weight")) for key in keys)

    def test_stock_peft_loads_it_as_lora(self, tmp_path):
        model = shared("llama", "lora")
        model.save_pretrained(tmp_path)
        loaded = load("llama", tmp_path)
        assert not interceptions(loaded)
        same(logits(loaded, "llama"), logits(model, "llama"))

    def test_every_field_comes_back(self, tmp_path):
        config = config_for(
            "lora", lora_dropout=0.1, use_rslora=True, heads_per_subnet=2, num_micro_batches=8, policy="random",
            num_devices=2, device_capacities=[0.5, 0.25], tie_break="spread", backward_score="taylor",
            forward_score="gradient_magnitude", score_fraction=0.5, shortcut="mean", forward_only_cost=0.4, seed=3,
        )  # fmt: skip
        model = get_peft_model(fresh("llama"), config)
        model.save_pretrained(tmp_path)
        restored = D2FTConfig.from_pretrained(tmp_path)
        for f in dataclasses.fields(D2FTConfig):
            if f.name not in WRITTEN_BY_PEFT:
                assert getattr(restored, f.name) == getattr(model.peft_config["default"], f.name), f.name

    def test_saving_leaves_the_running_config_alone(self, tmp_path):
        model = shared("llama", "lora")
        before = model.peft_config["default"].to_dict()
        model.save_pretrained(tmp_path)
        assert model.peft_config["default"].to_dict() == before

    def test_lora_trained_by_others_has_no_d2ft_config(self, tmp_path):
        get_peft_model(fresh("llama"), LoraConfig(target_modules=["v_proj"])).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"holds a LORA adapter and no d2ft_config.json"):
            D2FTConfig.from_pretrained(tmp_path)

    @pytest.mark.thorough
    def test_it_loads_where_d2ft_peft_is_not_installed(self, tmp_path):
        expected = {}
        for name in ("llama", "gpt2"):
            model = trained(name, "lora", modules_to_save=MODULES_TO_SAVE[name])
            plain = fresh(name)
            plain.save_pretrained(tmp_path / name / "base")
            model.save_pretrained(tmp_path / name / "adapter")
            expected[name] = {"ids": TINY[name].batch()["input_ids"], "logits": logits(model, name)}
        torch.save(expected, tmp_path / "expected.pt")
        result = subprocess.run(
            [sys.executable, "-I", "-c", WITHOUT_D2FT, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == "same logits: llama gpt2"


WITHOUT_D2FT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "d2ft_peft":
            raise ImportError(name)

sys.meta_path.insert(0, Absent())
try:
    import d2ft_peft
except ImportError:
    pass
else:
    sys.exit("d2ft_peft can be imported")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

folder = sys.argv[1]
expected = torch.load(f"{folder}/expected.pt")
for name, batch in expected.items():
    base = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}/base")
    model = PeftModel.from_pretrained(base, f"{folder}/{name}/adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(batch["ids"]).logits, batch["logits"])
print("same logits:", *expected)
"""


class TestFullFolder:
    """The full variant has a type of its own and refuses tensors that do not fit."""

    @pytest.mark.parametrize("mode", ["full", "boundary"])
    def test_config_has_no_field_of_lora(self, mode, tmp_path):
        shared("gpt2", mode).save_pretrained(tmp_path)
        written = saved_config(tmp_path)
        assert written["peft_type"] == "D2FT"
        assert written["train_boundary"] == (mode == "boundary")
        assert written["heads_per_subnet"] == 1
        assert not {"r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "init_lora_weights", "bias"} & written.keys()

    @pytest.mark.parametrize("mode", ["full", "boundary"])
    def test_every_field_comes_back(self, mode, tmp_path):
        config = config_for(mode, num_full=2, num_forward_only=1, policy="random", shortcut="mean", seed=3)
        model = get_peft_model(fresh("llama"), config)
        model.save_pretrained(tmp_path)
        restored = PeftConfig.from_pretrained(tmp_path)
        assert type(restored) is D2FTConfig
        for field, value in model.peft_config["default"].to_dict().items():
            assert field in WRITTEN_BY_PEFT or restored.to_dict()[field] == value, field

    def test_missing_and_unknown_tensors_are_refused(self, tmp_path):
        shared("llama", "full").save_pretrained(tmp_path)
        weights = load_file(tmp_path / WEIGHTS)
        moved = next(key for key in weights if key.endswith("v_proj.d2ft_layers.weight"))
        weights[moved.replace("v_proj", "x_proj")] = weights.pop(moved)
        save_file(weights, tmp_path / WEIGHTS)
        message = r"1 of its 21 tensors are missing \(e.g. .*v_proj.* and 1 are unknown \(e.g. .*x_proj"
        with pytest.raises(ValueError, match=message):
            load("llama", tmp_path)

    def test_the_base_model_must_be_the_one_it_was_saved_with(self, tmp_path):
        shared("llama", "full").save_pretrained(tmp_path)
        deeper = TINY["llama"].build(num_hidden_layers=4)
        with pytest.raises(ValueError, match="7 of its 28 tensors are missing .* and 0 are unknown"):
            PeftModel.from_pretrained(deeper, tmp_path)


class TestModelCard:
    def test_full_says_how_to_install_and_import(self, tmp_path):
        shared("vit", "full").save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert "d2ft" in card.data.tags and "lora" not in card.data.tags
        assert card.data.library_name == "peft"
        top = card.text.strip().splitlines()[:10]
        assert any("pip install d2ft_peft" in line for line in top)
        assert any("import d2ft_peft" in line for line in top)

    def test_lora_says_that_it_is_plain_lora(self, tmp_path):
        shared("vit", "lora").save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert {"d2ft", "lora"} <= set(card.data.tags)
        assert "plain LoRA adapter" in card.text and "pip install d2ft_peft" not in card.text

    def test_saving_again_adds_nothing(self, tmp_path):
        model = shared("vit", "full")
        model.save_pretrained(tmp_path)
        first = (tmp_path / "README.md").read_text()
        model.save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == first

    @each_mode
    def test_a_readme_without_metadata_keeps_its_text(self, mode, tmp_path):
        """PEFT makes a card of it; D2FT adds its note and takes nothing away."""
        (tmp_path / "README.md").write_text("# My project\n\nNot a model card.\n")
        shared("vit", mode).save_pretrained(tmp_path)
        assert "# My project\n\nNot a model card." in ModelCard.load(tmp_path / "README.md").text

    def test_a_card_that_the_user_wrote_stays(self, tmp_path):
        (tmp_path / "README.md").write_text("---\ntags:\n- mine\n---\n# My model\n")
        config_for("full").save_pretrained(tmp_path)
        card = ModelCard.load(tmp_path / "README.md")
        assert card.data.tags == ["d2ft", "mine"] and "# My model" in card.text

    def test_a_local_base_model_warns(self, tmp_path):
        fresh("vit").save_pretrained(tmp_path / "base")
        base = TINY["vit"].model.from_pretrained(tmp_path / "base")
        model = get_peft_model(base, config_for("full"))
        with pytest.warns(UserWarning, match="the adapter's base model is the local path .*base"):
            model.save_pretrained(tmp_path / "adapter")
        model.peft_config["default"].base_model_name_or_path = "me/model"
        config_for("full").save_pretrained(tmp_path / "other")


def test_merged_models_are_saved_as_plain_ones(tmp_path):
    model = trained("llama", "boundary")
    expected = logits(model, "llama")
    model.merge_and_unload().save_pretrained(tmp_path)
    close(logits(TINY["llama"].model.from_pretrained(tmp_path), "llama"), expected)
