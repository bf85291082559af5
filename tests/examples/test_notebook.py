"""The notebook runs from top to bottom as it stands there, and was saved without outputs."""

import json
import warnings
from pathlib import Path

import pytest


PATH = Path(__file__).parents[2] / "examples" / "d2ft_quickstart.ipynb"
NOTEBOOK = json.loads(PATH.read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(folder, monkeypatch, steps=None) -> dict:
    monkeypatch.chdir(folder)
    names: dict = {}
    for number, code in enumerate(CODE):
        if steps is not None:
            code = code.replace("STEPS = 200", f"STEPS = {steps}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what PyTorch and transformers say of any Trainer on a CPU
            exec(compile(code, f"{PATH.name}, cell {number}", "exec"), names)
    return names


def check(names, folder):
    assert type(names["ordinary"]).__name__ == "ViTForImageClassification"
    assert 0 < names["executed"]["flops_ratio"] < 0.61
    assert (folder / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert names["schedule"].counts


@pytest.mark.thorough
def test_every_cell_runs(tmp_path, monkeypatch, capsys):
    check(run(tmp_path, monkeypatch, steps=3), tmp_path)


@pytest.mark.slow
def test_it_learns_the_digits(tmp_path, monkeypatch, capsys):
    check(run(tmp_path, monkeypatch), tmp_path)
    said = capsys.readouterr().out
    for name in ("plain", "d2ft"):
        (line,) = (line for line in said.splitlines() if line.startswith(f"{name}: "))
        assert float(line.split()[1].rstrip("%")) > 70, line


def test_it_is_a_notebook_without_outputs():
    assert NOTEBOOK["nbformat"] == 4 and len(CODE) >= 5
    for cell in NOTEBOOK["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
