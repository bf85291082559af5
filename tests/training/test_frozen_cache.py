"""What comes out of the frozen lower blocks is kept by sample: later epochs begin above them, with the same result."""

import os
import warnings

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.engine import frozen_cache, get_runtime, open_cache
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples, trained


NUMBER = 10  # samples: with batches of four the last is smaller
WITHOUT_DROPOUT = {"attention_dropout": 0.0}


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
    return get_peft_model(
        model, D2FTConfig(**{"r": 4, "layers_to_transform": [2], "policy": "all_full", "compute_budget": 1.0, **fields})
    )


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


@pytest.mark.parametrize("name", ["vit", "llama", "bert"])
def test_training_ends_with_the_same_bits_and_blocks_run_in_the_first_epoch_only(tmp_path, name):
    plain, losses, rows, trainer = train(tmp_path, name)
    cached, others, fewer, cached_trainer = train(tmp_path, name, cache_frozen=str(tmp_path / "cache"))
    assert_equal(trained(cached), trained(plain))
    assert others == losses
    assert sum(rows) == 3 * NUMBER and sum(fewer) == NUMBER
    ratios = [t.state.log_history[-1]["flops_ratio"] for t in (trainer, cached_trainer)]
    assert ratios[0] == 1 and ratios[1] < 0.8
    runtime = get_runtime(cached)
    assert runtime.cache is None and not cached.get_base_model().base_model._forward_pre_hooks


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


def lookups(model, directory, batch, **options):
    """(output of the cut, hits, misses) of one planned pass."""
    planner = D2FTPlanner(model.train())
    planner.plan([dict(batch)])
    with frozen_cache(model, str(directory), **options) as cache:
        with planner.micro_batch(0):
            loss = model(**batch).loss
            loss.backward()
        return loss.item(), cache.hits, cache.misses


def test_other_weights_other_inputs_and_another_model_are_misses(tmp_path):
    batch = TINY["vit"].batch(4)
    model = build("vit")
    assert lookups(model, tmp_path, batch)[1:] == (0, 4)
    assert lookups(model, tmp_path, batch)[1:] == (4, 0)
    changed = {**batch, "pixel_values": batch["pixel_values"].clone()}
    changed["pixel_values"][1, 0, 0, 0] += 1e-3
    assert lookups(model, tmp_path, changed)[1:] == (3, 1)
    weight = blocks_of(model)[1].mlp.fc1.weight
    kept = weight.detach().clone()
    weight.data[0, 0] += 1e-6
    assert lookups(model, tmp_path, batch)[1:] == (0, 4)
    weight.data.copy_(kept)
    assert lookups(model, tmp_path, batch)[1:] == (4, 0)
    model.set_attn_implementation("eager")
    assert lookups(model, tmp_path, batch)[1:] == (0, 4)
    blocks_of(model)[2].mlp.fc1.weight.data[0, 0] += 1  # above the cut
    assert lookups(model, tmp_path, batch)[1:] == (4, 0)


def test_a_batch_that_is_known_in_part_runs_the_rest_alone(tmp_path):
    model, batch = build("llama", dtype=torch.float64), TINY["llama"].batch(5)
    rows = count_rows(model)
    known = {key: value[1:4] for key, value in batch.items()}
    planner = D2FTPlanner(model.train())
    planner.plan([dict(batch)])
    found = []
    with frozen_cache(model, str(tmp_path)) as cache:
        for given in (known, batch):
            del rows[:]
            model.zero_grad()
            with planner.micro_batch(0):
                model(**given).loss.backward()
            found.append(([*rows], cache.hits, cache.misses))
            passes = [*cache.runtime.passes]
    assert found == [([3], 0, 3), ([2], 3, 5)] and passes == [(5, 7)]
    ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with planner.micro_batch(0):
        model(**batch).loss.backward()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, msg=name)


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


