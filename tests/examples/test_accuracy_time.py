"""Time to an accuracy, from runs of several lengths: interpolated over the logarithm of time, scoring included."""

import json

import accuracy_time
import pytest
from matplotlib.image import imread


@pytest.fixture
def path(tmp_path):
    """Plain runs of 10, 20, 40 seconds; one row twice as fast, one that is too short; two seeds, whose mean counts."""
    lines = []
    for row, budget, factor, accuracies in (
        ("plain", 1.0, 1.0, (50, 60, 70)), ("fewer_samples", 0.6, 0.5, (50, 60, 70)), ("bilevel", 0.6, 1.0, (40, 41)),
    ):  # fmt: skip
        for steps, accuracy in zip((1, 2, 4), accuracies, strict=False):
            for seed in (0, 1):
                run = {"row": row, "budget": budget, "train_samples": 9, "steps": steps, "seed": seed}
                cost = {"cpu_seconds": 10 * factor * steps + (-1) ** seed, "value": accuracy + (-1) ** seed}
                lines.append(json.dumps(run | cost))
    file = tmp_path / "runs.jsonl"
    file.write_text("\n".join(lines))
    return str(file)


def test_time_to_an_accuracy(path):
    rows = accuracy_time.load([path])[9]
    plain = rows["plain", 1.0]
    assert plain == {1: (10, 50), 2: (20, 60), 4: (40, 70)}
    assert accuracy_time.target(plain) == pytest.approx(60)
    assert accuracy_time.seconds_to(65, plain) == pytest.approx(20 * 2**0.5)
    assert accuracy_time.seconds_to(40, plain) == 10, "the shortest run"
    assert accuracy_time.seconds_to(71, plain) is None
    (row,) = accuracy_time.table({9: rows}).splitlines()[2:]
    assert row == "| 9 | 60.0 | 20 s (1.00) | not reached | 10 s (0.50) |"


def test_picture(path, tmp_path):
    accuracy_time.main([path, "--png", str(tmp_path / "time.png")])
    assert imread(tmp_path / "time.png").std() > 0.01, "an empty picture"
