"""What ranks save is whole or not there, and what is damaged is named when it is read."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from d2ft_peft import whole_files
from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.head_parallel.storage.optimizer_state import OPTIMIZER_FILE, load_adapter, load_optimizer
from d2ft_peft.whole_files import replacing, replacing_in
from tests.distributed.head_parallel import Case, batches_of, join, model_of, optimizer_of, random_schedule
from tests.distributed.launch import run


CASE = Case("vit", "full", (1, 2))
ADAPTER_FILE = "adapter_model.safetensors"


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def save_twice(folder: str) -> list[str]:
    """Save into one folder twice, with other weights; the files that took their place by a rename the second time."""
    join()
    folder, renamed = Path(folder), []
    parallel = HeadParallel(model_of(CASE, head_parallel=True))
    optimizer = optimizer_of(parallel.model, CASE)
    replace = os.replace

    def noted(source, target):
        renamed.append(os.path.relpath(target, folder))
        replace(source, target)

    for step in range(2):
        parallel.forward_backward(batches_of(CASE, step), random_schedule(CASE, step))
        optimizer.step()
        whole_files.os.replace = noted if step else replace
        parallel.save_pretrained(folder)
        parallel.save_optimizer(optimizer, folder)
    whole_files.os.replace = replace
    return sorted(renamed)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder that two ranks saved into, and what each of them renamed."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run(__name__, "save_twice", tmp_path_factory.mktemp("ranks"), str(folder), processes=2)


@pytest.fixture
def copied(saved, tmp_path):
    """Makes a copy of the folder, of which a test may damage something."""
    for name in files_in(saved[0]):
        (tmp_path / name).write_bytes((saved[0] / name).read_bytes())
    return tmp_path


@pytest.mark.thorough
@pytest.mark.distributed
def test_every_file_that_ranks_save_takes_its_place_by_a_rename(saved):
    folder, (first, second) = saved
    assert first == files_in(folder) and {OPTIMIZER_FILE, ADAPTER_FILE, "adapter_config.json"} <= set(first)
    assert second == []
    card = (folder / "README.md").read_text()
    assert card.count("library_name: peft") == 1  # the second time PEFT found the first one's


class Interrupted(Exception):
    """The process ends here."""


def test_a_write_that_is_interrupted_leaves_what_was_there(tmp_path):
    (tmp_path / "state").write_text("before")
    with pytest.raises(Interrupted), replacing(str(tmp_path / "state")) as partial:
        Path(partial).write_text("half of what comes af")
        assert (tmp_path / "state").read_text() == "before"
        raise Interrupted
    with pytest.raises(Interrupted), replacing_in(tmp_path) as folder:
        (Path(folder) / "state").write_text("half of what comes af")
        raise Interrupted
    assert files_in(tmp_path) == ["state"] and (tmp_path / "state").read_text() == "before"


def test_files_of_a_killed_process_are_not_taken_for_whole(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "left behind").write_text("half")
    with replacing_in(tmp_path) as folder:
        (Path(folder) / "other").mkdir()
        (Path(folder) / "other" / "state").write_text("whole")
    assert files_in(tmp_path) == [os.path.join("other", "state")]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def without_groups(path: Path) -> None:
    save_file(load_file(path), path)


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (OPTIMIZER_FILE, cut, "optimizer.safetensors' is damaged, or only a part of it was written"),
        (OPTIMIZER_FILE, empty, "optimizer.safetensors' is damaged, or only a part of it was written"),
        (OPTIMIZER_FILE, without_groups, "optimizer.safetensors' was not written by HeadParallel.save_optimizer"),
        (OPTIMIZER_FILE, remove, "has neither optimizer.safetensors nor optimizer.pt"),
        ("optimizer.pt", cut, "optimizer.pt' is damaged, or only a part of it was written"),
        ("optimizer.pt", empty, "optimizer.pt' is damaged, or only a part of it was written"),
        (ADAPTER_FILE, cut, "adapter_model.safetensors' is damaged, or only a part of it was written"),
        (ADAPTER_FILE, remove, "has no adapter_model.safetensors"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_damaged_file_is_named(copied, name, damage, says):
    model = model_of(CASE, head_parallel=False)
    optimizer = optimizer_of(model, CASE)
    if name == "optimizer.pt":  # of a Trainer on one process
        (copied / OPTIMIZER_FILE).unlink()
        torch.save(optimizer.state_dict(), copied / name)

    def load():
        if name == ADAPTER_FILE:
            load_adapter(model, copied, (), 0)
        else:
            load_optimizer(optimizer, model, copied)

    load()
    damage(copied / name)
    with pytest.raises(ValueError, match=says):
        load()
