"""Heads shared out over gloo processes: the same weights as on one process, in float64, for random schedules."""

import pytest
import torch

from tests.distributed.head_parallel import Case, train_alone, train_together
from tests.distributed.launch import run


pytestmark = pytest.mark.distributed

FIVE = (3, 2, 3, 1, 2)
TWO_RANKS = [
    Case("vit", "full", FIVE),
    Case("vit", "lora", FIVE, heads_per_subnet=2),
    Case("bert", "boundary", FIVE),
    Case("bert", "lora", (2, 3, 1)),
    Case("llama", "boundary", FIVE),
    Case("llama", "lora", (2, 2, 1)),
    Case("qwen3", "boundary", (2, 1, 2)),
    Case("gpt2", "full", (2, 1, 2)),
    Case("vit", "boundary", (2, 1, 2), shortcut="rescale"),
    Case("llama", "full", (3,)),
]
# Fewer micro-batches than ranks: nothing lives on some of them.
FOUR_RANKS = [Case("vit", "boundary", FIVE), Case("bert", "lora", (2, 1, 3)), Case("gpt2", "boundary", (1, 2, 2, 1, 1))]


def train_all(ranks: str) -> list[dict[str, torch.Tensor]]:
    return [train_together(case) for case in {"2": TWO_RANKS, "4": FOUR_RANKS}[ranks]]


def assert_equal(ours, theirs, case):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{case}: {name} {m}"
        )


@pytest.mark.parametrize(("ranks", "cases"), [(2, TWO_RANKS), (4, FOUR_RANKS)], ids=["two ranks", "four ranks"])
def test_weights_equal_those_of_one_process(tmp_path, ranks, cases):
    first, *others = run(__name__, "train_all", tmp_path, str(ranks), processes=ranks)
    for index, case in enumerate(cases):
        assert_equal(first[index], train_alone(case), case)
        for other in others:
            torch.testing.assert_close(
                other[index]["losses and norms"], first[index]["losses and norms"], rtol=0, atol=0
            )
