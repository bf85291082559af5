"""The README's code runs as it stands there."""

import re
import warnings
from pathlib import Path

from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from d2ft_peft.dlora import BaseModel, Cloud, CloudProgressCallback, KillReviveCallback, connect

from .models import TINY


README = Path(__file__).parents[1] / "README.md"


BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # PyTorch and transformers say these of any Trainer on a CPU.
        warnings.filterwarnings("ignore", message=".*(is_gradient_checkpointing|'pin_memory' argument).*")
        names: dict = {}
        exec(compile(code, str(README), "exec"), names)
    assert type(names["plain"]).__name__ == "ViTForImageClassification"
    assert (tmp_path / "out" / "readme" / "adapter" / "adapter_model.safetensors").is_file()
    logs = [entry for entry in names["trainer"].state.log_history if "compute_ratio" in entry]
    assert logs and all(entry["compute_ratio"] < 0.61 for entry in logs)


def test_the_edge_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    TINY["llama"].build().save_pretrained("base")
    cloud = Cloud(BaseModel.load("base"))
    there = (
        BLOCKS[1].replace("localhost:50051", f"localhost:{cloud.start()}").replace("meta-llama/Llama-3.2-1B", "base")
    )
    batch = TINY["llama"].batch(4)
    names = {
        "args": TrainingArguments("out", max_steps=2, report_to=[], dataloader_pin_memory=False),
        "data": [{name: value[i] for name, value in batch.items()} for i in range(4)],
        "Trainer": Trainer, "LoraConfig": LoraConfig, "connect": connect, "KillReviveCallback": half_as_many,
        "CloudProgressCallback": CloudProgressCallback,
    }  # fmt: skip
    exec(compile(there, str(README), "exec"), names)
    cloud.stop()
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert len(BLOCKS) == 2


def half_as_many(active: int) -> KillReviveCallback:
    """The model here has 6 modules."""
    return KillReviveCallback(active=active // 2)
