"""The accuracy benchmark's table, from a file of runs: paired differences with intervals, each row at its best rate."""

import json

import accuracy_table
import pytest
from matplotlib.image import imread


@pytest.fixture
def file_of(tmp_path):
    def write(runs, metric="accuracy"):
        fixed = {"task": "t", "mode": "full", "steps": 10, "train_samples": 9, "size": 8, "metric": metric}
        cost = {"compute_ratio": 0.5, "cpu_seconds": 1.0}
        lines = [
            fixed | cost | {"row": row, "budget": budget, "seed": seed, "lr": lr, "value": value}
            for (row, budget, lr), values in runs.items()
            for seed, value in enumerate(values)
        ]
        path = tmp_path / "runs.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
        return str(path)

    return write


def rows_of(path):
    """Cells of the table, by row."""
    [(setting, rows)] = accuracy_table.load([path]).items()
    lines = [line.strip("| ").split(" | ") for line in accuracy_table.table(setting, rows).splitlines()[4:]]
    return {line[0]: line[1:] for line in lines}


def test_differences_are_paired_by_seed(file_of):
    # Student's t for 3 pairs: half of the interval is 4.303 standard deviations / sqrt(3); these gaps are 1, 2, 3.
    path = file_of({("fewer_samples", 0.6, 1e-3): [50, 60, 70], ("importance", 0.6, 1e-3): [51, 62, 73]})
    assert rows_of(path)["importance"][5] == "+2.00 ± 2.48"


def test_a_smaller_loss_is_better(file_of):
    path = file_of({("fewer_samples", 0.6, 1e-3): [2.5], ("importance", 0.6, 1e-3): [2.0]}, metric="loss")
    assert rows_of(path)["importance"][5] == "+0.50"


@pytest.mark.parametrize(("metric", "best"), [("accuracy", "0.01"), ("loss", "0.001")])
def test_every_row_stands_at_its_best_rate(file_of, metric, best):
    runs = {("plain", 1.0, 1e-3): [50, 50], ("plain", 1.0, 1e-2): [52, 52], ("importance", 0.6, 1e-3): [51]}
    rows = rows_of(file_of(runs, metric))
    assert rows["plain"][0] == best and rows["importance"][0] == "0.001"


def test_rates_are_compared_on_the_seeds_that_all_of_them_ran(file_of):
    runs = {("plain", 1.0, 1e-3): [50, 90], ("plain", 1.0, 1e-2): [52]}
    assert rows_of(file_of(runs))["plain"][0] == "0.01"


def test_a_starred_row_runs_more_steps(file_of):
    assert rows_of(file_of({("importance*", 0.5, 1e-3): [50]}))["importance*"][1] == "1.00"


def test_the_picture_shows_rows_with_intervals(file_of, tmp_path):
    runs = {("fewer_samples", 0.6, 1e-3): [50, 60], ("importance", 0.6, 1e-3): [51, 62], ("moe", 0.6, 1e-3): [20, 21]}
    path = file_of(runs)
    accuracy_table.plot(accuracy_table.load([path]), str(tmp_path / "x.png"))
    assert imread(tmp_path / "x.png").std() > 0
