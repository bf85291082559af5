"""D2FTConfig: its defaults, and what it says to values that cannot be."""

import dataclasses

import numpy as np
import pytest
from peft import LoraConfig

from d2ft_peft import D2FTConfig
from d2ft_peft.schedule import Budget, policy_names
from d2ft_peft.scores.contribution import GRADIENT_SCORES


AUTO = {"device_capacities": "auto", "policy": "fewer_samples"}
TOKENS = {"policy": "fewer_tokens"}
DEFAULTS = {
    "r": None,
    "train_boundary": False,
    "keep_base": True,
    "subnets": None,
    "heads_per_subnet": 1,
    "stacks": None,
    "num_micro_batches": 5,
    "compute_budget": None,
    "communication_budget": None,
    "num_full": None,
    "num_forward_only": None,
    "num_devices": None,
    "device_capacities": None,
    "head_parallel": False,
    "policy": "exact_first",
    "rows": None,
    "padding": "compose",
    "interval": 10,
    "tie_break": "aligned",
    "backward_score": "weight_magnitude",
    "forward_score": "weight_magnitude",
    "score_fraction": 1.0,
    "shortcut": "zero",
    "forward_only_cost": None,
    "head_learning_rate_factor": 1.0,
    "learning_rate_follows_batch": None,
    "head_start": "auto",
    "head_start_fraction": None,
    "skip_unread_rows": True,
    "seed": 0,
    "cache_frozen": None,
    "cache_dtype": None,
    "cache_gigabytes": 8.0,
    "token_choice": "grid",
    "token_margins": (1, 1),
    "token_dense_share": 0.1,
    "token_ramp": 0.0,
}

