"""What a `Schedule` promises: it refuses to exist when broken, never changes, and judges itself by stated formulas."""

import copy
import json
import pickle

import numpy as np
import pytest

from d2ft_peft.schedule import COMMUNICATION, Operation, Schedule


S, O, F = Operation.SHORTCUT, Operation.FORWARD_ONLY, Operation.FULL  # noqa: E741


def example(**fields):
    """Two micro-batches of 1 and 3 samples, two blocks of two subnets, each block on its own device."""
    facts = {"weights": [1, 3], "devices": [0, 0, 1, 1], "blocks": [0, 0, 1, 1], "capacities": [8, 8]}
    return Schedule([[F, O, F, F], [S, S, F, F]], **(facts | fields))


def test_defaults_are_one_device_per_subnet_unit_weights_and_backward_twice_forward():
    schedule = Schedule([[F, O, S]])
    assert schedule.devices.tolist() == [0, 1, 2]
    assert schedule.weights.tolist() == [1]
    assert schedule.costs.tolist() == [[0, 1 / 3, 1]] * 3
    assert schedule.blocks.tolist() == [0, 0, 0]
    assert schedule.capacities is None
    assert schedule.operations.dtype == np.int8


def test_sizes():
    schedule = example()
    assert (schedule.num_micro_batches, schedule.num_subnets, schedule.num_devices) == (2, 4, 2)


def test_loads_and_ratios_follow_their_formulas():
    schedule = example()
    np.testing.assert_allclose(schedule.loads, [1 + 1 / 3, 8])
    np.testing.assert_allclose(schedule.full_loads, [8, 8])
    assert schedule.compute_ratio == pytest.approx((28 / 3) / 16)
    assert schedule.communication_ratio == pytest.approx((1 * 3.5 / 4 + 3 * 2 / 4) / 4)
    assert schedule.workload_variance == pytest.approx(((1 - 1 / 6) / 2) ** 2)
    assert schedule.counts == {S: 2, O: 1, F: 5}


def test_workload_variance_is_exactly_zero_when_devices_do_equal_work_in_another_order():
    operations = [[F, O, S, F], [F, F, O, S], [S, F, F, O], [O, S, F, F]]
    assert Schedule(operations, weights=[7, 7, 7, 7]).workload_variance == 0.0


@pytest.mark.parametrize(
    ("row", "expected"),
    [([F] * 6, 1.0), ([S] * 6, 1.0), ([F, F, O, O, S, S], 0.0), ([F, F, F, F, O, S], 0.5), ([O], 1.0), ([F, S], 0.0)],
)
def test_alignment_is_one_for_uniform_rows_and_zero_for_evenly_mixed_ones(row, expected):
    assert Schedule([row]).alignment == pytest.approx(expected)


def test_alignment_is_the_mean_over_rows():
    assert Schedule([[F] * 6, [F, F, O, O, S, S]]).alignment == pytest.approx(0.5)


def test_exact_gradients_need_full_in_same_and_higher_blocks_and_no_shortcut():
    schedule = Schedule(
        [[O, F, F, F], [F, F, O, F], [S, F, F, F], [F, F, F, F], [F, F, F, O]], blocks=[0, 0, 1, 1], weights=[1] * 5
    )
    assert schedule.exact_gradients.astype(int).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 0],
        [0, 0, 0, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    ]


def test_exact_gradients_do_not_assume_that_subnets_are_sorted_by_block():
    assert Schedule([[F, O]], blocks=[1, 0]).exact_gradients.tolist() == [[True, False]]


def test_skipped_micro_batches_are_shortcut_everywhere():
    assert Schedule([[S, S], [S, O], [F, F]]).skipped.tolist() == [True, False, False]


def test_all_full_is_plain_fine_tuning():
    schedule = Schedule.all_full(3, 2, weights=[1, 2, 3])
    assert schedule.compute_ratio == schedule.communication_ratio == schedule.alignment == 1
    assert schedule.exact_gradients.all()
    assert schedule.weights.tolist() == [1, 2, 3]


def test_arrays_are_copies_and_read_only():
    operations = np.full((2, 2), F)
    schedule = Schedule(operations)
    operations[0, 0] = S
    assert schedule.operations[0, 0] == F
    for array in (schedule.operations, schedule.weights, schedule.devices, schedule.costs, schedule.loads):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_equal_and_stay_read_only(copied):
    twin = copied(example())
    assert twin == example()
    assert not twin.operations.flags.writeable


