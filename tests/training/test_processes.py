"""Two gloo processes that differ: in the lengths of their batches, in what counts of their labels, in what ran."""

import contextlib
import tempfile

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import IterableDataset

from d2ft_peft import D2FTPlanner, D2FTTrainer, Operation, Schedule, register_policy
from d2ft_peft.schedule import policy_facts, policy_names
from d2ft_peft.schedule.policies import registry
from tests.distributed.launch import run
from tests.distributed.test_head_parallel_use import message
from tests.models import TINY
from tests.test_trainer import adapt, arguments, samples, trained
from tests.training.test_step_log import InOrder, pad, texts


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]

# Batches of two: short ones for process 0, long ones for process 1; the last of an epoch has one sample less.
LENGTHS = [length for _ in range(10) for length in (4, 5, 90, 60)] + [4, 3, 70]
POLICIES = {
    name: {"policy": name, "compute_budget": {"all_full": 1.0, "drop_bp": 0.8, "lisa": 0.8}.get(name, 0.6),
           "forward_score": "weight_magnitude"}
    for name in policy_names() if policy_facts(name).rows == "micro_batches" and not name.startswith("test")
}  # fmt: skip

SOME = ("bilevel", "depth", "random")


def train(config, accumulation, data=None, **kwargs):
    model = adapt("llama", "lora", **config).float()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(
            folder, gradient_accumulation_steps=accumulation, max_steps=4, optim="sgd", max_grad_norm=0, ddp_timeout=60,
            **kwargs,
        )  # fmt: skip
        trainer = InOrder(model=model, args=args, train_dataset=data or texts(LENGTHS), data_collator=pad)
        trainer.train()
    return trained(model), trainer.planner.schedule.digest()


def bare_loop(config, no_sync):
    """The loop of the documentation, with an Accelerator, on batches of this process."""
    accelerator = Accelerator(cpu=True)
    model = adapt("llama", "lora", **config).float()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    planner = D2FTPlanner(model)
    wrapped.train()
    for step in range(3):
        batches = [TINY["llama"].batch(2, seed=100 * step + 10 * i + dist.get_rank()) for i in range(4)]
        planner.plan(batches)
        for i, batch in enumerate(batches):
            with planner.micro_batch(i) as micro_batch:
                if micro_batch.skipped:
                    continue
                waits = no_sync and not micro_batch.last
                with accelerator.no_sync(wrapped) if waits else contextlib.nullcontext():
                    accelerator.backward(wrapped(**batch).loss * micro_batch.weight)
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def bare_loop_alone(config):
    """The same on one process that sees the samples of both."""
    model = adapt("llama", "lora", **config).float().train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    planner = D2FTPlanner(model)
    for step in range(3):
        pairs = [[TINY["llama"].batch(2, seed=100 * step + 10 * i + r) for r in (0, 1)] for i in range(4)]
        batches = [{key: torch.cat([one[key] for one in pair]) for key in pair[0]} for pair in pairs]
        planner.plan(batches)
        for i, batch in enumerate(batches):
            with planner.micro_batch(i) as micro_batch:
                if not micro_batch.skipped:
                    (model(**batch).loss * micro_batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    return trained(model)


def drifts(problem):
    """A policy that draws from a source of its own."""
    order = np.arange(problem.num_micro_batches) == dist.get_rank()
    return Schedule(np.where(order[:, None], Operation.FULL, 0) * np.ones((1, problem.num_subnets), dtype=np.int8))


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples("llama"))


def refusals():
    """What cannot work on several processes says so before anybody waits."""
    register_policy("test_drifts")(drifts)

    def trainer(config, data=None, static_graph=None, **kwargs):
        with tempfile.TemporaryDirectory() as folder:
            model = adapt("llama", "lora", **config).float()
            args = arguments(folder, accelerator_config=kwargs, ddp_timeout=60, ddp_static_graph=static_graph)
            D2FTTrainer(model=model, args=args, train_dataset=data or samples("llama")).train()

    return {
        "even_batches": message(lambda: trainer({"compute_budget": 0.5}, even_batches=False)),
        "dispatch_batches": message(lambda: trainer({"policy": "importance"}, dispatch_batches=True)),
        "static_graph": message(lambda: trainer({"compute_budget": 0.5}, static_graph=True)),
        "schedules": message(lambda: trainer({"policy": "test_drifts"})),
        "dispatched, as they come": message(lambda: trainer({"compute_budget": 0.5}, dispatch_batches=True)),
        "a stream": message(lambda: trainer({"compute_budget": 0.5}, Stream())),
    }


def in_two_processes() -> dict:
    """Everything that these tests look at: starting processes takes longer."""
    return {
        "steps": {name: train(POLICIES[name], 1) for name in SOME},
        "accumulated": {name: train(POLICIES[name], 4) for name in SOME},
        "exchanging every micro-batch": {name: bare_loop(POLICIES[name], False) for name in SOME},
        "exchanging once": {name: bare_loop(config, True) for name, config in POLICIES.items()},
        "refusals": refusals(),
    }


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
        patch.setattr(registry, "_FACTS", dict(registry._FACTS))
        yield run(__name__, "in_two_processes", tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("kind", ["steps", "accumulated"])
@pytest.mark.parametrize("policy", SOME)
def test_processes_with_batches_of_other_lengths_run_one_schedule(processes, policy, kind):
    """With one micro-batch a step, processes that disagree whether it runs would wait for each other for ever."""
    (first, schedule), (second, other) = (process[kind][policy] for process in processes)
    assert schedule == other
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "kind, policy",
    [*(("exchanging every micro-batch", name) for name in SOME), *(("exchanging once", name) for name in POLICIES)],
)
def test_a_bare_loop_on_two_processes_equals_one(processes, kind, policy):
    first, second = (process[kind][policy] for process in processes)
    alone = bare_loop_alone(POLICIES[policy])
    for name, value in alone.items():
        torch.testing.assert_close(second[name], first[name], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "what, says",
    [
        ("even_batches", "ValueError: even_batches=False leaves some processes without a batch"),
        ("dispatch_batches", "ValueError: dispatch_batches=True lets the first process load for all"),
        ("static_graph", "ValueError: ddp_static_graph=True promises DistributedDataParallel the same graph"),
        ("schedules", "ValueError: the schedule of process 1 differs from that of process 0"),
        ("dispatched, as they come", "no error"),
        ("a stream", "no error"),
    ],
)
def test_what_cannot_work_is_refused_on_every_process(processes, what, says):
    for process in processes:
        assert process["refusals"][what].startswith(says)
