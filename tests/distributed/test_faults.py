"""A rank that hangs or dies ends the step of the others with an error that names rank, block and exchange."""

import os
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.head_parallel.exchange import ranks
from d2ft_peft.head_parallel.exchange.rows import Rows
from tests.distributed.head_parallel import Case, batches_of, join, model_of, random_schedule, rank
from tests.distributed.launch import run


pytestmark = pytest.mark.distributed

CASE = Case("vit", "full", (1, 2))


def step_without_rank_1(do, overlap: int) -> str:
    """What a step says in which rank 1 does something else instead of the second block's combine."""
    exchange = Rows._exchange

    def absent(self, *args):
        if rank() == 1 and (args[-1], self.place) == ("combine", "block 1 (attention)"):
            do()
        return exchange(self, *args)

    model = model_of(CASE, head_parallel=True)
    parallel = HeadParallel(model, timeout=timedelta(seconds=2), overlap=overlap)
    Rows._exchange = absent
    try:
        parallel.forward_backward(batches_of(CASE, 0), random_schedule(CASE, 0))
    except RuntimeError as error:
        return str(error)
    finally:
        Rows._exchange = exchange
    return "no error"


def hang_then_die(folder: str) -> list[str]:
    join()
    ranks._REPORT = timedelta(seconds=0.5)
    noticed = Path(folder) / "noticed"

    def hang():
        while not noticed.exists():
            time.sleep(0.05)

    def die():
        torch.save([], Path(folder) / "rank1.pt")  # what the launcher looks for
        os._exit(0)

    said = [step_without_rank_1(hang, overlap=2)]
    noticed.touch()
    # With several waves a rank that dies takes rows with it that it was still sending: the dispatch would fail first.
    return [*said, step_without_rank_1(die, overlap=0)]


@pytest.mark.thorough
def test_the_error_names_rank_block_and_exchange(tmp_path):
    said = run(__name__, "hang_then_die", tmp_path, str(tmp_path), processes=2)[0]
    for message in said:
        assert message.startswith(
            "rank 0 failed in step 1, block 1 (attention), exchange 'combine': no sign of rank 1, it died or hangs; "
            "timeout 0:00:02"
        )
