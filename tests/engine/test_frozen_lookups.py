"""Single passes of a model whose frozen blocks are kept in a cache: what is found there, and what is refused."""

import os
import warnings

import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, D2FTPlanner
from d2ft_peft.engine import frozen_cache, get_runtime, open_cache
from tests.models import TINY
from tests.training.test_frozen_cache import blocks_of, build, count_rows
from tests.zoo_stacks import ZOO


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


def test_a_parameter_beside_the_blocks_is_not_taken_for_them(tmp_path):
    recipe = ZOO["llava_next"]  # its `model` holds one for the ends of rows of an image
    model, batch = get_peft_model(recipe.build(), D2FTConfig(layers_to_transform=[2])), recipe.batch()
    assert lookups(model, tmp_path, batch)[1:] == (0, 3)
    assert lookups(model, tmp_path, batch)[1:] == (3, 0)
    model.get_base_model().model.image_newline.requires_grad_(True)
    with pytest.raises(ValueError, match="cache_frozen: model learns"):
        open_cache(model, str(tmp_path))


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


def test_files_of_other_weights_make_room(tmp_path):
    batch, model = TINY["vit"].batch(4), build("vit")
    room = (256 + 4 * (32 + 5 * 32 * 4)) / 1e9
    lookups(model, tmp_path, batch, gigabytes=room)
    blocks_of(model)[0].mlp.fc1.weight.data.add_(1)
    lookups(model, tmp_path, batch, gigabytes=room)
    assert lookups(model, tmp_path, batch, gigabytes=room)[1:] == (4, 0)
    assert len(os.listdir(tmp_path)) == 1


@pytest.mark.quick(1)
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
