"""The benchmark of Kill-and-Revive on a tiny model: what its rows train and cost, and a file that is continued."""

import json

import kill_revive
import pytest
from matplotlib.image import imread
from tasks import Task

from tests.models import TINY


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the script on a few texts and returns the rows of its file."""
    batch = TINY["llama"].batch(20)["input_ids"]

    def collate(chosen, flip=False):
        ids = batch[chosen]
        return {"input_ids": ids, "labels": ids}

    task = Task(lambda: TINY["llama"].build(), None, list(range(20)), [0, 1, 2], collate, "loss", {"lora": 1e-2})
    monkeypatch.setattr(kill_revive, "load_task", lambda *args: task)
    setting = kill_revive.Setting(steps=30, batch_size=4, size=7, train=None, test=None)
    monkeypatch.setitem(kill_revive.SETTINGS, "shakespeare", setting)

    def run_script(*arguments):
        fixed = ["--assets", "none", "--task", "shakespeare", "--seeds", "0", "--results", str(tmp_path)]
        kill_revive.main([*fixed, *arguments])
        return [json.loads(line) for line in (tmp_path / "shakespeare.jsonl").read_text().splitlines()]

    return run_script


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
def test_rows_train_their_share_of_the_modules(run, tmp_path, capsys):
    picture = tmp_path / "activity.png"
    ways = ["all", "none", "fixed", "top", "low_rank", "fewer_steps", "probe:margin=0.2"]
    rows = {row["way"]: row for row in run("--ways", *ways, "--picture", str(picture))}
    assert {way: row["modules"] for way, row in rows.items()} == pytest.approx({
        "all": 1, "none": 0, "fixed": 2 / 21, "top": (2 + 28 * 2 / 21) / 30, "low_rank": 1, "fewer_steps": 1 / 8,
        "probe:margin=0.2": 2 / 21,
    })  # fmt: skip
    assert rows["fewer_steps"]["flops"] == pytest.approx(rows["all"]["flops"] * 4 / 30)
    assert rows["none"]["flops"] == 0 < max(rows[way]["flops"] for way in ("fixed", "top")) < rows["all"]["flops"]
    assert rows["all"]["value"] < rows["none"]["value"]
    assert imread(picture).std() > 0.01
    assert len(run("--ways", "all", "fixed")) == len(rows)  # a run is made once
    kill_revive.main(["--table", "--results", str(tmp_path)])
    assert "fewer_steps" in capsys.readouterr().out


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", kill_revive.METHODS)
def test_every_method_makes_a_row(method, monkeypatch, run):
    monkeypatch.setattr(kill_revive, "WAYS", ["random+warmup"])
    monkeypatch.setattr(kill_revive, "SHARES", [])
    rows = run("--methods", method)
    assert {row["method"] for row in rows} == {method} and [row["way"] for row in rows][:2] == ["all", "random+warmup"]
