"""Many subnets at a time: what settles them sooner than a table of dynamic programming gives up no worth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import Budget, Problem, get_policy, knapsack, objective, proven
from d2ft_peft.schedule.counting import choose_by_counts
from d2ft_peft.schedule.policies.joint import WITHIN

from .oracle import assignments, deterministic
from .test_knapsack import instances


def worth_of(worth, chosen):
    return np.take_along_axis(worth, chosen[:, :, None].astype(int), axis=2).sum(axis=(1, 2))


@deterministic
@given(instances(max_items=12, max_options=4), st.integers(0, 10_000), st.sampled_from([4, 60, 100_000]))
def test_what_is_proven_is_the_optimum(instance, seed, combinations):
    """Also where only a few moves of one or two items are tried."""
    values, units, limit = instance
    rng = np.random.default_rng(seed)
    worth = np.stack([rng.permutation(values) for _ in range(5)]).astype(np.int64) * 1000
    worth[rng.random(worth.shape) < 0.1] = -(1 << 62)
    worth[:, :, 0] = 0
    limits = rng.integers(0, limit + 1, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proven, "_COMBINATIONS", combinations)
        chosen, is_proven = proven.choose_proven(worth, units, limits)
    assert (units[np.arange(len(units)), chosen].sum(axis=1) <= limits).all()
    best = worth_of(worth, knapsack.dynamic_programme(worth, units, limits))
    assert (worth_of(worth, chosen)[is_proven] == best[is_proven]).all()
    assert (worth_of(worth, chosen) <= best).all()
    if combinations > 4**12 or combinations >= 4 ** len(units) * 5:
        assert is_proven.all()


@deterministic
@given(instances(max_items=12), st.integers(0, 10_000))
def test_what_is_proven_within_a_share_misses_no_more(instance, seed):
    values, units, limit = instance
    worth = np.stack([np.random.default_rng(seed + d).permutation(values) for d in range(5)]).astype(np.int64)
    limits = np.full(5, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proven, "_COMBINATIONS", 4)
        chosen, is_proven = proven.choose_proven(worth, units, limits, within=0.1)
    best = worth_of(worth, knapsack.dynamic_programme(worth, units, limits))
    assert (worth_of(worth, chosen)[is_proven] >= 0.9 * best[is_proven]).all()


def test_most_large_knapsacks_of_one_kind_are_proven():
    rng = np.random.default_rng(0)
    worth = knapsack.integer_values(np.stack([np.zeros((50, 64)), rng.random((50, 64))], axis=2))
    units = np.column_stack([np.zeros(64, dtype=np.int64), rng.integers(1, 9, 64)])
    assert proven.choose_proven(worth, units, np.full(50, 180))[1].mean() > 0.9


@deterministic
@given(st.integers(1, 5), st.integers(0, 10_000), st.sampled_from([1, 3, 1000]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_counts_match_brute_force(n, seed, levels, cost):
    rng = np.random.default_rng(seed)
    worth = np.cumsum(rng.integers(0, levels, (3, n, 3)), axis=2) * [0, 1, 1]
    costs, capacities = np.array([0.0, cost, 1.0]), rng.uniform(0, n, 3)
    chosen = choose_by_counts(worth, *knapsack._counts(costs, capacities, n))
    every = assignments(n)
    for device, capacity in enumerate(capacities):
        values = worth[device][np.arange(n), every].sum(axis=1)
        best = values[costs[every].sum(axis=1) <= capacity * (1 + 1e-12)].max()
        assert costs[chosen[device]].sum() <= capacity * (1 + 1e-9)
        assert worth[device][np.arange(n), chosen[device]].sum() == best


def large(name, seed=0, **fields):
    rng = np.random.default_rng(seed)
    scores = {"forward_scores": rng.random((24, 12)), "backward_scores": rng.random((24, 12))} | fields
    weights = rng.integers(1, 9, 24).astype(float) if name == "unequal" else np.ones(24)
    return Problem(**scores, budget=Budget(compute=0.63), weights=weights, costs=np.tile([0, 0.3661, 1], (12, 1)))


@pytest.mark.parametrize("sizes", ["equal", "unequal"])
@pytest.mark.parametrize("policy", ["bilevel", "joint"])
def test_large_problems_are_worth_what_the_table_finds(monkeypatch, policy, sizes):
    problem = large(sizes)
    by_table = get_policy(policy)(problem)
    monkeypatch.setattr(knapsack, "_FEW_TABLE_STEPS", 0)
    schedule = get_policy(policy)(problem)

    def full_worth(schedule):
        return np.where(schedule.operations == 2, problem.backward_scores, 0).sum(axis=0)

    if policy == "bilevel":
        np.testing.assert_allclose(full_worth(schedule), full_worth(by_table))
    elif sizes == "equal":  # the table rounds costs up, counts need not
        assert objective(problem, schedule) >= objective(problem, by_table) * (1 - 1e-12)
    else:
        assert objective(problem, schedule) >= objective(problem, by_table) * (1 - WITHIN)


@pytest.mark.parametrize("policy", ["bilevel", "joint", "depth"])
def test_scores_that_do_not_depend_on_the_sample_align_the_devices_of_large_problems(monkeypatch, policy):
    monkeypatch.setattr(knapsack, "_FEW_TABLE_STEPS", 0)
    magnitude = np.tile(np.random.default_rng(0).random(12), (24, 1))
    for sizes in ("equal", "unequal"):
        problem = large(sizes, forward_scores=np.zeros((24, 12)), backward_scores=magnitude)
        assert get_policy(policy)(problem).alignment == 1.0


def test_devices_that_are_alike_are_solved_once(monkeypatch):
    solved = []
    original = knapsack._solve

    def note(values, *args):
        solved.append(len(values))
        return original(values, *args)

    monkeypatch.setattr(knapsack, "_solve", note)
    magnitude = np.tile(np.random.default_rng(0).random(12), (24, 1))
    get_policy("bilevel")(large("unequal", forward_scores=magnitude, backward_scores=magnitude))
    assert set(solved) == {1}


@pytest.mark.parametrize("policy", ["bilevel", "joint", "depth", "moe", "importance", "selective_backprop", "drop_bp"])
def test_the_largest_scores_that_float32_holds_are_scores(policy):
    scores = np.full((5, 4), np.finfo(np.float32).max, dtype=np.float32)
    scores[3] /= 2
    problem = Problem(
        scores, scores, Budget(compute=0.8), blocks=np.arange(4), rng=np.random.default_rng(0), devices=np.zeros(4, int)
    )
    schedule = get_policy(policy)(problem)
    assert 0 < schedule.compute_ratio <= 0.8 + 1e-9
    assert problem.preference.tolist() == [0, 1, 2, 4, 3]


def test_sizes_without_a_common_unit_give_up_next_to_nothing():
    """One device with two thousand cells whose costs are rounded, against the bound that any price gives."""
    rng = np.random.default_rng(0)
    scores, weights = rng.random((200, 10)), 0.5 + rng.random(200)
    fields = {"weights": weights, "devices": np.zeros(10, dtype=int)}
    problem = Problem(np.zeros((200, 10)), scores, Budget(compute=0.63), **fields)
    bound = min(
        price * problem.limits[0] + np.maximum(0, scores - price * weights[:, None]).sum()
        for price in np.linspace(0.2, 0.6, 201)
    )
    worth = np.where(get_policy("bilevel")(problem).operations == 2, scores, 0).sum()
    assert bound * (1 - 2e-3) < worth <= bound
