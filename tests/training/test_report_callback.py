"""The Trainer writes a report when asked, and everybody who listens to its log gets the same numbers."""

import json
import sys

import pytest
from peft import get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer, ReportCallback
from d2ft_peft.report import RunRecord, read_run
from tests.distributed.launch import run
from tests.models import TINY


NUMBERS = {
    "loss", "compute_ratio", "communication_ratio", "flops_ratio", "workload_variance", "step_seconds",
    "peak_memory_mib",
}  # fmt: skip


class Listens(TrainerCallback):
    """What TensorBoard and others get."""

    def __init__(self):
        self.got = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.got.append(dict(logs))


def fit(folder, cls=D2FTTrainer, adapted=True, resume=None, **kwargs):
    batch = TINY["vit"].batch(16)
    model = TINY["vit"].build()
    if adapted:
        model = get_peft_model(model, D2FTConfig(policy="depth", train_boundary=True))
    arguments = {
        "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 2,
        "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no",
    } | kwargs.pop("args", {})  # fmt: skip
    trainer = cls(
        model=model, args=TrainingArguments(str(folder), **arguments),
        train_dataset=[{key: value[i] for key, value in batch.items()} for i in range(16)], **kwargs,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_the_trainer_writes_it_when_asked(tmp_path):
    pytest.importorskip("plotly", reason="plotly is not installed")
    listens = Listens()
    trainer = fit(tmp_path / "run", report=tmp_path / "out" / "report.html", callbacks=[listens])
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<title>run - D2FT</title>" in text and "What ran" in text and "Seconds of a step" in text
    entries = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    assert len(entries) == 2 and all(entry.keys() >= NUMBERS for entry in entries)
    assert "preparation_seconds" in entries[0] and "preparation_seconds" not in entries[1]
    # Every number of the report was logged, for whoever listens.
    heard = [{k: v for k, v in entry.items() if k not in ("step", "epoch")} for entry in trainer.state.log_history]
    assert [{k: v for k, v in entry.items() if k != "epoch"} for entry in listens.got] == heard
    record = read_run(tmp_path / "run")
    assert record.history == json.loads(json.dumps(trainer.state.log_history))
    assert record.activity.first == [1, 2, 3, 4] and record.activity.steps == 4
    assert record.schedule == trainer.planner.counts.last.to_dict()
    assert record.about["method"] == "D2FT" and record.about["policy"] == "depth"


def test_without_it_nothing_is_written_and_logs_stay_as_they_are(tmp_path):
    trainer = fit(tmp_path)
    assert not (tmp_path / "d2ft_run.json").exists()
    assert not any("step_seconds" in entry for entry in trainer.state.log_history)


def test_a_trainer_of_ones_own_takes_the_callback(tmp_path):
    trainer = fit(tmp_path, Trainer, callbacks=[D2FTCallback(), ReportCallback()])
    assert trainer.state.log_history[0].keys() >= NUMBERS
    assert read_run(tmp_path).activity.steps == 4


def test_a_plain_run_is_reported_as_far_as_it_is_known(tmp_path):
    fit(tmp_path, Trainer, adapted=False, callbacks=[ReportCallback()])
    record = read_run(tmp_path)
    assert record.about["method"] == "plain" and record.last("step_seconds") > 0
    assert record.schedule is None and record.activity.shares == []


def test_a_resumed_run_has_one_report_of_all_its_steps(tmp_path):
    save = {"save_strategy": "steps", "save_steps": 2}
    fit(tmp_path, args={"max_steps": 3, **save}, callbacks=[ReportCallback()])
    fit(tmp_path, args=save, callbacks=[ReportCallback()], resume=str(tmp_path / "checkpoint-2"))
    record = read_run(tmp_path)
    assert record.activity.first == [1, 2, 3, 4] and record.activity.last == [1, 2, 3, 4]


def test_one_step_that_is_planned_together_with_others_is_shown_with_them(tmp_path):
    fit(tmp_path, args={"gradient_accumulation_steps": 1, "max_steps": 7}, callbacks=[ReportCallback()])
    record = read_run(tmp_path)
    assert record.activity.first[0] == 1 and record.activity.last == [5]


def test_whoever_lacks_plotly_is_told_before_the_run(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "plotly" or "web_" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ImportError, match=r'pip install "d2ft_peft\[report\]"'):
        fit(tmp_path, report=tmp_path / "report.html")


def test_a_plain_run_beside_it_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="has neither d2ft_run.json"):
        ReportCallback(against=tmp_path)


def report_in_two_processes(folder: str) -> int:
    trainer = fit(folder, callbacks=[ReportCallback()], args={"ddp_backend": "gloo"})
    return int(trainer.state.is_world_process_zero)


@pytest.mark.thorough
@pytest.mark.distributed
def test_of_several_processes_the_first_writes(tmp_path):
    assert sorted(run(__name__, "report_in_two_processes", tmp_path, str(tmp_path / "run"))) == [0, 1]
    assert isinstance(read_run(tmp_path / "run"), RunRecord)


def test_tensorboard_shows_every_number_of_the_log(tmp_path, monkeypatch):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="no tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = fit(tmp_path, args={"report_to": ["tensorboard"]}, report=tmp_path / "report.html")
    events = reader.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    (entry,) = (entry for entry in trainer.state.log_history if entry["step"] == 4 and "learning_rate" in entry)
    assert entry.keys() >= NUMBERS
    for name in entry.keys() - {"epoch", "step"}:
        last = events.Scalars(f"train/{name}")[-1]
        assert (last.step, last.value) == (4, pytest.approx(entry[name], rel=1e-6)), name
