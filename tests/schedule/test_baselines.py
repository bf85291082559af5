"""Policies that ignore scores, and the registry of all of them."""

import numpy as np
import pytest
from hypothesis import given

from d2ft_peft.schedule import Budget, Operation, get_policy, policy_facts, policy_names, register_policy
from d2ft_peft.schedule.policies import registry

from .oracle import deterministic, problems, zeros


def test_the_policies_that_come_with_the_package():
    assert {"all_full", "bilevel", "depth", "joint", "random", "round_robin"} <= set(policy_names())


def test_unknown_policies_list_the_known():
    with pytest.raises(ValueError, match="policy='best' is unknown; choose one of .*'bilevel', 'depth'"):
        get_policy("best")


def test_a_policy_can_be_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))

    @register_policy("mine")
    def mine(problem):
        return problem.schedule(np.zeros((2, 2), dtype=int))

    assert get_policy("mine") is mine
    with pytest.raises(ValueError, match="policy='mine' is already registered"):
        register_policy("mine")(mine)


def test_a_policy_says_which_scores_it_reads(monkeypatch):
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    monkeypatch.setattr(registry, "_FACTS", dict(registry._FACTS))
    register_policy("blind")(get_policy("all_full"))
    register_policy("reader", reads=("backward",))(get_policy("all_full"))
    assert policy_facts("blind").reads == () and policy_facts("reader").reads == ("backward",)
    assert policy_facts("bilevel").reads == ("backward", "forward")
    with pytest.raises(ValueError, match=r"reads=\('fisher',\) must name"):
        register_policy("other", reads=("fisher",))


def test_all_full_ignores_the_budget():
    schedule = get_policy("all_full")(zeros(5, 3, Budget(compute=0.2), weights=[1, 2, 3, 4, 5]))
    assert schedule.compute_ratio == 1
    assert schedule.capacities is None
    assert schedule.weights.tolist() == [1, 2, 3, 4, 5]


def test_round_robin_starts_each_subnet_at_its_own_offset():
    expected = [[2, 2, 1, 0], [2, 1, 0, 0], [1, 0, 0, 2], [0, 0, 2, 2], [0, 2, 2, 1]]
    for budget in (Budget(num_full=2, num_forward_only=1), Budget(compute=(2 + 1 / 3) / 5)):
        schedule = get_policy("round_robin")(zeros(5, 4, budget))
        assert schedule.operations.tolist() == [list(row) for row in expected]
        assert schedule.workload_variance == 0.0


def test_round_robin_on_one_device_still_balances_subnets():
    schedule = get_policy("round_robin")(zeros(5, 4, Budget(compute=0.6), devices=np.zeros(4, dtype=int)))
    assert ((schedule.operations == Operation.FULL).sum(axis=0) == 3).all()


def test_round_robin_needs_a_whole_micro_batch_per_subnet():
    with pytest.raises(ValueError, match=r"compute_budget=0.1 .* no FULL micro-batch of any subnet fits.* 0.2 "):
        get_policy("round_robin")(zeros(5, 4, Budget(compute=0.1), devices=np.zeros(4, dtype=int)))


def test_random_needs_an_rng():
    with pytest.raises(ValueError, match="rng=None: the random policy needs a source of randomness"):
        get_policy("random")(zeros(5, 4, Budget(compute=0.6)))


def test_random_draws_each_subnet_independently():
    schedule = get_policy("random")(zeros(5, 200, Budget(compute=0.6), rng=np.random.default_rng(0)))
    assert schedule.workload_variance == 0
    assert schedule.alignment < 0.6
    shares = (schedule.operations == Operation.FULL).mean(axis=1)
    assert (abs(shares - 0.6) < 0.15).all()


@deterministic
@given(problems())
def test_random_leaves_no_room_for_another_cell(problem):
    schedule = get_policy("random")(problem)
    cell_costs = problem.weights[:, None, None] * problem.limited_costs
    cells = np.take_along_axis(cell_costs, schedule.operations[:, :, None].astype(int), axis=2)[:, :, 0]
    left = problem.limits - np.bincount(problem.devices, cells.sum(axis=0))
    idle = schedule.operations == Operation.SHORTCUT
    needed = np.where(idle, cell_costs[:, :, Operation.FORWARD_ONLY], np.inf)
    assert (needed > left[problem.devices] * (1 - 1e-9) - 1e-9).all()