def test_files_of_other_weights_make_room(tmp_path):
    batch, model = TINY["vit"].batch(4), build("vit")
    room = (256 + 4 * (32 + 5 * 32 * 4)) / 1e9
    lookups(model, tmp_path, batch, gigabytes=room)
    blocks_of(model)[0].mlp.fc1.weight.data.add_(1)
    lookups(model, tmp_path, batch, gigabytes=room)
    assert lookups(model, tmp_path, batch, gigabytes=room)[1:] == (4, 0)
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("damage", ["a value", "a header", "the end is missing", "the file's head"])
def test_what_is_damaged_is_computed_again_with_a_warning(tmp_path, damage):
    batch, model = TINY["vit"].batch(4), build("vit")
    loss = lookups(model, tmp_path, batch)[0]
    (path,) = (entry.path for entry in os.scandir(tmp_path))
    size = os.path.getsize(path)
    record = (size - 256) // 4
    position = {"a value": 256 + 40, "a header": 256 + record + 21, "the file's head": 3}.get(damage)
    if position is None:
        os.truncate(path, size - 5)
    else:
        with open(path, "r+b") as file:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 1]))
    known = {"a value": 3, "a header": 1, "the end is missing": 3, "the file's head": 0}[damage]
    speaks = damage in ("a value", "a header")
    with pytest.warns(UserWarning, match="damaged") if speaks else warnings.catch_warnings():
        again, hits, misses = lookups(model, tmp_path, batch)
    assert (hits, misses) == (known, 4 - known) and again == pytest.approx(loss, rel=1e-6)
    if damage != "a header":  # what was computed again is kept, and found
        assert lookups(model, tmp_path, batch)[1] == 4


@pytest.mark.parametrize("kept, bytes_each, tolerance", [("float16", 2, 2e-3), ("bfloat16", 2, 2e-2)])
def test_kept_in_half_the_bytes_it_is_as_exact_as_these_are(tmp_path, kept, bytes_each, tolerance):
    batch, model = TINY["vit"].batch(4), build("vit")
    exact = lookups(model, tmp_path, batch, dtype=kept)[0]
    D2FTPlanner(model)
    (path,) = (entry.path for entry in os.scandir(tmp_path))
    assert os.path.getsize(path) == 256 + 4 * (32 + 5 * 32 * bytes_each)
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with frozen_cache(model, str(tmp_path), dtype=kept) as cache:
        losses = []
        for _ in range(2):
            with planner.micro_batch(0):
                losses.append(model(**batch).loss.item())
        assert cache.hits == 8
    assert losses[1] != exact and losses[1] == pytest.approx(exact, rel=tolerance)


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


def test_samples_of_a_policy_and_depths_are_looked_up_too(tmp_path):
    for policy in ("fewer_samples", "depth"):
        options = {"policy": policy, "compute_budget": 0.6, "layers_to_transform": [1, 2], "r": 4}
        plain, _, more, _ = train(tmp_path, **options, num_train_epochs=4)
        cached, _, rows, _ = train(tmp_path, **options, num_train_epochs=4, cache_frozen=str(tmp_path / policy))
        assert sum(rows) < sum(more)
        for key, value in trained(plain).items():
            torch.testing.assert_close(trained(cached)[key], value, rtol=1e-3, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    "name, overrides, fields, message",
    [
        ("bert", {"hidden_dropout_prob": 0.1}, {}, r"dropout.*set the model's dropout to 0"),
        ("bert", {"attention_probs_dropout_prob": 0.1}, {}, "draws at random in training"),
        ("llama", {"attention_dropout": 0.1}, {}, "attention_dropout > 0"),
        ("gpt2", {"embd_pdrop": 0.1}, {}, "draws at random"),
        ("llama", {}, {"layers_to_transform": None}, "the lowest block learns"),
        ("llama", {}, {"modules_to_save": ["embed_tokens"]}, "learns, so that what frozen blocks return changes"),
    ],
)
def test_where_nothing_stays_the_same_it_is_refused(tmp_path, name, overrides, fields, message):
    config = D2FTConfig(**{"r": 4, "layers_to_transform": [2], **fields})
    model = get_peft_model(TINY[name].build(**overrides), config)
    with pytest.raises(ValueError, match=message):
        open_cache(model, str(tmp_path))
    assert get_runtime(model).cache is None


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
