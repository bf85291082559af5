"""Budgets: what they allow, and that an impossible one names the nearest that is possible."""

import re

import numpy as np
import pytest

from d2ft_peft.schedule import Budget, Operation, get_policy, policy_names

from .oracle import zeros


COSTS = np.tile([0, 1 / 3, 1], (4, 1))
DEVICES = np.array([0, 0, 1, 2])


def test_compute_is_a_share_of_each_devices_own_load():
    capacities = Budget(compute=0.6).capacities(COSTS, np.full(5, 2.0), DEVICES)
    np.testing.assert_allclose(capacities, [12, 6, 6])


def test_a_tuple_gives_each_device_its_own_share():
    capacities = Budget(compute=(1, 0.5, 0.01)).capacities(COSTS, np.ones(5), DEVICES)
    np.testing.assert_allclose(capacities, [10, 2.5, 0.05])


def test_counts_become_capacities():
    capacities = Budget(num_full=3, num_forward_only=1).capacities(COSTS, np.full(5, 2.0), DEVICES)
    np.testing.assert_allclose(capacities, np.array([2, 1, 1]) * 2 * (3 + 1 / 3))


def test_communication_is_a_share_of_each_devices_cells():
    budget = Budget(communication=0.5)
    np.testing.assert_allclose(budget.communication_capacities(np.array([1.0, 3.0]), DEVICES), [4, 2, 2])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "a budget has 0 limits .none.; give exactly one of compute_budget, communication_budget"),
        ({"compute": 0.5, "communication": 0.5}, "a budget has 2 limits .compute, communication."),
        ({"compute": 1.5}, r"compute_budget=1.5 must be in \(0, 1\]; the nearest possible is 1"),
        ({"compute": 0}, r"compute_budget=0 must be in \(0, 1\].* the nearest possible is one FULL micro-batch"),
        ({"compute": float("nan")}, r"compute_budget=nan must be a number in \(0, 1\]"),
        ({"compute": True}, "compute_budget=True must be a number"),
        ({"compute": "60%"}, "compute_budget='60%' must be a number"),
        ({"compute": (0.5, 2)}, r"device_capacities\[1\]=2 must be in \(0, 1\]"),
        ({"communication": -0.1}, r"communication_budget=-0.1 must be in \(0, 1\]"),
        ({"num_full": 0}, "num_full=0 must be at least 1.*the nearest possible is 1"),
        ({"num_full": 1.5}, "num_full=1.5 must be a whole number"),
        (
            {"num_full": 2, "num_forward_only": -1},
            "num_forward_only=-1 must not be negative; the nearest .* is 0",
        ),
        ({"compute": 0.5, "num_forward_only": 1}, "num_forward_only=1 needs num_full"),
    ],
)
def test_values_out_of_range_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Budget(**fields)


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        (5, {"compute": 0.1}, r"compute_budget=0.1 with 5 .* the nearest possible is 0.2 \(1 FULL of 5\)"),
        (5, {"compute": 0.19}, r"no FULL cell fits, so nothing would train; the nearest possible is 0.2"),
        (4, {"communication": 0.2}, r"communication_budget=0.2 .* the nearest possible is 0.25 \(1 FULL of 4\)"),
        (5, {"num_full": 4, "num_forward_only": 3}, "nearest possible is num_full=4 and num_forward_only=1"),
        (
            5,
            {"num_full": 7},
            "num_full=7 .* exceed the 5 .*; the nearest .* is num_full=5 and num_forward_only=0",
        ),
        (5, {"compute": (0.1, 0.15, 0.1)}, r"no FULL cell fits on any device.*raises device_capacities\[1\] to 0.2"),
        (5, {"compute": (0.5, 0.5)}, "device_capacities has 2 entries, but subnets are placed on 3 devices"),
    ],
)
def test_impossible_budgets_name_the_nearest_possible(rows, fields, message):
    with pytest.raises(ValueError, match=message):
        zeros(rows, 3, Budget(**fields))


