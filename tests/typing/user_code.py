"""What a user writes with d2ft_peft, for `mypy --strict`: never run, only checked (tests/typing/test_typing.py)."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

from d2ft_peft import (
    Architecture,
    AveragedWeightsCallback,
    BranchSpec,
    D2FTCallback,
    D2FTConfig,
    D2FTPlanner,
    D2FTTrainer,
    D2FTTrainerMixin,
    HeadStart,
    KillReviveCallback,
    Operation,
    Schedule,
    fit_head,
    partition_model,
    register_architecture,
    register_policy,
)
from d2ft_peft.schedule import Budget, Problem, policy_names


Batch = dict[str, torch.Tensor]


class OwnTrainer(D2FTTrainerMixin, Trainer):
    """A Trainer of the user's own."""


@register_policy("upper_half")
def upper_half(problem: Problem) -> Schedule:
    above = problem.blocks >= problem.blocks.max() / 2
    row = [Operation.FULL if full else Operation.FORWARD_ONLY for full in above]
    return problem.schedule([row] * problem.num_micro_batches)


def configurations() -> list[D2FTConfig]:
    budget: Budget = D2FTConfig(compute_budget=0.6).budget
    print(budget.compute, policy_names())
    return [
        D2FTConfig(r=16, lora_alpha=32, modules_to_save=["classifier"]),
        D2FTConfig(policy="fewer_samples", device_capacities="auto", rows="samples"),
        D2FTConfig(num_devices=2, device_capacities=[0.5, 1.0], tie_break="spread"),
    ]


def with_the_trainer(model: PreTrainedModel, data: Dataset[Batch], args: TrainingArguments) -> float:
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data, callbacks=[AveragedWeightsCallback(share=0.5)])
    loss: float = trainer.train().training_loss
    planner: D2FTPlanner | None = trainer.planner
    if planner is not None:
        print(planner.num_micro_batches)
    OwnTrainer(model=model, args=args, callbacks=[KillReviveCallback(active=4, interval=50)])
    Trainer(model=model, args=args, callbacks=[D2FTCallback()])
    return loss


def with_a_loop(model: nn.Module, steps: list[list[Batch]], optimizer: torch.optim.Optimizer) -> dict[str, float]:
    planner = D2FTPlanner(model)
    for batches in steps:
        schedule: Schedule = planner.plan(batches)
        operations: np.ndarray = schedule.operations
        print(operations.shape, schedule.compute_ratio)
        for i, batch in enumerate(batches):
            with planner.micro_batch(i) as micro_batch:
                if not micro_batch.skipped:
                    (model(**batch).loss * micro_batch.weight).backward()
        optimizer.step()
    return planner.pop_logs()


def look_inside(model: nn.Module, loader: list[Batch]) -> str:
    attention = BranchSpec("attn", ("attn.q", "attn.k", "attn.v"), "attn.out")
    register_architecture("mine", Architecture("layers", attention, ffn=None))
    start: HeadStart = fit_head(model, loader)
    print(start.samples)
    return partition_model(model).summary(sequence_length=197)
