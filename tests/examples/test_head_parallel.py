"""The head-parallel example runs through on two processes, and finds the weights of one process."""

import pytest

from tests.distributed.launch import run


pytestmark = pytest.mark.distributed


def two_steps(folder: str) -> list:
    from examples import head_parallel

    return head_parallel.main(["--steps", "2", "--folder", folder])


def test_the_example_trains_the_weights_of_one_process(tmp_path):
    first, second = run(__name__, "two_steps", tmp_path, str(tmp_path), processes=2)
    assert len(first) == 2 and not second
    assert all(0 < difference < 1e-11 for difference in first)