@pytest.mark.parametrize("rows", [3, 5, 6, 7, 11, 97])
@pytest.mark.parametrize("kind", ["compute", "communication"])
def test_the_nearest_possible_budget_is_possible(rows, kind):
    with pytest.raises(ValueError, match="nearest possible is") as caught:
        zeros(rows, 3, Budget(**{kind: 1e-3}))
    nearest = named_by(caught.value)
    assert nearest == pytest.approx(1 / rows, rel=2e-3)
    for name in policy_names():
        problem = zeros(rows, 3, Budget(**{kind: nearest}), rng=np.random.default_rng(0))
        try:
            schedule = get_policy(name)(problem)
        except ValueError as error:  # a policy that runs everything forward needs more, and says how much
            assert named_by(error) > nearest
            problem = zeros(rows, 3, Budget(**{kind: named_by(error)}), rng=np.random.default_rng(0))
            schedule = get_policy(name)(problem)
        assert schedule.counts[Operation.FULL] >= 1


def named_by(error):
    return float(re.search(r"nearest possible is ([\d.e-]+)", str(error)).group(1))


def test_the_lightest_micro_batch_and_the_least_fitting_device_decide_what_is_possible():
    weights, devices = [1, 4, 5], [0, 1, 1]
    zeros(3, 3, Budget(compute=0.1), weights=weights, devices=devices)
    with pytest.raises(ValueError, match="nearest possible is 0.1$"):
        zeros(3, 3, Budget(compute=0.09), weights=weights, devices=devices)


def test_a_slow_device_may_stay_idle_only_if_it_has_its_own_share():
    schedule = get_policy("bilevel")(zeros(5, 2, Budget(compute=(0.6, 0.1))))
    assert schedule.operations.T.tolist() == [[2, 2, 2, 0, 0], [1, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="compute_budget=0.1"):
        zeros(5, 2, Budget(compute=0.1))


def test_counts_of_unequal_micro_batches_bind_counts_not_loads():
    budget = Budget(num_full=1)
    mean = budget.capacities(COSTS, np.array([1.5, 1.5]), DEVICES)
    np.testing.assert_allclose(budget.capacities(COSTS, np.array([1.0, 2.0]), DEVICES), mean)
    assert get_policy("bilevel")(zeros(2, 4, budget, weights=[1, 2])).capacities is None


def test_each_kind_of_budget_answers_only_its_own_question():
    with pytest.raises(ValueError, match="communication_budget=0.5 sets no compute capacity"):
        Budget(communication=0.5).capacities(COSTS, np.ones(5), DEVICES)
    with pytest.raises(ValueError, match="does not limit communication"):
        Budget(compute=0.5).communication_capacities(np.ones(5), DEVICES)


@pytest.mark.parametrize(
    "budget, expected",
    [
        (Budget(compute=0.6), [1.0, 1.0, 2 / 3, 3 / 4]),
        (Budget(compute=(0.5, 0.1)), [1.0, 1 / 2, 1 / 3, 2 / 4]),
        (Budget(communication=0.2), [1.0, 1 / 2, 1 / 3, 1 / 4]),
        (Budget(num_full=3), [1.0, 1.0, 2 / 3, 3 / 4]),
        (Budget(num_full=2, num_forward_only=2), [1.0, 1.0, 2 / 3, 3 / 4]),
    ],
)
def test_the_rest_of_an_epoch_is_worth_no_less(budget, expected):
    """Whole FULL micro-batches; 2 FULL and 2 FORWARD_ONLY of 5 at half the cost are 0.6."""
    assert [budget.of_rest(n, 5, 0.5).compute for n in (1, 2, 3, 4)] == pytest.approx(expected)


def test_samples_get_their_nearest_whole_number():
    assert [Budget(compute=0.6).of_samples(n, 5).compute * n for n in (1, 2, 4, 80)] == pytest.approx([1, 1, 2, 48])
    assert Budget(num_full=2).of_samples(10, 5) == Budget(compute=0.4)
    assert Budget(communication=0.6).of_samples(10, 5) == Budget(communication=0.6)
    assert Budget(compute=(0.3, 0.6)).of_samples(10, 5) == Budget(compute=(0.3, 0.6))
