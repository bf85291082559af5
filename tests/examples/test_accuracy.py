"""The accuracy benchmark on a tiny model: what its rows run and cost, and a file that is continued."""

import json
import sys

import accuracy
import pytest
import torch
from tasks import Task

from tests.models import TINY


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs accuracy.py on a few images and returns the rows of its file."""
    batch = TINY["vit"].batch(40)
    samples = list(zip(batch["pixel_values"], batch["labels"].tolist(), strict=True))

    def collate(chosen, flip=False):
        images, labels = zip(*chosen, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    task = Task(
        TINY["vit"].build, "classifier", samples, samples[:8], collate, "accuracy", {"full": 1e-3, "lora": 1e-2}
    )
    monkeypatch.setattr(accuracy, "load_task", lambda *args: task)
    fixed = ["accuracy.py", "--assets", "none", "--task", "tiny", "--steps", "4", "--micro-batch-size", "2"]
    fixed += ["--budgets", "0.6", "--warmup", "0", "--threads", "1", "--json", str(tmp_path / "rows.jsonl"), "--rows"]

    def run_script(*rows):
        monkeypatch.setattr(sys, "argv", [*fixed, *rows])
        accuracy.main()
        return [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]

    return run_script


@pytest.mark.thorough
def test_rows_run_their_share_of_the_compute(run):
    names = ("plain", "fewer_steps", "fewer_samples", "bilevel:backward_score=fisher")
    whole = [f"{name}{',' if ':' in name else ':'}skip_unread_rows=False" for name in names]
    rows = dict(zip(names, run(*whole), strict=True))
    assert {name: row["compute_ratio"] for name, row in rows.items()} == pytest.approx(
        {"plain": 1, "fewer_steps": 1, "fewer_samples": 0.6, "bilevel:backward_score=fisher": 0.6}, abs=0.02
    )
    # Two of four steps; and a pass over all 40 samples before the 40 of the steps, of which 24 run.
    for name, share in (("fewer_steps", 0.5), ("fewer_samples", 0.6), ("bilevel:backward_score=fisher", 1.6)):
        assert rows[name]["flops"] == pytest.approx(share * rows["plain"]["flops"], rel=0.02), name
    for row in rows.values():
        assert 0 <= row["value"] <= 100 and row["cpu_seconds"] > row["planning_seconds"] > 0


@pytest.mark.thorough
def test_a_run_is_made_once(run):
    first = run("plain")
    assert run("plain", "importance")[:1] == first and len(run("plain", "importance")) == 2
