"""`d2ft plan` says what a budget saves, from a configuration alone."""

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import CONFIG_MAPPING, DistilBertConfig

from d2ft_peft import D2FTPlanner
from d2ft_peft.cli.architecture_choice import TASKS, batch_on_meta, choose_task, model_on_meta, read_config
from d2ft_peft.cli.foreseen import Foresight, make_config
from d2ft_peft.cli.kept_bytes import kept_bytes
from d2ft_peft.engine import compile_plan
from d2ft_peft.schedule import Operation

from ..models import TINY


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", sorted(TINY))
@pytest.mark.parametrize("r", [None, 2])
def test_the_flops_are_those_of_the_real_model(d2ft, config_folder, name, r):
    folder = config_folder(name)
    found = d2ft(f"plan {folder} --json --sequence-length 7 {f'--r {r}' if r else ''}")
    tiny = TINY[name]
    model = tiny.build()
    model = get_peft_model(model, make_config(model, found["task"], r))
    planner = D2FTPlanner(model)
    planner.prepare(tiny.batch() if tiny.kind == "image" else {"input_ids": tiny.batch()["input_ids"]})
    whole = planner.cost_model.full_flops(np.ones(1))
    assert found["counts_head"]
    assert found["forward_flops"] + found["backward_flops"] == pytest.approx(whole, rel=1e-9)
    assert found["trained_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["parameters"] == sum(p.numel() for p in tiny.build().parameters())


@pytest.mark.parametrize("name", sorted(TINY))
def test_what_is_kept_for_backward_is_counted_without_weights(config_folder, name):
    config = read_config(config_folder(name))
    task = choose_task(config, None)
    meta = model_on_meta(config, task).train()
    real = TASKS[task].from_config(config).train()
    batch = batch_on_meta(config, task, None if task == "image-classification" else 7)
    there = {key: torch.ones_like(value, device="cpu") for key, value in batch.items()}
    assert kept_bytes(meta, batch) == kept_bytes(real, there) > 0


def test_what_is_kept_follows_the_plan(config_folder):
    foresight = Foresight(read_config(config_folder("vit")), "image-classification")
    subnets = foresight.planner.partition.num_scheduled
    full = foresight.kept(np.full(subnets, Operation.FULL))
    half = np.where(np.arange(subnets) % 2, Operation.FULL, Operation.FORWARD_ONLY)
    assert 0 < foresight.kept(half) < full
    with foresight.planner.runtime.use(compile_plan(foresight.planner.partition, half)):
        assert kept_bytes(foresight.model, foresight.labelled) == foresight.kept(half)


def test_each_budget_says_what_it_saves(d2ft, config_folder):
    found = d2ft(f"plan {config_folder('vit')} --budget 0.6 --budget 0.4 --batch 4 --micro-batches 5 --json")
    ratios = [one["flops_ratio"] for one in found["budgets"]]
    assert ratios == pytest.approx([0.6, 0.4])
    assert [one["row_bytes"] < one["row_bytes_of_tensor_parallel"] for one in found["budgets"]] == [True, True]
    assert {one["policy"] for one in found["budgets"]} == {"exact_first"}
    assert not any(one["scores_drawn"] for one in found["budgets"])


def test_a_policy_that_reads_scores_gets_drawn_ones_and_says_so(d2ft, config_folder):
    folder = config_folder("vit")
    found = d2ft(f"plan {folder} --policy bilevel --budget 0.6 --json")
    assert found["budgets"][0]["scores_drawn"]
    assert "drawn at random" in d2ft(f"plan {folder} --policy bilevel --budget 0.6")


def test_the_answer_for_people_has_the_figures_and_the_picture(d2ft, config_folder, tmp_path):
    text = d2ft(f"plan {config_folder('llama')} --r 2 --subnets --png {tmp_path / 'schedule.png'}")
    assert "llama for causal-lm, 3 blocks" in text and "60.0%" in text and "heads each" in text
    assert (tmp_path / "schedule.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.thorough
def test_a_model_type_is_enough(d2ft):
    found = d2ft("plan gpt2 --r 4 --sequence-length 16 --heads-per-subnet 12 --json")
    assert (found["model_type"], found["task"], found["subnets"]) == ("gpt2", "causal-lm", 14)


def test_a_model_whose_heads_are_found_by_trying_is_planned_too(d2ft, tmp_path):
    DistilBertConfig(vocab_size=64, dim=32, n_heads=4, n_layers=2, hidden_dim=48).save_pretrained(tmp_path)
    found = d2ft(f"plan {tmp_path} --sequence-length 7 --json")
    assert (found["blocks"], found["subnets"]) == (2, 10) and found["budgets"][0]["flops_ratio"] == pytest.approx(0.6)


@pytest.mark.quick(2)
@pytest.mark.filterwarnings("ignore:the subnets are the .* whole blocks", "ignore:LoRA leaves dt_proj")
@pytest.mark.parametrize("r", ["", "--r 4"])
@pytest.mark.parametrize(
    ("model_type", "task"),
    [
        ("t5", "seq2seq-lm"), ("bart", "seq2seq-lm"), ("clip", "image-classification"),
        ("siglip", "image-classification"), ("swin", "image-classification"), ("convnext", "image-classification"),
        ("llava", "image-text-to-text"), ("qwen3_vl", "image-text-to-text"), ("mamba", "causal-lm"),
    ],
)  # fmt: skip
def test_models_of_every_kind_are_planned(d2ft, tmp_path, model_type, task, r):
    """From what transformers takes for usual of a type, with fewer blocks; heads that are new are found in each."""
    config = CONFIG_MAPPING[model_type]()
    for part in (config, getattr(config, "vision_config", config), config.get_text_config()):
        if hasattr(part, "num_hidden_layers") and not hasattr(part, "depths"):
            part.num_hidden_layers = 2
    for name in ("encoder_layers", "decoder_layers", "num_decoder_layers"):
        if hasattr(config, name):
            setattr(config, name, 2)
    config.save_pretrained(tmp_path)
    found = d2ft(f"plan {tmp_path} {r} --budget 0.5 --json")
    assert found["task"] == task and found["budgets"][0]["flops_ratio"] == pytest.approx(0.5)
    assert (found["trained_parameters"] < found["parameters"] / 2) == bool(r)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("plan {vit} --budget 1.5", "compute_budget=1.5 must be in"),
        ("plan {vit} --policy nonsense", "policy='nonsense'"),
        ("plan {vit} --policy fewer_tokens", "leaves out tokens within micro-batches"),
        ("plan {vit} --task causal-lm", "task='causal-lm' is nothing that transformers has a vit model for"),
        ("plan {vit} --task poetry", "task='poetry' is unknown"),
        ("plan {vit} --batch 0", "batch_size=0 must be at least 1"),
        ("plan {vit} --heads-per-subnet 3", "heads_per_subnet=3 does not divide"),
        ("plan {llama} --sequence-length 9999999", "sequence_length=9999999 must be between 1 and"),
        ("plan {empty}", "is a folder without config.json"),
        ("plan no/such-model", "neither a folder with config.json"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(d2ft, config_folder, tmp_path, line, says):
    (tmp_path / "empty").mkdir()
    line = line.format(vit=config_folder("vit"), llama=config_folder("llama"), empty=tmp_path / "empty")
    error = d2ft(line + " --json", code=2)
    assert error.startswith("d2ft: ") and says in error and error.count("\n") == 1


def test_help_has_an_example(d2ft):
    assert "Example: d2ft plan" in " ".join(d2ft("plan --help").split())
    assert "plan" in d2ft("--help")
    assert d2ft("--version").strip()


def test_an_encoder_decoder_is_planned_whole():
    config = read_config("t5")
    task = choose_task(config, None)
    assert task == "seq2seq-lm"
    outputs = model_on_meta(config, task)(**batch_on_meta(config, task, length=9))
    assert outputs.logits.shape == (1, 9, config.vocab_size)
    with pytest.raises(ValueError, match="decoder without an encoder to attend to"):
        choose_task(read_config("whisper"), "causal-lm")
