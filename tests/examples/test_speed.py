"""The speed benchmarks on a tiny model: ratios that are known, a file that is continued, a table and a picture.

Times are not looked at: they say nothing at this size.
"""

import json
import sys
from functools import cache, partial

import pytest
import speed
import speed_table
import step_time
from matplotlib.image import imread


pytestmark = pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")


@pytest.fixture(scope="module", autouse=True)
def tiny_shapes():
    shapes = {
        "tiny": {"model": "vit", "hidden": 64, "heads": 4, "image_size": 64},
        "tiny_llama": {"model": "llama", "hidden": 64, "heads": 4, "kv_heads": 2, "length": 32, "vocabulary": 12000},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, shape in shapes.items():
            patch.setitem(speed.SHAPES, name, shape)
        yield


def measure(path, *args, cell="tiny:2:3"):
    """Runs speed.py on a tiny shape and returns the rows of its file."""
    fixed = ("--cells", cell, "--micro-batches", "5", "--repeats", "1", "--threads", "1", "--json", str(path))
    speed.main([*fixed, *args])
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of one cell at a precision, and their file; measured once."""

    @cache
    def rows_and_file(*precision):
        path = tmp_path_factory.mktemp("measured") / "rows.jsonl"
        return measure(path, "--peers", "checkpointing", "lora_fa", "--budgets", "0.6", *precision), path

    return rows_and_file


@pytest.fixture
def run(tmp_path):
    """Runs speed.py in a folder of the test's own."""
    return partial(measure, tmp_path / "rows.jsonl")


def by_name(rows):
    return {(row["mode"], row["schedule"] or row["variant"], row["budget"]): row for row in rows}


@pytest.mark.thorough
@pytest.mark.parametrize("args", [(), ("--bf16",)])
def test_known_ratios(measured, args):
    rows = by_name(measured(*args)[0])
    assert len(rows) == 11
    for mode in ("full", "lora"):
        plain, aligned = rows[mode, "plain", 1.0], rows[mode, "aligned", 0.6]
        for ratio in ("time_ratio", "flops_ratio", "memory_ratio", "time_ratio_with_optimizer"):
            assert plain[ratio] == 1, ratio
        assert plain["memory_ratio_with_weights"] == 1 and plain["efficiency"] is None
        assert (aligned["num_full"], aligned["num_forward_only"], aligned["num_micro_batches"]) == (3, 0, 5)
        assert aligned["flops_ratio"] == pytest.approx(0.6, rel=0.02)
        assert aligned["efficiency"] == pytest.approx((1 - aligned["time_ratio"]) / (1 - aligned["flops_ratio"]))
        spread, depth = rows[mode, "spread", 0.6], rows[mode, "depth", 0.6]
        assert (spread["num_full"], spread["num_forward_only"]) == (3, 0)
        assert depth["num_full"] > 0 and depth["num_forward_only"] > 0
        assert 0.6 < spread["flops_ratio"] < 0.75 and depth["flops_ratio"] == pytest.approx(0.6, abs=0.08)
        assert 1.1 < rows[mode, "checkpointing", 1.0]["flops_ratio"] < 1.5
    assert 0.85 < rows["lora", "lora_fa", 1.0]["flops_ratio"] < 1


@pytest.mark.thorough
def test_memory_of_the_peers(run):
    rows = by_name(run("--peers", "checkpointing", "lora_fa", "--schedules", cell="tiny_llama:4:6"))
    assert rows["full", "checkpointing", 1.0]["memory_ratio"] < 0.9
    assert rows["lora", "lora_fa", 1.0]["memory_ratio"] < 0.97
    full, lora = rows["full", "plain", 1.0], rows["lora", "plain", 1.0]
    assert full["bytes"] > lora["bytes"], "LoRA has fewer gradients and less optimizer state"


def test_badam_trains_the_middle_block_and_the_head(run):
    pytest.importorskip("badam", reason="pip install --no-deps badam")
    rows = by_name(run("--peers", "badam", "--schedules", "--modes", "full"))
    assert 0.5 < rows["full", "badam", 1.0]["flops_ratio"] < 0.9
    assert rows["full", "badam", 1.0]["memory_ratio_with_weights"] < 1
    _, given = speed.setting("tiny:2:3", speed.parse_args(["--threads", "1"]))
    model = speed.PEERS["badam"][0](step_time.build_model(given), "full", 4).model
    trained = {".".join(name.split(".")[:3]) for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vit.layers.1", "classifier.weight", "classifier.bias"}


@pytest.mark.thorough
def test_a_row_is_measured_once(run):
    args = ("--peers", "--modes", "full", "--schedules", "aligned")
    first = run(*args, "--budgets", "0.6")
    assert run(*args, "--budgets", "0.6") == first
    more = run(*args, "--budgets", "0.6", "0.4")
    assert more[:2] == first and [row["budget"] for row in more] == [1.0, 0.6, 0.4]
    assert more[2]["flops_ratio"] == pytest.approx(0.4, rel=0.02)
    assert len(run(*args, "--budgets", "0.6", "--bf16")) == 5, "another precision is another cell"


def test_presets_name_shapes():
    for cell in speed.PRESETS["all"] + speed.PRESETS["quick"] + speed.PRESETS["cpu"]:
        identity, given = speed.setting(cell, speed.parse_args(["--peers"]))
        assert identity["blocks"] % 2 == 1, "BAdam's middle block"
        assert given.hidden % given.heads == 0 and given.vocabulary >= 1000


def test_variants_begin_in_turn(monkeypatch):
    """Every variant begins a repeat; a pass that is not timed comes first where the model changes."""

    class Fake:
        distinct_plans = {None: 2}

        def __init__(self, name, model):
            self.name, self.model, self.plans = name, model, [None, None]

        def run(self, plan):
            passes.append(self.name)

    variants = {"a": Fake("a", "first"), "b": Fake("b", "second"), "c": Fake("c", "second")}
    monkeypatch.setattr(step_time, "seconds", lambda run, device: run() or 1.0)
    begins = []
    for first in range(3):
        passes = []
        assert step_time.step_seconds(variants, "cpu", first) == {"a": 2, "b": 2, "c": 2}
        begins.append("".join(passes))
    assert begins == ["aabbcaabbc", "bbcaabbcaa", "ccaabbcaabb"]


@pytest.mark.thorough
def test_step_time_keeps_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    shape = ["--hidden", "64", "--heads", "4", "--layers", "2", "--image-size", "64", "--micro-batch-size", "2"]
    fixed = ["--placement", "aligned", "--mixes", "3+0,2+1", "--repeats", "1", "--threads", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *shape, *fixed])
    step_time.main()
    rows = json.loads(path.read_text())
    assert [(row["mode"], row["num_full"], row["num_forward_only"]) for row in rows] == [
        (mode, *counts) for mode in ("full", "lora") for counts in ((5, 0), (3, 0), (2, 1))
    ]
    for plain, three, _ in (rows[:3], rows[3:]):
        assert plain["num_micro_batches"] == 5
        assert plain["time_ratio"] == plain["flops_ratio"] == plain["memory_ratio"] == 1
        assert three["flops_ratio"] == pytest.approx(0.6, rel=0.02)


@pytest.mark.thorough
def test_table_and_picture(measured, tmp_path, capsys):
    _, path = measured()
    capsys.readouterr()
    speed_table.main([str(path), "--png", str(tmp_path / "speed.png")])
    printed = capsys.readouterr().out
    assert "## tiny, 3 blocks, 5 micro-batches of 2, fp32, 1 threads" in printed
    for step in ("plain", "checkpointing", "D2FT aligned 0.6", "D2FT depth 0.6", "D2FT spread 0.6"):
        assert f"| full | {step} |" in printed and f"| lora | {step} |" in printed
    assert imread(tmp_path / "speed.png").std() > 0.01, "an empty picture"


@pytest.mark.thorough
def test_other_policies_are_schedules_too(run):
    names = ["drop_bp", "lisa", "stochastic_depth", "dynamic_pruning", "moe"]
    rows = by_name(run("--peers", "--schedules", *names, "--budgets", "0.7"))
    assert {key[1] for key in rows} == {"plain", *names}
    for (mode, name, _), row in rows.items():
        assert (row["num_forward_only"] > 0) == (name in ("drop_bp", "lisa")), (mode, name)
        assert name == "plain" or 0.5 < row["flops_ratio"] < 0.85, (mode, name)
