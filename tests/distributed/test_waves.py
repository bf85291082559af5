"""In which order a rank runs heads while rows travel. No processes."""

import numpy as np
import pytest
import torch

from d2ft_peft import Schedule, partition_model
from d2ft_peft.distributed import place_subnets
from d2ft_peft.distributed.route import Residence, choose_homes, make_routes, make_waves
from d2ft_peft.distributed.step import Step
from tests.models import TINY


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
    for rank, step in enumerate(steps(operations, num_ranks, overlap)):
        for route in step.routes:
            parts = step.parts(route)
            assert sorted(i for _, part in parts for i in part) == list(route.active[rank])
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
