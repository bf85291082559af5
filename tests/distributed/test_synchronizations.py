"""A head-parallel step never waits for its device in between, and ranks notice all the same when they differ."""

import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from peft import get_peft_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import d2ft_peft
from d2ft_peft import D2FTConfig, Schedule
from d2ft_peft.head_parallel import HeadParallel
from tests.distributed.head_parallel import Case, batches_of, join, model_of, random_schedule, rank
from tests.distributed.launch import run
from tests.distributed.test_head_parallel_use import message
from tests.models import TINY


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

PACKAGE = str(Path(d2ft_peft.__file__).parent)
# `numpy` is not among them: a tensor on a device refuses it.
READS = ("item", "cpu", "tolist", "__bool__", "__float__", "__int__", "__index__", "nonzero")
WRITES = ("tensor", "as_tensor", "new_tensor")
CASES = [("vit", {"shortcut": "rescale"}), ("llama", {"r": 4}), ("gpt2", {})]


def calls_of_ours() -> bool:
    """Whether the line that called torch is this package's."""
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename.startswith(PACKAGE)


class Scalars(TorchDispatchMode):
    """Counts numbers that this package reads from tensors, however it does so."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func) and calls_of_ours()
        return func(*args, **(kwargs or {}))


class Crossings(TorchFunctionMode):
    """Counts calls by which this package would read from a device, or would write numbers of the host to it."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        writes = name in WRITES and "device" in (kwargs or {})
        if (name in READS or writes) and calls_of_ours():
            self.calls["writes" if writes else "reads"] += 1
        return func(*args, **(kwargs or {}))


def uneven_schedule(parallel: HeadParallel) -> Schedule:
    """Micro-batches without FULL heads in a block, without any heads in a block, and with both."""
    blocks = parallel.planner.partition.subnet_blocks
    operations = np.random.default_rng(0).integers(0, 3, (4, len(blocks)))
    operations[0], operations[1], operations[2, blocks == 0] = 2, 1, 0
    return Schedule(operations, [2] * 4, blocks=blocks)


def crossings(name: str, config: dict, blocks: int) -> dict[str, list[int]]:
    """(scalars, reads, writes) of the first step with clipping, and of a usual one."""
    depth = "n_layer" if name == "gpt2" else "num_hidden_layers"
    model = TINY[name].build(**{depth: blocks})
    parallel = HeadParallel(get_peft_model(model, D2FTConfig(head_parallel=True, **config)).train())
    counted = {}
    for which in ("first", "usual"):
        with Scalars() as scalars, Crossings() as crossed:
            parallel.forward_backward([TINY[name].batch(2, seed=i) for i in range(4)], uneven_schedule(parallel))
            parallel.clip_grad_norm_(0.1)
        counted[which] = [scalars.count, crossed.calls["reads"], crossed.calls["writes"]]
    return counted


def differences() -> list[str]:
    """What is said, step by step, where ranks differ between comparisons of contents, three steps apart."""
    case = Case("vit", "full", (2, 2))
    parallel, schedule = HeadParallel(model_of(case, head_parallel=True, interval=3)), random_schedule(case, 0)
    alike, other = batches_of(case, 0), batches_of(case, rank())
    swapped = alike[::-1] if rank() else alike
    longer = [{key: value[: 2 - rank()] for key, value in batch.items()} for batch in alike]
    steps = [alike, other, alike, alike, alike, swapped, alike, longer, alike, alike, alike]
    return [message(lambda batches=batches: parallel.forward_backward(batches, schedule)) for batches in steps]


def on_two_ranks() -> dict:
    join()
    counted = [[crossings(*case, blocks) for blocks in (1, 3)] for case in CASES]
    return {"crossings": counted, "differences": differences()}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return run(__name__, "on_two_ranks", tmp_path_factory.mktemp("waiting"), processes=2)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, _ in CASES])
def test_a_usual_step_reads_nothing_from_the_device(two_ranks, index):
    for of_rank in two_ranks:
        for counted in of_rank["crossings"][index]:
            scalars, reads, _ = counted["usual"]
            assert (scalars, reads) == (0, 0)


@pytest.mark.parametrize("index", range(len(CASES)), ids=[name for name, _ in CASES])
def test_what_crosses_does_not_grow_with_the_blocks(two_ranks, index):
    for of_rank in two_ranks:
        one, three = of_rank["crossings"][index]
        assert one["usual"] == three["usual"]
        # The checksum of what the micro-batches contain. Where heads lie is written once for each set of them.
        assert one["first"][:2] == three["first"][:2] == [1, 1]


def test_contents_that_differed_are_found_at_the_next_comparison(two_ranks):
    for of_rank in two_ranks:
        said, differ = of_rank["differences"], "on rank 1 differ from those on rank 0; give every rank of a"
        assert said[:3] == ["no error"] * 3
        assert said[3].startswith(f"ValueError: the micro-batches of steps 2 to 4 {differ}")
        assert said[4:6] == ["no error"] * 2
        assert said[6].startswith(f"ValueError: the micro-batches of steps 5 to 7 {differ}")


def test_shapes_that_differ_are_found_at_once_and_only_once(two_ranks):
    for of_rank in two_ranks:
        said = of_rank["differences"]
        assert said[7].startswith("ValueError: the micro-batches on rank 1 differ from those on rank 0")
        assert said[8:] == ["no error"] * 3
