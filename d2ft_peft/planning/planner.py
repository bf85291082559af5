"""From batches to plans: scores, cost model and policy make the schedule of each optimizer step.

`D2FTPlanner` is what the Trainer, the callback and a bare loop share:

    planner = D2FTPlanner(model)
    schedule = planner.plan(batches)                   # the micro-batches of one optimizer step
    for i, batch in enumerate(batches):
        with planner.micro_batch(i) as micro_batch:
            if not micro_batch.skipped:
                loss = model(**batch).loss * micro_batch.weight
                accelerator.backward(loss)

Where the policy schedules samples (``rows="samples"``), it composes the micro-batches:

    planner.prepare(batch)                             # once, any batch: what the model costs
    for i, positions in enumerate(planner.compose(indices, size)):
        batch = collate([dataset[indices[p]] for p in positions])
        with planner.micro_batch(i) as micro_batch:
            outputs = model(**batch)
            accelerator.backward(outputs.loss * micro_batch.weight)
            planner.observe(indices[positions], outputs.logits, batch["labels"])
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..costs.flops import cost_model
from ..costs.probe import Probe, probe_model
from ..engine import compile_plan, get_runtime
from ..engine.plan import executed_operations
from ..partition import base_model
from ..processes import all_reduce, world_size
from ..schedule import Budget, CostModel, Problem, Schedule, compose, get_policy, policy_facts
from ..scores import INDEX_KEY, ScoreSource, ScoreTable
from ..unequal import Shares
from .micro_batch import MicroBatch, batch_size


class D2FTPlanner:
    """Makes the schedule of every optimizer step, and counts what was executed.

    Args:
        model: A model wrapped with a `D2FTConfig`; its active adapter's configuration holds.
        num_micro_batches: Micro-batches of a usual step; a shorter one is the rest of an epoch. By default those of
            the first step.
        progress: Whether scoring passes show a progress bar.

    Attributes:
        config: The `D2FTConfig`.
        partition: The subnets.
        schedule: The schedule of the current step, or None before the first.
        executed: Schedules of the steps since the last `pop_logs`, as they were executed.
        source: Where scores of samples come from.
        shares: How samples are shared out over unequal processes, or None if all run equally many.
        step: Number of schedules made so far.
        each_is_a_step: Whether an optimizer step follows every micro-batch instead of the last one.
    """

    is_head_parallel = False
    """Whether all processes get the same micro-batches, and share out the heads."""

    def __init__(self, model: nn.Module, num_micro_batches: int | None = None, progress: bool = True):
        self.model, self.num_micro_batches, self.progress = model, num_micro_batches, progress
        self.runtime = get_runtime(model)
        adapter = model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapters()[0]
        self.config, self.partition = model.peft_config[adapter], self.runtime.partitions[adapter]
        if self.config.head_parallel and not self.is_head_parallel:
            raise ValueError(
                "head_parallel=True: the processes share out the heads of the model, which a planner on its own does "
                "not drive; train with D2FTTrainer or d2ft_peft.head_parallel.HeadParallel, or set "
                "model.peft_config['default'].head_parallel = False."
            )
        self.policy = get_policy(self.config.policy)
        self.rng = np.random.default_rng(self.config.seed)
        self.step = 0
        self.probe: Probe | None = None
        self.cost_model: CostModel | None = None
        self.schedule: Schedule | None = None
        self.executed: list[Schedule] = []
        self.each_is_a_step = False
        names = tuple(dict.fromkeys(self._score_name(kind) for kind in self._kinds_read))
        self.source = ScoreSource(model, self.partition, names, self.config.interval)
        base = base_model(model)
        projections = [base.get_submodule(name) for name in self.partition.projections]
        self._subnet_parameters = [p for module in projections for p in module.parameters()]
        self.shares: Shares | None = None
        if self.config.is_auto:
            self.shares = Shares(self.config.budget, self._subnet_parameters[0].device)
            self.runtime.after_backward = self.shares.pace.ready
        self._micro_batches: list[MicroBatch] = []
        self._rows: dict[int, np.ndarray] = {}
        self._sizes = np.zeros(0)
        self._last_index = 0
        self._last_row: np.ndarray | None = None

    @property
    def scores(self) -> dict[str, ScoreTable]:
        """Tables of the scores that were made before training, by name."""
        return self.source.tables

    @property
    def schedules_samples(self) -> bool:
        """Whether the rows of a schedule are samples, so that micro-batches are composed."""
        return self.config.rows == "samples"

    def _score_name(self, kind: str) -> str:
        return getattr(self.config, f"{kind}_score")

    @property
    def _kinds_read(self) -> tuple[str, ...]:
        """Which of the backward and forward score the policy looks at, given the budget."""
        reads = policy_facts(self.config.policy).reads
        n = self.num_micro_batches or self.config.num_micro_batches
        if self.config.policy == "bilevel" and not self.config.budget.leaves_forward_only_a_choice(n):
            reads = ("backward",)
        return reads

    def plan(self, batches: Sequence[dict[str, Any]]) -> Schedule:
        """Schedule the micro-batches of one optimizer step; every process of a distributed run makes the same.

        Args:
            batches: The micro-batches. Those that carry ``d2ft_index`` are looked up in the score tables; the key is
                removed from them.

        Returns:
            The schedule; `micro_batch` runs its rows.
        """
        if not batches:
            raise ValueError("batches is empty; plan the micro-batches of one optimizer step.")
        if self.schedules_samples:
            raise ValueError(f"policy={self.config.policy!r} schedules samples; call compose(indices, size), not plan.")
        indices = [batch.pop(INDEX_KEY, None) for batch in batches]
        sizes = np.array([batch_size(batch) for batch in batches])
        self.prepare(batches[0])
        self._share_at_interval()
        global_sizes = self._sum_over_replicas(sizes)
        known = all(index is not None for index in indices)
        samples = np.concatenate([index.cpu().numpy() for index in indices]) if known else None
        starts = np.cumsum(sizes) - sizes

        def mean(values: np.ndarray) -> np.ndarray:
            """Over the samples of each micro-batch, in all processes."""
            return self._sum_over_replicas(np.add.reduceat(values, starts)) / global_sizes[:, None]

        self.use(self.policy(self._problem(samples, mean, self._budget(len(batches)), global_sizes)), sizes)
        return self.schedule

    def _sum_over_replicas(self, values: np.ndarray) -> np.ndarray:
        """Sum over the processes that have different data."""
        return all_reduce(values)

    def compose(self, indices: Sequence[int], size: int) -> list[np.ndarray]:
        """Schedule the samples of one optimizer step, and compose micro-batches of those that run.

        Several processes run whole samples, equally many each unless ``device_capacities="auto"``. So they need not ask
        each other in a usual step; every ``interval`` steps they tell each other what they saw.

        Args:
            indices: Indices of the candidates in the data set, [n]; every process of a distributed run gives its own,
                equally many.
            size: Most samples of a micro-batch.

        Returns:
            For each micro-batch, in the order of `micro_batch`, the positions of its samples among the candidates.

        Raises:
            ValueError: If `prepare` was not called, or samples run in part in a run of several processes.
        """
        if self.cost_model is None:
            raise ValueError("compose needs the model's costs; call prepare(batch) once, with any collated batch.")
        indices = np.asarray(indices)
        if self.shares is not None:
            self.shares.begin_step(self.model)
        self._share_at_interval()
        if self.shares is not None:
            budget = self.shares.share(len(indices))
        else:
            usual = self.num_micro_batches or self.config.num_micro_batches
            budget = self.config.budget.of_samples(len(indices), usual)
        samples = self.policy(self._problem(indices, np.asarray, budget, np.ones(len(indices))))
        composition = compose(samples, size)
        ran = sum(map(len, composition.micro_batches))
        ran = ran * world_size() if self.shares is None else self.shares.total(ran)
        self.use(*composition.among_processes(ran, len(indices) * world_size()))
        self.pass_over()
        return list(composition.micro_batches)

    def _share_at_interval(self) -> None:
        if self.step and (self.step % self.config.interval == 0 or (self.shares and self.step == Shares.first)):
            self.share()

    def share(self) -> None:
        """Tell the other processes which scores of samples, and which pace, this one has seen since the last time.

        `plan` and `compose` do so every ``interval`` steps. Before a checkpoint every process calls it, so that what
        one of them writes holds for all.
        """
        self.source.share()
        if self.shares is not None:
            self.shares.exchange()
            self.shares.pace.begin()

    def observe(self, indices: np.ndarray, logits: Tensor, labels: Tensor) -> None:
        """Let scores that follow training see a forward pass of this process.

        Args:
            indices: Indices of its samples in the data set, [n].
            logits: Outputs [n, ..., classes].
            labels: Their labels.
        """
        if self.source.live:
            values = self.source.observe(logits.detach(), labels)
            self.source.update(np.asarray(indices), values, self.step)

    def _problem(
        self,
        samples: np.ndarray | None,
        to_rows: Callable[[np.ndarray], np.ndarray],
        budget: Budget,
        weights: np.ndarray,
    ) -> Problem:
        """The next step's problem; `to_rows` makes scores of rows [N, K] of those of samples [n, K]."""
        shape = (len(weights), self.partition.num_scheduled)

        def scores(kind: str) -> np.ndarray:
            if kind not in self._kinds_read:
                return np.ones(shape)
            values = self.source.of(self._score_name(kind), samples, self.step)
            return np.broadcast_to(values, shape) if values.ndim == 1 else to_rows(values)

        problem = Problem(
            scores("forward"),
            scores("backward"),
            budget=budget,
            weights=weights,
            **self._facts,
            tie_break=self.config.tie_break,
            rng=self.rng,
            seed=self.config.seed,
            step=self.step,
            interval=self.config.interval,
        )
        self.step += 1
        return problem

    @property
    def _facts(self) -> dict[str, np.ndarray | None]:
        """What problems and schedules have to know of the subnets."""
        costs = self.cost_model.costs
        return {"costs": costs / costs.max(), "devices": self._devices(), "blocks": self.partition.subnet_blocks}

    def use(self, schedule: Schedule, sizes: np.ndarray | None = None) -> None:
        """Take a schedule made elsewhere as the current step's.

        Args:
            schedule: Its weights are the sizes of the micro-batches over all processes.
            sizes: Sizes in this process, [N]; the schedule's weights by default.
        """
        sizes = schedule.weights if sizes is None else sizes
        ran = schedule.weights[~schedule.skipped].sum() if not schedule.skipped.all() else 1.0
        self.schedule, self._sizes, self._rows = schedule, sizes, {}
        self._micro_batches = [
            MicroBatch(compile_plan(self.partition, row), float(size * world_size() / ran))
            for row, size in zip(schedule.operations, sizes, strict=True)
        ]

    def resume(self, operations: np.ndarray, weights: np.ndarray) -> None:
        """Take what is left of a schedule that a checkpoint interrupted: operations [N, K], sizes [N] here.

        `prepare` was called before.
        """
        self.use(Schedule(operations, all_reduce(weights), **self._facts), weights)

    def pass_over(self) -> list[int]:
        """Note that the micro-batches which are skipped as a whole do not run; returns the indices of the others."""
        running = []
        for index, micro_batch in enumerate(self._micro_batches):
            if micro_batch.skipped:
                self._note(index, np.array(micro_batch.plan.operations))
            else:
                running.append(index)
        return running

    @contextmanager
    def micro_batch(self, index: int) -> Iterator[MicroBatch]:
        """Run forward and backward of one micro-batch under its row of the schedule."""
        micro_batch = self._micro_batches[index]
        with self.runtime.use(micro_batch.plan):
            yield micro_batch
            self._last_index, self._last_row = index, executed_operations(self.partition, self.runtime.executed)
        if self.each_is_a_step and not micro_batch.skipped:
            self._zero_missing_gradients()
        self._note(index, self._last_row)

    def _note(self, index: int, row: np.ndarray) -> None:
        # By index: a loop may run the micro-batches in another order than they were planned in.
        self._rows[index] = row
        if len(self._rows) == len(self._micro_batches):
            self._finish_step()

    def peek(self, index: int) -> MicroBatch:
        """The micro-batch, without running it."""
        return self._micro_batches[index]

    def _zero_missing_gradients(self) -> None:
        """A projection that was FULL nowhere in a step has a gradient of zero, like the heads that were not FULL in one
        that was: an optimizer with momentum then treats them alike, on one process as on several."""
        for parameter in self._subnet_parameters:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _finish_step(self) -> None:
        if self.shares is not None:
            self.shares.end_step()
        if not self.each_is_a_step and not self.schedule.skipped.all():
            self._zero_missing_gradients()
        schedule = self.schedule
        rows = np.stack([self._rows[index] for index in range(len(self._rows))])
        # What ran may exceed no capacity that planning kept: capacities are left out, they bind plans.
        self.executed.append(Schedule(rows, schedule.weights, schedule.devices, schedule.costs, None, schedule.blocks))
        self._rows = {}

    def pop_logs(self) -> dict[str, float]:
        """Means over the steps since the last call, as executed (`CostModel.means`), and `Shares.logs`."""
        steps, self.executed = self.executed, []
        return (self.cost_model.means(steps) if steps else {}) | (self.shares.logs() if self.shares else {})

    def last_flops(self) -> float:
        """FLOPs of the last micro-batch in this process, as executed."""
        if self._last_row is None:
            return 0.0
        return self.cost_model.step_flops(self._last_row[None], self._sizes[[self._last_index]])

    def prepare(self, batch: dict[str, Any]) -> None:
        """Learn what the model costs, from one look at a batch."""
        if self.cost_model is None:
            inputs = {name: value for name, value in batch.items() if name != INDEX_KEY}
            self.probe = probe_model(self.model, self.partition, inputs)
            self.cost_model = cost_model(self.model, self.partition, self.probe, self.config.forward_only_cost)

    def _devices(self) -> np.ndarray | None:
        """Device of each subnet: contiguous, equally many each."""
        if self.config.num_devices is None:
            return None
        subnets = self.partition.num_scheduled
        if self.config.num_devices > subnets:
            raise ValueError(
                f"num_devices={self.config.num_devices} exceeds the {subnets} subnets of the model; "
                f"use at most {subnets}, or lower heads_per_subnet."
            )
        return np.arange(subnets) * self.config.num_devices // subnets

    def _budget(self, num_micro_batches: int) -> Budget:
        """The configured budget, or that of the shorter rest of an epoch."""
        if self.num_micro_batches is None:
            self.num_micro_batches = num_micro_batches
        if num_micro_batches >= self.num_micro_batches:
            return self.config.budget
        forward_only, full = self.cost_model.costs[:, 1:].sum(axis=0)
        return self.config.budget.of_rest(num_micro_batches, self.num_micro_batches, forward_only / full)
