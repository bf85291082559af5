"""What comes out of the frozen lower blocks is kept by sample: later epochs begin above them, with the same result."""

import os

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset

from d2ft_peft import D2FTConfig, D2FTTrainer
from d2ft_peft.engine import get_runtime
from tests.distributed.launch import run
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples, trained


NUMBER = 10  # samples: with batches of four the last is smaller


def ragged(name, n=NUMBER, side="right"):
    """Texts of different lengths, padded batch by batch."""
    rng = np.random.default_rng(0)
    data = [dict(item) for item in samples(name, n)]
    for item in data:
        length = int(rng.integers(2, 8))
        for key in item:
            item[key] = item[key][:length] if item[key].ndim else item[key]

    def collate(items):
        width = max(len(item["input_ids"]) for item in items)
        padded = {}
        for key, filler in {"input_ids": 0, "attention_mask": 0, "labels": -100}.items():
            if not items[0][key].ndim:
                padded[key] = torch.stack([item[key] for item in items])
                continue
            rows = []
            for item in items:
                rest = item[key].new_full((width - len(item[key]),), filler)
                rows.append(torch.cat([item[key], rest] if side == "right" else [rest, item[key]]))
            padded[key] = torch.stack(rows)
        return padded

    return data, collate


def build(name, dtype=torch.float32, **fields):
    model = TINY[name].build().to(dtype)
    torch.manual_seed(5)
    usual = {"r": 4, "layers_to_transform": [2], "policy": "all_full", "compute_budget": 1.0}
    return get_peft_model(model, D2FTConfig(**{**usual, **fields}))


def blocks_of(model):
    base = model.get_base_model()
    return [base.get_submodule(name) for name in get_runtime(model).partitions["default"].blocks]


def count_rows(model):
    """A list that fills with the rows of each pass through the first block's attention."""
    seen = []
    branch = get_runtime(model).partitions["default"].branches[0]
    projection = model.get_base_model().get_submodule(branch.columns[0].name)
    projection.register_forward_hook(lambda _, args, output: seen.append(len(args[0])) if model.training else None)
    return seen


def train(tmp_path, name="vit", data=None, collate=None, model=None, **options):
    """(model, losses, rows that the first block ran on, trainer)."""
    fields = {key: options.pop(key) for key in [*options] if key in D2FTConfig.__dataclass_fields__}
    model = build(name, **fields) if model is None else model
    rows = count_rows(model)
    settings = {
        "max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "remove_unused_columns": False,
    }  # fmt: skip
    trainer = D2FTTrainer(
        model=model, args=arguments(tmp_path / "out", **{**settings, **options}), data_collator=collate,
        train_dataset=samples(name, NUMBER) if data is None else data,
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return model, losses, [n for n in rows if n], trainer


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_training_ends_with_the_same_bits_and_blocks_run_in_the_first_epoch_only(tmp_path, name):
    alone = {"skip_unread_rows": False}  # the cache alone is looked at
    plain, losses, rows, trainer = train(tmp_path, name, **alone)
    cached, others, fewer, cached_trainer = train(tmp_path, name, cache_frozen=str(tmp_path / "cache"), **alone)
    assert_equal(trained(cached), trained(plain))
    assert others == losses
    assert sum(rows) == 3 * NUMBER and sum(fewer) == NUMBER
    ratios = [t.state.log_history[-1]["flops_ratio"] for t in (trainer, cached_trainer)]
    assert ratios[0] == 1 and ratios[1] < 0.8
    runtime = get_runtime(cached)
    assert runtime.cache is None and not cached.get_base_model().base_model._forward_pre_hooks


@pytest.mark.quick(1)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("name, side", [("bert", "right"), ("llama", "left"), ("llama", "right")])
def test_only_real_tokens_are_kept_and_padding_may_change_from_epoch_to_epoch(tmp_path, name, side, accumulation):
    data, collate = ragged(name, side=side)
    options = {"data": data, "collate": collate, "gradient_accumulation_steps": accumulation}
    plain, losses, _, _ = train(tmp_path, name, **options)
    cached, others, rows, _ = train(tmp_path, name, **options, cache_frozen=str(tmp_path / "cache"))
    assert sum(rows) == NUMBER
    assert others == pytest.approx(losses, rel=1e-5)
    for key, value in trained(plain).items():
        torch.testing.assert_close(trained(cached)[key], value, rtol=1e-3, atol=1e-5, msg=key)
    kept = sum(len(item["input_ids"]) for item in data) * 32 * 4
    (file,) = os.scandir(tmp_path / "cache")
    assert file.stat().st_size == 256 + 32 * NUMBER + kept


def test_a_second_call_of_train_and_a_resumed_run_find_what_is_there(tmp_path):
    cache = {"cache_frozen": str(tmp_path / "cache")}
    model, _, rows, trainer = train(tmp_path, **cache, save_strategy="epoch")
    del rows[:], trainer
    again, _, fewer, _ = train(tmp_path, **cache, num_train_epochs=1)
    # Blocks run once, so that it is seen what they return.
    assert sum(fewer) == 4
    resumed = build("vit", **cache)
    rows = count_rows(resumed)
    D2FTTrainer(
        model=resumed, train_dataset=samples("vit", NUMBER),
        args=arguments(
            tmp_path / "out", max_steps=-1, num_train_epochs=3, per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
        ),
    ).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))  # fmt: skip
    assert sum(rows) == 4
    assert_equal(trained(resumed), trained(model))


