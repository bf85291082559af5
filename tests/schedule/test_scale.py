"""Problems between brute force and a large model: exact where sizes are whole numbers, and no work done twice."""

import numpy as np
import pytest

from d2ft_peft.schedule import Budget, Operation, Problem, get_policy, knapsack


def best_by_sums(items, capacity):
    """The most that one option (cost, worth) of each item is worth within `capacity`; over all sums that there are."""
    best = {0: 0}
    for options in items:
        reached = {}
        for spent, gained in best.items():
            for cost, worth in [(0, 0), *options]:
                if spent + cost <= capacity:
                    reached[spent + cost] = max(reached.get(spent + cost, -1), gained + worth)
        best = reached
    return max(best.values())


def whole_problem(rows, subnets, scores, tie_break="aligned", **fields):
    """Whole sizes and scores; FORWARD_ONLY costs a third of FULL."""
    rng = np.random.default_rng(rows)
    forward = rng.integers(0, 1000, (rows, subnets))
    backward = rng.integers(1, 1000, (rows, subnets))
    if scores == "of subnets":
        backward = np.tile(backward[0], (rows, 1))
    weights = rng.integers(1, 9, rows).astype(float)
    budget = fields.pop("budget", Budget(compute=0.63))
    return Problem(forward, backward, budget, weights=weights, tie_break=tie_break, **fields)


@pytest.fixture(params=["table", "large"])
def path(request, monkeypatch):
    """Small problems as they are, and as if they were too large for a table."""
    if request.param == "large":
        monkeypatch.setattr(knapsack, "_FEW_TABLE_STEPS", 0)
        monkeypatch.setattr(knapsack, "_MAX_TABLE_STEPS", 0)


@pytest.mark.quick(8)
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("tie_break", ["aligned", "spread"])
@pytest.mark.parametrize("scores", ["of samples", "of subnets"])
@pytest.mark.parametrize("rows", [20, 31, 40])
def test_both_levels_of_bilevel_are_exact(rows, scores, tie_break):
    problem = whole_problem(rows, 6, scores, tie_break, devices=[0, 1, 2, 3, 3, 4])
    schedule = get_policy("bilevel")(problem)
    for device in range(5):
        own = problem.devices == device
        sizes = np.repeat(problem.weights[:, None], own.sum(), axis=1).ravel().astype(int)
        full = (schedule.operations[:, own] == Operation.FULL).ravel()
        forward_only = (schedule.operations[:, own] == Operation.FORWARD_ONLY).ravel()
        backward, forward = (table[:, own].ravel() for table in (problem.backward_scores, problem.forward_scores))
        thirds = int(3 * problem.limits[device] + 1e-6)
        items = [[(3 * size, worth)] for size, worth in zip(sizes, backward, strict=True)]
        assert backward[full].sum() == best_by_sums(items, thirds)
        rest = [[(size, worth)] for size, worth in zip(sizes[~full], forward[~full], strict=True)]
        assert forward[forward_only].sum() == best_by_sums(rest, thirds - 3 * sizes[full].sum())


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("scores", ["of samples", "of subnets"])
@pytest.mark.parametrize("rows", [20, 31])
def test_depth_is_exact(rows, scores):
    problem = whole_problem(rows, 12, scores, blocks=np.repeat(np.arange(6), 2))
    schedule = get_policy("depth")(problem)
    items = []
    for size, forward, backward in zip(problem.weights, problem.forward_scores, problem.backward_scores, strict=True):
        depths = [slice(12 - 2 * depth, None) for depth in range(1, 7)]
        costs = [int(size) * (12 + 2 * 2 * depth) for depth in range(1, 7)]
        items.append([(cost, forward.sum() + backward[top].sum()) for cost, top in zip(costs, depths, strict=True)])
    worth = (problem.forward_scores * (schedule.operations > 0)).sum()
    worth += (problem.backward_scores * (schedule.operations == Operation.FULL)).sum()
    assert worth == best_by_sums(items, int(3 * problem.limits.sum() + 1e-6))


@pytest.mark.quick(4)
@pytest.mark.usefixtures("path")
@pytest.mark.parametrize("policy", ["bilevel", "joint", "depth"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.63])
@pytest.mark.parametrize("seed", range(3))
def test_rounded_costs_never_exceed_a_capacity(policy, share, seed):
    rng = np.random.default_rng(seed)
    costs = np.column_stack([np.zeros(9), 0.3 + 0.2 * rng.random(9), 1 + rng.random(9)])
    problem = Problem(
        *rng.random((2, 30, 9)),
        Budget(compute=share),
        costs=costs,
        weights=0.5 + rng.random(30),
        devices=[0, 0, 1, 2, 3, 4, 5, 5, 5],
        blocks=np.arange(9),
    )
    schedule = get_policy(policy)(problem)
    limits = problem.limits if policy != "depth" else problem.limits.sum()
    assert (schedule.loads <= limits * (1 + 1e-9)).all()
    assert schedule.loads.sum() > 0.9 * problem.limits.sum()


@pytest.fixture
def work(monkeypatch):
    """Notes how many knapsacks are solved in each call, and the cells that dynamic programming visits."""
    noted = {"solved": [], "cells": 0}
    solve, programme = knapsack._solve, knapsack.dynamic_programme

    def note_solve(values, *args):
        noted["solved"].append(len(values))
        return solve(values, *args)

    def note_programme(worth, units, limits):
        noted["cells"] += int((worth[:, :, 1:] >= 0).sum()) * (int(limits.max()) + 1)
        return programme(worth, units, limits)

    monkeypatch.setattr(knapsack, "_solve", note_solve)
    monkeypatch.setattr(knapsack, "dynamic_programme", note_programme)
    return noted


def test_scores_of_subnets_are_one_knapsack_for_640_devices(work):
    problem = whole_problem(128, 640, "of subnets", blocks=np.repeat(np.arange(80), 8))
    get_policy("bilevel")(problem)
    assert work["solved"][0] == 1


def test_an_order_of_its_own_for_each_device_is_solved_in_one_go(work):
    problem = whole_problem(128, 640, "of subnets", tie_break="spread", budget=Budget(compute=0.6))
    get_policy("bilevel")(problem)
    assert work["solved"][0] == 128
    assert len(work["solved"]) <= 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("scores", ["of samples", "of subnets"])
@pytest.mark.parametrize("policy", ["bilevel", "joint", "depth"])
def test_640_devices_leave_little_to_dynamic_programming(work, policy, scores):
    get_policy(policy)(whole_problem(128, 640, scores, blocks=np.repeat(np.arange(80), 8)))
    assert work["cells"] < 1_000_000  # a table of all of them: more than 30 million
