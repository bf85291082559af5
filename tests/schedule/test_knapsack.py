"""The solvers: exact against brute force, whole numbers from fractions, ties to the first items."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule import knapsack
from d2ft_peft.schedule.core import find_core

from .oracle import assignments, deterministic


def brute_force(values, costs, capacity):
    """The lexicographically highest among the most valuable choices, found by trying all; and its value."""
    options = assignments(len(costs), tuple(range(costs.shape[1])))[::-1]
    items = np.arange(len(costs))
    value = np.where(costs[items, options].sum(axis=1) <= capacity, values[items, options].sum(axis=1), -1)
    return options[np.argmax(value)], value.max()


@st.composite
def instances(draw, max_items=6, max_options=3):
    """Whole values and costs with many ties: (values [n, R], costs [n, R], capacity)."""
    items, options = draw(st.integers(1, max_items)), draw(st.integers(2, max_options))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kinds = np.cumsum(rng.integers(0, 4, (draw(st.integers(1, 3)), options)), axis=1)
    costs = kinds[rng.integers(0, len(kinds), items)] * (np.arange(options) > 0)
    values = rng.integers(0, draw(st.sampled_from([1, 3, 100])), (items, options)) * (np.arange(options) > 0)
    return values, costs, int(rng.integers(0, costs[:, -1].sum() + 2))


@deterministic
@given(instances())
def test_choose_is_the_lexicographically_first_optimum(instance):
    values, costs, capacity = instance
    chosen = knapsack.choose(values[None].astype(float), costs.astype(float), np.array([float(capacity)]))[0]
    expected, value = brute_force(values, costs, capacity)
    items = np.arange(len(costs))
    assert costs[items, chosen].sum() <= capacity
    assert values[items, chosen].sum() == value
    assert chosen.tolist() == expected.tolist()


@pytest.mark.thorough
@pytest.mark.parametrize("own_order", [False, True])
def test_devices_that_are_solved_together_are_solved_as_well_as_alone(own_order):
    """One has room to spare and the next hardly any; options that one may take, another may not; and each may have the
    items in an order of its own. Such devices differ in what of the common tables they need: many draws find that."""
    rng = np.random.default_rng(0)
    for _ in range(1500):
        devices, items, options = 2, int(rng.integers(3, 6)), int(rng.integers(2, 4))
        rise = np.arange(options) > 0
        costs = np.sort(rng.integers(0, 9, (items, options)), axis=1) * rise
        values = rng.random((devices, items, options)) * rise
        values[(rng.random(values.shape) < 0.3) & rise] = knapsack.FORBIDDEN
        of_device = np.stack([rng.permutation(costs) if own_order else costs for _ in range(devices)])
        capacities = np.floor(rng.random(devices) * costs.max(axis=1).sum())
        chosen = knapsack.choose(values, of_device.astype(float), capacities)
        for device, choice in enumerate(chosen):
            _, value = brute_force(values[device], of_device[device], capacities[device])
            assert of_device[device][np.arange(items), choice].sum() <= capacities[device]
            assert values[device][np.arange(items), choice].sum() == pytest.approx(value)


@deterministic
@given(instances(max_items=40, max_options=4), st.booleans())
def test_the_core_alone_reaches_the_optimum_of_the_whole(instance, proportional):
    values, costs, capacity = instance
    if proportional:
        # Worth follows cost closely: then many items must change together to use the last units.
        values = values % 3 * (costs > 0) + 100 * 7 * costs
        costs, capacity = 7 * costs + (costs > 3), 7 * capacity
    whole = knapsack.dynamic_programme(values[None], costs, np.array([capacity]))[0]
    by_core = knapsack._choose_in_core(values, costs, capacity, 0.0)
    items = np.arange(len(costs))
    assert costs[items, by_core].sum() <= capacity
    assert values[items, by_core].sum() == values[items, whole].sum()


def test_the_core_holds_several_items_of_one_kind():
    # One unit is left after all items of cost 5; the optimum gives one of them up for two of cost 3.
    costs = np.array([[0, 5]] * 4 + [[0, 3]] * 4)
    values = np.array([[0, 5000]] * 4 + [[0, 2997]] * 4)
    assert knapsack._choose_in_core(values, costs, 21, 0.0)[4:].sum() == 2


def test_the_core_of_a_large_problem_is_small():
    rng = np.random.default_rng(0)
    values = np.sort(rng.integers(0, 10**6, (100_000, 3)), axis=1) * [0, 1, 1]
    core = find_core(values, np.tile([0, 1, 3], (100_000, 1)), 180_001)
    assert len(core.items) <= 36


def test_costs_rounded_up_leave_room_that_is_used():
    rng = np.random.default_rng(0)
    costs = np.column_stack([np.zeros(9), 0.3 + rng.random(9), 2 + rng.random(9)])
    values = np.tile([0.0, 1, 2], (1, 9, 1))
    assert (knapsack.choose(values, costs, np.array([costs[:, 2].sum()])) == 2).all()


def test_many_devices_solve_as_they_would_alone():
    rng = np.random.default_rng(0)
    costs = np.column_stack([np.zeros(6), rng.integers(1, 4, 6), rng.integers(4, 8, 6)])
    values = rng.random((5, 6, 3)) * [0, 1, 1]
    capacities = np.array([0.0, 3, 9, 20, 100])
    together = knapsack.choose(values, costs, capacities)
    for device, capacity in enumerate(capacities):
        alone = knapsack.choose(values[device : device + 1], costs, np.array([capacity]))
        assert together[device].tolist() == alone[0].tolist()


@pytest.mark.parametrize("limit", ["_MAX_TABLE_BYTES", "_MAX_TABLE_STEPS", "_MAX_TABLE_ITEMS"])
def test_chunks_and_cores_change_no_value(monkeypatch, limit):
    rng = np.random.default_rng(1)
    costs = np.column_stack([np.zeros(12), rng.integers(1, 4, 12), rng.integers(4, 8, 12)])
    values, capacities = np.sort(rng.random((7, 12, 3)), axis=2) * [0, 1, 1], rng.integers(0, 50, 7).astype(float)

    def solved():
        chosen = knapsack.choose(values, costs, capacities)
        return np.take_along_axis(values, chosen[:, :, None].astype(int), axis=2).sum(axis=(1, 2))

    expected = solved()
    monkeypatch.setattr(knapsack, limit, 1)
    np.testing.assert_allclose(solved(), expected)


@pytest.mark.parametrize(
    ("costs", "expected"),
    [
        ([1 / 3, 1], [1, 3]),
        ([0.5, 1], [1, 2]),
        ([0.4, 1], [2, 5]),
        ([8, 16, 24], [1, 2, 3]),
        ([0, 7], [0, 1]),
        ([0.7 * 3, 0.7 * 5], [3, 5]),
        ([0, 0], [0, 0]),
    ],
)
def test_rational_costs_become_their_smallest_whole_multiples(costs, expected):
    whole, unit = knapsack.integer_costs(np.array(costs, dtype=float), 10.0, 4096)
    assert whole.tolist() == expected
    np.testing.assert_allclose(whole * unit, costs)


def test_other_costs_are_rounded_up_a_little_and_the_largest_not_at_all():
    costs = np.array([np.pi, np.e, np.sqrt(2), 0.1234567])
    whole, unit = knapsack.integer_costs(costs, 30.0, 4096)
    assert (whole * unit >= costs * (1 - 1e-9)).all()
    assert whole[0] * unit == pytest.approx(np.pi, rel=1e-12)
    assert (whole * unit <= costs * 1.01).all()


def test_values_become_integers_without_loss_of_order_or_overflow():
    values = np.array([[[0, 1e300], [0, 1.0], [0, knapsack.FORBIDDEN]], [[0, 3e-200], [0, 1e-200], [0, 2e-200]]])
    whole = knapsack.integer_values(values)
    assert whole[1, :, 1].argsort().tolist() == [1, 2, 0]
    assert whole[:, :, 1].max(axis=1).min() > 0
    assert whole.max(axis=2).sum(axis=1).max() < 2**62
    assert whole[0, 2, 1] < -(2**61)


def test_equal_costs_take_the_best_and_leave_ties_to_the_first():
    values = np.array([[1.0, 3, 3, 2, 3], [0, 0, 0, 0, 0]])
    assert knapsack.top(values, [2, 3]).astype(int).tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 0, 0]]


def test_forbidden_items_are_never_taken():
    values = np.array([[1.0, knapsack.FORBIDDEN, 2]])
    assert knapsack.top(values, [3]).tolist() == [[True, False, True]]
    options = np.stack([np.zeros_like(values), values], axis=2)
    costs = np.array([[0, 1.0], [0, 2], [0, 3]])
    assert knapsack.choose(options, costs, np.array([6.0])).tolist() == [[1, 0, 1]]


def test_capacities_that_rounding_made_a_hair_too_small_still_fit():
    values = np.zeros((1, 3, 2))
    costs = np.array([[0, 0.1]] * 3)
    assert knapsack.choose(values, costs, np.array([0.3 - 1e-16])).sum() == 3
    assert knapsack.choose(values, costs * [[1], [2], [1]], np.array([0.4 - 1e-16])).sum() == 3
