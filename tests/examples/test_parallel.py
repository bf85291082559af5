"""The parallel benchmark on a tiny Llama and two processes: bytes that are known, one loss, a table, and predictions.

Times are not looked at: they say nothing at this size.
"""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

from d2ft_peft.simulate import Cluster, Device


ROOT = Path(__file__).parents[2]
TINY = ["--model", "llama", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--layers", "2", "--length", "16",
        "--vocabulary", "1024", "--micro-batch-size", "2", "--repeats", "1"]  # fmt: skip
SHARES = {"D2FT all FULL": 1, "D2FT 3F+2S": 0.6, "D2FT 2F+1O+2S": 0.5, "tensor parallel, 3 of 5": 0.6}


@pytest.fixture
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    import parallel
    import simulate
    import simulate_plot

    return parallel, simulate, simulate_plot


@pytest.mark.distributed
def test_bytes_losses_and_predictions(scripts, tmp_path):
    parallel, simulate, _ = scripts
    path = tmp_path / "parallel.json"
    parallel.main([*TINY, "--json", str(path)])
    result = json.loads(path.read_text())
    rows = {row["variant"]: row for row in result["rows"] if row["group"] == "equal"}
    whole = sum(rows["tensor parallel"]["rows"])
    for name, share in SHARES.items():
        assert sum(rows[name]["rows"]) == pytest.approx(share * whole), name
    assert sum(rows["D2FT unequal"]["rows"]) < 0.5 * whole
    losses = {name: sum(row["loss"]) / 2 for name, row in rows.items()}
    pairs = [(name, "D2FT all FULL") for name in ("tensor parallel", "transformers tp_plan", "DDP", "FSDP2")]
    for name, ours in (*pairs, ("tensor parallel, 3 of 5", "D2FT 3F+2S")):
        assert losses[name] == pytest.approx(losses[ours], rel=1e-5), name
        assert rows[name]["gradient_norm"] == pytest.approx(rows[ours]["gradient_norm"], rel=1e-4), name
    # Of two ranks each sends every gradient once.
    assert rows["DDP"]["sent"] == pytest.approx([4 * parameters for parameters in rows["DDP"]["parameters"]], rel=1e-3)
    assert sum(rows["FSDP2"]["parameters"]) == rows["DDP"]["parameters"][0]
    assert sum(result["calibrated"]["capacities"]) / 2 == pytest.approx(0.6)

    workload = simulate.workload_of(result["setting"])
    predictions = simulate.predict(result, workload, Cluster((Device(1e9),) * 2))
    for name in (*SHARES, "DDP", "FSDP2"):
        moved = [sum(sent[rank] for sent in predictions[name].sent.values()) for rank in range(2)]
        # Not predicted: hashes and flags that ranks compare, and tensor parallelism's gradients of norms.
        assert moved == pytest.approx(rows[name]["sent"], rel=0.02), name


@pytest.mark.parametrize("name", ["parallel.json", "parallel_llama.json"])
def test_predictions_are_near_what_was_measured(scripts, capsys, name):
    """The files beside the scripts hold measured steps, and micro-measurements from which these are predicted."""
    _, simulate, _ = scripts
    path = simulate.Path(simulate.__file__).parent / "results" / name
    simulate.main(["--measured", str(path)])
    printed = capsys.readouterr().out
    result = json.loads(path.read_text())
    workload = simulate.workload_of(result["setting"])
    predictions = simulate.predict(result, workload, simulate.cluster_of(result, workload))
    rows = {row["variant"]: row for row in result["rows"] if row["group"] == "equal"}
    for variant, prediction in predictions.items():
        row = rows[variant]
        assert f"| {variant} | {row['sent'][0] / 1e6:.2f} |" in printed
        if row["compute_kind"] == "heads":
            assert prediction.compute == pytest.approx(row["compute_seconds"], rel=0.08), variant
            assert prediction.seconds == pytest.approx(row["step_seconds"], rel=0.15), variant


def test_the_picture_of_what_cannot_be_run(scripts, tmp_path, monkeypatch):
    plot = scripts[2]
    monkeypatch.setattr(plot, "cases", lambda cases=plot.cases: [next(cases())])
    printed = plot.draw(str(tmp_path / "simulated.png"))
    assert "| ViT-L, full; devices alike |" in printed
    assert imread(tmp_path / "simulated.png").std() > 0.01, "an empty picture"
