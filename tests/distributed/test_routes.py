"""Routes say what the schedule says: which rows travel where, and which heads run on them. No processes."""

import numpy as np
import pytest

from d2ft_peft import Operation, Schedule, partition_model
from d2ft_peft.head_parallel import place_subnets
from d2ft_peft.head_parallel.exchange.route import Residence, choose_homes, make_routes
from d2ft_peft.head_parallel.placement import heads_by_rank
from tests.models import TINY


PARTITIONS = {
    "one head a subnet": partition_model(TINY["vit"].build()),
    "two heads a subnet": partition_model(TINY["vit"].build(), heads_per_subnet=2),
    "six heads": partition_model(TINY["vit"].build(num_attention_heads=6, hidden_size=48)),
}
CASES = [("one head a subnet", 2), ("one head a subnet", 4), ("two heads a subnet", 2), ("six heads", 4)]


def random_schedule(partition, seed=0, n=5):
    operations = np.random.default_rng(seed).integers(0, 3, (n, partition.num_scheduled))
    operations[2] = Operation.SHORTCUT
    return Schedule(operations, blocks=partition.subnet_blocks)


@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_every_rank_owns_neighbouring_heads_of_every_block(name, num_ranks):
    partition = PARTITIONS[name]
    ranks = place_subnets(partition, num_ranks)
    for block in range(len(partition.blocks)):
        owned = heads_by_rank(partition, ranks, block)
        heads = partition.branches[0].heads
        assert [head for of_rank in owned for head in of_rank] == list(range(heads))
        sizes = [len(of_rank) for of_rank in owned]
        assert min(sizes) >= partition.heads_per_subnet and max(sizes) - min(sizes) <= partition.heads_per_subnet


@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_the_groups_of_all_ranks_do_what_the_schedule_says(name, num_ranks):
    partition = PARTITIONS[name]
    schedule, ranks = random_schedule(partition), place_subnets(partition, num_ranks)
    running = schedule.operations[~schedule.skipped]
    done = np.zeros_like(running)
    for block, route in enumerate(make_routes(partition, schedule, ranks)):
        for rank, groups in enumerate(route.groups):
            owned = heads_by_rank(partition, ranks, block)[rank]
            for group in groups:
                assert [owned[head] for head in group.heads] == [
                    head for subnet in group.subnets for head in partition.subnets[subnet].heads
                ]
                done[np.ix_(group.full, group.subnets)] += Operation.FULL
                done[np.ix_(group.forward_only, group.subnets)] += Operation.FORWARD_ONLY
    np.testing.assert_array_equal(done, running)


@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_rows_travel_only_to_ranks_with_work_and_back_only_where_they_are_full(name, num_ranks):
    partition = PARTITIONS[name]
    schedule, ranks = random_schedule(partition, seed=1), place_subnets(partition, num_ranks)
    running = schedule.operations[~schedule.skipped]
    for block, route in enumerate(make_routes(partition, schedule, ranks)):
        in_block = partition.subnet_blocks == block
        for rank in range(num_ranks):
            cells = running[:, in_block & (ranks == rank)]
            assert route.active[rank] == tuple(np.flatnonzero((cells != Operation.SHORTCUT).any(axis=1)))
            assert route.full[rank] == tuple(np.flatnonzero((cells == Operation.FULL).any(axis=1)))
        np.testing.assert_allclose(route.heads_active, (running[:, in_block] != Operation.SHORTCUT).mean(axis=1))
        np.testing.assert_array_equal(route.any_full, (running[:, in_block] == Operation.FULL).any(axis=1))


def test_heads_that_agree_run_together():
    partition = PARTITIONS["one head a subnet"]
    ranks = place_subnets(partition, 2)
    operations = np.where(ranks[None] == np.arange(4)[:, None] % 2, Operation.FULL, Operation.FORWARD_ONLY)
    for route in make_routes(partition, Schedule(operations, blocks=partition.subnet_blocks), ranks):
        assert [len(groups) for groups in route.groups] == [1, 1]
        assert route.groups[0][0].heads == (0, 1)
        assert route.groups[0][0].full == (0, 2) and route.groups[0][0].forward_only == (1, 3)


def test_a_block_without_work_has_no_route():
    partition = PARTITIONS["one head a subnet"]
    operations = np.where(partition.subnet_blocks == 1, Operation.SHORTCUT, Operation.FULL)[None].repeat(3, axis=0)
    route = make_routes(partition, Schedule(operations, blocks=partition.subnet_blocks), place_subnets(partition, 2))[1]
    assert route.groups == ((), ()) and route.active == ((), ()) == route.full


def travelling(routes, sizes, homes) -> int:
    """Samples that leave their home, over all blocks and both ways."""
    residence = Residence(sizes, homes)
    return sum(
        sum(residence.samples(of_rank)) - sum(residence.samples(residence.on(rank, of_rank)))
        for route in routes
        for needed in (route.active, route.full)
        for rank, of_rank in enumerate(needed)
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("name", "num_ranks"), CASES)
def test_homes_are_shared_out_evenly_and_save_travel(name, num_ranks, seed):
    partition = PARTITIONS[name]
    routes = make_routes(partition, random_schedule(partition, seed), place_subnets(partition, num_ranks))
    sizes = (3, 1, 2, 2)
    homes = choose_homes(routes, sizes)
    assert np.bincount(homes, minlength=num_ranks).max() <= -(-len(sizes) // num_ranks)
    in_turn = tuple(i % num_ranks for i in range(len(sizes)))
    assert travelling(routes, sizes, homes) <= travelling(routes, sizes, in_turn)


def test_a_micro_batch_lives_where_its_work_is():
    partition = PARTITIONS["one head a subnet"]
    ranks = place_subnets(partition, 2)
    operations = np.where(ranks[None] == np.array([1, 1, 0, 0])[:, None], Operation.FULL, Operation.SHORTCUT)
    routes = make_routes(partition, Schedule(operations, blocks=partition.subnet_blocks), ranks)
    assert choose_homes(routes, (1, 1, 1, 1)) == (1, 1, 0, 0)
    assert travelling(routes, (1, 1, 1, 1), (1, 1, 0, 0)) == 0


def test_micro_batches_that_all_ranks_run_take_turns():
    partition = PARTITIONS["one head a subnet"]
    schedule = Schedule.all_full(5, partition.num_scheduled, blocks=partition.subnet_blocks)
    assert choose_homes(make_routes(partition, schedule, place_subnets(partition, 4)), (1,) * 5) == (0, 1, 2, 3, 0)


def test_more_ranks_than_subnets_of_a_block_are_refused():
    with pytest.raises(ValueError, match="3 processes cannot share the 2 subnets of a block, each needs one"):
        place_subnets(PARTITIONS["two heads a subnet"], 3)
