"""Rows of a schedule, compiled for execution and read back."""

import gc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft import partition_model
from d2ft_peft.engine import plan
from d2ft_peft.engine.plan import compile_plan, executed_operations
from tests.models import TINY

from .oracle import deterministic


PARTITIONS = {
    "heads": partition_model(TINY["vit"].build()),
    "pairs": partition_model(TINY["gpt2"].build(), heads_per_subnet=2),
    "groups": partition_model(TINY["llama"].build()),
}


@pytest.mark.parametrize("name", PARTITIONS)
@deterministic
@given(seed=st.integers(0, 1000))
def test_a_plan_says_of_every_head_what_its_subnet_does(name, seed):
    partition = PARTITIONS[name]
    rng = np.random.default_rng(seed)
    row = rng.choice([2, rng.integers(0, 3)], partition.num_scheduled)
    compiled = compile_plan(partition, row)
    assert compiled.operations == tuple(row.tolist())
    for branch, cell in zip(partition.branches, compiled.cells, strict=True):
        heads = {o: [] for o in (0, 1, 2)}
        for subnet in partition.subnets:
            if subnet.block == branch.block:
                heads[int(row[subnet.index])] += subnet.heads
        if len(heads[2]) == branch.heads:
            assert cell is None
        else:
            assert [list(part.indices) for part in (cell.skipped, cell.forward_only, cell.full)] == [*heads.values()]
    assert executed_operations(partition, dict(enumerate(compiled.cells))).tolist() == row.tolist()


def test_a_block_that_did_not_run_was_skipped():
    partition = PARTITIONS["heads"]
    cells = compile_plan(partition, np.full(12, 1)).cells
    ran = {index: cells[index] for index, branch in enumerate(partition.branches) if branch.block != 1}
    assert executed_operations(partition, ran).tolist() == [1] * 4 + [0] * 4 + [1] * 4


def test_equal_rows_are_compiled_once():
    partition = PARTITIONS["heads"]
    row = np.resize([2, 1, 0], 12)
    assert compile_plan(partition, row) is compile_plan(partition, row.astype(np.int8))
    # In another partition the same row may mean other heads.
    other = partition_model(TINY["vit"].build())
    assert compile_plan(other, row) is not compile_plan(partition, row)


def test_nothing_is_remembered_of_a_partition_that_is_gone():
    partition = partition_model(TINY["vit"].build())
    compile_plan(partition, np.zeros(12, dtype=int))
    key = id(partition)
    assert key in plan._LAYOUTS
    del partition
    gc.collect()
    assert key not in plan._LAYOUTS


@pytest.mark.parametrize("value", [3, -1, 0.5, 258])
def test_values_that_are_no_operation_are_refused(value):
    with pytest.raises(ValueError, match="must be values of Operation"):
        compile_plan(PARTITIONS["heads"], np.full(12, value))
