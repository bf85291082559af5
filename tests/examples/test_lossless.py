"""The benchmark beside the stock Trainer, on tiny models: what rows are, which samples they see, what a table says."""

import json
from dataclasses import fields, replace

import lossless
import lossless_table
import numpy as np
import pytest
import stock_trainer
import torch
from accuracy import config_of
from matplotlib.image import imread
from peft import LoraConfig
from tasks import Task
from transformers import Trainer

from d2ft_peft import D2FTConfig, D2FTTrainer
from tests.models import TINY


def collate(chosen, flip=False):
    """Pads to the longest; the prompt of three tokens carries no loss, nor does padding."""
    longest = max(len(sample["input_ids"]) for sample in chosen)
    ids = torch.tensor([s["input_ids"] + [0] * (longest - len(s["input_ids"])) for s in chosen])
    mask = torch.tensor([[1] * len(s["input_ids"]) + [0] * (longest - len(s["input_ids"])) for s in chosen])
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def task(monkeypatch):
    """A tiny Llama on ragged prompts and answers: 20 to train on, 5 to validate, 6 to test."""
    lengths = np.random.default_rng(0).integers(5, 12, 31)
    samples = [{"input_ids": torch.randint(3, 60, (int(n),)).tolist()} for n in lengths]
    made = Task(TINY["llama"].build, None, samples[:25], samples[25:], collate, "loss", {"full": 1e-3, "lora": 1e-2})
    monkeypatch.setattr(lossless, "load_task", lambda *args: replace(made))
    monkeypatch.setattr(lossless, "SETTINGS", {"tiny": lossless.Setting(20, 5, 6, 4, micro_batch_size=2)})
    return made


@pytest.fixture
def script(task, tmp_path):
    """Calls the script, and returns the rows of its file."""

    def call(*arguments, modes=("full",)):
        path = tmp_path / "rows.jsonl"
        lossless.main(["--assets", "", "--json", str(path), "--tasks", "tiny", "--modes", *modes, *arguments])
        return [json.loads(line) for line in path.read_text().splitlines()]

    return call


def run_of(row, mode="full", budget=1.0):
    return lossless.Run("tiny", mode, row, budget, 0, 1e-3, "test", 1.0, 4)


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_plain_is_the_stock_trainer_on_all_weights_or_on_plain_lora(task):
    model = lossless.build(run_of("plain"), task)
    assert type(model) is TINY["llama"].model and all(p.requires_grad for p in model.parameters())
    lora, d2ft = (lossless.build(run_of(row, "lora"), task) for row in ("plain:use_rslora=True", "all_full"))
    assert type(lora.peft_config["default"]) is LoraConfig and lora.peft_config["default"].use_rslora
    assert trained(lora) == trained(d2ft)
    assert not issubclass(lossless.StockTrainer, D2FTTrainer) and issubclass(lossless.StockTrainer, Trainer)


def test_the_default_row_is_what_a_budget_alone_gives(task):
    config, alone = config_of("default", 0.6, "full", task, seed=0), D2FTConfig(compute_budget=0.6)
    names = [field.name for field in fields(D2FTConfig)]
    assert [name for name in names if getattr(config, name) != getattr(alone, name)] == ["train_boundary"]
    assert config_of("default:compute_budget=0.5", 0.6, "full", task, seed=0).compute_budget == 0.5


@pytest.mark.thorough
def test_rows_cost_their_share_of_the_flops(script):
    whole = ":skip_unread_rows=False"
    d2ft = [name + whole for name in ("all_full", "fewer_steps", "fewer_samples")]
    rows = {row["row"].removesuffix(whole): row for row in script("--rows", "plain", *d2ft)}
    for name, share in (("all_full", 1.0), ("fewer_steps", 0.5), ("fewer_samples", 0.6)):
        ratio = rows[name]["flops"] / rows["plain"]["flops"]
        assert ratio == pytest.approx(share, abs=0.02 if name == "all_full" else 0.1), name
    assert 0 < rows["plain"]["logged"]["padding"] < 0.5 and rows["fewer_samples"]["logged"]["flops_ratio"] < 0.8
    assert rows["plain"]["value"] == pytest.approx(rows["all_full"]["value"], abs=1e-4)


def test_flops_of_any_length_are_counted(task):
    """By the counter itself, batch by batch, which the interpolation between three lengths must meet."""
    model = TINY["llama"].build()
    trainer = stock_trainer.StockTrainer.__new__(stock_trainer.StockTrainer)
    trainer.samples, trainer.counts, trainer.real = {}, stock_trainer.Counter(), 0
    trainer.model, expected = model, 0
    for length in (4, 5, 6, 9, 12):
        ids = torch.randint(3, 60, (3, length))
        batch = {"input_ids": ids, "labels": ids}
        trainer.floating_point_ops(batch)
        with stock_trainer.flop_counter() as counter:
            model(**batch).loss.backward()
        expected += counter.get_total_flops()
    assert trainer.flops() == pytest.approx(expected, rel=1e-9)


