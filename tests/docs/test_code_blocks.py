"""Every block of Python in the documentation runs as it stands there. Blocks of a page share their names."""

import gc
import os
import warnings
from pathlib import Path

import pytest
from accelerate import PartialState

from tests.distributed.launch import run
from tests.models import TINY

from .given import GIVEN, REPLACED, everywhere
from .pages import ROOT, blocks, with_blocks


ON_RANKS = ("docs/head_parallel.md", "docs/simulator.md")  # their code is for several processes
PAGES = with_blocks("python")


def execute(page: str, folder: Path) -> dict:
    """Run a page's blocks in order within a folder; returns the names that there are in the end."""
    os.chdir(folder)
    names = everywhere()
    for number, block in enumerate(blocks(ROOT / page, "python")):
        given, code = GIVEN.get(page, {}).get(number, lambda folder: {})(folder), block.code
        for theirs, here in given.pop(REPLACED, {}).items():
            assert theirs in code, f"{page}, block {number}: {theirs!r} is gone"
            code = code.replace(theirs, here)
        names |= given
        with warnings.catch_warnings():
            # The advice that PyTorch, transformers and PEFT give of tiny models on a CPU.
            warnings.simplefilter("ignore")
            exec(compile(code, f"{page}, block {number}", "exec"), names)
    return names


def execute_on_rank(folder: str) -> list[set[str]]:
    """Run the pages on one of two processes, each in a folder of its own; the names that there are in the end."""
    here = Path(folder, str(PartialState(cpu=True).process_index))
    here.mkdir()
    return [set(execute(page, here)) for page in ON_RANKS]


@pytest.mark.quick(3)
@pytest.mark.parametrize("page", [page for page in PAGES if page not in ON_RANKS])
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = execute(page, tmp_path)
    if "server" in names:
        names["server"].stop()
    names.clear()
    gc.collect()


@pytest.mark.thorough
@pytest.mark.distributed
def test_the_code_for_several_processes_runs(tmp_path):
    TINY["llama"].build().save_pretrained(tmp_path / "base")  # under a process group rank 0 alone writes
    for head_parallel, simulator in run(__name__, "execute_on_rank", tmp_path, str(tmp_path)):
        assert {"trainer", "parallel"} <= head_parallel and {"capacities", "prediction"} <= simulator


def test_every_given_thing_has_its_block():
    for page, given in GIVEN.items():
        assert max(given) < len(blocks(ROOT / page, "python")), page
