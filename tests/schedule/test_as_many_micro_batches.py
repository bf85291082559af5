"""Where processes meet in every pass, the one with fewer micro-batches cuts its own until all have as many."""

import numpy as np
import pytest

from d2ft_peft.planning import planner
from d2ft_peft.schedule import Schedule, compose


@pytest.fixture
def composition():
    """Five samples run, in micro-batches of three and two; a sixth does not."""
    return compose(Schedule(np.array([[2], [2], [2], [2], [2], [0]], dtype=np.int8), np.ones(6)), 3)


def test_the_largest_is_halved_and_nothing_else_changes(composition):
    cut = composition.cut_into(4)
    assert [part.tolist() for part in cut.micro_batches] == [[0], [1], [2], [3, 4]]
    assert cut.schedule.weights.tolist() == [1, 1, 1, 2, 1]
    assert cut.schedule.operations[:, 0].tolist() == [2, 2, 2, 2, 0]
    assert [len(part) for part in composition.cut_into(2).micro_batches] == [3, 2]


def test_every_process_takes_the_largest_number(composition, monkeypatch):
    monkeypatch.setattr(planner, "gather", lambda mine: np.stack([mine, [3.0, 7.0]]))
    assert len(planner._as_many_everywhere(composition).micro_batches) == 3


def test_a_process_with_too_few_samples_is_named(composition, monkeypatch):
    monkeypatch.setattr(planner, "gather", lambda mine: np.stack([mine, [6.0, 6.0]]))
    with pytest.raises(ValueError, match="process 0 runs 5 samples of a step, and process 1 has 6 micro-batches"):
        planner._as_many_everywhere(composition)
