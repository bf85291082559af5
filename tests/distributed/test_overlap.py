"""Heads run while rows travel: in which order, and without changing a weight."""

import numpy as np
import pytest
import torch

from d2ft_peft import Schedule, partition_model
from d2ft_peft.head_parallel import HeadParallel, place_subnets
from d2ft_peft.head_parallel.branch import BranchForward
from d2ft_peft.head_parallel.exchange.route import Residence, choose_homes, make_routes, make_waves
from d2ft_peft.head_parallel.exchange.rows import Arriving, Rows
from d2ft_peft.head_parallel.step import Step
from tests.distributed.head_parallel import (
    Case,
    batches_of,
    join,
    model_of,
    random_schedule,
    rank,
    train_alone,
    train_together,
)
from tests.distributed.launch import run
from tests.distributed.test_head_parallel import assert_equal
from tests.models import TINY


FIVE = (3, 2, 3, 1, 2)
# The default, 2, is what other tests run with. There are never more waves than micro-batches.
CASES = [(overlap, Case("llama", "boundary", FIVE)) for overlap in (0, 1, 9)]
PARTITION = partition_model(TINY["vit"].build())


def steps(operations, num_ranks, overlap) -> list[Step]:
    """The step as every rank sees it."""
    schedule = Schedule(operations, blocks=PARTITION.subnet_blocks)
    routes = make_routes(PARTITION, schedule, place_subnets(PARTITION, num_ranks))
    sizes = (1,) * int((~schedule.skipped).sum())
    residence = Residence(sizes, choose_homes(routes, sizes))
    common = (routes, schedule.num_subnets, False, overlap, torch.device("cpu"))
    return [Step(residence, rank, *common) for rank in range(num_ranks)]


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_waves_hold_every_micro_batch_once_and_homes_alike(count):
    residence = Residence((1,) * 7, (0, 1, 0, 1, 2, 2, 0))
    waves = make_waves(residence, count)
    assert sorted(i for wave in waves for i in wave) == list(range(7))
    assert len(waves) == min(count, 7) and all(waves)
    for home in range(3):
        sizes = [len(residence.on(home, wave)) for wave in waves]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("overlap", [0, 1, 2, 3])
@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_every_micro_batch_is_run_once_when_it_is_there(seed, num_ranks, overlap):
    operations = np.random.default_rng(seed).integers(0, 3, (5, PARTITION.num_scheduled))
    for number, step in enumerate(steps(operations, num_ranks, overlap)):
        for route in step.routes:
            parts = step.parts(route)
            assert sorted(i for _, part in parts for i in part) == list(route.active[number])
            # The waves are waited for one after the other, on every rank: their exchanges are collective.
            assert [wave for wave, _ in parts if wave is not None] == list(range(len(step.waves)))
            there = set(step.own)
            for wave, part in parts:
                there |= set() if wave is None else set(step.waves[wave])
                assert set(part) <= there


def test_rows_that_live_here_are_run_while_others_travel():
    everything = np.full((5, PARTITION.num_scheduled), 2)
    first, second = steps(everything, 2, 1)
    assert first.own == (0, 2, 4) and second.own == (1, 3)
    assert first.parts(first.routes[0]) == [(None, (0, 2)), (0, (1, 3)), (None, (4,))]
    assert second.parts(second.routes[0]) == [(None, (1,)), (0, (0, 2, 4)), (None, (3,))]
    first, _ = steps(everything, 2, 2)
    assert first.waves == ((0, 3, 4), (1, 2))
    assert first.parts(first.routes[0]) == [(None, (0, 2)), (0, (3,)), (1, (1,)), (None, (4,))]
    assert steps(everything, 2, 0)[0].parts(first.routes[0]) == [(0, (0, 1, 2, 3, 4))]


def test_a_rank_from_and_to_which_nothing_travels_runs_its_rows_at_once():
    ranks = place_subnets(PARTITION, 2)
    operations = np.where(ranks[None] == np.array([0, 0, 1, 1])[:, None], 2, 0)
    first, _ = steps(operations, 2, 1)
    assert first.parts(first.routes[0]) == [(0, (0, 1))]