def test_a_loss_is_the_mean_over_the_tokens_that_have_a_label(task, script):
    (row,) = script("--rows", "plain", "--share", "0.05")
    losses = []
    torch.manual_seed(0)
    args = lossless.parse_args(["--assets", "", "--json", "", "--rows", "plain", "--share", "0.05"])
    args.micro_batch_size = 2
    seen = {}

    class Keeping(lossless.StockTrainer):
        def measure(self):
            seen["model"] = self.model
            return super().measure()

    lossless.StockTrainer, stock = Keeping, lossless.StockTrainer
    try:
        short = lossless.prepare("tiny", "", "test", 0.05)
        again = lossless.train(replace(run_of("plain"), share=0.05), short, args)
    finally:
        lossless.StockTrainer = stock
    for sample in task.test:  # each alone, without padding
        ids = torch.tensor([sample["input_ids"]])
        with torch.no_grad():
            logits = seen["model"].eval()(input_ids=ids).logits[0, 2:-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 3:], reduction="none"))
    assert again["value"] == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert row["value"] == pytest.approx(again["value"], abs=1e-5)


@pytest.mark.thorough
def test_every_row_runs_at_its_own_rate_found_on_samples_of_no_other_run(task, script, tmp_path, capsys):
    seen = []
    train = lossless.train
    spied = pytest.MonkeyPatch()
    spied.setattr(lossless, "train", lambda run, given, args: seen.append((run, given)) or train(run, given, args))
    try:
        tuning = script("--rows", "plain", "default:lr=0.5", "default", "--tune", "--grid", "1", "30")
        assert [(row["row"], row["lr"]) for row in tuning] == [
            ("plain", 1e-3), ("plain", 0.03), ("default", 1e-3), ("default", 0.03),
        ]  # fmt: skip
        path = str(tmp_path / "rows.jsonl")
        rows = script("--rows", "plain", "default", "--rates", path)[4:]
    finally:
        spied.undo()
    for row in rows:
        best = min((t for t in tuning if t["row"] == row["row"]), key=lambda t: t["value"])
        assert row["lr"] == best["lr"] and row["split"] == "test"
    assert "end of its grid" in capsys.readouterr().out
    for run, given in seen:
        assert given.train == task.train[:20]
        held_out = task.train[20:] if run.split == "validation" else task.test
        assert sorted(map(str, given.test)) == sorted(map(str, held_out))
    with pytest.raises(ValueError, match="row='fewer_samples' has no rate at budget=0.6 .* run with --tune first"):
        script("--rows", "fewer_samples", "--rates", path)


@pytest.mark.thorough
def test_a_run_is_made_once_and_rounds_of_times_go_on(script):
    first = script("--rows", "plain")
    assert script("--rows", "plain") == first
    timed = [row for row in script("--rows", "default", "--time", "--rounds", "2") if row["split"] == "time"]
    assert [(row["row"], row["seed"]) for row in timed] == [("plain", 0), ("default", 0), ("default", 1), ("plain", 1)]
    assert {row["train_samples"] for row in timed} == {10} and {row["value"] for row in timed} == {None}
    assert script("--rows", "default", "--time", "--rounds", "1")[-1]["seed"] == 2


@pytest.fixture
def found(tmp_path):
    """Two tasks: on the first the default is better than plain in 0.55 of its time, on the second, of losses, worse."""
    lines = []
    for task, metric, values in (("a", "accuracy", (50, 51)), ("b", "loss", (2.0, 2.1))):
        for row, budget, value, seconds in (("plain", 1.0, values[0], 10), ("default", 0.6, values[1], 5.5)):
            for seed in range(3):
                run = {"task": task, "mode": "full", "row": row, "budget": budget, "seed": seed, "lr": 0.1, "steps": 9}
                run |= {"split": "test", "train_samples": 8, "metric": metric, "value": value + seed * (budget < 1)}
                run |= {"cpu_seconds": 2 * seconds, "flops": 10 * budget, "logged": {"padding": 0.25}}
                turn = run | {"split": "time", "value": None, "cpu_seconds": seconds + seed * budget}
                lines += [run, turn, turn | {"task": "timed only"}] if task == "a" else [run]
    path = tmp_path / "runs.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_the_table_says_where_a_row_is_as_good_in_its_time(found):
    text = lossless_table.tables(lossless_table.load([found]))
    assert "- full, default, 60%: at or above the full run at <= 0.6 of its time on 1 of 2 tasks" in text
    # Gaps are 1, 2, 3: half of Student's interval is 4.303 standard deviations / sqrt(3).
    assert "| a | full | 50.00 (3) | 52.00 (3) | +2.00 ± 2.48 | 0.55 (0.55 - 0.56) |" in text
    assert "| default, 60% | 0.1 | 3.1000 (3) | -1.1000 ± 2.4841 | ~0.55 | 0.60 | 11 |" in text
    assert "## a, full: 9 steps, 8 samples, 25% padding" in text and "timed only" not in text


def test_the_table_says_which_budget_would_take_equal_time(found):
    settings = lossless_table.load([found])
    cells = settings["b", "full"]
    slower = {seed: run | {"cpu_seconds": 14} for seed, run in cells["default", 0.6].runs.items()}
    settings["b", "full"] = cells | {("default", 0.8): lossless_table.Cell(slower)}
    assert lossless_table.equal_time(settings).splitlines()[2:] == ["- b, full, default: compute_budget=0.67"]


def test_the_picture_shows_accuracies_and_losses(found, tmp_path):
    lossless_table.main([found, "--png", str(tmp_path / "x.png"), "--page", str(tmp_path / "x.md")])
    assert imread(tmp_path / "x.png").std() > 0.01, "an empty picture"


def test_a_row_that_was_run_twice_is_refused(found, tmp_path):
    with pytest.raises(ValueError, match="task=a, mode=full, row=plain, budget=1.0, seed=0 was run twice"):
        lossless_table.load([found, found])
