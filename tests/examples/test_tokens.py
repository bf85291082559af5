"""The benchmark of fewer tokens on a tiny model: every row costs its share of the plain one; files are continued."""

import argparse
import json

import pytest
import tokens
import torch
from tasks import Task

from tests.models import TINY


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs tokens.py on a few images of 65 tokens and returns the rows of its file."""
    images = torch.randn(40, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    samples = [(image, index % 5) for index, image in enumerate(images)]

    def collate(chosen, flip=False):
        pixels, labels = zip(*chosen, strict=True)
        return {
            "pixel_values": torch.stack(pixels), "labels": torch.tensor(labels), "interpolate_pos_encoding": True,
        }  # fmt: skip

    def build():
        return TINY["vit"].build(image_size=64, patch_size=8, num_hidden_layers=6)

    task = Task(build, "classifier", samples, samples[:8], collate, "accuracy", {"full": 1e-3, "lora": 1e-2})
    monkeypatch.setattr(tokens, "load_task", lambda *args: task)
    path = tmp_path / "rows.jsonl"

    def run_script(what, *arguments):
        tokens.main([what, "--json", str(path), *arguments])
        return [json.loads(line) for line in path.read_text().splitlines()]

    return run_script


@pytest.mark.thorough
def test_every_row_costs_its_share_of_the_plain_run(run):
    fixed = ["--size", "64", "--low", "48", "--steps", "5", "--micro-batch-size", "1", "--rows"]
    rows = run("accuracy", *fixed, "plain", "fewer_samples", "lower_resolution", "fewer_tokens:token_choice=variance")
    plain = next(row for row in rows if row["row"] == "plain")
    ratios = {row["row"]: row["flops"] / plain["flops"] for row in rows if row is not plain}
    assert set(ratios) == {"fewer_samples", "lower_resolution:48", "fewer_tokens:token_choice=variance"}
    assert all(ratio == pytest.approx(0.6, abs=0.03) for ratio in ratios.values())
    assert run("accuracy", *fixed, "plain") == rows


@pytest.mark.thorough
def test_times_are_ratios_to_the_plain_step(run, monkeypatch):
    make = tokens.build_model
    small = {"hidden": 16, "heads": 2, "intermediate": 32}
    monkeypatch.setattr(tokens, "build_model", lambda args: make(argparse.Namespace(**{**vars(args), **small})))
    rows = run("time", "--repeats", "2", "--shapes", "BERT, 128 tokens", "--choices", "grid")
    assert [(row["choice"], row["time_ratio"] > 0) for row in rows] == [("plain", True), ("grid", True)]
    assert rows[1]["flops_ratio"] == pytest.approx(0.6, abs=0.03) and rows[0]["flops_ratio"] == 1
