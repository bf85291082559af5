"""The benchmark of unequal processes on a tiny model: both variants do the same work. Times are not looked at."""

import json
import sys
from pathlib import Path

import pytest
import unequal_figure
from matplotlib.image import imread

from tests.distributed.launch import run


pytestmark = pytest.mark.distributed


def two_turns(out: str) -> bool:
    import unequal

    tiny = {"hidden": 24, "layers": 1, "image-size": 32, "candidates": 10, "size": 3, "interval": 2}
    short = {"steps": 3, "turns": 2, "settled": 3}
    sys.argv = ["unequal.py", "--out", out, *(f"--{name}={value}" for name, value in (tiny | short).items())]
    unequal.main()
    return True


@pytest.mark.thorough
def test_both_variants_run_as_many_samples(tmp_path):
    assert all(run(__name__, "two_turns", tmp_path, str(tmp_path / "figures.json")))
    measured = json.loads(Path(tmp_path / "figures.json").read_text())
    for variant, trace in measured["trace"].items():
        assert [sum(step["samples"]) for step in trace] == [12] * 18
        assert all(min(step["idle"]) == 0 <= step["exchange"] for step in trace)
        assert variant == "auto" or all(step["samples"] == [6, 6] for step in trace)
    assert {summary["steps"] for summary in measured["summary"]["auto"].values()} == {2}
    unequal_figure.draw(measured, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").std() > 0
