"""The parallel benchmark on a tiny Llama and two processes: bytes that are known, one loss, a table, and predictions.

Times are not looked at: they say nothing at this size.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import parallel
import pytest
import simulate
import simulate_plot
from matplotlib.image import imread

from d2ft_peft.simulate import Cluster, Device
from tests.distributed.launch import run


TINY = ["--model", "llama", "--hidden", "64", "--heads", "4", "--kv-heads", "2", "--layers", "2", "--length", "16",
        "--vocabulary", "1024", "--micro-batch-size", "2", "--repeats", "1"]  # fmt: skip
SHARES = {"D2FT all FULL": 1, "D2FT 3F+2S": 0.6, "D2FT 2F+1O+2S": 0.5, "tensor parallel, 3 of 5": 0.6}


def work(*arguments: str) -> bool:
    """What each process of the benchmark does."""
    import parallel

    return parallel.main(list(arguments)) is None


@pytest.fixture
def forked(monkeypatch, tmp_path):
    """Lets the benchmark start its processes as tests do: forked, instead of importing everything anew."""

    def start(command: list[str], check: bool) -> None:
        assert check and command[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        assert Path(command[6]) == Path(parallel.__file__)
        assert all(run(__name__, "work", tmp_path, *command[7:], processes=2))

    monkeypatch.setattr(parallel, "subprocess", SimpleNamespace(run=start))


@pytest.mark.thorough
@pytest.mark.distributed
def test_bytes_losses_and_predictions(forked, tmp_path):
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


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["parallel.json", "parallel_llama.json"])
def test_predictions_are_near_what_was_measured(capsys, name):
    """The files beside the scripts hold measured steps, and micro-measurements from which these are predicted."""
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


@pytest.mark.thorough
def test_the_picture_of_what_cannot_be_run(tmp_path, monkeypatch):
    monkeypatch.setattr(simulate_plot, "cases", lambda cases=simulate_plot.cases: [next(cases())])
    printed = simulate_plot.draw(str(tmp_path / "simulated.png"))
    assert "| ViT-L, full; devices alike |" in printed
    assert imread(tmp_path / "simulated.png").std() > 0.01, "an empty picture"