def on_two_ranks() -> dict:
    """Everything that two ranks do; starting processes takes longer than the runs."""
    join()
    return {
        "runs": [train_together(case, overlap=overlap) for overlap, case in CASES],
        "graphs": samples_with_a_graph(),
        "order": [order(overlap) for overlap in (0, 1, 2)],
        "timeline": timeline(),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(__name__, "on_two_ranks", tmp_path_factory.mktemp("overlap"), processes=2)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_overlap_changes_no_weight(two_ranks, index):
    assert_equal(two_ranks[0]["runs"][index], train_alone(CASES[index][1]))


def samples_with_a_graph() -> tuple[list[list[int]], list[list[int]]]:
    """Heads x samples that run with and without autograd on this rank in each branch, and what the schedule says."""
    case = Case("vit", "full", FIVE)
    parallel, schedule = HeadParallel(model_of(case, head_parallel=True)), random_schedule(case, 0)
    ran = {branch.place: [0, 0] for branch in parallel._branches}
    compute = BranchForward.compute

    def noted(branch, x, args, kwargs, heads):
        out = compute(branch, x, args, kwargs, heads)
        ran[branch.place][int(not out.requires_grad)] += len(heads) * len(x)
        return out

    BranchForward.compute = noted
    try:
        parallel.forward_backward(batches_of(case, 0), schedule)
    finally:
        BranchForward.compute = compute
    own = parallel.planner.ranks_of_subnets == rank()
    expected = []
    for branch in parallel.planner.partition.branches:
        cells = schedule.operations[:, own & (schedule.blocks == branch.block)]
        expected.append([int(np.array(FIVE) @ (cells == operation).sum(1)) for operation in (2, 1)])
    return list(ran.values()), expected


@pytest.mark.thorough
@pytest.mark.distributed
def test_only_full_heads_run_with_a_graph(two_ranks):
    for of_rank in two_ranks:
        ran, expected = of_rank["graphs"]
        assert ran == expected
        assert all(sum(column) for column in zip(*ran, strict=True))


def order(overlap: int) -> list[str]:
    """What happens in the first branch's forward on this rank, one thing after the other."""
    case, events = Case("vit", "full", (1,) * 6), []
    parallel = HeadParallel(model_of(case, head_parallel=True), overlap=overlap)
    exchange, wait, compute = Rows._exchange, Arriving.wait, BranchForward.compute

    def noted_exchange(rows, *args):
        arriving = exchange(rows, *args)
        arriving.name = f"{args[-1]}, {rows.place}"
        events.append(f"start {arriving.name}")
        return arriving

    def noted_wait(arriving):
        events.append(f"wait {arriving.name}")
        return wait(arriving)

    def noted_compute(branch, x, *args):
        events.append(f"{len(x)} rows, {branch.place}")
        return compute(branch, x, *args)

    Rows._exchange, Arriving.wait, BranchForward.compute = noted_exchange, noted_wait, noted_compute
    try:
        subnets = parallel.planner.partition.num_scheduled
        parallel.planner.prepare(batches_of(case, 0)[0])
        events.clear()
        parallel.forward_backward(
            batches_of(case, 0), Schedule.all_full(6, subnets, blocks=random_schedule(case, 0).blocks)
        )
    finally:
        Rows._exchange, Arriving.wait, BranchForward.compute = exchange, wait, compute
    return [
        event.split(",")[0] for event in events if event.endswith("block 0 (attention)") and "backward" not in event
    ]


@pytest.mark.thorough
@pytest.mark.distributed
def test_heads_run_while_rows_travel(two_ranks):
    for of_rank in two_ranks:
        without, one, two = of_rank["order"]
        assert without == ["start dispatch", "wait dispatch", "6 rows", "start combine", "wait combine"]
        assert one == [
            "start dispatch", "2 rows", "wait dispatch", "3 rows", "start combine", "1 rows", "wait combine",
        ]  # fmt: skip
        waves = [f"{n} rows" for n in ((1, 2) if of_rank is two_ranks[0] else (2, 1))]
        assert two == [
            "start dispatch", "start dispatch", "2 rows", "wait dispatch", waves[0], "start combine",
            "wait dispatch", waves[1], "start combine", "1 rows", "wait combine", "wait combine",
        ]  # fmt: skip


def timeline() -> list[tuple[str, bool]]:
    """What a timeline records of a step: what, and whether it ends after it begins."""
    case = Case("vit", "full", (1, 1))
    parallel, schedule = HeadParallel(model_of(case, head_parallel=True)), random_schedule(case, 0)
    parallel.forward_backward(batches_of(case, 0), schedule)
    assert not parallel.timeline.spans
    parallel.timeline.on = True
    parallel.forward_backward(batches_of(case, 0), schedule)
    return [(span.what, span.begin <= span.end) for span in parallel.timeline.spans]


@pytest.mark.thorough
@pytest.mark.distributed
def test_a_timeline_knows_computations_exchanges_and_waits(two_ranks):
    for of_rank in two_ranks:
        spans = of_rank["timeline"]
        assert all(ends_later for _, ends_later in spans)
        assert {what for what, _ in spans} == {
            "forward", "backward", "wait", "dispatch", "combine", "combine backward", "dispatch backward",
        }  # fmt: skip
