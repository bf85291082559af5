"""Two replicas whose heads two ranks each share out: the weights of one process that sees all samples, in float64."""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from peft import get_peft_model
from torch.distributed.device_mesh import init_device_mesh

from d2ft_peft import D2FTConfig, Schedule
from d2ft_peft.head_parallel import HeadParallel, load_head_parallel
from d2ft_peft.head_parallel.exchange import ranks
from d2ft_peft.head_parallel.exchange.rows import Rows
from d2ft_peft.scores import INDEX_KEY, ScoreTable
from tests.distributed.head_parallel import (
    Case,
    adapter_of,
    batches_of,
    join,
    model_of,
    optimizer_of,
    random_schedule,
    rank,
    train_alone,
    train_together,
)
from tests.distributed.launch import run
from tests.distributed.test_head_parallel import assert_equal
from tests.models import TINY


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

# Everything that is trained: heads, what LoRA shares among them, norms, embeddings, task head.
CASES = [Case("vit", "boundary", (3, 2, 1)), Case("llama", "lora", (2, 2, 1)), Case("bert", "full", (1, 2, 2))]
AXES = ("data", "heads")


def mesh(*axes, shape=(2, 2)):
    join()
    return init_device_mesh("cpu", shape, mesh_dim_names=axes or AXES)


