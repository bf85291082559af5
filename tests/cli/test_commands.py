"""`d2ft compare`, `train`, `report`, `simulate` and `cloud` on tiny models and data of every kind."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from d2ft_peft.cli import compare_command
from d2ft_peft.cli.compare_command import compared
from d2ft_peft.cli.side_by_side import WAYS, Measured, Setting
from d2ft_peft.cli.task_data import IGNORED, load_task


pytestmark = pytest.mark.filterwarnings(
    "ignore:the adapter's base model is the local path", "ignore:.*'pin_memory' argument is set as true"
)


@pytest.mark.parametrize(
    ("model", "data", "task"),
    [
        ("bert", "reviews.csv", "sequence-classification"),
        ("llama", "reviews.csv", "sequence-classification"),
        ("llama", "plain.txt", "causal-lm"),
        ("llama", "pairs.jsonl", "causal-lm"),
        ("vit", "images", "image-classification"),
    ],
)
def test_data_become_batches_that_the_model_takes(assets, tmp_path, model, data, task):
    found = load_task(str(assets / model), str(assets / data), cache_dir=str(tmp_path), length=None)
    assert found.name == task and len(found.train) > len(found.held_out) > 0
    batch = found.collate([found.train[i] for i in range(3)])
    loss = found.build()(**batch).loss
    assert loss.isfinite()
    if data == "pairs.jsonl":
        labels = batch["labels"]
        assert (labels == IGNORED).any() and (labels != IGNORED).any(dim=1).all()
    if data == "reviews.csv":
        assert found.classes == ["neg", "pos"]


@pytest.mark.thorough
def test_compare_runs_three_ways_and_judges_them(d2ft, assets, tmp_path):
    found = d2ft(
        f"compare {assets / 'bert'} {assets / 'reviews.csv'} --steps 7 --chunk 2 --seeds 2 --batch 4 --micro-batches 2 "
        f"--cache-dir {tmp_path} --learning-rate 1e-3 --json"
    )
    assert [row["way"] for row in found["rows"]] == list(WAYS)
    plain, _, ours = found["rows"]
    assert ours["flops_ratio"] < 0.75 and "flops_ratio" not in plain
    assert all(row["memory_bytes"] > 1e5 and row["step_seconds"] > 0 for row in found["rows"])
    assert found["verdict"]["answer"] in ("worth it", "not worth it", "not decided")
    assert found["verdict"]["text"].startswith(found["verdict"]["answer"])


def measured(loss: float, seconds: float) -> Measured:
    return Measured([seconds] * 3, 0.1, loss, {"accuracy": 0.5}, 10**6, {})


def test_what_is_judged_is_paired_by_seed_and_chunk(d2ft, assets, tmp_path, monkeypatch):
    runs = {
        "plain": [measured(1.0, 1.0), measured(2.0, 2.0)], "fewer samples": [measured(1.1, 1.0), measured(2.2, 2.0)],
        "D2FT": [measured(1.0, 0.5), measured(2.0, 1.0)],
    }  # fmt: skip
    found = compared(runs, Setting(steps=10), 0.02)
    assert found["rows"][2]["time"]["mean"] == pytest.approx(0.5) == found["rows"][2]["time"]["high"]
    assert found["rows"][1]["time"]["mean"] == pytest.approx(0.6)
    assert found["rows"][1]["loss_difference"]["mean"] == pytest.approx(0.1)
    assert found["verdict"]["answer"] == "worth it"
    monkeypatch.setattr(compare_command, "side_by_side", lambda *_: runs)
    text = d2ft(f"compare {assets / 'bert'} {assets / 'reviews.csv'} --cache-dir {tmp_path}")
    assert "Worth it here, because a step takes 0.50" in text and "fewer samples" in text


def test_one_seed_decides_nothing():
    runs = {way: [measured(1.0, 1.0 if way == "plain" else 0.5)] for way in WAYS}
    assert compared(runs, Setting(steps=10), 0.02)["verdict"]["answer"] == "not decided"


def test_train_saves_an_adapter_that_peft_loads_and_report_reads_the_run(d2ft, assets, tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    out = tmp_path / "out"
    found = d2ft(
        f"train {assets / 'bert'} {assets / 'reviews.csv'} --output-dir {out} --r 2 --batch 4 --micro-batches 2 "
        f"--max_steps 3 --logging_steps 1 --cache-dir {tmp_path / 'cache'} --report {out / 'page.html'} --json"
    )
    assert 0 <= found["metrics"]["eval_accuracy"] <= 1 and found["metrics"]["flops_ratio"] < 0.8
    base = AutoModelForSequenceClassification.from_pretrained(
        assets / "bert", num_labels=2, ignore_mismatched_sizes=True
    )
    assert PeftModel.from_pretrained(base, str(out)) is not None
    assert (out / "page.html").is_file()
    read = d2ft(f"report {out} --against {out} --output {tmp_path / 'again.html'} --json")
    assert read["last"]["step"] == 3 and (tmp_path / "again.html").stat().st_size > 10**6
    assert d2ft(f"report {out}").strip().endswith("report.html")


def test_train_plainly(d2ft, assets, tmp_path):
    text = d2ft(
        f"train {assets / 'llama'} {assets / 'plain.txt'} --output-dir {tmp_path / 'out'} --method plain --batch 2 "
        f"--max_steps 1 --sequence-length 8 --cache-dir {tmp_path / 'cache'}"
    )
    assert text.startswith("plain, causal-lm: loss ") and (tmp_path / "out" / "model.safetensors").is_file()
    assert "1/1 [" in d2ft.stderr  # how far it is


def test_simulate_predicts_a_step_of_each_way(d2ft, config_folder):
    found = d2ft(f"simulate {config_folder('llama')} --devices 2 --micro-batches 5 --sequence-length 7 --json")
    rows = {row["way"]: row for row in found["rows"]}
    assert len(rows) == 7 and rows["D2FT, head-parallel"]["sent_bytes"] < rows["tensor parallel"]["sent_bytes"]
    assert rows["DDP, fewer samples"]["seconds"] < rows["DDP"]["seconds"]
    assert "nothing was measured" in d2ft("simulate vit --devices 3")


@pytest.mark.quick(6)
@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("compare {bert} {csv} --steps 2", "leaves fewer samples less than two chunks"),
        ("compare {bert} {csv} --budget 0", "budget=0 must be in (0, 1]"),
        ("compare {bert} {csv} --seeds 0", "seeds=0 must be at least 1"),
        ("compare {bert} {csv} --text-column body", "column 'body' is not in the data"),
        ("compare {bert} {csv} --policy nonsense", "policy='nonsense'"),
        ("compare {vit} {csv}", "task='sequence-classification' is nothing that transformers has a vit model for"),
        ("compare {bert} ./missing.csv", "data='./missing.csv' does not exist"),
        ("train {bert} {csv} --output-dir {out} --method magic", "method='magic' must be"),
        ("train {bert} {csv} --output-dir {out} --no_such_option 3", "is no option of d2ft train"),
        ("report {out}", "has neither d2ft_run.json nor a trainer_state.json"),
        ("simulate vit --devices 2 --flops 1 --flops 2 --flops 3", "flops is given 3 times"),
        ("simulate vit --devices 99", "99 processes cannot share"),
        ("cloud {out}/missing", "missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(d2ft, assets, tmp_path, line, says):
    names = {"bert": assets / "bert", "vit": assets / "vit", "csv": assets / "reviews.csv", "out": tmp_path}
    cache = f" --cache-dir {tmp_path / 'cache'}" if line.startswith(("compare", "train")) else ""
    error = d2ft(line.format(**names) + cache, code=2)
    assert says in error and error.startswith("d2ft: ") and error.count("\n") == 1


@pytest.mark.parametrize("command", ["plan", "compare", "train", "report", "simulate", "edge"])
def test_every_command_has_an_example(d2ft, command):
    text = " ".join(d2ft(f"{command} --help").split())
    assert f"Example: d2ft {command}" in text and "--json" in text


def test_json_is_all_there_is_on_stdout(d2ft, config_folder):
    json.dumps(d2ft(f"plan {config_folder('vit')} --json"))
