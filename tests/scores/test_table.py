"""Score tables: looked up by index, saved, reused."""

import random

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch.utils.data import DataLoader

from d2ft_peft.scores import (
    IndexedCollator,
    IndexedDataset,
    ScoreTable,
    gather_tables,
    preserved_rng,
    score_samples,
)
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


def scored(monkeypatch, rows):
    """A table from rows of scores, two samples a batch."""
    model, partition = adapted("vit", "full")
    rows = np.repeat(np.array(rows, dtype=float)[:, None], partition.num_scheduled, axis=1)
    monkeypatch.setattr(
        "d2ft_peft.scores.score_table.gradient_scores", lambda m, p, batch, score: rows[batch["labels"].numpy()]
    )
    order = torch.arange(len(rows))
    batches = [{"labels": part, "d2ft_index": part} for part in order.split(2)]
    return score_samples(model, partition, batches, "fisher", progress=False)


def test_a_sample_without_a_finite_score_counts_like_the_mean_of_the_others(monkeypatch):
    with pytest.warns(UserWarning, match=r"samples \[1\] have an infinite .* score 'fisher'"):
        table = scored(monkeypatch, [2.0, np.nan, 6.0])
    assert list(table.samples) == [0, 2]
    assert table.lookup(np.array([0, 1, 2]))[:, 0].tolist() == [2, 4, 6]
    with pytest.warns(UserWarning, match=r"samples \[2\]"):
        assert list(scored(monkeypatch, [2.0, 3.0, 1e300]).samples) == [0, 1]  # infinite in float32


def test_a_data_set_without_any_finite_score_is_refused(monkeypatch):
    with pytest.warns(UserWarning):
        table = scored(monkeypatch, [np.inf, np.nan])
    for ask in (lambda: gather_tables(table), lambda: table.lookup(np.array([0]))):
        with pytest.raises(ValueError, match="no sample has a finite score 'fisher'.*check the model's loss"):
            ask()


def test_batches_whose_rows_are_not_the_samples_are_refused():
    model, partition = adapted("llama", "full")
    batch = TINY["llama"].batch(1) | {"d2ft_index": torch.arange(3)}
    with pytest.raises(ValueError, match="1 rows and 3 samples.*collator that pads"):
        score_samples(model, partition, [batch], "fisher", progress=False)


def test_the_table_is_averaged_once():
    class Counted(np.ndarray):
        means = 0

        def mean(self, *args, **kwargs):
            Counted.means += 1
            return np.asarray(self).mean(*args, **kwargs)

    table = ScoreTable("fisher", TABLE.samples, TABLE.values.view(Counted))
    for _ in range(3):
        table.lookup(np.array([2, 99]))
    assert Counted.means == 1


def test_scores_stay_in_float32():
    assert TABLE.lookup(np.array([2, 99])).dtype == np.float32


def test_a_fingerprint_tells_tables_apart():
    other = [
        ScoreTable("taylor", TABLE.samples, TABLE.values),
        ScoreTable("fisher", TABLE.samples + 1, TABLE.values),
        ScoreTable("fisher", TABLE.samples, TABLE.values[::-1]),
    ]
    changed = np.ones((5000, 3), dtype=np.float32)
    base = ScoreTable("fisher", np.arange(5000), changed.copy())
    changed[3, 1] = 1.001  # not among the rows that are looked at: the mean tells
    other += [base, ScoreTable("fisher", np.arange(5000), changed)]
    assert len({table.fingerprint for table in (TABLE, *other)}) == 6
    again = ScoreTable("fisher", TABLE.samples.copy(), TABLE.values.copy())
    assert again.fingerprint == TABLE.fingerprint


def test_a_file_that_could_not_be_written_leaves_the_former_one(tmp_path, monkeypatch):
    TABLE.save(tmp_path / "scores")
    before = (tmp_path / "scores").read_bytes()

    def full_disk(arrays, path, metadata=None):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("d2ft_peft.scores.score_table.save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        TABLE.save(tmp_path / "scores")
    assert (tmp_path / "scores").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_files_that_cannot_be_read_are_named(tmp_path):
    path = tmp_path / "scores.safetensors"
    with pytest.raises(ValueError, match=r"scores\.safetensors' is missing"):
        ScoreTable.load(path)
    TABLE.save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match=r"scores\.safetensors' is damaged"):
        ScoreTable.load(path)
    save_file({"something": np.ones(2)}, path)
    with pytest.raises(ValueError, match=r"scores\.safetensors' is no table of scores; it holds \['something'\]"):
        ScoreTable.load(path)
