"""The head-parallel example runs through on two processes, and finds the weights of one process."""

import os

import pytest

from tests.distributed.launch import run


pytestmark = pytest.mark.distributed
OF_SEVERAL = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


def alone(*arguments: str) -> bool:
    """What the example starts for itself, with the arguments that it would give: a process that is the only one."""
    from examples import head_parallel

    for name in OF_SEVERAL:
        os.environ.pop(name, None)
    return head_parallel.main(list(arguments)) == []


def two_steps(folder: str) -> dict:
    from examples import head_parallel

    started = []

    def note(command: list[str], env: dict[str, str], **kwargs) -> None:
        started.append({"command": command[1:], "of several": sorted(OF_SEVERAL & env.keys())})

    head_parallel.subprocess.run = note  # the test has trained alone already, without importing everything anew
    return {"differences": head_parallel.main(["--steps", "2", "--folder", folder]), "started": started}


@pytest.mark.thorough
def test_the_example_trains_the_weights_of_one_process(tmp_path):
    arguments = ["--steps", "2", "--folder", str(tmp_path), "--alone"]
    assert run(__name__, "alone", tmp_path, *arguments, processes=1) == [True]
    first, second = run(__name__, "two_steps", tmp_path, str(tmp_path), processes=2)
    assert len(first["differences"]) == 2 and not second["differences"] and not second["started"]
    assert all(0 < difference < 1e-11 for difference in first["differences"])
    [(script, *given)] = [one["command"] for one in first["started"]]
    assert script.endswith("head_parallel.py") and given == arguments
    assert first["started"][0]["of several"] == []