def test_what_is_full_stays_full_and_says_so_once(tmp_path):
    room = 256 + 3 * (32 + 5 * 32 * 4)  # three samples of five tokens
    with pytest.warns(UserWarning, match="is full") as told:
        cached, losses, rows, _ = train(
            tmp_path, cache_frozen=str(tmp_path / "cache"), cache_gigabytes=room / 1e9, policy="all_full"
        )
    assert len([one for one in told if "is full" in str(one.message)]) == 1
    assert sum(rows) == NUMBER + 2 * (NUMBER - 3)
    assert sum(file.stat().st_size for file in os.scandir(tmp_path / "cache")) == room
    plain, expected, _, _ = train(tmp_path)
    assert losses == pytest.approx(expected, rel=1e-5)


def test_augmented_inputs_are_computed_and_it_is_said_that_nothing_is_gained(tmp_path):
    class Augmented(Dataset):
        def __init__(self):
            self.items = samples("vit", NUMBER)

        def __len__(self):
            return NUMBER

        def __getitem__(self, index):
            item = self.items[index]
            return {**item, "pixel_values": item["pixel_values"] + 0.1 * torch.randn(3, 16, 16)}

    with pytest.warns(UserWarning, match="no sample came a second time") as told:
        _, _, rows, _ = train(tmp_path, data=Augmented(), cache_frozen=str(tmp_path / "cache"))
    assert sum(rows) == 3 * NUMBER
    assert len([one for one in told if "second time" in str(one.message)]) == 1


@pytest.mark.quick(1)
@pytest.mark.parametrize("kind", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointed_blocks_are_recomputed_on_what_was_kept(tmp_path, kind):
    weights = []
    for directory in (None, str(tmp_path / "cache")):
        model = build("llama", layers_to_transform=[1, 2], cache_frozen=directory)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        model.enable_input_require_grads()
        _, _, rows, _ = train(tmp_path, "llama", model=model)
        weights.append(trained(model))
    assert sum(rows) == NUMBER
    assert_equal(*weights)


def test_a_schedule_that_leaves_out_frozen_heads_runs_as_it_is(tmp_path):
    options = {"policy": "random", "compute_budget": 0.6}
    plain, _, _, _ = train(tmp_path, **options)
    with pytest.warns(UserWarning, match="the schedule leaves out some of their heads"):
        cached, _, _, _ = train(tmp_path, **options, cache_frozen=str(tmp_path / "cache"))
    assert_equal(trained(cached), trained(plain))


@pytest.mark.thorough
def test_samples_of_a_policy_and_depths_are_looked_up_too(tmp_path):
    for policy in ("fewer_samples", "depth"):
        options = {"policy": policy, "compute_budget": 0.6, "layers_to_transform": [1, 2], "r": 4}
        plain, _, more, _ = train(tmp_path, **options, num_train_epochs=4)
        cached, _, rows, _ = train(tmp_path, **options, num_train_epochs=4, cache_frozen=str(tmp_path / policy))
        assert sum(rows) < sum(more)
        for key, value in trained(plain).items():
            torch.testing.assert_close(trained(cached)[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"cache_frozen": ""}, "cache_frozen='' must be the path of a folder"),
        ({"cache_dtype": "int8"}, "cache_dtype='int8' must be one of float32, float16, bfloat16"),
        ({"cache_gigabytes": 0}, "cache_gigabytes=0 must be a positive number"),
        ({"cache_frozen": "x", "head_parallel": True}, "is not possible with head_parallel=True"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        D2FTConfig(**fields)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_folder_is_not_saved_with_the_adapter(tmp_path, rank):
    config = D2FTConfig(r=rank, cache_frozen="/home/somebody/cache", cache_dtype="float16")
    config.save_pretrained(tmp_path)
    assert not any("somebody" in file.read_text() for file in tmp_path.iterdir())
    loaded = D2FTConfig.from_pretrained(str(tmp_path))
    assert loaded.cache_frozen is None and loaded.cache_dtype == "float16"


def train_in_a_process(directory):
    """(weights, rows that ran, bytes in the folder) of one of two processes, on one shard of the data each."""
    model = build("vit", cache_frozen=directory)
    rows = count_rows(model)
    args = arguments(
        f"{directory}-out", max_steps=-1, num_train_epochs=3, gradient_accumulation_steps=1, ddp_timeout=60,
        per_device_train_batch_size=4,
    )  # fmt: skip
    D2FTTrainer(model=model, args=args, train_dataset=samples("vit", 16)).train()
    return trained(model), sum(rows), len(os.listdir(directory))


@pytest.mark.thorough
@pytest.mark.distributed
def test_each_process_writes_a_file_and_reads_those_of_the_others(tmp_path):
    (ours, rows, files), (theirs, others, _) = run(__name__, "train_in_a_process", tmp_path, str(tmp_path / "cache"))
    assert_equal(ours, theirs)
    # Which samples a process meets differs from epoch to epoch; each sample ran once, in one of them.
    assert rows == others == 8 and files == 2
