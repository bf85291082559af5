"""Where processes meet in every pass, the one with fewer micro-batches cuts its own until all have as many; if one has
too few samples for that, the others run some together."""

import numpy as np
import pytest

from d2ft_peft.planning import planner
from d2ft_peft.schedule import Schedule, compose


@pytest.fixture
def composition():
    """Five samples run, in micro-batches of three and two; a sixth does not."""
    return compose(Schedule(np.array([[2], [2], [2], [2], [2], [0]], dtype=np.int8), np.ones(6)), 3)


def test_the_largest_is_halved_and_nothing_else_changes(composition):
    cut = composition.regrouped(4)
    assert [part.tolist() for part in cut.micro_batches] == [[0], [1], [2], [3, 4]]
    assert cut.schedule.weights.tolist() == [1, 1, 1, 2, 1]
    assert cut.schedule.operations[:, 0].tolist() == [2, 2, 2, 2, 0]
    assert [len(part) for part in composition.regrouped(2).micro_batches] == [3, 2]


def test_every_process_takes_the_largest_number(composition, monkeypatch):
    monkeypatch.setattr(planner, "gather", lambda mine: np.stack([mine, [3.0, 7.0]]))
    assert len(planner._as_many_everywhere(composition).micro_batches) == 3


def test_the_smallest_neighbours_run_together_and_nothing_else_changes():
    schedule = Schedule(np.array([[2], [0], [2], [2], [2], [2], [2]], dtype=np.int8), np.ones(7))
    composition = compose(schedule, 3, cut=lambda members: [members[3:], members[2:3], members[:2]])
    merged = composition.regrouped(2)
    assert [part.tolist() for part in merged.micro_batches] == [[4, 5, 6], [0, 2, 3]]
    assert merged.schedule.weights.tolist() == [3, 3, 1]
    assert merged.schedule.operations[:, 0].tolist() == [2, 2, 0]
    (whole,) = composition.regrouped(1).micro_batches
    assert whole.tolist() == [0, 2, 3, 4, 5, 6]


def test_no_process_takes_more_than_the_samples_of_another(composition, monkeypatch):
    monkeypatch.setattr(planner, "gather", lambda mine: np.stack([mine, [1.0, 1.0]]))
    assert [part.tolist() for part in planner._as_many_everywhere(composition).micro_batches] == [[0, 1, 2, 3, 4]]


def test_a_process_without_a_sample_is_named(composition, monkeypatch):
    monkeypatch.setattr(planner, "gather", lambda mine: np.stack([mine, [0.0, 0.0]]))
    with pytest.raises(ValueError, match="process 1 runs no sample of a step, and process 0 runs 5"):
        planner._as_many_everywhere(composition)
