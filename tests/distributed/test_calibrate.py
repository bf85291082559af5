"""Capacities that follow what the ranks achieve: the sharing out in numbers, and measured on two processes."""

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.head_parallel import HeadParallel, balanced_capacities, calibrate
from d2ft_peft.head_parallel.branch import BranchForward
from tests.distributed.head_parallel import Case, batches_of, join, model_of, rank
from tests.distributed.launch import run
from tests.distributed.test_head_parallel_use import message


CASE = Case("vit", "full", (2, 2, 2, 2, 2))


@given(
    st.lists(st.tuples(st.floats(0.01, 100), st.floats(0.1, 10)), min_size=1, max_size=6),
    st.floats(0.01, 1),
)
def test_all_devices_that_do_not_do_everything_are_ready_together(devices, budget):
    seconds, loads = np.array(devices).T
    capacities = np.array(balanced_capacities(seconds, loads, budget))
    assert (capacities > 0).all() and (capacities <= 1).all()
    assert (capacities * loads).sum() == pytest.approx(budget * loads.sum())
    taken = capacities * seconds
    assert taken == pytest.approx(np.where(capacities < 1, taken.max(), seconds))
    assert (taken <= taken.max() * (1 + 1e-9)).all()


@pytest.mark.parametrize(
    ("seconds", "loads", "budget", "expected"),
    [
        ([1, 1], [1, 1], 0.6, [0.6, 0.6]),
        ([1, 2], [1, 1], 0.6, [0.8, 0.4]),
        ([2, 1], [2, 1], 0.5, [0.375, 0.75]),
        ([1, 9], [1, 1], 0.6, [1.0, 0.2]),
        ([1, 1], [1, 1], 1, [1.0, 1.0]),
    ],
)
def test_known_capacities(seconds, loads, budget, expected):
    assert balanced_capacities(seconds, loads, budget) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (([1, 0], [1, 1], 0.6), "must be positive, one each per device"),
        (([1], [1, 1], 0.6), "must be positive, one each per device"),
        (([1, 1], [1, 1], 0), r"compute_budget=0 must be in \(0, 1\]"),
        (([1, 1], [1, 1], 1.1), r"compute_budget=1.1 must be in \(0, 1\]"),
    ],
)
def test_numbers_without_sense_are_refused(args, message):
    with pytest.raises(ValueError, match=message):
        balanced_capacities(*args)


def measure() -> dict:
    join()
    parallel, batches = HeadParallel(model_of(CASE, head_parallel=True)), batches_of(CASE, 0)
    before = {name: p.detach().clone() for name, p in parallel.model.named_parameters()}
    if rank() == 1:
        compute = BranchForward.compute

        def slow(*args, **kwargs):
            time.sleep(0.05)
            return compute(*args, **kwargs)

        BranchForward.compute = slow
    found = {"capacities": calibrate(parallel, batches, 0.5, steps=2)}
    timeline = parallel.timeline
    found["as before"] = (timeline.on, timeline.spans, parallel.traffic.steps, parallel.planner.counts.of_run.steps)
    found["gradients"] = [name for name, p in parallel.model.named_parameters() if p.grad is not None]
    found["changed"] = [name for name, p in parallel.model.named_parameters() if not p.equal(before[name])]
    parallel.forward_backward(batches)
    found["refusals"] = [
        message(lambda: calibrate(parallel, batches)),
        message(lambda: calibrate(parallel, batches, steps=0)),
    ]
    return found


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_slower_rank_gets_less(tmp_path):
    ranks = run(__name__, "measure", tmp_path, processes=2)
    for of_rank in ranks:
        fast, slow = of_rank["capacities"]
        assert fast > 2 * slow and (fast + slow) / 2 == pytest.approx(0.5)
        assert of_rank["capacities"] == ranks[0]["capacities"]
        assert of_rank["as before"] == (False, [], 0, 0)
        assert of_rank["gradients"] == [] == of_rank["changed"]
        assert "the model has gradients" in of_rank["refusals"][0]
        assert "steps=0 must be at least 1" in of_rank["refusals"][1]
