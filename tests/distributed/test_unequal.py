"""device_capacities="auto": processes run different numbers of samples, and train what one process trains on all."""

import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.numpy import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from d2ft_peft import D2FTPlanner, D2FTTrainer, Schedule
from d2ft_peft.planning.state import ARRAYS_FILE
from d2ft_peft.unequal import Pace, Shares
from tests.distributed.launch import run
from tests.test_trainer import adapt, arguments, assert_close, doubles, samples, trained


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

CONFIG = {"device_capacities": "auto", "policy": "importance", "compute_budget": 0.6, "interval": 2}
# (model, full or LoRA, gradient accumulation steps); an epoch of 40 samples ends with a shorter step.
RUNS = [
    ("vit", "full", 4), ("vit", "lora", 1), ("llama", "lora", 4), ("llama", "full", 1), ("bert", "full", 4),
    ("bert", "lora", 1),
]  # fmt: skip
STEPS = 7
WAIT = 60.0


def data(name: str) -> list[dict[str, torch.Tensor]]:
    """Forty samples; of texts every third one has fewer tokens that count."""
    items = doubles(samples(name, n=40))
    if name == "llama":
        for item in items[::3]:
            item["labels"][4:] = -100
    return items


meetings: list[None] = []
"""One entry for each time that the processes told each other something besides gradients and logs."""
common_starts: list[None] = []
"""One entry for each time that they waited for each other at the start of a step."""


def told_in_advance() -> None:
    """Process 1 is at first half as fast as process 0, later it is the other way round. Meetings are noted."""
    calls, all_reduce = [], dist.all_reduce

    def noted(*args, **kwargs):
        meetings.append(None)
        return all_reduce(*args, **kwargs)

    def start(self):
        common_starts.append(None)
        return begin_together(self)

    dist.all_reduce, Pace.begin_together, begin_together = noted, start, Pace.begin_together

    def figures(self):
        self._steps.clear()
        calls.append(self)
        slow = dist.get_rank() == (1 if calls.count(self) < 3 else 0)
        return np.array([0.1, 2.0 if slow else 1.0, 1.0])

    Pace.figures, Pace.warm_up, Pace.enough, Shares.first = figures, 0, 1, 1


def train(name: str, mode: str, accumulation: int, folder: str, steps: int = STEPS, **kwargs) -> dict:
    """Weights after some steps, the samples that each step ran here, and what was logged of shares."""
    ran, met = [], []

    class Watching(D2FTTrainer):
        def get_batch_samples(self, *args):
            before = len(meetings)
            batches, items = super().get_batch_samples(*args)
            met.append(len(meetings) - before)
            tasks = [task for task in self._d2ft_session.step_tasks if task.runs]
            ran.append(torch.from_numpy(np.concatenate([task.facts.indices for task in tasks])))
            return batches, items

        def training_step(self, model, *args, **kwargs):
            assert not model.broadcast_buffers
            return super().training_step(model, *args, **kwargs)

    args = arguments(
        folder, per_device_train_batch_size=2 if accumulation > 1 else 8, gradient_accumulation_steps=accumulation,
        max_steps=steps, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, **kwargs,
    )  # fmt: skip
    trainer = Watching(model=adapt(name, mode, **CONFIG), args=args, train_dataset=data(name))
    if name != "llama":
        trainer.accelerator.gather = None  # the number of items is known without it
    common_starts.clear()
    trainer.train(resume_from_checkpoint="save_strategy" in kwargs and steps > STEPS)
    logs = [{k: v for k, v in e.items() if "share" in k or "ratio" in k} for e in trainer.state.log_history[:-1]]
    done = {"weights": trained(trainer.model), "ran": ran, "met": met, "logs": logs}
    return {**done, "common starts": len(common_starts)}


