"""Brute force over every assignment of small problems, and the problems that the tests draw."""

import itertools

import numpy as np
from hypothesis import assume, settings
from hypothesis import strategies as st

from d2ft_peft.schedule import Budget, Operation, Problem, get_policy


deterministic = settings(derandomize=True, deadline=None, max_examples=30, database=None)

TOLERANCE = 1e-9


def assignments(num_cells: int, operations=tuple(Operation)) -> np.ndarray:
    """All ways to give `num_cells` cells one of `operations`; [len(operations) ** num_cells, num_cells]."""
    return np.array(list(itertools.product(operations, repeat=num_cells)), dtype=np.int64)


def cells_of(problem: Problem, device: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Forward scores, backward scores [cells] and limited costs [cells, 3] of the device's cells, row by row."""
    subnets = np.flatnonzero(problem.devices == device)
    costs = problem.weights[:, None, None] * problem.limited_costs[subnets]
    return (
        problem.forward_scores[:, subnets].ravel(),
        problem.backward_scores[:, subnets].ravel(),
        costs.reshape(-1, 3),
    )


def best_bilevel(problem: Problem, device: int, full: np.ndarray) -> tuple[float, float]:
    """The best FULL value of a device; and, with the FULL cells `full` taken, the best FORWARD_ONLY value."""
    forward, backward, costs = cells_of(problem, device)
    limit = problem.limits[device] * (1 + TOLERANCE)
    chosen = assignments(len(forward), (0, 1)).astype(bool)
    best_full = (chosen @ backward)[chosen @ costs[:, Operation.FULL] <= limit].max()
    left = problem.limits[device] - costs[full, Operation.FULL].sum() + TOLERANCE * problem.limits[device]
    fits = ~(chosen & full).any(axis=1) & (chosen @ costs[:, Operation.FORWARD_ONLY] <= left)
    return best_full, (chosen @ forward)[fits].max()


def best_joint(problem: Problem, device: int) -> float:
    """The best objective of a device over all assignments within its limit."""
    forward, backward, costs = cells_of(problem, device)
    operations = assignments(len(forward))
    cells = np.arange(len(forward))
    load = costs[cells, operations].sum(axis=1)
    value = (forward * (operations > 0) + backward * (operations == Operation.FULL)).sum(axis=1)
    return value[load <= problem.limits[device] * (1 + TOLERANCE)].max()


def best_joint_by_counts(problem: Problem, subnet: int) -> float:
    """The best objective of a subnet over all assignments with exactly the counts of the budget."""
    num_full, num_forward_only = problem.budget.counts
    operations = assignments(problem.num_micro_batches)
    fits = ((operations == 2).sum(axis=1) == num_full) & ((operations == 1).sum(axis=1) == num_forward_only)
    value = (operations > 0) @ problem.forward_scores[:, subnet] + (operations == 2) @ problem.backward_scores[
        :, subnet
    ]
    return value[fits].max()


def best_depth(problem: Problem) -> float:
    """The best value over all ways to give each micro-batch a depth or to skip it, within the total limit."""
    blocks = np.unique(problem.blocks)
    best = -1.0
    for depths in itertools.product([None, *blocks], repeat=problem.num_micro_batches):
        load = value = 0.0
        for row, depth in enumerate(depths):
            for subnet in range(problem.num_subnets) if depth is not None else ():
                full = problem.blocks[subnet] >= depth
                load += problem.weights[row] * problem.limited_costs[subnet, 2 if full else 1]
                value += problem.forward_scores[row, subnet] + full * problem.backward_scores[row, subnet]
        if load <= problem.limits.sum() * (1 + TOLERANCE):
            best = max(best, value)
    return best


def zeros(num_micro_batches: int, num_subnets: int, budget: Budget, **fields) -> Problem:
    """A problem without any information: all scores 0."""
    scores = np.zeros((num_micro_batches, num_subnets))
    return Problem(scores, scores, budget, **fields)


@st.composite
def problems(draw, max_rows=4, max_subnets=3, budgets=("compute", "communication"), equal_weights=None):
    """Small problems: scores with many ties or none, equal or unequal weights, costs that are whole or not."""
    rows, subnets = draw(st.integers(1, max_rows)), draw(st.integers(1, max_subnets))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    levels = draw(st.sampled_from([1, 2, 3, 1000]))
    scores = [rng.integers(0, levels, (rows, subnets)) / draw(st.sampled_from([1, 7])) for _ in range(2)]
    if draw(st.booleans()) if equal_weights is None else equal_weights:
        weights = np.full(rows, draw(st.sampled_from([1.0, 16.0])))
    else:
        weights = rng.choice([rng.integers(1, 9, rows).astype(float), 0.5 + rng.random(rows)])
    forward_cost = draw(st.sampled_from([1 / 3, 0.5, 0.4, 0.0, 0.3412345678]))
    scale = rng.integers(1, 4, subnets) if draw(st.booleans()) else np.ones(subnets)
    num_devices = draw(st.integers(1, subnets))
    devices = rng.permutation(np.r_[np.arange(num_devices), rng.integers(0, num_devices, subnets - num_devices)])
    return Problem(
        *scores,
        draw_budget(draw, draw(st.sampled_from(budgets)), rows),
        costs=scale[:, None] * np.array([0.0, forward_cost, 1.0]),
        weights=weights,
        devices=devices,
        blocks=rng.integers(0, 3, subnets),
        rng=np.random.default_rng(draw(st.integers(0, 100))),
    )


def draw_budget(draw, kind: str, rows: int) -> Budget:
    """A budget of `kind` under which every problem with `rows` micro-batches can train."""
    if kind == "counts":
        num_full = draw(st.integers(1, rows))
        return Budget(num_full=num_full, num_forward_only=draw(st.integers(0, rows - num_full)))
    # The lightest micro-batch is never heavier than the mean, so 1 / rows always fits one FULL cell.
    share = draw(st.sampled_from([1 / rows, 0.3, 0.5, 0.6, 0.77, 1.0]))
    return Budget(**{kind: max(share, 1 / rows)})


def solve(name, problem):
    """The policy's schedule; draws without one (it names the nearest possible budget) are left out."""
    try:
        return get_policy(name)(problem)
    except ValueError as error:
        assert "nearest possible" in str(error)
        assume(False)
