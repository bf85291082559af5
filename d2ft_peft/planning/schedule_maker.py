"""Makes schedules: from a configuration, scores, costs and sizes to the policy's table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from ..engine import get_runtime
from ..partition import parts_elsewhere
from ..processes import all_reduce
from ..schedule import Budget, CostModel, Operation, Problem, Schedule, get_policy, policy_facts
from ..scores import ScoreSource, ScoreTable, shifts_labels
from ..value_checks import check_integer
from .model_costs import ModelCosts
from .unread_rule import UnreadRule


class ScheduleMaker:
    """What the schedules of a model depend on, and how they come about.

    Args:
        model: A model wrapped with a `D2FTConfig`; its active adapter's configuration holds.
        num_micro_batches: Micro-batches of a usual step; by default those of the first.

    Attributes:
        config: The `D2FTConfig`.
        adapter: Name of the adapter that it belongs to.
        partition: The subnets.
        policy: Makes a schedule of a problem.
        rows: What its rows are: ``"samples"`` or ``"micro_batches"``.
        rng: Source of randomness of policies that draw.
        costs: What the model costs, once `prepare` has looked at a batch.
        unread: Finds out which rows of the last block no loss reads, at the first batch with labels.
        source: Where scores of samples come from.
        step: Number of schedules made so far.
        shifts_labels: Whether the model's own loss predicts the next token.

    Raises:
        ValueError: If the adapter's heads are shared out over processes, which a planner on its own does not drive.
    """

    is_head_parallel = False
    """Whether all processes get the same micro-batches, and share out the heads."""

    def __init__(self, model: nn.Module, num_micro_batches: int | None = None):
        if num_micro_batches is not None:
            check_integer("num_micro_batches", num_micro_batches, 1, ", or None for those of the first step")
        self.model, self.num_micro_batches = model, num_micro_batches
        self.runtime = get_runtime(model)
        self.adapter = active_adapter(model)
        self.config, self.partition = model.peft_config[self.adapter], self.runtime.partitions[self.adapter]
        if self.config.head_parallel and not self.is_head_parallel:
            raise ValueError(
                "head_parallel=True: the processes share out the heads of the model, which a planner on its own does "
                "not drive; train with D2FTTrainer or d2ft_peft.head_parallel.HeadParallel, or set "
                "model.peft_config['default'].head_parallel = False."
            )
        self.policy = get_policy(self.config.policy)
        self.rows = self.config.rows or policy_facts(self.config.policy).rows
        self.rng = np.random.default_rng(self.config.seed)
        self.step = 0
        # Heads, or blocks, that run elsewhere get whole rows.
        skips = self.config.skip_unread_rows and not self.is_head_parallel and not parts_elsewhere(model)
        self.unread = UnreadRule(model, self.runtime, self.partition, skips)
        self.costs = ModelCosts(model, self.partition, self.config.forward_only_cost)
        names = tuple(dict.fromkeys(self._score_name(kind) for kind in self._kinds_read))
        self.source = ScoreSource(model, self.partition, names, self.config.interval)
        self.shifts_labels = shifts_labels(model)

    @property
    def cost_model(self) -> CostModel | None:
        """What a sample of the agreed length costs, or None before `prepare`."""
        return self.costs.at(self.costs.probe.sequence_length) if self.costs.known else None

    @property
    def scores(self) -> dict[str, ScoreTable]:
        """Tables of the scores that were made before training, by name."""
        return self.source.tables

    @property
    def schedules_samples(self) -> bool:
        """Whether the rows of a schedule are samples, so that micro-batches are composed."""
        return self.rows == "samples"

    def _score_name(self, kind: str) -> str:
        return getattr(self.config, f"{kind}_score") or "weight_magnitude"

    @property
    def _kinds_read(self) -> tuple[str, ...]:
        """Which of the backward and forward score the policy looks at, given the budget."""
        reads = policy_facts(self.config.policy).reads
        n = self.num_micro_batches or self.config.num_micro_batches
        if self.config.policy == "bilevel" and not self.config.budget.leaves_forward_only_a_choice(n):
            reads = ("backward",)
        return reads

    def prepare(self, batch: dict[str, Any]) -> None:
        """Learn what the model costs, from one look at a batch; all processes take the mean of their lengths. Then find
        out which rows its loss reads, at the first batch with labels."""
        if not self.costs.known:
            self.costs.learn(batch, self._sum_over_replicas)
            self._check_order()
        self.unread.find(batch)

    def _check_order(self) -> None:
        """Refuse to leave out whole blocks where the first look showed that they do not run one after the other."""
        disorder, facts = self.costs.probe.disorder, policy_facts(self.config.policy)
        if disorder and facts.rows == "micro_batches" and self.config.policy != "all_full":
            raise ValueError(
                f"policy={self.config.policy!r} leaves out blocks, which the model's do not allow: {disorder}; choose "
                "a policy over samples (exact_first, fewer_samples, ...), which runs every block."
            )

    @property
    def prepared(self) -> bool:
        """Whether `prepare` has nothing more to look at."""
        return self.costs.known and self.unread.searched

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
        if self.config.rows == "tokens":  # kept within the micro-batches, not by their schedule
            return Budget(compute=1.0)
        if num_micro_batches >= self.num_micro_batches:
            return self.config.budget
        costs = self.costs.relative.sum(axis=0)
        ratio = costs[Operation.FORWARD_ONLY] / costs[Operation.FULL]
        return self.config.budget.of_rest(num_micro_batches, self.num_micro_batches, ratio)

    def _sum_over_replicas(self, values: np.ndarray) -> np.ndarray:
        """Sum over the processes that have different data."""
        return all_reduce(values)

    def _make(
        self,
        samples: np.ndarray | None,
        to_rows: Callable[[np.ndarray], np.ndarray],
        budget: Budget,
        weights: np.ndarray,
    ) -> Schedule:
        """The next step's schedule.

        Args:
            samples: Indices of the samples, [n], or None if they are not known.
            to_rows: Makes scores of rows [N, K] of those of samples [n, K].
            budget: What the step may do.
            weights: Sizes of the rows, [N].
        """
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
        return self.policy(problem)

    @property
    def _facts(self) -> dict[str, np.ndarray | None]:
        """What problems and schedules have to know of the subnets."""
        return {"costs": self.costs.relative, "devices": self._devices(), "blocks": self.partition.subnet_blocks}


def active_adapter(model: nn.Module) -> str:
    """Name of the first active adapter of a PEFT model."""
    return model.active_adapter if isinstance(model.active_adapter, str) else model.active_adapters()[0]