def train_all(folder: str) -> dict:
    """Everything that two processes do; starting them takes longer than the runs."""
    result = {
        "ready": ready_before_the_exchange(Path(folder) / "ready"),
        "bare": in_a_bare_loop(),
        "sharded": under_fsdp(),
    }
    told_in_advance()
    runs = [train(*case, folder) for case in RUNS]
    save = {"save_strategy": "steps", "save_steps": 1}
    whole = train(*RUNS[0], f"{folder}/whole", steps=STEPS, **save)
    return {**result, "runs": runs, "whole": whole, "resumed": train(*RUNS[0], f"{folder}/whole", STEPS + 2, **save)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("unequal")


@pytest.fixture(scope="module")
def processes(folder):
    """What two processes did."""
    return run(__name__, "train_all", folder, str(folder), timeout=300)


def parallel(**config) -> tuple[DistributedDataParallel, D2FTPlanner]:
    """A model under torch's own data parallelism, with a planner, as a bare loop has them."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model = adapt(**{**CONFIG, **config}).train()
    planner = D2FTPlanner(model)
    planner.prepare({key: value[None] for key, value in data("vit")[0].items()})
    return DistributedDataParallel(model), planner


def ready_before_the_exchange(said: Path) -> bool:
    """Whether process 0 says (by a file) that it is ready while process 1 has not begun its backward pass."""
    model, planner = parallel()
    ready = planner.runtime.after_backward

    def say() -> None:
        ready()
        said.touch()

    if dist.get_rank() == 0:
        planner.runtime.after_backward = say
    (positions,) = planner.compose(np.arange(4), 4)
    batch = {key: torch.stack([item[key] for item in data("vit")[:2]]) for key in data("vit")[0]}
    with planner.micro_batch(0):
        loss = model(**batch).loss
        last = time.monotonic() + WAIT
        while dist.get_rank() == 1 and not said.exists() and time.monotonic() < last:
            time.sleep(0.05)
        in_time = said.exists()  # or process 0 is already waiting for this one
        loss.backward()
    return in_time


def under_fsdp() -> str:
    """What is said of a model whose parameters are sharded."""
    model = adapt(**CONFIG).train()
    planner = D2FTPlanner(model)
    planner.prepare({key: value[None] for key, value in data("vit")[0].items()})
    fully_shard(model.base_model.model.vit.layers[1], mesh=init_device_mesh("cpu", (2,)))
    try:
        planner.compose(np.arange(8), 4)
    except ValueError as error:
        return str(error)
    return "nothing"


def in_a_bare_loop() -> dict:
    """Three steps without a Trainer, told that process 1 is slow."""
    model, planner = parallel(policy="fewer_samples")
    planner.shares.take(np.array([[0.0, 1.0, 5.0], [0.0, 3.0, 15.0]]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    items, ran = data("vit"), []
    for step in range(3):
        indices = np.arange(8) + 8 * (2 * step + dist.get_rank()) % 40
        groups = planner.compose(indices, 3)
        for i, positions in enumerate(groups):
            batch = {key: torch.stack([items[j][key] for j in indices[positions]]) for key in items[0]}
            last = i == len(groups) - 1
            with planner.micro_batch(i) as micro_batch, nullcontext() if last else model.no_sync():
                (model(**batch).loss * micro_batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
        ran.append(torch.from_numpy(indices[np.concatenate(groups)]))
    return {"weights": trained(model.module), "ran": ran}


def candidates(accumulation: int, step: int) -> int:
    """Of each process."""
    return 4 if accumulation > 1 and step % 3 == 2 else 8


def train_alone(name: str, mode: str, accumulation: int, steps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """One process, all samples of a step in one micro-batch."""
    items = data(name)
    model = adapt(name, mode, **{**CONFIG, "device_capacities": None}).train()
    planner = D2FTPlanner(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for ran in steps:
        batch = {key: torch.stack([items[i][key] for i in ran]) for key in items[0]}
        planner.use(Schedule.all_full(1, planner.partition.num_scheduled, weights=[len(ran)]))
        with planner.micro_batch(0):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def test_a_process_is_ready_before_it_waits_for_the_others(processes):
    assert processes[1]["ready"]


@pytest.mark.parametrize("index", range(len(RUNS)), ids=[", ".join(map(str, case)) for case in RUNS])
def test_two_unequal_processes_train_the_weights_of_one(processes, index):
    first, second = (process["runs"][index] for process in processes)
    assert_close(first["weights"], second["weights"])
    steps = [torch.cat(parts) for parts in zip(first["ran"], second["ran"], strict=True)]
    assert_close(first["weights"], train_alone(*RUNS[index], steps))
    # Equality is not for want of a difference: if the processes weighed alike, other weights would come out.
    alone = train_alone(*RUNS[index], [ran.repeat_interleave(2)[: len(ran)] for ran in steps])
    assert any(not torch.allclose(alone[name], value) for name, value in first["weights"].items())


def test_fsdp_is_refused(processes):
    """Its processes meet in every block of every micro-batch, and these run different numbers of them."""
    for process in processes:
        assert process["sharded"].startswith("device_capacities='auto' does not run under FSDP")


def test_in_a_usual_step_processes_exchange_nothing_but_gradients(processes):
    """They agree on the length that costs are taken at, meet after the first step here, then after every second one;
    only tokens are summed in every step."""
    for process in processes:
        for done in process["runs"]:
            assert [step for step, met in enumerate(done["met"]) if met] == [0, 1, 2, 4, 6]
        starts = {name: done["common starts"] for (name, _, _), done in zip(RUNS, process["runs"], strict=True)}
        assert starts == {"vit": 0, "llama": STEPS, "bert": 0}


def test_a_checkpoint_knows_of_the_samples_of_all_processes(processes, folder):
    """Also if it is made before they have met for the first time."""
    losses = load_file(folder / "whole" / "checkpoint-1" / ARRAYS_FILE)["live.loss"]
    ran = torch.cat([process["whole"]["ran"][0] for process in processes])
    assert set(np.flatnonzero(~np.isnan(losses))) == set(ran.tolist())


def test_a_bare_loop_trains_the_weights_of_one_process(processes):
    first, second = (process["bare"] for process in processes)
    assert [tuple(map(len, parts)) for parts in zip(first["ran"], second["ran"], strict=True)] == [(8, 2)] * 3
    steps = [torch.cat(parts) for parts in zip(first["ran"], second["ran"], strict=True)]
    assert_close(first["weights"], train_alone("vit", "full", 1, steps))


def test_a_resumed_run_goes_on_with_the_shares_that_it_had(processes):
    resumed = [process["resumed"] for process in processes]
    assert [tuple(map(len, parts)) for parts in zip(*(r["ran"] for r in resumed), strict=True)] == [(3, 7), (4, 1)]
    assert_close(resumed[0]["weights"], resumed[1]["weights"])


def test_the_faster_process_runs_more_and_all_together_what_the_budget_says(processes):
    """0.6 of 8 + 8 candidates are 10 samples, of 4 + 4 at the end of an epoch 5; told of after steps 1, 2, 4 and 6."""
    for index, (_, _, accumulation) in enumerate(RUNS):
        first, second = (process["runs"][index] for process in processes)
        counts = [tuple(map(len, parts)) for parts in zip(first["ran"], second["ran"], strict=True)]
        equal, slow_second, slow_first = {8: (5, 5)}, {8: (7, 3), 4: (4, 1)}, {8: (3, 7), 4: (2, 3)}
        expected = [equal, slow_second, slow_second, slow_second, slow_first, slow_first, slow_first]
        assert counts == [shares[candidates(accumulation, step)] for step, shares in enumerate(expected)]
        for rank in (first, second):
            assert [(e["share_of_process_0"], e["share_of_process_1"]) for e in rank["logs"]] == [
                (ours / candidates(accumulation, step), theirs / candidates(accumulation, step))
                for step, (ours, theirs) in enumerate(counts)
            ]
            assert [e["compute_ratio"] for e in rank["logs"]] == [
                sum(parts) / (2 * candidates(accumulation, step)) for step, parts in enumerate(counts)
            ]
            assert "waiting_share" not in rank["logs"][0]
            assert rank["logs"][1]["waiting_share"] == 0.0
