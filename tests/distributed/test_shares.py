"""Shares of work by measured pace, with a clock and processes that are made up."""

import warnings

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from d2ft_peft import D2FTPlanner, D2FTTrainer
from d2ft_peft.schedule import Budget
from d2ft_peft.unequal import Pace, Shares, shares
from tests.test_trainer import adapt, arguments, doubles, samples


class Clock:
    """A pace whose time is told to it."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        monkeypatch.setattr(Pace, "_now", lambda pace: self.time)
        monkeypatch.setattr(Pace, "warm_up", 1)
        self.pace = Pace(torch.device("cpu"))

    def step(self, before, work, waiting, samples, told=0.0, together=False):
        """A step of these seconds: optimizer and loading, own work, waiting for others; `told` at its start."""
        self.time += before
        self.pace.arrive()
        self.time += told
        if together:
            self.pace.begin_together()
        elif told:
            self.pace.begin()
        for part in (0.25, 0.75):  # of several backward passes the last one counts
            self.time += work * part
            self.pace.ready()
        self.time += waiting
        self.pace.end(samples)


def test_pace_is_own_time_without_waiting(monkeypatch):
    clock = Clock(monkeypatch)
    clock.step(before=0, work=99, waiting=0, samples=1)  # warm-up
    assert not clock.pace.has_figures
    clock.step(before=2, work=8, waiting=5, samples=4)
    clock.step(before=3, work=30, waiting=0, samples=10, told=7)
    clock.step(before=2.5, work=10, waiting=50, samples=4)
    assert clock.pace.has_figures
    assert clock.pace.figures().tolist() == [2.5, 2.5, 12.5]
    assert not clock.pace.has_figures


def test_what_lies_before_a_common_start_makes_no_process_late(monkeypatch):
    clock = Clock(monkeypatch)
    for _ in range(4):
        clock.step(before=3, work=8, waiting=1, samples=4, told=2, together=True)
    assert clock.pace.figures().tolist() == [0, 2, 8]


def test_a_step_whose_backward_pass_was_not_seen_is_an_error(monkeypatch):
    clock = Clock(monkeypatch)
    clock.pace.arrive()
    with pytest.raises(RuntimeError, match="call backward inside the micro-batch's context"):
        clock.pace.end(3)


def test_the_planner_sees_every_backward_pass():
    """On one process nothing is exchanged, and all is measured."""
    with pytest.warns(UserWarning, match=r"there is one: it runs compute_budget=0.5 of its samples"):
        planner = planner_of_four_steps()
    assert planner.shares.counts.tolist() == [4]
    assert planner.pop_logs()["compute_ratio"] == 0.5
    assert planner.shares.pace.has_figures
    fixed, per_sample, busy = planner.shares.pace.figures()
    assert fixed > 0 and per_sample > 0
    assert busy >= 4 * per_sample


def planner_of_four_steps():
    items = doubles(samples(n=8))
    model = adapt(device_capacities="auto", policy="fewer_samples", compute_budget=0.5).train()
    planner = D2FTPlanner(model)
    planner.shares.pace._to_skip = 0
    planner.prepare({key: value[None] for key, value in items[0].items()})
    for _ in range(4):
        for index, positions in enumerate(planner.compose(np.arange(8), 3)):
            batch = {key: torch.stack([items[position][key] for position in positions]) for key in items[0]}
            with planner.micro_batch(index) as micro_batch:
                (model(**batch).loss * micro_batch.weight).backward()
    return planner


@pytest.fixture
def two(monkeypatch):
    """Shares as process 0 of two sees them, for a budget."""
    monkeypatch.setattr(shares, "world_size", lambda: 2)
    monkeypatch.setattr(shares, "rank", lambda: 0)
    return lambda budget: Shares(Budget(compute=budget), torch.device("cpu"))


def told(*per_sample, fixed=0.0):
    """What processes of this pace say of a step."""
    return np.array([[fixed, seconds, fixed + 10 * seconds] for seconds in per_sample])


def test_all_count_as_equal_until_they_know_better(two):
    ours = two(0.6)
    assert ours.share(8) == Budget(compute=5 / 8)
    assert ours.counts.tolist() == [5, 5]
    ours.take(told(1, 2))
    assert ours.share(8) == Budget(compute=7 / 8)
    assert ours.counts.tolist() == [7, 3]
    assert ours.share(4).compute == 1 and ours.counts.tolist() == [4, 1]  # 0.6 of 4 + 4, at the end of an epoch
    assert ours.waiting == pytest.approx(1 - 15 / 20)


def test_fewer_samples_than_processes_are_one_for_each(two):
    assert two(0.1).share(3) == Budget(compute=1 / 3)


def test_counts_stay_where_others_would_save_next_to_nothing(two):
    ours = two(0.6)
    ours.share(40)
    ours.take(told(1, 1.05))
    ours.share(40)
    assert ours.counts.tolist() == [24, 24]  # 25 + 23 would save less than a hundredth
    ours.take(told(1, 1.2))
    ours.share(40)
    assert ours.counts.tolist() == [25, 23]


def test_counts_do_not_swing_where_one_more_sample_costs_a_micro_batch(two):
    """24 samples are three micro-batches of 8, the 25th makes a fourth one necessary, which costs a tenth."""
    ours = two(0.6)
    ours.figures = told(1, 1.2)  # by chance
    seen = []
    for _ in range(6):
        ours.share(40)
        seen.append(ours.counts.tolist())
        ours.take(told(*(1.1 if count > 24 else 1.0 for count in ours.counts)))
    assert seen[0] != [24, 24] and seen[3:] == [[24, 24]] * 3


def test_a_device_that_changes_its_speed_is_believed_at_once(two):
    ours = two(0.6)
    ours.take(told(1, 2))
    ours.take(told(2, 1))
    ours.share(40)
    assert ours.counts.tolist() == [16, 32]


def test_a_process_without_further_candidates_is_spoken_of_once(two):
    ours = two(0.9)
    ours.take(told(1, 2))
    with pytest.warns(UserWarning, match=r"process 0 runs all of its 40 candidates and still waits 38% of the step.*"
                      r"\[40, 32\] samples in \[40.0, 64.0\] s.*compute_budget to at most 0.75"):  # fmt: skip
        ours.share(40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.share(20)
        at_most = two(0.75)
        at_most.take(told(1, 2))
        at_most.share(40)
    assert at_most.counts.tolist() == [40, 20]


def test_a_policy_that_runs_another_number_is_refused(two):
    ours = two(0.5)
    ours.share(8)
    assert ours.total(4) == 8
    with pytest.raises(ValueError, match="gave this process 4 samples and the policy ran 5"):
        ours.total(5)


def test_figures_survive_a_checkpoint_of_as_many_processes(two, monkeypatch):
    ours, resumed = two(0.6), two(0.6)
    assert ours.state() is None
    ours.take(told(1, 2))
    resumed.load_state(ours.state())
    resumed.share(8)
    assert resumed.counts.tolist() == [7, 3]
    monkeypatch.setattr(shares, "world_size", lambda: 3)
    other = Shares(Budget(compute=0.6), torch.device("cpu"))
    other.load_state(ours.state())
    other.share(10)
    assert other.counts.tolist() == [6, 6, 6]


def test_the_trainer_refuses_fsdp(tmp_path, monkeypatch):
    model = adapt(device_capacities="auto", policy="fewer_samples", compute_budget=0.5)
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples())
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", plugin, raising=False)
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="device_capacities='auto' does not run under FSDP: .*use Distributed"):
        trainer.train()


def test_the_trainer_does_not_let_processes_weigh_alike(tmp_path):
    model = adapt(device_capacities="auto", policy="fewer_samples", compute_budget=0.5)
    args = arguments(tmp_path, average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="average_tokens_across_devices=False would weigh the processes alike"):
        D2FTTrainer(model=model, args=args, train_dataset=samples()).train()
