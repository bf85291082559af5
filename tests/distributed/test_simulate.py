"""The simulator: bytes as in real runs, limits that are known, and a step worked out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from d2ft_peft import Schedule, partition_model
from d2ft_peft.costs.flops import cost_model
from d2ft_peft.costs.probe import probe_model
from d2ft_peft.head_parallel import HeadParallel, place_subnets
from d2ft_peft.head_parallel.exchange.traffic import BACKWARD, FORWARD
from d2ft_peft.simulate import (
    Cluster,
    Device,
    Link,
    Workload,
    data_parallel,
    fit_line,
    head_parallel,
    tensor_parallel,
    workload_of_model,
)
from tests.distributed.head_parallel import Case, batches_of, join, model_of, random_schedule
from tests.distributed.launch import run
from tests.models import TINY


CASES = [
    Case("vit", "boundary", (3, 1, 2, 2)),
    Case("vit", "lora", (3, 1, 2, 2)),
    Case("llama", "boundary", (2, 2, 2)),
    Case("gpt2", "lora", (1, 2, 1, 2, 1)),
]
PURPOSES = (*FORWARD, *BACKWARD)
FREE = Link(0.0, np.inf)


def workload_of(name: str, lora: bool = False, **kwargs) -> Workload:
    return workload_of_model(TINY[name].build(), TINY[name].batch(), lora_rank=4 if lora else None, **kwargs)


def cluster_of(size: int, link: Link = FREE, flops: float = 1e9) -> Cluster:
    return Cluster((Device(flops),) * size, link)


def uniform(workload: Workload, *rows: int, size: int = 2) -> Schedule:
    """Every row has one operation in all subnets."""
    partition = workload.partition
    operations = np.repeat(np.array(rows)[:, None], partition.num_scheduled, axis=1)
    return Schedule(operations, [size] * len(rows), blocks=partition.subnet_blocks)


def randomly(workload: Workload, seed: int, n: int = 5) -> Schedule:
    rng = np.random.default_rng(seed)
    operations = rng.integers(0, 3, (n, workload.partition.num_scheduled))
    return Schedule(operations, rng.integers(1, 4, n), blocks=workload.partition.subnet_blocks)


def schedule_of(case: Case, step: int) -> Schedule:
    """Random operations; in the third step the lowest block has no FULL heads, so under LoRA nothing asks it for
    gradients."""
    schedule = random_schedule(case, step % 2)
    if step < 2:
        return schedule
    operations = schedule.operations.copy()
    operations[:, schedule.blocks == 0] = 1
    return replace(schedule, operations=operations)


def count() -> dict:
    """Bytes of three steps of every case, by purpose: sent and received."""
    join()
    found = {}
    for case in CASES:
        parallel = HeadParallel(model_of(case, head_parallel=True))
        for step in range(3):
            parallel.traffic.reset()
            parallel.forward_backward(batches_of(case, step), schedule_of(case, step))
            traffic = parallel.traffic
            found[f"{case}, step {step}"] = [(traffic.sent[p], traffic.received[p]) for p in (*PURPOSES, "gradients")]
    return found


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    return run(__name__, "count", tmp_path_factory.mktemp("simulate"), processes=2)


@pytest.mark.thorough
@pytest.mark.distributed
@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_that_two_processes_move(counted, case, step):
    workload = workload_of(case.name, case.mode == "lora", bytes_per_number=8)
    prediction = head_parallel(workload, cluster_of(2), schedule_of(case, step))
    for rank, of_rank in enumerate(counted):
        measured = of_rank[f"{case}, step {step}"]
        predicted = [(prediction.sent[p][rank], prediction.received[p][rank]) for p in PURPOSES]
        assert predicted == measured[:-1], f"rank {rank}"
        assert sum(sent for sent, _ in measured[:-1]) > 0


@pytest.mark.thorough
@pytest.mark.distributed
def test_gradients_that_are_summed_are_those_that_two_processes_sum(counted):
    for case in CASES[:3]:
        workload = workload_of(case.name, case.mode == "lora", bytes_per_number=8)
        prediction = head_parallel(workload, cluster_of(2), schedule_of(case, 0))
        measured = [of_rank[f"{case}, step 0"][-1] for of_rank in counted]
        assert [
            (s, r) for s, r in zip(prediction.sent["gradients"], prediction.received["gradients"], strict=True)
        ] == measured


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("lora", [False, True])
def test_flops_are_those_of_the_cost_model(name, lora):
    model, batch = TINY[name].build(), TINY[name].batch()
    model.requires_grad_(not lora)  # a frozen model: what LoRA's own factors cost is left out
    workload = workload_of_model(model, batch, lora_rank=4 if lora else None)
    partition = workload.partition
    model.get_input_embeddings().requires_grad_(True)  # else nothing of a frozen model has a backward pass
    costs = cost_model(model, partition, probe_model(model, partition, batch))
    assert costs.forward.sum() == sum(b.heads * workload.forward(b) for b in partition.branches)
    assert costs.backward.sum() == sum(b.heads * workload.backward(b) for b in partition.branches)
    assert (costs.below_forward, costs.above_forward) == (workload.below, workload.above)
    assert workload.head_parameters + workload.boundary_parameters == sum(p.numel() for p in model.parameters())


def test_lora_has_the_parameters_that_it_has():
    model = model_of(Case("llama", "lora", (1,)), head_parallel=False)
    workload = workload_of("llama", lora=True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert workload.trained_of_heads + workload.trained_of_all == trained


def test_a_step_by_hand():
    """One block and one micro-batch, which lives on device 0; device 1 has half of the heads."""
    partition = partition_model(TINY["vit"].build(num_hidden_layers=1))
    workload = Workload(partition, tokens=5, bytes_per_number=4, boundary_parameters=100)
    attention, ffn = partition.branches
    rows = 2 * 5 * 32 * 4  # samples, tokens, width, bytes
    products = 4 * 5 * 8  # the attention products of a head of width 8, per token
    of_attention = 2 * 5 * (2 * 4 * 32 * 8 + products)  # samples, tokens, four projections of 32 x 8
    of_ffn = 2 * 5 * (2 * 2 * 32 * 12)
    assert 2 * workload.forward(attention) == of_attention and 2 * workload.forward(ffn) == of_ffn
    cluster = Cluster((Device(2e6, 0.25), Device(1e6, 0.5)), Link(10.0, 64.0))
    # Device 1 is the slower one, with the longer overhead; every exchange is there and back.
    forward = 4 * (10 + rows / 64) + (2 * of_attention + 2 * of_ffn) / 1e6 + 2 * 0.5
    more = 2 * 5 * (2 * 4 * 32 * 8 + 1.5 * products) * 2 / 1e6  # the backward pass on top of the forward pass
    backward = forward + more + 2 * of_ffn / 1e6
    gradients = 2 * (10 + 400 / 2 / 64)
    prediction = head_parallel(workload, cluster, uniform(workload, 2))
    assert prediction.seconds == pytest.approx(40 + forward + backward + gradients, rel=1e-12)
    assert prediction.sent["dispatch"].tolist() == [2 * rows, 0]
    assert prediction.received["combine"].tolist() == [2 * rows, 0]
    # FORWARD_ONLY: rows do not travel back.
    once = head_parallel(workload, cluster, uniform(workload, 1))
    assert once.seconds == pytest.approx(40 + forward + gradients, rel=1e-12)


@pytest.mark.parametrize("name", ["vit", "bert", "llama", "gpt2"])
def test_without_a_cost_of_exchanges_a_step_is_its_computation(name):
    workload = workload_of(name)
    for size in (1, 2):
        prediction = head_parallel(replace(workload, below=0, above=0), cluster_of(size), uniform(workload, 2, 2, 2, 2))
        per_sample = sum(b.heads * (workload.forward(b) + workload.backward(b)) for b in workload.partition.branches)
        assert prediction.seconds == pytest.approx(8 * per_sample / size / 1e9, rel=1e-12)
        assert prediction.compute == pytest.approx(prediction.seconds)
        assert prediction.max_over_mean == pytest.approx(1)


@pytest.mark.parametrize("size", [2, 4])
def test_all_full_moves_the_bytes_of_tensor_parallelism(size):
    workload, cluster = workload_of("vit"), cluster_of(size)
    theirs = tensor_parallel(workload, cluster, samples=16)
    for rows, share in (((2,) * 8, 1), ((2, 2, 0, 0) * 2, 0.5), ((2,) * 4 + (1,) * 4, 0.75)):
        ours = head_parallel(workload, cluster, uniform(workload, *rows))
        for counter in ("sent", "received"):
            both = [sum(getattr(p, counter)[purpose] for purpose in PURPOSES) for p in (ours, theirs)]
            np.testing.assert_allclose(both[0], share * both[1])


@pytest.mark.parametrize("seed", range(5))
def test_faster_links_and_overlap_never_hurt(seed):
    workload = workload_of("vit")
    schedule = randomly(workload, seed)
    devices = (Device(1e9), Device(0.5e9))
    at = [head_parallel(workload, Cluster(devices, Link(1e-4, b)), schedule) for b in (1e6, 1e7, 1e8, np.inf)]
    seconds = [prediction.seconds for prediction in at]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > seconds[-1]
    assert head_parallel(workload, Cluster(devices, Link(1e-2, 1e8)), schedule).seconds > at[2].seconds
    overlapped = head_parallel(workload, Cluster(devices, Link(1e-4, 1e7)), schedule, overlap=True)
    assert at[1].compute.max() <= overlapped.seconds < at[1].seconds
    assert sum(overlapped.sent["dispatch"]) == sum(at[1].sent["dispatch"])


@pytest.mark.parametrize("seed", range(5))
def test_compute_is_what_the_schedule_says(seed):
    workload = workload_of("vit")
    schedule, ranks = randomly(workload, seed), place_subnets(workload.partition, 2)
    prediction = head_parallel(workload, Cluster((Device(1e9), Device(0.5e9)), Link(1e-3, 1e7)), schedule)
    forward = sum(workload.forward(b) for b in workload.partition.branches) / 3  # of one of the three blocks
    backward = sum(workload.backward(b) for b in workload.partition.branches) / 3
    for rank, flops in enumerate((1e9, 0.5e9)):
        cells = schedule.operations[:, ranks == rank]
        active, full = (schedule.weights @ (cells >= least).sum(axis=1) for least in (1, 2))
        assert prediction.compute[rank] == pytest.approx((active * forward + full * backward) / flops)


def test_one_device_is_one_device():
    workload = workload_of("llama")
    alone = head_parallel(workload, cluster_of(1, Link(1.0, 1.0)), uniform(workload, 2, 2))
    assert not any(sent.any() for sent in alone.sent.values())
    data = data_parallel(workload, cluster_of(1), samples=4)
    extra = 4 * workload.below / 1e9  # the engine makes all embeddings once more, to learn the inputs of the blocks
    waiting = 4 * 1.0  # the checks
    assert alone.seconds - extra - waiting == pytest.approx(data.seconds)
    with_norms = Cluster((Device(1e9, row_bandwidth=1e6),), Link(1.0, 1.0))
    rows = 4 * workload.row_bytes * len(workload.partition.branches)
    assert head_parallel(workload, with_norms, uniform(workload, 2, 2)).seconds - alone.seconds == pytest.approx(
        rows / 1e6
    )
    assert data_parallel(workload, with_norms, samples=4).seconds - data.seconds == pytest.approx(rows / 1e6)


def test_an_exchange_takes_as_long_as_its_busiest_device():
    link = Link(0.5, 2.0)
    assert link.exchange(np.array([[9, 0, 3], [0, 9, 3], [0, 0, 9]])) == 0.5 + 6 / 2
    assert link.exchange(np.array([[9, 3, 3], [0, 9, 1], [0, 0, 9]])) == 0.5 + 6 / 2
    assert link.exchange(np.diag([9, 9])) == 0
    assert link.all_reduce(8.0, 4) == pytest.approx(2 * (2 * 0.5 + 3 / 4 * 8 / 2))
    assert link.all_reduce(8.0, 1) == link.all_reduce(0.0, 4) == 0


def test_data_parallelism_hides_gradients_behind_the_backward_pass():
    workload = workload_of("vit")
    gradients = (workload.head_parameters + workload.boundary_parameters) * 4
    free, busy = (data_parallel(workload, cluster_of(4, link), samples=8) for link in (FREE, Link(0.0, 1e9)))
    plain = data_parallel(workload, cluster_of(4, Link(0.0, 1e9)), samples=8, overlap=False)
    assert plain.seconds - free.seconds == pytest.approx(2 * 3 / 4 * gradients / 1e9)
    assert free.seconds <= busy.seconds < plain.seconds
    assert busy.sent["gradients"].tolist() == [2 * 3 / 4 * gradients] * 4
    slow = data_parallel(workload, cluster_of(4, Link(0.0, 1e3)), samples=8)
    assert slow.seconds == pytest.approx(2 * 3 / 4 * gradients / 1e3, rel=0.01)


def test_replicas_add_samples_and_a_sum_of_gradients():
    workload = workload_of("vit")
    one = cluster_of(2, Link(1e-4, 1e8))
    four = replace(one, replicas=4, replica_link=Link(1e-3, 1e7))
    for predict in (
        lambda cluster: head_parallel(workload, cluster, uniform(workload, 2, 0)),
        lambda cluster: tensor_parallel(workload, cluster, samples=4),
    ):
        alone, together = predict(one), predict(four)
        assert together.samples == 4 * alone.samples
        owned = workload.boundary_parameters + workload.head_parameters / 2
        assert together.seconds - alone.seconds == pytest.approx(2 * (2 * 1e-3 + 3 / 4 * owned * 4 / 1e7))


def test_memory_falls_with_the_devices_that_share_the_model():
    workload = workload_of("vit", state_bytes=12)
    whole, boundary = workload.head_parameters, workload.boundary_parameters
    cluster = Cluster((Device(1e9, memory=16 * (whole / 2 + boundary)),) * 2)
    ours = head_parallel(workload, cluster, uniform(workload, 2))
    assert ours.memory == 16 * (whole / 2 + boundary) and ours.fits
    theirs = data_parallel(workload, cluster, samples=2)
    assert theirs.memory == 16 * (whole + boundary) and not theirs.fits
    assert data_parallel(workload, cluster, samples=2, sharded=True).memory < theirs.memory


def test_capacities_by_speed_balance_a_mixed_group():
    workload = workload_of("vit")
    ranks = place_subnets(workload.partition, 2)
    full = np.where(ranks == 0, 4, 2)
    operations = 2 * (np.arange(5)[:, None] < full)
    schedule = Schedule(operations, [2] * 5, blocks=workload.partition.subnet_blocks)
    mixed = Cluster((Device(1e9), Device(0.5e9)), Link(1e-5, 1e9))
    assert head_parallel(workload, mixed, schedule).max_over_mean == pytest.approx(1)
    assert head_parallel(workload, mixed, uniform(workload, 2, 2, 2, 0, 0)).max_over_mean == pytest.approx(4 / 3)


def test_a_line_is_found_and_noise_is_not_taken_for_negative_time():
    amounts = np.array([1e3, 1e5, 1e6])
    latency, rate = fit_line(amounts, 0.002 + amounts / 5e7)
    assert latency == pytest.approx(0.002) and rate == pytest.approx(5e7)
    latency, rate = fit_line([1.0, 2.0], [1.0, 2.5])
    assert latency == 0 and 0.8 < rate < 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Device(0.0), "Device.flops=0.0 must be positive"),
        (lambda: Link(-1.0, 1.0), "Link.latency=-1.0 must be not negative"),
        (lambda: Link(0.0, 0.0), "Link.bandwidth=0.0 must be positive"),
        (lambda: Cluster(()), "a cluster of 0 devices x 1 replicas"),
        (lambda: fit_line([1.0, 1.0], [1.0, 2.0]), "at least two sizes"),
        (lambda: fit_line([1.0, 2.0], [2.0, -1.0]), "positive seconds"),
        (lambda: fit_line([1.0, 10.0], [2.0, 1.0]), "seconds do not grow with the amount"),
        (lambda: head_parallel(w := workload_of("vit"), cluster_of(8), uniform(w, 2)), "8 processes cannot share"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_model_without_weights_will_do():
    with torch.device("meta"):
        model = TINY["llama"].model(TINY["llama"].config(**TINY["llama"].kwargs, attn_implementation="eager"))
        ids = torch.ones(1, 7, dtype=torch.long)
        batch = {"input_ids": ids, "attention_mask": ids, "use_cache": False}
    assert workload_of_model(model, batch) == workload_of("llama")
