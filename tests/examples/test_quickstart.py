"""The quickstart runs through, with a toy model: its table, its pictures, and adapters that others can load."""

from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from peft import PeftConfig
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification

from examples import quickstart


SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "image_size": 24, "patch_size": 6, "num_channels": 1, "num_labels": 5,
}  # fmt: skip


@pytest.mark.thorough
def test_a_quick_run_writes_everything_and_reads_its_model_back(tmp_path, capsys):
    rows = quickstart.main(["--quick", "--output", str(tmp_path)])
    check_rows(rows)
    check_files(tmp_path)
    printed = capsys.readouterr().out
    assert "| full, fewer samples" in printed and "a plain LoRA adapter" in printed
    for name in printed.split("Written:")[1].split():
        if name.startswith(str(tmp_path)):
            assert Path(name.rstrip(":")).exists()
    assert "{'" not in printed, "logs are for the curves, not for the reader"


def check_rows(rows):
    rows = {row["fine-tuning"]: row for row in rows}
    assert list(rows) == [
        "full", "full, fewer samples", "D2FT", "D2FT, head by head", "LoRA", "LoRA, fewer samples", "D2FT-LoRA",
    ]  # fmt: skip
    assert all(0 <= row["test accuracy"] <= 1 and row["seconds"] > 0 for row in rows.values())
    compute = {name: row["compute"] for name, row in rows.items()}
    assert compute["full"] == 1
    assert compute["full, fewer samples"] == pytest.approx(0.6)
    assert compute["D2FT"] == pytest.approx(0.6, abs=0.15)  # on average over the run, which has two steps
    assert compute["LoRA, fewer samples"] == pytest.approx(0.6 * compute["LoRA"])
    assert compute["D2FT-LoRA"] == pytest.approx(0.6 * compute["LoRA"], abs=0.15)
    # Two FULL and three FORWARD_ONLY of five, and the pass that scores 160 samples before 2 steps of 80,
    # which leave out the rows of the last of two blocks that no loss reads.
    assert compute["D2FT, head by head"] == pytest.approx(0.6 + 160 / 160, abs=0.2)
    memory = {name: row["peak memory, MiB"] for name, row in rows.items()}
    assert memory["D2FT"] > memory["full"] > 0, "the original weights stay beside the trained ones"


def check_files(folder):
    for name in ("schedule", "schedule-head-by-head", "device-loads", "losses"):
        assert imread(folder / f"{name}.png").std() > 0.01, "an empty picture"
    assert PeftConfig.from_pretrained(folder / "d2ft-lora").peft_type == "LORA"
    for name in ("d2ft", "d2ft-head-by-head", "d2ft-lora"):
        assert load_file(folder / name / "adapter_model.safetensors")


@pytest.mark.thorough
def test_the_pre_trained_model_is_kept_for_its_recipe(tmp_path):
    first, path = quickstart.pretrained(SIZES, 1, tmp_path)
    written = path.stat().st_mtime_ns
    again, same = quickstart.pretrained(SIZES, 1, tmp_path)
    _, other = quickstart.pretrained(SIZES, 2, tmp_path)
    assert same == path != other and path.stat().st_mtime_ns == written
    for name, value in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


@pytest.mark.thorough
def test_all_ways_see_the_same_samples_in_the_same_order():
    """Before the first update all models agree, so equal losses mean equal samples."""
    torch.manual_seed(0)
    base, samples = ViTForImageClassification(ViTConfig(**SIZES)), quickstart.digits(range(5, 10), 24)[:160]
    losses = {}
    for way in quickstart.WAYS:
        cls = quickstart.Trainer if way.d2ft is None else quickstart.D2FTTrainer
        trainer = quickstart.make_trainer(quickstart.adapt(base, way), samples, "x", 1e-3, 1, way.micro_batches, cls)
        trainer.train()
        losses[way.name] = trainer.state.log_history[0]["loss"]
    everything, three = losses["full"], losses["full, fewer samples"]
    assert abs(everything - three) > 1e-4
    for way in quickstart.WAYS:
        if "compute_budget" in (way.d2ft or {}):  # draws among the samples of all five
            assert min(abs(losses[way.name] - other) for other in (three, everything)) > 1e-6
        else:
            expected = three if way.micro_batches == 3 else everything
            assert losses[way.name] == pytest.approx(expected, abs=1e-6), way.name


def test_an_adapter_that_predicts_otherwise_is_an_error(tmp_path, monkeypatch):
    base = ViTForImageClassification(ViTConfig(**SIZES))
    samples = quickstart.digits(range(5, 10), 24)[:8]
    model = quickstart.adapt(base, quickstart.WAYS[-1])
    trainer = quickstart.make_trainer(model, samples, "x", 1e-3, 1, 5, quickstart.D2FTTrainer)
    quickstart.save_and_reload("same", trainer, base, samples, tmp_path)
    save = model.save_pretrained

    def spoil(folder):
        save(folder)
        with torch.no_grad():
            model.base_model.model.classifier.modules_to_save["default"].bias += 1

    monkeypatch.setattr(model, "save_pretrained", spoil)
    with pytest.raises(RuntimeError, match="off by 1"):
        quickstart.save_and_reload("other", trainer, base, samples, tmp_path)
