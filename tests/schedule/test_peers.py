"""Policies of other papers within our budgets: dynamic_pruning, moe, drop_bp, stochastic_depth, lisa."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import Budget, Operation, Problem, get_policy
from d2ft_peft.schedule.policies.stochastic_depth import skip_chances

from .oracle import deterministic, problems, solve, zeros


SHORTCUT, FORWARD_ONLY, FULL = Operation
POOLED = ["dynamic_pruning", "drop_bp", "stochastic_depth", "lisa"]
DRAWS = ["drop_bp", "stochastic_depth"]
NO_FORWARD_ONLY = ["dynamic_pruning", "moe", "stochastic_depth"]
KINDS = ("compute", "communication", "counts")
BY_BLOCK = np.repeat(np.arange(4), 3)


def operations(name, *args, **fields):
    return get_policy(name)(Problem(*args, **fields)).operations


def one_operation_per_block(schedule):
    """Asserts that each row is the same within a block; returns it per block, [N, B]."""
    _, first, block = np.unique(schedule.blocks, return_index=True, return_inverse=True)
    per_block = schedule.operations[:, first]
    assert (schedule.operations == per_block[:, block]).all()
    return per_block


def left(problem, schedule):
    """What the budget of one machine still allows, and the limited costs of all cells [N, K, 3]."""
    costs = problem.weights[:, None, None] * problem.limited_costs
    used = np.take_along_axis(costs, schedule.operations[:, :, None].astype(int), axis=2)
    return problem.pooled().limits[0] - used.sum(), costs


def assert_no_other_block_fits(problem, schedule, per_block, rest):
    """No block of a micro-batch that does `rest` could still be FULL within the budget of one machine."""
    room, costs = left(problem, schedule)
    for place, block in enumerate(np.unique(problem.blocks)):
        raised = (costs[:, :, FULL] - costs[:, :, rest])[:, problem.blocks == block].sum(axis=1)
        assert (raised[per_block[:, place] == rest] > room * (1 - 1e-9) - 1e-9).all()


# What holds for all of them.


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", POOLED)
@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=KINDS))
def test_one_machine_stays_within_the_total_budget(name, problem):
    schedule = solve(name, problem)
    assert not schedule.devices.any()
    room, _ = left(problem, schedule)
    assert room >= -1e-9 * problem.limits.sum()
    assert (schedule.operations == FULL).any()


@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=KINDS))
def test_moe_keeps_every_device_within_its_limit(problem):
    schedule = solve("moe", problem)
    full = schedule.operations == FULL
    if problem.budget.counts is not None:
        assert (full.sum(axis=0) <= problem.budget.num_full).all()
    else:
        used = np.bincount(problem.devices, (problem.weights @ full) * problem.limited_costs[:, FULL])
        assert (used <= problem.limits * (1 + 1e-9)).all()
    assert (schedule.devices == problem.devices).all()
    assert full.any() and (full | (schedule.operations == SHORTCUT)).all()


@pytest.mark.parametrize("name", DRAWS)
def test_policies_that_draw_need_an_rng_and_repeat_with_its_seed(name):
    problem = zeros(8, 12, Budget(compute=0.6), blocks=BY_BLOCK)
    with pytest.raises(ValueError, match=f"rng=None: the {name} policy needs a source of randomness; give np.random"):
        get_policy(name)(problem)
    first, again, other = (get_policy(name)(replace(problem, rng=np.random.default_rng(seed))) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("name", ["dynamic_pruning", "moe", "lisa"])
def test_the_others_need_no_rng(name):
    problem = zeros(8, 12, Budget(compute=0.6), blocks=BY_BLOCK)
    assert get_policy(name)(problem) == get_policy(name)(problem)


@pytest.mark.parametrize("name", NO_FORWARD_ONLY)
def test_without_forward_only_cells_they_cannot_be_counted(name):
    problem = zeros(5, 12, Budget(num_full=2, num_forward_only=1), blocks=BY_BLOCK, rng=np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"num_forward_only=1: every cell of the {name} policy.* num_forward_only=0"):
        get_policy(name)(problem)


@pytest.mark.parametrize("name", ["dynamic_pruning", "moe", "drop_bp", "stochastic_depth", "lisa"])
def test_a_budget_of_everything_is_plain_fine_tuning(name):
    for budget in (Budget(compute=1.0), Budget(communication=1.0), Budget(num_full=3), Budget(compute=(1.0,) * 12)):
        problem = zeros(3, 12, budget, weights=[1, 2, 3], blocks=BY_BLOCK, rng=np.random.default_rng(0))
        assert (get_policy(name)(problem).operations == FULL).all()


@pytest.mark.parametrize("name", POOLED)
@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=("compute", "communication")), share=st.floats(0.01, 0.5))
def test_the_nearest_possible_budget_is_possible(name, problem, share):
    kind = "compute" if problem.budget.compute else "communication"
    problem = replace(problem, devices=np.zeros(problem.num_subnets, dtype=int))
    cell = problem.weights.min() * problem.limited_costs[:, FULL].min()
    cell /= problem.weights.sum() * problem.limited_costs[:, FULL].sum()
    problem = replace(problem, budget=Budget(**{kind: max(share, cell)}))
    try:
        get_policy(name)(problem)
    except ValueError as error:
        nearest = float(str(error).split("nearest possible is ")[1].split(" ")[0])
        assert nearest > share
        get_policy(name)(replace(problem, budget=Budget(**{kind: nearest})))


# Errors name what does not fit and the nearest possible budget.


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [
        ("dynamic_pruning", 0.05, "no subnet that is FULL for all micro-batches fits.* nearest possible is 0.0834$"),
        ("stochastic_depth", 0.04, "no FULL block of a micro-batch fits.* nearest possible is 0.05$"),
        # FORWARD_ONLY everywhere is 1/3; one block for one of 5 micro-batches raises it by 2/3 of 1/20, for all by 1/6.
        ("drop_bp", 0.36, "no FULL block of a micro-batch beside FORWARD_ONLY everywhere else.* is 0.367$"),
        ("lisa", 0.45, "no FULL block beside FORWARD_ONLY everywhere else.* is 0.5$"),
    ],
)
def test_a_share_that_is_too_small(name, share, message):
    fields = {"blocks": BY_BLOCK, "devices": np.zeros(12, dtype=int), "rng": np.random.default_rng(0)}
    with pytest.raises(ValueError, match=f"compute_budget={share} with 5 micro-batches: {message}"):
        get_policy(name)(zeros(5, 12, Budget(compute=share), **fields))


@pytest.mark.parametrize(
    ("name", "counts", "nearest"),
    [
        ("dynamic_pruning", (1, 0), (2, 0)),
        ("drop_bp", (1, 0), (1, 4)),
        ("lisa", (1, 2), (2, 3)),
    ],
)
def test_counts_that_are_too_small(name, counts, nearest):
    problem = zeros(5, 4, Budget(num_full=counts[0], num_forward_only=counts[1]), blocks=[0, 0, 1, 2])
    # Each subnet of dynamic_pruning and each block of lisa is too dear for 1 of 5.
    costs = np.tile([0, 1 / 3, 1], (4, 1)) * [[1], [1], [2], [2]]
    problem = replace(problem, costs=costs, rng=np.random.default_rng(0))
    full, forward_only = counts
    message = f"num_full={full} and num_forward_only={forward_only} with 5 micro-batches: no .* fits.* "
    message += f"nearest possible is num_full={nearest[0]} and num_forward_only={nearest[1]}$"
    if name == "dynamic_pruning":
        problem = replace(problem, costs=np.tile([0, 1 / 3, 1], (4, 1)))
    with pytest.raises(ValueError, match=message):
        get_policy(name)(problem)
    get_policy(name)(replace(problem, budget=Budget(num_full=nearest[0], num_forward_only=nearest[1])))


def test_moe_needs_room_for_one_micro_batch_in_a_subnet():
    with pytest.raises(ValueError, match=r"compute_budget=0.1 .* no FULL micro-batch of any subnet fits.* 0.2 "):
        get_policy("moe")(zeros(5, 4, Budget(compute=0.1), devices=np.zeros(4, dtype=int)))


# dynamic_pruning


def test_pruning_keeps_the_strongest_subnets_for_all_micro_batches():
    backward = np.tile([1.0, 9, 3, 2, 8], (5, 1))
    assert (
        operations("dynamic_pruning", np.zeros((5, 5)), backward, Budget(compute=0.6)).tolist() == [[0, 2, 2, 0, 2]] * 5
    )


def test_pruning_passes_over_a_subnet_that_does_not_fit():
    backward = np.tile([3.0, 2, 1], (2, 1))
    costs = np.array([[0, 1, 2], [0, 2, 4], [0, 1, 2]])
    assert (
        operations("dynamic_pruning", backward, backward, Budget(compute=0.5), costs=costs).tolist() == [[2, 0, 2]] * 2
    )


def test_pruning_weighs_the_scores_of_samples_by_the_size_of_their_micro_batch():
    backward = [[3.0, 0], [0, 1]]
    fields = {"devices": [0, 0], "weights": [1.0, 4]}
    assert (
        operations("dynamic_pruning", np.zeros((2, 2)), backward, Budget(compute=0.5), **fields).tolist()
        == [[0, 2]] * 2
    )


def test_counts_set_the_total_of_pruning():
    assert operations("dynamic_pruning", *np.ones((2, 5, 10)), Budget(num_full=3)).tolist() == [[2] * 6 + [0] * 4] * 5


@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=("compute", "communication")))
def test_pruning_leaves_no_subnet_that_still_fits(problem):
    schedule = solve("dynamic_pruning", problem)
    assert (schedule.operations == schedule.operations[0]).all()
    assert set(np.unique(schedule.operations)) <= {SHORTCUT, FULL}
    room, costs = left(problem, schedule)
    pruned = costs[:, schedule.operations[0] == SHORTCUT, FULL].sum(axis=0)
    assert (pruned > room * (1 - 1e-9) - 1e-9).all()


@deterministic
@given(problem=problems(max_rows=5, max_subnets=6), seed=st.integers(0, 100))
def test_pruning_holds_as_long_as_the_scores_do(problem, seed):
    schedule = solve("dynamic_pruning", problem)
    later = replace(problem, step=7, interval=3, seed=seed, forward_scores=1 - problem.forward_scores.clip(0, 1))
    assert get_policy("dynamic_pruning")(later) == schedule


# moe


def test_moe_routes_to_the_best_subnets_of_every_block():
    forward = np.array([[9.0, 1, 5, 6], [2, 8, 7, 1]])
    assert operations("moe", forward, forward, Budget(compute=0.5), blocks=[0, 0, 1, 1]).tolist() == [
        [2, 0, 0, 2],
        [0, 2, 2, 0],
    ]


def test_overflow_goes_to_the_next_best_subnet_with_room_or_is_dropped():
    # Every subnet takes one of three: all prefer the first, the lowest of them ends where there is room.
    forward = np.array([[9.0, 2, 1], [8, 3, 1], [7, 6, 5]])
    assert operations("moe", forward, forward, Budget(compute=1 / 3)).tolist() == [[2, 0, 0], [0, 0, 2], [0, 2, 0]]
    # Room for 1 of 2 in three subnets: k is 2, so the micro-batch that comes late finds one place.
    forward = np.array([[9.0, 8, 1], [7, 6, 5]])
    assert operations("moe", forward, forward, Budget(num_full=1)).tolist() == [[2, 2, 0], [0, 0, 2]]


def test_a_large_micro_batch_goes_where_it_fits():
    # Room for a weight of 3 in either subnet.
    fields = {"weights": [2.0, 3, 1]}
    forward = np.array([[9.0, 1], [8, 7], [6, 5]])
    assert operations("moe", forward, forward, Budget(compute=0.5), **fields).tolist() == [[2, 0], [0, 2], [2, 0]]


def test_moe_breaks_ties_as_the_problem_says():
    ones = np.ones((3, 2))
    fields = {"blocks": [0, 1]}
    aligned = operations("moe", ones, ones, Budget(num_full=1), **fields)
    spread = operations("moe", ones, ones, Budget(num_full=1), tie_break="spread", **fields)
    assert aligned.tolist() == [[2, 2], [0, 0], [0, 0]]
    assert spread.tolist() == [[2, 0], [0, 2], [0, 0]]


def test_devices_have_room_for_their_own_share():
    ones = np.ones((4, 2))
    schedule = get_policy("moe")(Problem(ones, ones, Budget(compute=(0.25, 0.75)), blocks=[0, 1]))
    assert ((schedule.operations == FULL).sum(axis=0) == [1, 3]).all()


@deterministic
@given(problem=problems(max_rows=7, max_subnets=6, equal_weights=True, budgets=("counts",)))
def test_no_micro_batch_and_subnet_would_both_rather_have_each_other(problem):
    problem = replace(problem, budget=Budget(num_full=problem.budget.num_full))
    full = get_policy("moe")(problem).operations == FULL
    scores, num_full = problem.forward_scores, problem.budget.num_full
    for block in np.unique(problem.blocks):
        columns = np.flatnonzero(problem.blocks == block)
        top_k = -(-num_full * len(columns) // len(full))
        assert (full[:, columns].sum(axis=1) <= top_k).all()
        for row, column in np.argwhere(~full[:, columns]):
            own, others = full[row, columns], full[:, columns[column]]
            score = scores[row, columns[column]]
            satisfied = own.sum() == top_k and scores[row, columns[own]].min() >= score
            taken = others.sum() == num_full and scores[others, columns[column]].min() >= score
            assert satisfied or taken


# drop_bp


@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=KINDS))
def test_dropbp_drops_whole_blocks_and_no_more_than_it_must(problem):
    schedule = solve("drop_bp", problem)
    per_block = one_operation_per_block(schedule)
    assert set(np.unique(per_block)) <= {FORWARD_ONLY, FULL}
    assert_no_other_block_fits(problem, schedule, per_block, FORWARD_ONLY)


def test_the_number_of_dropped_pairs_is_exact():
    # 0.6 = 1/3 + 2/3 * 0.4: of 20 pairs 8 are FULL.
    for seed in range(20):
        problem = zeros(5, 12, Budget(compute=0.6), blocks=BY_BLOCK, rng=np.random.default_rng(seed))
        schedule = get_policy("drop_bp")(problem)
        assert (one_operation_per_block(schedule) == FULL).sum() == 8
        assert schedule.compute_ratio == pytest.approx(0.6)


def full_shares(name, backward, budget, num_micro_batches=400):
    """How many of many micro-batches have each of 4 blocks FULL."""
    scores = np.tile(backward, (num_micro_batches, 1)).astype(float)
    problem = Problem(scores, scores, budget, blocks=BY_BLOCK, rng=np.random.default_rng(0))
    return (one_operation_per_block(get_policy(name)(problem)) == FULL).mean(axis=0)


def test_sensitive_blocks_are_dropped_less():
    shares = full_shares("drop_bp", np.repeat([1, 4, 2, 0], 3), Budget(compute=0.6))
    assert shares[3] == 0  # a block of no sensitivity drops first
    assert shares[0] + 0.1 < shares[2] < shares[1] - 0.1
    # Only ratios count: the moment of dropping is exponential, with rates in the ratio of 1 / sensitivity.
    larger = full_shares("drop_bp", 1000 * np.repeat([1, 4, 2, 0], 3), Budget(compute=0.6))
    assert (larger == shares).all()
    np.testing.assert_allclose(np.log(shares[:3]) / np.log(shares[1]), [4, 1, 2], rtol=0.2)


def test_the_sensitivity_of_a_block_is_the_total_of_its_subnets():
    even = full_shares("drop_bp", [6, 0, 0, 2, 2, 2, 3, 3, 0, 0, 0, 6], Budget(compute=0.6))
    assert (abs(even - 0.4) < 0.06).all()


def test_without_any_sensitivity_blocks_drop_evenly():
    shares = full_shares("drop_bp", np.zeros(12), Budget(communication=0.75))
    assert (abs(shares - 0.5) < 0.06).all()


# stochastic_depth


@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=KINDS))
def test_stochastic_depth_skips_whole_blocks_and_no_more_than_it_must(problem):
    schedule = solve("stochastic_depth", problem)
    per_block = one_operation_per_block(schedule)
    assert set(np.unique(per_block)) <= {SHORTCUT, FULL}
    assert_no_other_block_fits(problem, schedule, per_block, SHORTCUT)


def test_survival_falls_linearly_with_depth():
    # Skipped on average 0.25 = (0.1 + 0.2 + 0.3 + 0.4) / 4.
    shares = full_shares("stochastic_depth", np.zeros(12), Budget(compute=0.75), 2000)
    np.testing.assert_allclose(shares, [0.9, 0.8, 0.7, 0.6], atol=0.03)
    assert shares.mean() == pytest.approx(0.75)


def test_under_a_tight_budget_the_deepest_block_never_runs():
    shares = full_shares("stochastic_depth", np.zeros(12), Budget(compute=0.25), 2000)
    np.testing.assert_allclose(shares, [2 / 3, 1 / 3, 0, 0], atol=0.03)


@deterministic
@given(costs=st.lists(st.floats(0.1, 10), min_size=1, max_size=9), share=st.floats(0, 0.999))
def test_skip_chances_grow_linearly_up_to_certainty(costs, share):
    costs = np.array(costs)
    chances = skip_chances(costs, share)
    assert chances @ costs == pytest.approx(share * costs.sum())
    assert ((chances > 0) & (chances <= 1)).all()
    np.testing.assert_allclose(chances, np.minimum(chances[0] * np.arange(1, len(costs) + 1), 1))


# lisa


@deterministic
@given(problem=problems(max_rows=6, max_subnets=6, budgets=KINDS), seed=st.integers(0, 50))
def test_lisa_trains_whole_blocks_for_all_micro_batches(problem, seed):
    schedule = solve("lisa", replace(problem, seed=seed))
    per_block = one_operation_per_block(schedule)
    assert (per_block == per_block[0]).all()
    assert set(np.unique(per_block)) <= {FORWARD_ONLY, FULL}
    room, costs = left(problem, schedule)
    for place, block in enumerate(np.unique(problem.blocks)):
        if per_block[0, place] == FORWARD_ONLY:
            raised = (costs[:, :, FULL] - costs[:, :, FORWARD_ONLY])[:, problem.blocks == block].sum()
            assert raised > room * (1 - 1e-9) - 1e-9


def test_lisa_draws_blocks_anew_every_interval():
    rows = []
    for step in range(120):
        problem = zeros(5, 12, Budget(compute=0.75), blocks=BY_BLOCK, seed=3, step=step, interval=4)
        rows.append((one_operation_per_block(get_policy("lisa")(problem))[0] == FULL).tolist())
    assert all(sum(row) == 2 for row in rows)  # 1/3 + 2/3 * 2/4 <= 0.75
    starts = rows[::4]
    assert rows == [row for row in starts for _ in range(4)]
    assert len({tuple(row) for row in starts}) == 6  # every pair of blocks
    assert (abs(np.mean(starts, axis=0) - 0.5) < 0.2).all()


def test_lisa_draws_other_blocks_for_another_seed_and_ignores_the_rng():
    drawn = set()
    for seed in range(10):
        problem = zeros(5, 12, Budget(compute=0.5), blocks=BY_BLOCK, seed=seed)
        schedule = get_policy("lisa")(problem)
        assert get_policy("lisa")(replace(problem, rng=np.random.default_rng(seed + 5))) == schedule
        drawn.add(schedule.digest())
    assert len(drawn) > 1
