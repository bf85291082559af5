"""The README's code runs as it stands there."""

import re
import warnings
from pathlib import Path


README = Path(__file__).parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
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
