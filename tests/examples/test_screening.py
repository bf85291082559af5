"""The benchmark of first-epoch screening on a tiny BERT: what its rows train, and how good its guesses are."""

import json

import pytest
import screening
import torch
from loss_predictors import Probe, Ridge
from tasks import Task

from tests.models import TINY


@pytest.fixture
def task():
    generator = torch.Generator().manual_seed(0)
    samples = []
    for i in range(64):
        length, label = 4 + i % 5, i % 2
        ids = torch.randint(3 + 30 * label, 33 + 30 * label, (length,), generator=generator)
        samples.append({"input_ids": ids.tolist(), "labels": label})

    def collate(chosen, flip=False):
        length = max(len(sample["input_ids"]) for sample in chosen)
        ids = torch.zeros(len(chosen), length).long()
        for row, sample in zip(ids, chosen, strict=True):
            row[: len(sample["input_ids"])] = torch.tensor(sample["input_ids"])
        return {
            "input_ids": ids,
            "attention_mask": (ids > 0).long(),
            "labels": torch.tensor([s["labels"] for s in chosen]),
        }

    return Task(
        lambda: TINY["bert"].build(num_labels=2),
        "classifier",
        samples,
        samples[:10],
        collate,
        "accuracy",
        {"full": 1e-3},
    )


@pytest.mark.thorough
def test_screening_is_paid_with_samples(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(screening, "load_task", lambda *args, **kwargs: task)
    path = tmp_path / "rows.jsonl"
    arguments = ["--json", str(path), "--steps", "8", "--candidates", "8", "--seeds", "0", "--train", "64"]
    screening.main([*arguments, "--rows", *screening.ROWS, "screened_ridge"])
    rows = {row["row"]: row for row in map(json.loads, path.read_text().splitlines())}
    cost = rows["fewer_samples"]["screening_cost"]
    assert 0.15 < cost < 0.25  # two of three blocks forward, of three passes
    expected = {"fewer_samples": 0.6, "oracle": 0.6, "screened_probe": 0.6 - cost, "screened_ridge": 0.6 - cost}
    expected["screened_probe+reuse"] = (0.6 - cost) / (1 - cost)
    assert {name: row["trained"] for name, row in rows.items()} == pytest.approx(expected, abs=1 / 64)
    assert -1 <= rows["oracle"]["probe_correlation"] <= 1
    screening.main([*arguments, "--rows", "oracle"])
    assert len(path.read_text().splitlines()) == len(rows)  # a run is made once
    screening.main(["--json", str(path), "--table"])
    assert "screened_ridge" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps x candidates = 72"):
        screening.main([*arguments, "--steps", "9"])


def test_features_are_those_of_the_whole_model_after_two_blocks(task):
    model = task.model().eval()
    alone, _ = screening.look(model, task, task.train[:20], whole=False)
    with_the_rest, losses = screening.look(model, task, task.train[:20], whole=True)
    torch.testing.assert_close(alone, with_the_rest)
    model.eval()
    for i in (0, 7):
        assert losses[i].item() == pytest.approx(model(**task.collate([task.train[i]])).loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", [Ridge, Probe])
def test_guesses_follow_the_loss(kind):
    torch.manual_seed(0)
    labels = torch.randint(2, (80,))
    # The first feature tells the label, but for wrongly labelled samples, whose loss is high.
    wrong = torch.rand(80) < 0.2
    features = torch.randn(80, 4) * 0.3
    features[:, 0] = (2.0 * labels - 1) * (1 - 2.0 * wrong)
    losses = 0.1 + 2.0 * wrong
    if kind is Ridge:
        features = features * (2.0 * labels - 1)[:, None]  # linear in the loss
    predictor = kind(4, 2)
    for part in range(4):
        at = slice(16 * part, 16 * part + 16)
        predictor.learn(features[at], labels[at], losses[at])
    guesses = predictor.predict(features[64:], labels[64:])
    assert guesses[wrong[64:]].min() > guesses[~wrong[64:]].max()