def test_equal_content_means_equal_hash_and_digest():
    assert example() == example()
    assert hash(example()) == hash(example())
    assert example().digest() == example().digest()
    assert example() != "schedule"
    assert example(costs=np.tile([-0.0, 0.5, 1], (4, 1))) == example(costs=np.tile([0, 0.5, 1], (4, 1)))


@pytest.mark.parametrize(
    "change",
    [
        {"weights": [1, 2]},
        {"devices": [0, 1, 0, 1]},
        {"blocks": [0, 1, 1, 1]},
        {"capacities": [9, 8]},
        {"capacities": None},
        {"costs": np.tile([0, 0.5, 1], (4, 1))},
    ],
)
def test_digest_covers_every_field(change):
    assert example(**change).digest() != example().digest()
    assert example(**change) != example()


def test_digest_covers_operations():
    assert Schedule([[F, O]]).digest() != Schedule([[O, F]]).digest()
    assert Schedule([[F, O]]).digest() != Schedule([[F], [O]]).digest()


def test_dict_survives_json():
    for schedule in (example(), Schedule([[F, O]])):
        assert Schedule.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


@pytest.mark.parametrize("data", [{"weights": [1]}, {"operations": [[2]], "loads": [1]}])
def test_from_dict_names_the_keys_it_takes(data):
    with pytest.raises(ValueError, match="needs the key 'operations' and takes .*'weights'.* got"):
        Schedule.from_dict(data)


def test_small_schedules_print_as_a_grid_with_blocks_apart():
    lines = str(example()).splitlines()
    assert lines[1:] == ["   0  FO FF", "   1  SS FF"]
    assert "2 micro-batches x 4 subnets on 2 devices: 2 SHORTCUT, 1 FORWARD_ONLY, 5 FULL" in lines[0]


def test_large_schedules_print_as_one_line():
    assert "\n" not in str(Schedule.all_full(100, 1000))


def test_communication_is_indexed_by_operation():
    assert [COMMUNICATION[operation] for operation in (S, O, F)] == [0, 0.5, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"operations": [F, O]}, r"operations has shape \(2,\), it must be \[micro-batches, subnets\]"),
        ({"operations": np.zeros((0, 3))}, r"operations has shape \(0, 3\).*at least 1"),
        ({"operations": [[F, 3]]}, r"operations\[0, 1\]=3 must be in 0..2; use the values of Operation"),
        ({"operations": [[F, -1]]}, r"operations\[0, 1\]=-1 must be in 0..2"),
        ({"operations": [[1.0, 2.0]]}, r"operations has dtype float64, it must be of an integer type"),
        ({"weights": [1, 2]}, r"weights has shape \(2,\), it must have shape \(1,\); give the size"),
        ({"weights": [0]}, r"weights\[0\]=0 must be positive"),
        ({"weights": [-1]}, r"weights\[0\]=-1.0 must not be negative"),
        ({"weights": [np.nan]}, r"weights\[0\]=nan must be finite"),
        ({"weights": ["many"]}, r"weights must be numbers of shape \(1,\)"),
        ({"devices": [0, 2]}, r"devices: no subnet on device 1; number the devices 0..M-1"),
        ({"devices": [0, -1]}, r"devices\[1\]=-1 must be at least 0"),
        ({"devices": [0.0, 1.0]}, r"devices has dtype float64"),
        ({"blocks": [0]}, r"blocks has shape \(1,\), it must have shape \(2,\)"),
        ({"costs": [[0, 1, 1]]}, r"costs has shape \(1, 3\), it must have shape \(2, 3\)"),
        ({"costs": [[0, 1, 1], [0.1, 1, 1]]}, r"costs\[1\]=\[0.1, 1.0, 1.0\] must be 0 for SHORTCUT"),
        ({"costs": [[0, 1, 0.5], [0, 1, 1]]}, r"costs\[0\]=.* must not decrease"),
        ({"costs": [[0, 0, 0], [0, 1, 1]]}, r"costs\[0\]=.* FULL must be positive"),
        ({"capacities": [1]}, r"capacities has shape \(1,\), it must have shape \(2,\)"),
        ({"capacities": [1, 0.3]}, r"capacities\[1\]=0.3 is less than the load 0.333333 of device 1; raise the cap"),
    ],
)
def test_broken_schedules_do_not_exist(fields, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**({"operations": [[F, O]]} | fields))


def test_capacity_tolerates_rounding_and_no_more():
    Schedule([[F]], capacities=[1 - 0.9e-9])
    with pytest.raises(ValueError, match="capacities"):
        Schedule([[F]], capacities=[1 - 1.2e-9])
