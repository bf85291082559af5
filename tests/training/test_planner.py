"""A planner in a loop of one's own: what is asked in the wrong order, or too late, says so."""

import numpy as np
import pytest

from d2ft_peft import D2FTPlanner
from tests.models import TINY
from tests.test_trainer import adapt


def batches(n=5):
    return [TINY["vit"].batch(4, seed) for seed in range(n)]


def planner(**config):
    return D2FTPlanner(adapt("vit", **config).float().train())


@pytest.mark.parametrize(
    "misuse, message",
    [
        (lambda p: p.peek(0), "no micro-batch is planned"),
        (lambda p: p.micro_batch(0).__enter__(), "no micro-batch is planned"),
        (lambda p: p.weigh([]), "no micro-batch is planned"),
        (lambda p: p.plan([]), "list of 0: give a list of the micro-batches"),
        (lambda p: p.plan(TINY["vit"].batch()), "dict of 2: give a list of the micro-batches"),
        (lambda p: (p.plan(batches()), p.peek(5)), "index=5 is none of the 5 micro-batches"),
        (lambda p: (p.prepare(batches()[0]), p.compose(np.arange(4), 2)), "call plan.batches., not compose"),
    ],
)
def test_misuse_is_named(misuse, message):
    with pytest.raises(ValueError, match=message):
        misuse(planner(policy="bilevel", compute_budget=0.6))


def test_a_step_without_candidates_is_named():
    p = planner(policy="fewer_samples")
    p.prepare(batches()[0])
    with pytest.raises(ValueError, match="indices is empty"):
        p.compose([], 4)


def test_what_ran_of_a_step_that_was_left_unfinished_is_counted():
    p = planner(policy="all_full", compute_budget=1.0, skip_unread_rows=False)
    for run in (4, 2):
        steps = batches(5 if run == 4 else 2)
        p.plan([dict(batch) for batch in steps])
        for i in range(run):
            with p.micro_batch(i):
                p.model(**steps[i]).loss.backward()
    p.pop_logs()
    assert p.counts.of_run.weight == 6 * 4
    assert p.counts.of_run.flops == p.counts.of_run.full_flops == p.cost_model.full_flops(np.array([24.0]))
