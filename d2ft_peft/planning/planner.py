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

import dataclasses
from collections.abc import Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor, nn

from ..processes import all_reduce, gather, is_sharded, world_size
from ..schedule import Composition, Schedule, compose, policy_facts
from ..unequal import Shares
from .account import Account
from .candidates import Candidates
from .facts import BatchFacts, shares_of_items, take_facts
from .plan_runner import PlanRunner
from .planned_step import Prices, check_same_schedule
from .sample_choice import SampleChoice, budget_of_batches, prices_of_batches


class D2FTPlanner(PlanRunner):
    """Makes the schedule of every optimizer step, and counts what was executed.

    Args:
        model: A model wrapped with a `D2FTConfig`; its active adapter's configuration holds.
        num_micro_batches: Micro-batches of a usual step; a shorter one is the rest of an epoch. By default those of
            the first step.
        progress: Whether scoring passes show a progress bar.
        steps: Optimizer steps of the whole run, which policies over tokens ask for; the Trainer says it itself.

    Attributes:
        account: What the run may spend, where its budget is a share of plain training's compute; else None.
        open_step: Of a step that a checkpoint interrupts and that is to be entered into the account: the fields of its
            `Prices`, and FLOPs `executed` and `full` before, in the mean over processes; else None.
        table_files: Where score tables were written, by their fingerprint: they are written once a run.
    """

    def __init__(
        self,
        model: nn.Module,
        num_micro_batches: int | None = None,
        progress: bool = True,
        steps: int | None = None,
    ):
        super().__init__(model, num_micro_batches, steps)
        self.progress = progress
        self.table_files: dict[str, str] = {}
        shares_plain = policy_facts(self.config.policy).budget_of == "plain"
        self.account = Account(self.config.budget.compute) if shares_plain else None
        self.open_step: tuple[float, ...] | None = None

    def plan(self, batches: Sequence[dict[str, Any]]) -> Schedule:
        """Schedule the micro-batches of one optimizer step; every process of a distributed run makes the same.

        Args:
            batches: The micro-batches. Those that carry ``d2ft_index`` are looked up in the score tables; the key is
                removed from them.

        Returns:
            The schedule; `micro_batch` runs its rows.

        Raises:
            ValueError: If there is no batch, the policy schedules samples, or processes made different schedules.
        """
        if not isinstance(batches, Sequence) or not len(batches):
            size = f" of {len(batches)}" if isinstance(batches, Sized) else ""
            raise ValueError(f"batches={type(batches).__name__}{size}: give a list of the micro-batches.")
        self._refuse_samples()
        facts = [take_facts(batch, self.shifts_labels) for batch in batches]
        self.prepare(batches[0])
        if self.tokens is not None:
            self.tokens.begin_step(self.step, self.steps)
        return self.plan_facts(facts)

    def plan_facts(self, facts: Sequence[BatchFacts]) -> Schedule:
        """`plan` for batches of which these facts are known; `prepare` was called before."""
        self._refuse_samples()
        self._share_at_interval()
        sizes, items = np.array([float(one.size) for one in facts]), shares_of_items(facts)
        global_sizes, global_items = self._sum_over_replicas(np.stack([sizes, items]))
        known = all(one.indices is not None for one in facts)
        samples = np.concatenate([one.indices for one in facts]) if known else None
        starts = (np.cumsum(sizes) - sizes).astype(int)

        def mean(values: np.ndarray) -> np.ndarray:
            """Over the samples of each micro-batch, in all processes."""
            return self._sum_over_replicas(np.add.reduceat(values, starts)) / global_sizes[:, None]

        checks = self.step % self.config.interval == 0
        prices = None
        if self.account is None:
            budget = self._budget(len(facts))
        else:
            self.settle()
            prices = prices_of_batches(self.costs, facts)
            budget = budget_of_batches(self.account, prices, global_sizes)
        self.use(self._make(samples, mean, budget, global_sizes), sizes)
        if prices is not None:
            self._planned.prices = Prices(float(prices.sum()), float(prices[~self.schedule.skipped].sum()))
        if checks and not self.is_head_parallel:
            check_same_schedule(self.schedule)
        self._planned.weigh(items, global_items)
        self._planned.note_facts(facts)
        return self.schedule

    def _refuse_samples(self) -> None:
        if self.config.rows is None:
            self.rows = "micro_batches"
        if self.schedules_samples:
            raise ValueError(f"policy={self.config.policy!r} schedules samples; call compose(indices, size), not plan.")

    def compose(
        self, indices: Sequence[int] | Candidates, size: int, lengths: Sequence[int] | None = None
    ) -> list[np.ndarray]:
        """Schedule the samples of one optimizer step, and compose micro-batches of those that run.

        Several processes run whole samples. Where all candidates are alike and the budget is a share of them, all run
        equally many and need not ask each other in a usual step; every ``interval`` steps they tell each other what
        they saw.

        Args:
            indices: Indices of the candidates in the data set, [n]; every process of a distributed run gives its own,
                equally many.
            size: Samples of a micro-batch as plain training makes them. Where lengths are given its tokens bound
                those of every micro-batch, padding included.
            lengths: Tokens of each candidate, [n], where they differ.

        Returns:
            For each micro-batch, in the order of `micro_batch`, the positions of its samples among the candidates.

        Raises:
            ValueError: If `prepare` was not called, or samples run in part in a run of several processes.
        """
        if not self.costs.known:
            raise ValueError("compose needs the model's costs; call prepare(batch) once, with any collated batch.")
        if not self.schedules_samples:
            raise ValueError(f"policy={self.config.policy!r} schedules micro-batches; call plan(batches), not compose.")
        if not isinstance(indices, Candidates):
            indices = Candidates.of_loader(indices, size, lengths)
        if not len(indices.indices):
            raise ValueError("indices is empty; give the candidates of one optimizer step.")
        if self.shares is not None:
            self.shares.begin_step(self.model)
        self._share_at_interval()
        return self._compose(SampleChoice(self.costs, indices, self.config.padding))

    def _compose(self, choice: SampleChoice) -> list[np.ndarray]:
        self.settle()
        count = len(choice.candidates.indices)
        if self.shares is not None:
            budget, weights = self.shares.share(count), np.ones(count)
        else:
            usual = self.num_micro_batches or self.config.num_micro_batches
            budget, weights = choice.budget(self.config.budget, usual, self.account), choice.weights
        samples = self._make(choice.candidates.indices, np.asarray, budget, weights)
        samples = dataclasses.replace(samples, weights=np.ones(count), capacities=None)
        composition = compose(samples, choice.candidates.size, choice.cut)
        if world_size() > 1 and is_sharded(self.model):
            composition = _as_many_everywhere(composition)
        ran = sum(map(len, composition.micro_batches))
        if self.shares is not None:
            ran = self.shares.total(ran)
        elif self.account is None and choice.candidates.lengths is None:
            ran = ran * world_size()
        else:
            ran = int(all_reduce(np.array([float(ran)]))[0])
        self.use(*composition.among_processes(ran, count * world_size()))
        self._planned.prices = Prices(choice.plain, choice.foreseen(composition.micro_batches))
        self._planned.plain = None if choice.candidates.lengths is None else choice.plain
        self.pass_over()
        return list(composition.micro_batches)

    def settle(self) -> None:
        """Enter the last step into the run's account; every process calls it alike."""
        if self.account is not None and self._planned is not None:
            self._planned.enter(self.account)

    def weigh(self, facts: Sequence[BatchFacts]) -> None:
        """Weight composed micro-batches by the items that they turned out to hold, instead of by their samples.

        Every process calls it alike; not under ``device_capacities="auto"``, where none waits for the others.

        Args:
            facts: Of each micro-batch of `compose`, in their order.
        """
        items = np.zeros(len(self._step.sizes))
        items[: len(facts)] = shares_of_items(facts)
        total = all_reduce(np.array([items.sum()]))[0]  # processes may have composed different numbers of them
        self._planned.weigh(items, items * (total / (items.sum() or 1.0)))
        self._planned.note_facts(facts)

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
        self.open_step = None
        if self.account is not None and self._planned is not None:
            self.open_step = self._planned.enter_or_leave_open(self.account)

    def observe(self, indices: np.ndarray, logits: Tensor, labels: Tensor | None, **layout: Tensor | None) -> None:
        """Let scores that follow training see a forward pass of this process.

        Args:
            indices: Indices of its samples in the data set, [n].
            logits: Outputs [n, ..., classes].
            labels: Their labels.
            layout: ``position_ids``, ``cu_seq_lens`` or ``shift_labels``, where samples lie in one row or labels are
                shifted already; see `ScoreSource.observe`.
        """
        self.source.observe(np.asarray(indices), logits.detach(), labels, self.step, **layout)

    def resume(
        self,
        operations: np.ndarray,
        facts: Sequence[BatchFacts],
        devices: np.ndarray | None = None,
    ) -> None:
        """Take what is left of a schedule that a checkpoint interrupted.

        Args:
            operations: Of the micro-batches that are left, int [N, K].
            facts: Of each of them.
            devices: Device of each subnet, [K], which a policy may have chosen itself.
        """
        sizes, items = np.array([float(one.size) for one in facts]), shares_of_items(facts)
        global_sizes, global_items = self._sum_over_replicas(np.stack([sizes, items]))
        if len(operations):
            known = self._facts if devices is None else {**self._facts, "devices": devices}
            self.use(Schedule(operations, global_sizes, **known), sizes)
            self._planned.weigh(items, global_items)
            self._planned.note_facts(facts)
            if self.open_step is not None:
                self._planned.reopen(self.open_step)
                self.open_step = None


def _as_many_everywhere(composition: Composition) -> Composition:
    """The composition of this process in as many micro-batches as all the others run: where parameters are shared out,
    a process that ran one more would wait in it for the others.

    They are as many as the process with most of them has, or as few as the process with fewest samples can run.

    Raises:
        ValueError: A process runs no sample, and another does; on every process.
    """
    parts = composition.micro_batches
    counts, samples = gather(np.array([len(parts), sum(map(len, parts))], dtype=float)).astype(int).T
    if samples.max() and not samples.min():
        raise ValueError(
            f"process {samples.argmin()} runs no sample of a step, and process {samples.argmax()} runs "
            f"{samples.max()}; under FSDP or DeepSpeed all run equally many micro-batches: raise compute_budget or "
            "per_device_train_batch_size, or use DistributedDataParallel."
        )
    return composition.regrouped(int(min(counts.max(), samples.min())))
