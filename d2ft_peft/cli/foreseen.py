"""What training under a budget costs, foreseen from shapes: FLOPs, kept activations, parameters, bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from ..engine import compile_plan
from ..partition import partition_model
from ..planning import D2FTPlanner
from ..planning.facts import BatchFacts
from ..schedule import Operation, Schedule, policy_facts
from ..simulate import Cluster, Device, Workload, head_parallel, tensor_parallel
from ..tuners import D2FTConfig
from .architecture_choice import batch_on_meta, has_new_head, model_on_meta
from .kept_bytes import kept_bytes


class DrawnScores:
    """Stands in for scores of samples and weights, which a model without weights and data cannot have.

    Args:
        num_subnets: Subnets of the model.
        seed: Of the draws.

    Attributes:
        asked: Whether a policy read them.
    """

    live: dict[str, Any] = {}

    def __init__(self, num_subnets: int, seed: int):
        self.num_subnets, self.asked = num_subnets, False
        self._rng = np.random.default_rng(seed)

    def of(self, name: str, indices: np.ndarray | None, step: int) -> np.ndarray:
        """Scores of samples [n, K]; of weights, which are those of every sample, [K]."""
        self.asked = True
        shape = (self.num_subnets,) if indices is None or name == "weight_magnitude" else (len(indices), 1)
        return np.broadcast_to(self._rng.random(shape), (*shape[:-1], self.num_subnets)).copy()

    def share(self) -> None:
        """Nobody else has any."""


def make_config(
    model: nn.Module, task: str, r: int | None = None, budget: float | None = None, **options: Any
) -> D2FTConfig:
    """What the command line trains: everything, or under LoRA the adapters and a new head.

    Args:
        model: The plain model.
        task: Whether there is a head that is new.
        r: Rank of LoRA, or None.
        budget: Share of the compute.
        options: Further fields of `D2FTConfig`.
    """
    given = {name: value for name, value in options.items() if value is not None}
    saved = head_names(model) if r is not None and has_new_head(task) else None
    return D2FTConfig(r=r, compute_budget=budget, train_boundary=r is None, modules_to_save=saved, **given)


def head_names(model: nn.Module) -> list[str]:
    """The modules outside of the pre-trained body: those that are new where a task gave the model a head.

    The body of some has another name than the class says (CLIP's image classifier): nothing new holds a list of blocks.
    """
    body = getattr(model, "base_model_prefix", "")
    return [
        name
        for name, child in model.named_children()
        if name != body
        and next(child.parameters(), None) is not None
        and not any(isinstance(inner, nn.ModuleList) for inner in child.modules())
    ]


class Foresight:
    """A model on the meta device with its adapter, its subnets, and what a sample costs.

    Args:
        config: Of the transformers model.
        task: What is trained.
        micro_batches, batch_size: Of an optimizer step.
        length, image_size: Of a sample, see `batch_on_meta`.
        adapter: Fields of `D2FTConfig` besides the budget.

    Attributes:
        planner: Makes the schedules.
        batch: One sample, without labels.
        counts_head: Whether the forward pass went through without values, so that what lies around the subnets is
            counted.
    """

    def __init__(
        self,
        config: tf.PretrainedConfig,
        task: str,
        micro_batches: int = 5,
        batch_size: int = 8,
        length: int | None = None,
        image_size: int | None = None,
        **adapter: Any,
    ):
        for name, value in (("micro_batches", micro_batches), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.config, self.task, self.adapter = config, task, adapter
        self.micro_batches, self.batch_size = micro_batches, batch_size
        self.labelled = batch_on_meta(config, task, length, image_size)
        self.batch = {name: value for name, value in self.labelled.items() if name != "labels"}
        self._kept: dict[bytes, int | None] = {}
        self._adapt(None)

    def _adapt(self, budget: float | None) -> None:
        """Adapt the model under a budget, which belongs to the adapter's configuration."""
        plain = model_on_meta(self.config, self.task)
        self.parameters = sum(p.numel() for p in plain.parameters())
        with torch.device("meta"):
            self.model = get_peft_model(plain, make_config(plain, self.task, budget=budget, **self.adapter)).train()
        self.planner = D2FTPlanner(self.model, self.micro_batches)
        self.planner.prepare(self.batch)
        self.counts_head = self.planner.costs.state()["complete"]
        self.planner.source = DrawnScores(self.planner.partition.num_scheduled, self.planner.config.seed)

    @property
    def tokens(self) -> int:
        """Tokens of a sample."""
        return self.planner.costs.probe.sequence_length

    @property
    def trained(self) -> int:
        """Parameters that train."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def facts(self) -> dict[str, Any]:
        """What a sample and a step cost where nothing is left out."""
        one, costs, partition = np.ones(1), self.planner.cost_model, self.planner.partition
        full = np.full((1, partition.num_scheduled), Operation.FULL)
        size = next(self.model.parameters()).element_size()
        return {
            "model_type": self.config.model_type,
            "task": self.task,
            "tokens": self.tokens,
            "blocks": len(partition.blocks),
            "subnets": partition.num_subnets,
            "scheduled": partition.num_scheduled,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "forward_flops": costs.forward_flops(1),
            "backward_flops": costs.full_flops(one) - costs.forward_flops(1),
            "kept_bytes": _times(self.kept(full[0]), self.batch_size),
            "gradient_bytes": self.trained * size,
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
            "optimizer_bytes": 2 * self.trained * size,
            "micro_batches": self.micro_batches,
            "batch_size": self.batch_size,
        }

    def kept(self, row: np.ndarray) -> int | None:
        """Bytes that one sample keeps for its backward pass under a row of operations, int [K]; None where the forward
        pass looks at values, of which there are none."""
        key = np.asarray(row, dtype=np.int8).tobytes()
        if key not in self._kept:
            plan = compile_plan(self.planner.partition, np.asarray(row))
            try:
                with self.planner.runtime.use(plan):
                    self._kept[key] = kept_bytes(self.model, self.labelled)
            except (RuntimeError, NotImplementedError):
                self._kept[key] = None
        return self._kept[key]

    def schedule(self, budget: float | None) -> Schedule:
        """A step's schedule under a budget; rows are micro-batches, a last one what does not run where samples are
        scheduled.

        Raises:
            ValueError: If the policy leaves out tokens, within micro-batches.
        """
        self._adapt(budget)
        planner = self.planner
        if policy_facts(planner.config.policy).rows == "tokens":
            raise ValueError(
                f"policy={planner.config.policy!r} leaves out tokens within micro-batches, which no schedule shows; "
                "choose another one."
            )
        if planner.schedules_samples:
            planner.compose(np.arange(self.micro_batches * self.batch_size), self.batch_size)
        else:
            sizes = np.arange(self.batch_size)
            planner.plan_facts(
                [BatchFacts(self.batch_size, None, sizes + i * self.batch_size) for i in range(self.micro_batches)]
            )
        return planner.schedule

    def under(self, budget: float | None, devices: int) -> tuple[dict[str, Any], Schedule]:
        """What a step costs under a budget, beside the same step with everything FULL, and its schedule.

        Args:
            budget: Share of the compute, or None for `D2FTConfig`'s own.
            devices: Devices that would share out the heads, for the bytes of rows.
        """
        schedule = self.schedule(budget)
        running = ~schedule.skipped
        flops, whole = (
            self.planner.cost_model.step_flops(operations, schedule.weights)
            for operations in (schedule.operations, np.full_like(schedule.operations, Operation.FULL))
        )
        size = max(map(int, schedule.weights[running]))
        kept = [self.kept(one) for one in schedule.operations[running]]
        most = None if None in kept else max(kept) * size
        plain = _times(self.kept(np.full(schedule.num_subnets, Operation.FULL)), self.batch_size)
        sent, of_tensor_parallel = self._rows_sent(schedule, devices)
        return {
            "budget": budget,
            "policy": self.planner.config.policy,
            "step_flops": flops,
            "flops_ratio": flops / whole,
            "compute_ratio": schedule.compute_ratio,
            "communication_ratio": schedule.communication_ratio,
            "alignment": schedule.alignment,
            "kept_bytes": most,
            "kept_ratio": most / plain if most and plain else None,
            "row_bytes": sent,
            "row_bytes_of_tensor_parallel": of_tensor_parallel,
            "scores_drawn": self.planner.source.asked,
        }, schedule

    def _rows_sent(self, schedule: Schedule, devices: int) -> tuple[float | None, float | None]:
        """Bytes of hidden states that devices would send in a step, head-parallel and tensor-parallel; None where they
        are more than a block has subnets."""
        partition, probe = self.planner.partition, self.planner.costs.probe
        if devices > np.bincount(partition.subnet_blocks).min():
            return None, None
        workload = Workload(partition, tokens=probe.sequence_length, lora_rank=self.adapter.get("r"))
        cluster = Cluster((Device(1.0),) * devices)
        predictions = (
            head_parallel(workload, cluster, schedule),
            tensor_parallel(workload, cluster, schedule.weights.sum()),
        )
        rows = (
            sum(float(sent.sum()) for purpose, sent in one.sent.items() if purpose != "gradients")
            for one in predictions
        )
        return tuple(rows)


def _times(value: int | None, factor: int) -> int | None:
    return None if value is None else value * factor


def subnets_table(config: tf.PretrainedConfig, task: str, tokens: int, heads_per_subnet: int) -> str:
    """The subnets as `Partition.summary` prints them."""
    return partition_model(model_on_meta(config, task), heads_per_subnet).summary(tokens)
