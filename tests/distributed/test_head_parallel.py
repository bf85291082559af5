"""Heads shared out over gloo processes: the same weights as on one process, in float64, for random schedules."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from d2ft_peft import D2FTConfig
from d2ft_peft.head_parallel import HeadParallel
from d2ft_peft.head_parallel.exchange.ranks import Ranks
from d2ft_peft.head_parallel.exchange.rows import Arriving, Rows
from tests.distributed.head_parallel import (
    Case,
    adapter_of,
    join,
    model_of,
    train_alone,
    train_together,
)
from tests.distributed.launch import run
from tests.models import TINY


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
    Case("gpt_neox", "lora", (2, 1)),  # query, key and value of a head side by side
    Case("phi3", "full", (2, 1)),  # parts of unequal width, and a number read of the config
]
# Fewer micro-batches than ranks: nothing lives on some of them.
FOUR_RANKS = [Case("vit", "boundary", FIVE), Case("bert", "lora", (2, 1, 3))]
WRONG = Case("vit", "boundary", (2, 1))
EXCHANGES = ("dispatch", "combine", "combine backward", "dispatch backward", "gradients")
SAVED = [Case("vit", "boundary", FIVE), Case("llama", "lora", (2, 2, 1)), Case("bert", "lora", (2, 1, 3))]


def on_two_ranks(folder: str) -> dict:
    """Everything that two ranks do; starting processes takes longer than the runs."""
    results = {
        "runs": [train_together(case) for case in TWO_RANKS],
        "right": train_together(WRONG),
        "wrong": {purpose: train_with_wrong(purpose) for purpose in EXCHANGES},
    }
    for case in SAVED:
        HeadParallel(model_of(case, head_parallel=True)).save_pretrained(Path(folder) / case.name)
    return results


def on_four_ranks(folder: str) -> dict:
    """Runs, and what two ranks saved as four ranks see it."""
    join()
    runs = [train_together(case) for case in FOUR_RANKS]
    loaded = []
    for case in SAVED:
        if case.name != "llama":  # it has two key/value heads
            path = str(Path(folder) / case.name)
            base, config = TINY[case.name].build(seed=0).double(), D2FTConfig.from_pretrained(path)
            model = PeftModel.from_pretrained(
                base, path, config=config, is_trainable=True, autocast_adapter_dtype=False
            )
            loaded.append(adapter_of(HeadParallel(model).gather_state_dict() or {}))
    return {"runs": runs, "loaded": loaded}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, folder):
    return run(__name__, "on_two_ranks", tmp_path_factory.mktemp("two"), str(folder), processes=2)


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory, folder, two_ranks):
    return run(__name__, "on_four_ranks", tmp_path_factory.mktemp("four"), str(folder), processes=4)


def assert_equal(ours, theirs, case=""):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{case}: {n} {m}")


@pytest.mark.quick(3)
@pytest.mark.parametrize("index", range(len(TWO_RANKS)), ids=map(str, TWO_RANKS))
def test_two_ranks_train_the_weights_of_one_process(two_ranks, index):
    assert_equal(two_ranks[0]["runs"][index], train_alone(TWO_RANKS[index]))
    assert_equal(two_ranks[1]["runs"][index], {"losses and norms": two_ranks[0]["runs"][index]["losses and norms"]})


@pytest.mark.thorough
@pytest.mark.parametrize("index", range(len(FOUR_RANKS)), ids=map(str, FOUR_RANKS))
def test_four_ranks_train_the_weights_of_one_process(four_ranks, index):
    assert_equal(four_ranks[0]["runs"][index], train_alone(FOUR_RANKS[index]))


def train_with_wrong(purpose: str) -> dict[str, torch.Tensor]:
    """A run in which what one kind of exchange brings from other ranks is off by 1 %."""
    wait, exchange, all_reduce = Arriving.wait, Rows._exchange, Ranks.all_reduce

    def noted_exchange(rows, *args):
        arriving = exchange(rows, *args)
        arriving.wrong = args[-1] == purpose
        return arriving

    def wrong_wait(arriving):
        return [(i, 1.01 * rows if arriving.wrong else rows) for i, rows in wait(arriving)]

    def wrong_all_reduce(ranks, tensor, of, *args):
        return all_reduce(ranks, tensor, of, *args).mul_(1.01 if of == purpose else 1)

    Arriving.wait, Rows._exchange, Ranks.all_reduce = wrong_wait, noted_exchange, wrong_all_reduce
    try:
        return train_together(WRONG)
    finally:
        Arriving.wait, Rows._exchange, Ranks.all_reduce = wait, exchange, all_reduce


@pytest.fixture(scope="module")
def alone():
    return train_alone(WRONG)


@pytest.mark.parametrize("purpose", EXCHANGES)
def test_equality_fails_when_one_exchange_is_wrong(two_ranks, alone, purpose):
    assert_equal(two_ranks[0]["right"], alone)
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(two_ranks[0]["wrong"][purpose], alone)


def test_two_ranks_save_an_ordinary_adapter(two_ranks, folder):
    for case in SAVED:
        expected = model_of(case, head_parallel=False)
        base = TINY[case.name].build(seed=0).double()
        loaded = PeftModel.from_pretrained(base, str(folder / case.name), autocast_adapter_dtype=False)
        assert_equal(adapter_of(loaded.state_dict()), adapter_of(expected.state_dict()), case)


@pytest.mark.thorough
def test_four_ranks_load_what_two_saved(four_ranks):
    cases = [case for case in SAVED if case.name != "llama"]
    for case, state in zip(cases, four_ranks[0]["loaded"], strict=True):
        assert_equal(state, adapter_of(model_of(case, head_parallel=False).state_dict()), case)