BAD = [
    ({"r": 0}, "r=0 must be an integer of at least 1"),
    ({"r": 2.5}, "r=2.5 must be an integer"),
    ({"r": True}, "r=True must be an integer"),
    ({"train_boundary": 1}, "train_boundary=1 must be True or False"),
    ({"r": 4, "train_boundary": True}, "train_boundary=True is for full fine-tuning; name modules_to_save"),
    ({"keep_base": 0}, "keep_base=0 must be True or False"),
    ({"r": 4, "keep_base": False}, "keep_base=False is for full fine-tuning; LoRA leaves the base as it is"),
    ({"head_parallel": True, "keep_base": False}, "keep_base=False trains the base itself"),
    ({"subnets": "layers"}, "subnets='layers' must be 'heads', 'blocks' or None"),
    (
        {"subnets": "blocks", "heads_per_subnet": 2},
        r"heads_per_subnet=2 groups heads; leave it out \(subnets='blocks'\)",
    ),
    ({"subnets": "blocks", "shortcut": "mean"}, "shortcut='mean' stands in for heads that are skipped; use 'zero'"),
    ({"subnets": "blocks", "head_parallel": True}, "head_parallel=True shares out heads; leave it out"),
    ({"subnets": "blocks", "rows": "tokens", "policy": "fewer_tokens"}, "rows='tokens' runs heads on some tokens"),
    ({"heads_per_subnet": 0}, "heads_per_subnet=0 must be an integer of at least 1"),
    ({"stacks": []}, r"stacks=\[\] must be the path of a stack of blocks, a list of such paths, or None"),
    ({"stacks": ["encoder", 1]}, r"stacks=\['encoder', 1\] must be the path of a stack"),
    ({"heads_per_subnet": "2"}, "heads_per_subnet='2' must be an integer"),
    ({"num_micro_batches": 0}, "num_micro_batches=0 must be an integer of at least 1"),
    ({"num_micro_batches": 2.0}, "num_micro_batches=2.0 must be an integer"),
    ({"num_devices": 0}, "num_devices=0 must be an integer of at least 1 or None"),
    ({"num_devices": 1.5}, "num_devices=1.5 must be an integer"),
    ({"head_start": "yes"}, "head_start='yes' must be 'auto', True or False"),
    ({"head_start_fraction": 1.5}, r"head_start_fraction=1.5 must be a number in \(0, 1\], or None"),
    ({"head_start": True, "head_parallel": True}, "head_start=True is not available under head_parallel=True"),
    ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
    ({"seed": None}, "seed=None must be an integer"),
    ({"compute_budget": 0}, r"compute_budget=0 must be in \(0, 1\]"),
    ({"compute_budget": 1.1}, r"compute_budget=1.1 must be in \(0, 1\]"),
    ({"compute_budget": "0.6"}, r"compute_budget='0.6' must be a number in \(0, 1\]"),
    ({"compute_budget": float("nan")}, r"compute_budget=nan must be a number in \(0, 1\]"),
    ({"communication_budget": -0.5}, r"communication_budget=-0.5 must be in \(0, 1\]"),
    ({"num_full": 0}, "num_full=0 must be at least 1"),
    ({"num_full": 1.5}, "num_full=1.5 must be a whole number"),
    ({"num_full": 1, "num_forward_only": -1}, "num_forward_only=-1 must not be negative"),
    ({"num_forward_only": 2}, "num_forward_only=2 needs num_full beside it"),
    ({"compute_budget": 0.5, "num_forward_only": 2}, "num_forward_only=2 needs num_full beside it"),
    ({"compute_budget": 0.5, "num_full": 2}, r"compute_budget and num_full=\[0.5, 2\] are both given; keep one"),
    ({"compute_budget": 0.5, "communication_budget": 0.5}, "compute_budget and communication_budget=.* keep one"),
    ({"compute_budget": 0.5, "num_devices": 1, "device_capacities": [0.5]}, "compute_budget and device_capacities="),
    ({"device_capacities": 0.5}, "device_capacities=0.5 must be a list of numbers, or 'auto'"),
    ({"device_capacities": "fast"}, "device_capacities='fast' must be a list of numbers, or 'auto'"),
    ({**AUTO, "policy": "bilevel"}, "policy='bilevel' with rows='micro_batches' schedules.*choose 'fewer_samples'"),
    ({**AUTO, "rows": "micro_batches"}, "policy='fewer_samples' with rows='micro_batches' schedules"),
    ({**AUTO, "num_full": 2}, "num_full=2 is not possible; give compute_budget, the mean over processes, with device_"),
    ({**AUTO, "communication_budget": 0.5}, "communication_budget=0.5 is not possible"),
    ({**AUTO, "num_devices": 2}, "num_devices=2 is not possible"),
    ({**AUTO, "compute_budget": 1.0}, "compute_budget=1.0 leaves every process all of its samples"),
    ({**AUTO, "head_parallel": True}, "head_parallel=True takes numbers, one per process"),
    ({"device_capacities": [0.5, 0.6]}, r"device_capacities=\[0.5, 0.6\] needs num_devices=2, not None"),
    ({"num_devices": 1, "device_capacities": [0.5, 0.6]}, "needs num_devices=2, not 1"),
    ({"num_devices": 2, "device_capacities": [0.5, 0]}, r"device_capacities\[1\]=0 must be in \(0, 1\]"),
    ({"policy": "best"}, "policy='best' is unknown; choose one of .*bilevel"),
    ({"policy": ["bilevel"]}, r"policy=\['bilevel'\] must be the name of a policy"),
    ({"rows": "patches"}, "rows='patches' must be one of micro_batches, samples, tokens"),
    ({"rows": "tokens"}, "rows='tokens' does not go with policy='exact_first'"),
    ({**TOKENS, "rows": "samples"}, "rows='samples' does not go with policy='fewer_tokens'"),
    ({**TOKENS, "num_full": 2}, "num_full=2 is not possible with policy='fewer_tokens'; give compute_budget alone"),
    ({**TOKENS, "cache_frozen": "cache"}, "cache_frozen='cache' is not possible with policy='fewer_tokens'"),
    ({**TOKENS, "shortcut": "mean"}, "shortcut='mean' is for heads"),
    ({**TOKENS, "head_parallel": True}, "rows='tokens' is not available under head_parallel=True"),
    ({**TOKENS, "token_choice": "best"}, "token_choice='best' must be one of grid, random, random_per_block"),
    ({**TOKENS, "token_margins": (0, 1)}, r"token_margins=\(0, 1\) must be two integers, at least 1 for the first"),
    ({**TOKENS, "token_dense_share": 1}, r"token_dense_share=1 must be a number in \[0, 1\)"),
    ({**TOKENS, "token_ramp": 0.95}, "token_ramp=0.95 and token_dense_share=0.1 are more than all steps"),
    ({"token_choice": "random"}, "token_choice='random' is for policy='fewer_tokens', not 'exact_first'; leave it out"),
    ({"interval": 0}, "interval=0 must be an integer of at least 1"),
    ({"policy": "importance", "num_full": 1, "num_forward_only": 1}, "num_forward_only=1 counts micro-batches"),
    ({"policy": "exact_first", "num_full": 2}, "num_full=2 is not possible under policy='exact_first'"),
    ({"policy": "exact_first", "head_parallel": True}, "head_parallel=True is not possible under policy='exact_"),
    ({"policy": 3}, "policy=3 must be the name of a policy, or None"),
    ({"padding": "none"}, "padding='none' must be one of compose, flatten, keep"),
    ({"tie_break": "even"}, "tie_break='even' must be one of aligned, spread"),
    ({"backward_score": "l2"}, "backward_score='l2' must be one of weight_magnitude, fisher"),
    ({"score_fraction": 0}, r"score_fraction=0 must be a number in \(0, 1\]"),
    ({"score_fraction": 1.5}, r"score_fraction=1.5 must be a number in \(0, 1\]"),
    ({"score_fraction": "all"}, r"score_fraction='all' must be a number in \(0, 1\]"),
    ({"shortcut": "skip"}, "shortcut='skip' must be one of zero, mean, rescale"),
    ({"forward_only_cost": 1}, r"forward_only_cost=1 must be a number in \(0, 1\), or None"),
    ({"forward_only_cost": "low"}, r"forward_only_cost='low' must be a number in \(0, 1\), or None"),
    ({"task_type": "SPEECH"}, "Invalid task type: 'SPEECH'"),
]