def of_replica(replica: int, case: Case, step: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches of a replica; the second has more samples, and its texts are shorter."""
    sizes = tuple(size + replica for size in case.sizes)
    batches = batches_of(Case(case.name, case.mode, sizes), step + 10 * replica)
    if replica and case.name != "vit":
        batches = [{k: v[:, :6] if v.ndim == 2 else v for k, v in batch.items()} for batch in batches]
    return batches


def of_both(case: Case, step: int) -> list[dict[str, torch.Tensor]]:
    return [batch for replica in range(2) for batch in of_replica(replica, case, step)]


def schedule_of_both(case: Case, step: int) -> Schedule:
    one, sizes = random_schedule(case, step), [size + replica for replica in range(2) for size in case.sizes]
    return Schedule(np.tile(one.operations, (2, 1)), sizes, blocks=one.blocks)


def here(case: Case, step: int) -> list[dict[str, torch.Tensor]]:
    return of_replica(rank() // 2, case, step)


def on_four_ranks(folder: str) -> dict:
    """Everything that four ranks do; starting processes takes longer than the runs."""
    shape = mesh()
    results = {
        "runs": [train_together(case, here, mesh=shape) for case in CASES],
        "bits": bits(),
        "accumulated": accumulated_gradients(),
        "planned": planned(),
        "bytes": count(),
        "errors": errors(),
        "saved": save(Path(folder)),
    }
    return {**results, "hang": hang(Path(folder), results)}  # after which nothing works any more


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("mesh")


@pytest.fixture(scope="module")
def four_ranks(folder):
    return run(__name__, "on_four_ranks", folder, str(folder), processes=4, timeout=300)


@pytest.mark.parametrize("index", range(len(CASES)), ids=map(str, CASES))
def test_two_replicas_train_the_weights_of_one_process_that_sees_all_samples(four_ranks, index):
    case = CASES[index]
    assert_equal(four_ranks[0]["runs"][index], train_alone(case, of_both, schedule_of_both))
    for of_rank in four_ranks[1:]:  # the first one gathers
        assert_equal(of_rank["runs"][index], {"losses and norms": four_ranks[0]["runs"][index]["losses and norms"]})
    # Equality is not for want of a difference: one replica's samples give other weights.
    with pytest.raises(AssertionError, match="not close"):
        assert_equal(four_ranks[0]["runs"][index], train_alone(case))


def bits() -> dict[str, torch.Tensor]:
    """What a rank holds after three steps in float32 with clipping."""
    parallel = HeadParallel(model_of(CASES[0], head_parallel=True).float(), mesh=mesh())
    optimizer = torch.optim.AdamW((p for p in parallel.model.parameters() if p.requires_grad), lr=1e-2)
    for step in range(3):
        batches = [{**batch, "pixel_values": batch["pixel_values"].float()} for batch in here(CASES[0], step)]
        parallel.forward_backward(batches, random_schedule(CASES[0], step))
        parallel.clip_grad_norm_(0.1)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in parallel.model.named_parameters() if p.requires_grad}


def test_replicas_stay_alike_to_the_last_bit(four_ranks):
    for first, second in (four_ranks[::2], four_ranks[1::2]):
        for name, value in first["bits"].items():
            assert torch.equal(value, second["bits"][name]), name
    for name, value in four_ranks[0]["bits"].items():
        if value.shape == four_ranks[1]["bits"][name].shape and "layernorm" in name:
            assert torch.equal(value, four_ranks[1]["bits"][name]), name


def accumulated_gradients() -> float:
    """Largest difference between the gradients of a step and half of those of two without zeroing between them."""
    parallel = HeadParallel(model_of(CASES[0], head_parallel=True), mesh=mesh())
    once, twice = [], []
    for gradients in (once, twice):
        parallel.forward_backward(here(CASES[0], 0), random_schedule(CASES[0], 0))
        gradients += [p.grad.clone() for p in parallel.model.parameters() if p.grad is not None]
    return max((b / 2 - a).abs().max().item() for a, b in zip(once, twice, strict=True))


def test_gradients_of_several_steps_add_up(four_ranks):
    for of_rank in four_ranks:
        assert of_rank["accumulated"] < 1e-12


SCORES = torch.tensor([[5.0, 1.0, 0.0], [0.0, 1.0, 6.0]])  # of each replica's three samples


def planned() -> dict:
    """A schedule that the planner makes by scores of samples, one in each micro-batch."""
    case = Case("llama", "lora", (1, 1, 1))
    model = model_of(case, head_parallel=True, num_full=1, backward_score="fisher")
    parallel = HeadParallel(model, mesh=mesh())
    values = SCORES.flatten()[:, None].repeat(1, parallel.planner.partition.num_scheduled)
    parallel.planner.scores["fisher"] = ScoreTable("fisher", np.arange(6), values.numpy())
    replica, batches = rank() // 2, [dict(batch) for batch in here(case, 0)]
    batches = [{name: value[:1] for name, value in batch.items()} for batch in batches]
    for i, batch in enumerate(batches):
        batch[INDEX_KEY] = torch.tensor([3 * replica + i])
    parallel.forward_backward(batches)
    return {"operations": parallel.planner.schedule.operations.tolist(), "logs": parallel.planner.pop_logs()}


def test_all_replicas_run_one_schedule_by_the_mean_of_their_scores(four_ranks):
    for of_rank in four_ranks:
        rows = np.array(of_rank["planned"]["operations"])
        assert (rows[2] == 2).all() and not rows[:2].any()
        assert of_rank["planned"]["logs"]["compute_ratio"] == pytest.approx(1 / 3)


def count() -> dict:
    """Bytes of a step by axis, and what they should be: rows of this replica, gradients of this rank's heads."""
    parallel = HeadParallel(model_of(CASES[0], head_parallel=True), mesh=mesh())
    parallel.traffic.reset()
    parallel.forward_backward(here(CASES[0], 0), random_schedule(CASES[0], 0))
    traffic, cut = parallel.traffic, {id(shard.tensor) for shard in parallel._shards}
    trained = [p for p in parallel.model.parameters() if p.grad is not None]
    return {
        **{axis: traffic.axes[axis] for axis in ("heads", "data", "all")},
        "rows": traffic.rows,
        "of heads": sum(2 * p.grad.nbytes for p in trained if id(p) in cut),
        "of all": sum(2 * p.grad.nbytes for p in trained if id(p) not in cut),
        "checks": traffic.sent["check"] + traffic.received["check"],
    }


def test_bytes_are_counted_by_axis(four_ranks):
    for of_rank in four_ranks:
        found = of_rank["bytes"]
        assert found["heads"] == found["rows"] > 0
        samples = 2 * 8  # how many samples ran here: sent and received
        assert found["data"] == found["of heads"] + samples
        assert found["all"] == found["of all"] + found["checks"] - samples


def message(call) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            call()
    except (ValueError, UserWarning) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def errors() -> dict[str, str]:
    case, odd = CASES[0], rank() == 3
    parallel = HeadParallel(model_of(case, head_parallel=True, interval=1), mesh=mesh())
    schedule, batches = random_schedule(case, 0), here(case, 0)
    step = parallel.forward_backward
    two = Case("vit", "full", (1, 2))

    def with_waves():
        parallel.overlap = min(rank(), 1)
        try:
            step(batches, schedule)
        finally:
            parallel.overlap = 2

    return {
        "batches": message(lambda: step(here(case, int(odd)), schedule)),
        "schedules": message(lambda: step(batches, random_schedule(case, rank() // 2))),
        "numbers": message(lambda: step(batches[: 3 - rank() // 2])),
        "same": message(lambda: step(batches_of(case, 0), schedule)),
        "waves": message(with_waves),
        "weights": message(lambda: HeadParallel(model_of(case, head_parallel=True, seed=int(odd)), mesh=mesh())),
        "axes": message(lambda: HeadParallel(model_of(two, True), mesh=mesh("heads", "data"))),
        "names": message(lambda: HeadParallel(model_of(two, True), mesh=mesh("dp_shard", "tp"))),
        "part": message(lambda: HeadParallel(model_of(two, True), mesh=mesh()["heads"])),
        "capacities": message(lambda: HeadParallel(model_of(two, True, device_capacities=[0.5] * 4), mesh=mesh())),
        "overlap": message(lambda: HeadParallel(model_of(two, True), mesh=mesh(), overlap=-1)),
        "accelerate's names": message(lambda: HeadParallel(model_of(two, True), mesh=mesh("dp_replicate", "tp"))),
        "still works": message(lambda: step(batches, schedule)),
    }


@pytest.mark.parametrize(
    ("what", "says"),
    {
        "batches": "ValueError: the micro-batches on rank 3 differ from those on rank 2; give every rank of a replica",
        "schedules": "ValueError: the schedules on rank 2, 3 differ from those on rank 0; make them from",
        "numbers": "ValueError: the numbers of micro-batches or of waves on rank 2, 3 differ from those on rank 0",
        "same": "UserWarning: all 2 replicas have the same micro-batches; give each its own.",
        "waves": "ValueError: the numbers of micro-batches or of waves on rank 1, 2, 3 differ from those on rank 0",
        "weights": "ValueError: the weights on rank 3 differ from those on rank 0; set the same seed",
        "axes": "ValueError: mesh has axes ('heads', 'data'); it needs 'heads', or 'data' and 'heads' in this order",
        "names": "ValueError: mesh has axes ('dp_shard', 'tp'); it needs",
        "part": "ValueError: mesh=[[",
        "capacities": "ValueError: num_devices=None and device_capacities=[0.5, 0.5, 0.5, 0.5] do not fit 2 processes",
        "overlap": "ValueError: overlap=-1 must be a number of waves, or 0",
        "accelerate's names": "no error",
        "still works": "no error",
    }.items(),
)
def test_errors_speak_on_every_rank_of_every_replica(four_ranks, what, says):
    for of_rank in four_ranks:
        assert of_rank["errors"][what].startswith(says)


def save(folder: Path) -> list:
    parallel = HeadParallel(model_of(CASES[0], head_parallel=True), mesh=mesh())
    state = parallel.gather_state_dict()
    parallel.save_pretrained(folder / "adapter")
    parallel.save_checkpoint(folder / "checkpoint", optimizer_of(parallel.model, CASES[0]))
    return [state is not None, adapter_of(state or {}), parts_differ(folder)]


def parts_differ(folder: Path) -> list[str]:
    """Parameters that differ between a model that is loaded in parts and one that is loaded whole and cut."""
    if rank() == 0:
        TINY["vit"].build().save_pretrained(folder / "whole")
    dist.barrier()
    shape, config = mesh(), {"head_parallel": True, "num_full": 1}
    part = load_head_parallel(TINY["vit"].model, str(folder / "whole"), D2FTConfig(**config), mesh=shape)
    whole = get_peft_model(TINY["vit"].model.from_pretrained(folder / "whole"), D2FTConfig(**config))
    for model in (part, whole):
        HeadParallel(model.train(), mesh=shape)
    of_part, of_whole = dict(part.named_parameters()), dict(whole.named_parameters())
    return [name for name in of_whole if not torch.equal(of_part[name], of_whole[name])]


def test_the_first_rank_of_the_first_replica_saves(four_ranks, folder):
    first, *others = [of_rank["saved"] for of_rank in four_ranks]
    assert first[0] and not any(gathered for gathered, *_ in others)
    assert_equal(first[1], adapter_of(model_of(CASES[0], head_parallel=False).state_dict()))
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    assert (folder / "checkpoint" / "optimizer.safetensors").exists()
    assert not any(differing for *_, differing in (first, *others))


def hang(folder: Path, results: dict) -> str:
    """What a step says in which rank 3 hangs in the second block's combine."""
    exchange = Rows._exchange

    def wait_until_noticed():
        while len(list(folder.glob("noticed*"))) < 3:
            time.sleep(0.05)

    def absent(self, *args):
        if (args[-1], self.place) == ("combine", "block 1 (attention)"):
            torch.save(results, folder / "rank3.pt")  # what the launcher looks for
            wait_until_noticed()
            os._exit(0)
        return exchange(self, *args)

    ranks._REPORT = timedelta(seconds=1)
    parallel = HeadParallel(model_of(CASES[0], head_parallel=True), timeout=timedelta(seconds=3), mesh=mesh())
    if rank() == 3:
        Rows._exchange = absent
    try:
        parallel.forward_backward(here(CASES[0], 0), random_schedule(CASES[0], 0))
    except RuntimeError as error:
        (folder / f"noticed{rank()}").touch()
        if rank() == 0:  # the store that the others ask lives in this process
            wait_until_noticed()
        return str(error)
    return "no error"


def test_a_rank_that_hangs_is_named_by_its_global_number(four_ranks):
    said = [of_rank["hang"] for of_rank in four_ranks[:3]]
    assert said[2].startswith("rank 2 failed in step 1, block 1 (attention), exchange 'combine': no sign of rank 3, it")
    for number in range(2):
        assert said[number].startswith(
            f"rank {number} failed in step 1, after the blocks, exchange 'check': no sign of"
        )
        assert "3, it died or hangs" in said[number]
