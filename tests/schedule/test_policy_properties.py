"""What holds for every policy, whatever the numbers."""

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import Budget, Operation, Problem, Schedule, get_policy, policy_names

from .oracle import deterministic, problems, solve


BY_SCORE = ["bilevel", "joint"]
PER_DEVICE = ["bilevel", "joint", "random", "round_robin"]
ONE_MACHINE = ["depth", "dynamic_pruning", "drop_bp", "stochastic_depth", "lisa"]
WHOLE = {"all_full", "fewer_tokens"}  # the latter keeps its budget in the forward pass
KINDS = ("compute", "communication", "counts")


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", policy_names())
@deterministic
@given(problem=problems(max_rows=6, max_subnets=5, budgets=KINDS))
def test_a_schedule_covers_all_cells_and_keeps_the_problems_facts(name, problem):
    schedule = solve(name, problem)
    assert isinstance(schedule, Schedule)
    assert schedule.operations.shape == problem.forward_scores.shape
    assert sum(schedule.counts.values()) == problem.num_micro_batches * problem.num_subnets
    for fact in ("weights", "costs", "blocks"):
        assert (getattr(schedule, fact) == getattr(problem, fact)).all()


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", sorted(set(policy_names()) - WHOLE))
@deterministic
@given(problem=problems(max_rows=6, max_subnets=5, budgets=("compute", "communication")))
def test_no_device_exceeds_its_limit(name, problem):
    schedule = solve(name, problem)
    problem = problem.pooled() if name in ONE_MACHINE else problem
    cells = np.take_along_axis(
        problem.weights[:, None, None] * problem.limited_costs, schedule.operations[:, :, None].astype(int), axis=2
    )
    used = np.bincount(problem.devices, cells[:, :, 0].sum(axis=0))
    assert (used <= problem.limits * (1 + 1e-9)).all()


@pytest.mark.parametrize("name", PER_DEVICE)
@deterministic
@given(problem=problems(max_rows=6, max_subnets=5, budgets=("counts",)))
def test_counts_are_hit_exactly(name, problem):
    operations = get_policy(name)(problem).operations
    num_full, num_forward_only = problem.budget.counts
    assert ((operations == Operation.FULL).sum(axis=0) == num_full).all()
    assert ((operations == Operation.FORWARD_ONLY).sum(axis=0) == num_forward_only).all()


@pytest.mark.quick(4)
@pytest.mark.parametrize("name", policy_names())
@deterministic
@given(problem=problems(max_rows=6, max_subnets=5, budgets=KINDS), seed=st.integers(0, 100))
def test_the_same_problem_and_seed_give_the_same_schedule(name, problem, seed):
    first, second = (solve(name, replace(problem, rng=np.random.default_rng(seed))) for _ in range(2))
    assert first == second


@pytest.mark.thorough
@pytest.mark.parametrize("name", BY_SCORE)
@deterministic
@given(problem=problems(max_rows=6, max_subnets=5, budgets=KINDS), seed=st.integers(0, 100))
def test_permuting_devices_permutes_the_schedule(name, problem, seed):
    problem = replace(problem, devices=np.arange(problem.num_subnets))
    order = np.random.default_rng(seed).permutation(problem.num_subnets)
    columns = {field.name: getattr(problem, field.name) for field in fields(problem)}
    columns |= {key: columns[key][:, order] for key in ("forward_scores", "backward_scores")}
    columns |= {key: columns[key][order] for key in ("costs", "blocks")}
    permuted = get_policy(name)(Problem(**columns)).operations
    assert (permuted == get_policy(name)(problem).operations[:, order]).all()


@pytest.mark.parametrize("name", ["bilevel", "joint", "depth"])
@deterministic
@given(
    rows=st.integers(1, 7),
    seed=st.integers(0, 10_000),
    share=st.sampled_from([0.3, 0.5, 0.6, 0.77]),
    forward_cost=st.sampled_from([1 / 3, 0.5, 0.4]),
    same_everywhere=st.booleans(),
)
def test_scores_that_do_not_depend_on_the_sample_align_all_devices(
    name, rows, seed, share, forward_cost, same_everywhere
):
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 5, rows).astype(float)
    magnitude = np.full(5, 0.1) if same_everywhere else rng.random(5)
    forward = np.zeros((rows, 5))
    costs = np.tile([0, forward_cost, 1], (5, 1))
    budget = Budget(compute=max(share, weights.min() / weights.sum()))
    problem = Problem(forward, np.tile(magnitude, (rows, 1)), budget, costs=costs, weights=weights)
    assert get_policy(name)(problem).alignment == 1.0


@pytest.mark.parametrize("name", BY_SCORE)
@deterministic
@given(rows=st.integers(2, 7), seed=st.integers(0, 10_000), num_full=st.integers(1, 7))
def test_counts_align_where_every_device_ranks_the_samples_alike(name, rows, seed, num_full):
    rng = np.random.default_rng(seed)
    sample, magnitude = rng.random(rows), rng.random(5)
    budget = Budget(num_full=min(num_full, rows - 1), num_forward_only=1)
    problem = Problem(np.outer(sample, 1 + magnitude), np.tile(magnitude, (rows, 1)), budget)
    schedule = get_policy(name)(problem)
    assert schedule.alignment == 1.0
    full_rows = np.flatnonzero(schedule.operations[:, 0] == Operation.FULL)
    if name == "bilevel":
        assert sorted(full_rows) == sorted(np.argsort(-sample)[: budget.num_full])


@pytest.mark.parametrize("name", policy_names())
def test_a_hundred_thousand_cells_run_to_completion(name):
    rng = np.random.default_rng(0)
    forward, backward = rng.random((2, 98, 1024))
    problem = Problem(forward, backward, Budget(compute=0.6), blocks=np.arange(1024) // 16, rng=rng)
    schedule = get_policy(name)(problem)
    assert schedule.compute_ratio == pytest.approx(1.0 if name in WHOLE else 0.6, abs=0.01)


def test_scheduling_never_imports_torch():
    # The other packages import torch, so only what schedule itself imports counts.
    code = "import sys, types; package = types.ModuleType('d2ft_peft'); package.__path__ = ['d2ft_peft']; "
    code += "sys.modules['d2ft_peft'] = package; import d2ft_peft.schedule; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
