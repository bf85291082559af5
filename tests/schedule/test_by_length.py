"""Micro-batches by length: as little padding as there can be."""

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from d2ft_peft.schedule.by_length import cut_by_length


def cost_of(parts, lengths, overhead):
    return sum(len(part) * lengths[part].max() + overhead for part in parts)


def all_partitions(items):
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for count in range(len(rest) + 1):
        for others in itertools.combinations(rest, count):
            left = [item for item in rest if item not in others]
            for partition in all_partitions(left):
                yield [[first, *others], *partition]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=7), st.integers(1, 40), st.integers(0, 10))
def test_no_other_way_to_share_samples_out_costs_less(lengths, max_tokens, overhead):
    lengths = np.array(lengths)
    parts = cut_by_length(lengths, lengths, max_tokens, overhead)
    allowed = (
        partition
        for partition in all_partitions(list(range(len(lengths))))
        if all(len(part) == 1 or len(part) * lengths[part].max() <= max_tokens for part in partition)
    )
    best = min(cost_of([np.array(part) for part in partition], lengths, overhead) for partition in allowed)
    assert cost_of(parts, lengths, overhead) == best
    assert sorted(np.concatenate(parts)) == list(range(len(lengths)))


def test_alike_samples_stay_together_and_the_longest_come_first():
    parts = cut_by_length(np.array([9, 2, 8, 2, 3]), np.array([9, 2, 8, 2, 3]), max_tokens=18, overhead=4)
    assert [part.tolist() for part in parts] == [[0, 2], [1, 3, 4]]


def test_a_sample_longer_than_a_micro_batch_may_be_runs_alone():
    parts = cut_by_length(np.array([50, 3, 3]), np.array([50, 3, 3]), max_tokens=10)
    assert [part.tolist() for part in parts] == [[0], [1, 2]]
