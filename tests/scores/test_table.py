"""Score tables: looked up by index, saved, reused."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from d2ft_peft.scores import IndexedCollator, IndexedDataset, ScoreTable, preserved_rng, score_samples
from tests.models import TINY
from tests.scores.test_contribution import adapted


TABLE = ScoreTable("fisher", np.array([2, 5, 7]), np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], dtype=np.float32))


def test_known_samples_are_found_and_unknown_ones_get_the_mean():
    np.testing.assert_array_equal(TABLE.lookup(np.array([7, 2, 6, 99])), [[5, 9], [1, 2], [3, 5], [3, 5]])


def test_a_table_survives_the_disk(tmp_path):
    TABLE.save(tmp_path / "scores.safetensors")
    loaded = ScoreTable.load(tmp_path / "scores.safetensors")
    assert loaded.score == "fisher"
    np.testing.assert_array_equal(loaded.samples, TABLE.samples)
    np.testing.assert_array_equal(loaded.values, TABLE.values)


def test_bad_tables_are_refused():
    with pytest.raises(ValueError, match=r"values has shape \[2, 1\] and samples \[3\]"):
        ScoreTable("fisher", np.arange(3), np.ones((2, 1)))
    with pytest.raises(ValueError, match="infinities or NaNs"):
        ScoreTable("fisher", np.arange(1), np.array([[np.nan]]))


def test_samples_are_scored_in_any_order_and_filed_by_index():
    data = TINY["vit"].batch(6)
    items = [{key: value[i] for key, value in data.items()} for i in range(6)]
    model, partition = adapted("vit", "full")
    model.float()

    def collate(items):
        return {key: torch.stack([item[key] for item in items]) for key in items[0]}

    tables = []
    for indices in ([0, 1, 2, 3, 4, 5], [4, 1, 5]):
        loader = DataLoader(IndexedDataset(items, indices), batch_size=2, collate_fn=IndexedCollator(collate))
        tables.append(score_samples(model, partition, loader, "taylor", progress=False))
    assert list(tables[1].samples) == [1, 4, 5]
    np.testing.assert_allclose(tables[1].values, tables[0].values[[1, 4, 5]], rtol=1e-4)


def test_every_random_stream_is_given_back():
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    with preserved_rng():
        random.random(), np.random.rand(), torch.rand(1)
    assert random.getstate() == states[0]
    assert (np.random.get_state()[1] == states[1]).all()
    assert torch.equal(torch.get_rng_state(), states[2])