NEEDS_RANK = {
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "use_rslora": True,
    "init_lora_weights": False,
    "bias": "all",
    "rank_pattern": {"q_proj": 2},
    "fan_in_fan_out": True,
    "use_dora": True,
}
NOT_UNDER_D2FT = {
    "use_dora": True,
    "use_qalora": True,
    "layer_replication": [(0, 2)],
    "target_parameters": ["mlp.weight"],
}


def test_defaults():
    config = D2FTConfig()
    own = {f.name for f in dataclasses.fields(D2FTConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}
    assert own | {"r"} == DEFAULTS.keys()
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert config.budget == Budget(compute=0.6)


@pytest.mark.parametrize(
    "fields, policy",
    [
        ({}, "exact_first"),
        ({"compute_budget": 0.4, "heads_per_subnet": 2}, "exact_first"),
        ({"num_full": 3, "num_forward_only": 1}, "bilevel"),
        ({"communication_budget": 0.5}, "bilevel"),
        ({"num_devices": 2, "device_capacities": [0.5, 1.0]}, "bilevel"),
        ({"forward_score": "fisher"}, "bilevel"),
        ({"tie_break": "spread"}, "bilevel"),
        ({"head_parallel": True}, "bilevel"),
        ({"device_capacities": "auto"}, "fewer_samples"),
    ],
)
def test_without_a_policy_it_follows_from_what_is_asked_for(fields, policy):
    assert D2FTConfig(**fields).policy == policy


@pytest.mark.parametrize("policy", policy_names())
def test_no_policy_asks_for_a_pass_over_the_data_by_default(policy):
    config = D2FTConfig(policy=policy)
    assert not {config.forward_score, config.backward_score} & set(GRADIENT_SCORES)
    assert D2FTConfig(policy=policy, forward_score="fisher").forward_score == "fisher"


def test_a_policy_brings_its_rows_and_its_score():
    config = D2FTConfig(policy="importance")
    assert (config.rows, config.backward_score) == ("samples", "loss")
    assert D2FTConfig(policy="importance", rows="micro_batches", backward_score="el2n").rows == "micro_batches"


@pytest.mark.parametrize("values, message", BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_values_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        D2FTConfig(**values)


@pytest.mark.parametrize("field", NEEDS_RANK)
def test_fields_of_lora_need_a_rank(field):
    with pytest.raises(ValueError, match=f"{field}=.* is for LoRA; set r as well"):
        D2FTConfig(**{field: NEEDS_RANK[field]})


@pytest.mark.parametrize("field", NOT_UNDER_D2FT)
def test_variants_of_lora_that_heads_do_not_fit(field):
    with pytest.raises(ValueError, match=f"{field}=.* is not available under D2FT; leave it out"):
        D2FTConfig(r=4, **{field: NOT_UNDER_D2FT[field]})


@pytest.mark.parametrize(
    "values, budget",
    [
        ({"compute_budget": 1}, Budget(compute=1.0)),
        ({"communication_budget": 0.5}, Budget(communication=0.5)),
        ({"num_full": 3}, Budget(num_full=3)),
        ({"num_full": 3, "num_forward_only": 1}, Budget(num_full=3, num_forward_only=1)),
        ({"num_devices": 2, "device_capacities": [0.5, 1]}, Budget(compute=(0.5, 1.0))),
        (AUTO, Budget(compute=0.6)),
        ({**AUTO, "compute_budget": 0.75}, Budget(compute=0.75)),
    ],
)
def test_the_budget_that_the_fields_state(values, budget):
    assert D2FTConfig(**values).budget == budget


def test_numbers_of_numpy_are_numbers(tmp_path):
    config = D2FTConfig(r=np.int64(4), heads_per_subnet=np.int32(2), score_fraction=np.float32(0.5))
    config.save_pretrained(tmp_path)
    restored = D2FTConfig.from_pretrained(tmp_path)
    assert (restored.r, restored.heads_per_subnet, restored.score_fraction) == (4, 2, 0.5)


def test_the_rank_decides_the_variant():
    assert (D2FTConfig().peft_type, D2FTConfig().is_lora) == ("D2FT", False)
    assert (D2FTConfig(r=8).peft_type, D2FTConfig(r=8).is_lora) == ("D2FT_LORA", True)
    assert "r" not in D2FTConfig().to_dict() and D2FTConfig(r=8).to_dict()["r"] == 8


@pytest.mark.parametrize(
    "content, message",
    [
        ("[]", r"d2ft_config.json holds \[\]; it must be a JSON object"),
        ("null", "d2ft_config.json holds None; it must be a JSON object"),
        ('{"policy": ', "d2ft_config.json is damaged, it holds no JSON"),
        ("\xff", "d2ft_config.json is damaged, it holds no JSON"),
        ('{"num_micro_batches": "5"}', "d2ft_config.json: num_micro_batches='5' must be an integer"),
        ('{"policy": "nope"}', "d2ft_config.json: policy='nope' is unknown"),
        ('{"policy": {}}', "d2ft_config.json: policy={} must be the name of a policy"),
        ('{"num_full": 1e400}', "d2ft_config.json: num_full=inf must be a whole number"),
        ('{"device_capacities": {"a": 1}, "num_devices": 1}', "d2ft_config.json: device_capacities={'a': 1} must be"),
        ('{"rows": ["samples"]}', r"d2ft_config.json: rows=\['samples'\] must be one of"),
    ],
)
def test_a_damaged_file_is_named(content, message, tmp_path):
    D2FTConfig(r=4).save_pretrained(tmp_path)
    (tmp_path / "d2ft_config.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        D2FTConfig.from_pretrained(tmp_path)


def test_own_fields_can_be_put_beside_adapter_files_that_were_copied(tmp_path):
    config = D2FTConfig(r=4, compute_budget=0.5)
    config.save_pretrained(tmp_path / "saved")
    copied = tmp_path / "pushed"
    copied.mkdir()
    (copied / "adapter_config.json").write_text((tmp_path / "saved" / "adapter_config.json").read_text())
    config.save_own_fields(copied)
    assert D2FTConfig.from_pretrained(copied).compute_budget == 0.5
    D2FTConfig().save_own_fields(tmp_path)
    assert not (tmp_path / "d2ft_config.json").exists()


def test_a_project_readme_stays_as_it_is(tmp_path):
    text = "# My project\n\nNot a model card.\n"
    (tmp_path / "README.md").write_text(text)
    D2FTConfig(r=4).save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text
