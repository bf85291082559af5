"""Training with subnets that live on different processes.

state = accelerate.PartialState()                      # under torchrun or accelerate launch
model = get_peft_model(model, D2FTConfig(head_parallel=True, compute_budget=0.6))
parallel = HeadParallel(model)                         # this process keeps its own heads only
optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
for batches in steps:                                  # the same micro-batches on every process
    loss = parallel.forward_backward(batches)
    parallel.clip_grad_norm_(1.0)
    optimizer.step()
    optimizer.zero_grad()
parallel.save_pretrained("adapter")                    # whole, by the first process
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..planner import batch_size
from ..schedule import Schedule
from ..scores import INDEX_KEY
from ..tuners.flops import base_model
from .branch import BranchForward
from .clock import Clock
from .gradients import Gradients, checksum
from .placement import heads_by_rank
from .planner import HeadParallelPlanner
from .ranks import Ranks
from .route import Residence, choose_homes, make_routes
from .shard import cut_model
from .stack import BlockStack, concatenate
from .step import Step
from .traffic import Traffic


class HeadParallel:
    """D2FT as the paper has it (arXiv 2504.12471, section 3): each rank owns subnets, and rows travel to them.

    Every rank calls everything here, with the same arguments. The constructor cuts the model: each rank keeps the
    weights, gradients and (in an optimizer made afterwards) optimizer state of its own heads, and a copy of what
    belongs to no head. At inference, under ``torch.no_grad()``, the model is called on all ranks with the same batch.

    Args:
        model: A model wrapped with ``D2FTConfig(head_parallel=True)``, with the same weights on every rank.
        num_micro_batches: Micro-batches of a usual step; by default those of the first.
        timeout: How long an exchange may wait for another rank before it fails. NCCL keeps to it only with
            ``TORCH_NCCL_BLOCKING_WAIT=1``.

    Attributes:
        model: The model.
        planner: Makes the schedules; its ``pop_logs`` tells what was executed.

    Raises:
        ValueError: If the processes, the configuration or the weights do not fit.
    """

    def __init__(
        self, model: nn.Module, num_micro_batches: int | None = None, timeout: timedelta = timedelta(minutes=10)
    ):
        _check_model(model)
        base = base_model(model)
        self.model = model
        self._ranks = Ranks(timeout, next(model.parameters()).device)
        self.planner = HeadParallelPlanner(model, self._ranks, num_micro_batches)
        self._check_same("weights", [checksum(p) for p in model.parameters()], "set the same seed before building the "
                         "model on every rank (transformers.set_seed), or load the same checkpoint")  # fmt: skip
        model.base_model._remove_interceptions()
        model.zero_grad()  # gradients of the whole model fit no part of it
        partition, ranks = self.planner.partition, self.planner.ranks_of_subnets
        self._shards = cut_model(base, partition, ranks, self._ranks.rank)
        self._branches = []
        for branch in partition.branches:
            heads = heads_by_rank(partition, ranks, branch.block)[self._ranks.rank]
            forward = BranchForward(base, branch, self._shards, self._ranks, len(heads))
            forward.install()
            self._branches.append(forward)
        self._stack = BlockStack(model, [base.get_submodule(name) for name in partition.blocks])
        projections = [base.get_submodule(name) for name in partition.projections]
        self._gradients = Gradients(model, projections, self._shards, self._ranks)
        # Both would work on this rank's part, and nobody would notice before the result is used.
        model.save_pretrained = _refuse("call HeadParallel.save_pretrained on every rank")
        model.base_model._unload_and_optionally_merge = _refuse(
            "save it with HeadParallel.save_pretrained, and load and merge it in one process"
        )

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank sent and received."""
        return self._ranks.traffic

    @property
    def clock(self) -> Clock:
        """Seconds that this rank's heads ran, where it is switched on."""
        return self._ranks.clock

    @property
    def num_parameters(self) -> int:
        """Parameters that this rank holds."""
        return sum(p.numel() for p in self.model.parameters())

    def forward_backward(self, batches: list[dict[str, Any]], schedule: Schedule | None = None) -> Tensor:
        """Run one optimizer step's micro-batches; gradients are complete afterwards, and add to those that are there.

        Args:
            batches: The micro-batches, the same on every rank, with labels; samples of all have the same length.
            schedule: Its operations; by default the planner makes it.

        Returns:
            The mean loss over the samples that ran, the same on every rank.

        Raises:
            ValueError: If ranks differ in their schedules or batches, or these do not fit; no rank has begun then.
            RuntimeError: If another rank dies or takes longer than the timeout.
        """
        self._ranks.step += 1
        if not self.model.training:
            raise ValueError("model.training=False: forward_backward trains; call model.train() first.")
        if any(getattr(block, "gradient_checkpointing", False) for block in self._stack.blocks):
            raise ValueError(
                "gradient checkpointing would repeat every exchange in backward and is not available under "
                "head_parallel=True; call model.gradient_checkpointing_disable()."
            )
        schedule = self.planner.plan(batches) if schedule is None else schedule
        batches = [{key: value for key, value in batch.items() if key != INDEX_KEY} for batch in batches]
        self._check_step(batches, schedule)
        ran = np.flatnonzero(~schedule.skipped)
        batches = [batches[i] for i in ran]
        sizes = tuple(batch_size(batch) for batch in batches)
        routes = make_routes(self.planner.partition, schedule, self.planner.ranks_of_subnets)
        rescale = self.planner.config.shortcut == "rescale"
        residence = Residence(sizes, choose_homes(routes, sizes))
        step = Step(residence, self._ranks.rank, routes, schedule.num_subnets, rescale, self._ranks.device)
        with self._gradients.of_one_step():
            loss = self._run(step, batches)
            loss, operations = self._gradients.reduce(loss, step.operations)
        self._note(schedule, ran, operations)
        return loss

    def _run(self, step: Step, batches: list[dict[str, Any]]) -> Tensor:
        """Forward and backward of the micro-batches that live here, and of this rank's heads for all."""
        stack, own = self._stack, step.own
        with torch.no_grad():
            _, of_all = stack.enter(concatenate(batches))
        # A rank on which nothing lives has to know what the rows look like all the same.
        entered = [stack.enter(batches[i]) for i in own or [0]]
        of_one, samples = entered[0][1], step.sizes[own[0] if own else 0]
        inputs = [step.learn(all_, one, samples) for all_, one in zip(of_all, of_one, strict=True)]
        hidden = torch.cat([h for h, _ in entered]) if own else entered[0][0][:0]
        for branch in self._branches:
            branch.step = step
        try:
            out = stack.run(hidden, inputs)
            end = out.detach().requires_grad_()
            loss, first = torch.zeros((), dtype=torch.float64, device=out.device), 0
            for i in own:
                part = end.narrow(0, first, step.sizes[i])
                first += step.sizes[i]
                loss += self._head(batches[i], part, step.sizes[i] / sum(step.sizes))
            if out.requires_grad:
                torch.autograd.backward(out, torch.zeros_like(out) if end.grad is None else end.grad)
            return loss
        finally:
            for branch in self._branches:
                branch.step = None

    def _head(self, batch: dict[str, Any], hidden: Tensor, weight: float) -> Tensor:
        """Task head, loss, and their backward, of one micro-batch; returns its share of the mean loss."""
        loss = getattr(self._stack.leave(batch, hidden), "loss", None)
        if loss is None:
            raise ValueError(f"the model returned no loss for a batch with keys {sorted(batch)}; give labels in it.")
        loss = loss * weight
        loss.backward()
        return loss.detach()

    def _note(self, schedule: Schedule, ran: np.ndarray, operations: np.ndarray) -> None:
        """Let the planner's logs know what was executed."""
        executed = np.zeros_like(schedule.operations)
        executed[ran] = operations
        devices = self.planner.ranks_of_subnets
        self.planner.executed.append(
            Schedule(executed, schedule.weights, devices, schedule.costs, None, schedule.blocks)
        )
        self.traffic.steps += 1

    def _check_step(self, batches: list[dict[str, Any]], schedule: Schedule) -> None:
        expected = (len(batches), self.planner.partition.num_scheduled)
        problem = None
        if schedule.operations.shape != expected:
            problem = f"schedule has shape {schedule.operations.shape} instead of {expected} [micro-batches, subnets]"
        elif schedule.skipped.all():
            problem = "schedule is SHORTCUT everywhere, so nothing would train; give it FULL cells"
        # Looked at on every rank before anyone speaks: one rank's own error must not leave the others waiting.
        tensors = [v for batch in batches for _, v in sorted(batch.items()) if isinstance(v, Tensor)]
        self._check_same("schedules", [schedule.digest()], "make them from the same numbers and the same seed")
        self._check_same("micro-batches", [(tuple(t.shape), checksum(t)) for t in tensors], "give every rank the same "
                         "ones (no DistributedSampler, no sharded data loader)")  # fmt: skip
        if problem:
            raise ValueError(f"{problem}.")

    def _check_same(self, what: str, value: Any, advice: str) -> None:
        differing = self._ranks.differing([repr(value).encode()])[0]
        if differing:
            raise ValueError(
                f"the {what} on rank {', '.join(map(str, differing))} differ from those on rank 0; {advice}."
            )

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients down to a norm over all ranks; `torch.nn.utils.clip_grad_norm_` would see one rank's only.

        Args:
            max_norm: Largest norm that is left as it is.

        Returns:
            The norm before.
        """
        return self._gradients.clip(max_norm)

    def gather_state_dict(self) -> dict[str, Tensor] | None:
        """The model's state dict with whole adapter tensors, on rank 0; None on the others.

        The frozen base model's own projections stay cut in it: adapters are saved without them.
        """
        state = self.model.state_dict(keep_vars=True)
        names: dict[int, list[str]] = {}
        for name, value in state.items():
            names.setdefault(id(value), []).append(name)
        for shard in self._shards:
            if not shard.of_adapter:
                continue
            shapes = [shard.shape(len(heads)) for heads in shard.heads]
            parts = self._ranks.to_first(shard.tensor.detach(), shapes)
            if parts is not None:
                whole = shard.join(parts).cpu()
                state.update(dict.fromkeys(names[id(shard.tensor)], whole))
        return None if self._ranks.rank else {name: value.detach() for name, value in state.items()}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the ordinary adapter, which loads on any number of ranks.

        Args:
            save_directory: Folder that the first rank writes.
            kwargs: See `peft.PeftModel.save_pretrained`.
        """
        state = self.gather_state_dict()
        if state is not None:
            type(self.model).save_pretrained(self.model, save_directory, state_dict=state, **kwargs)
        self._ranks.barrier("while saving")


def _refuse(advice: str) -> Callable[..., NoReturn]:
    def refusal(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"this rank holds a part of the adapter only; {advice}.")

    return refusal


def _check_model(model: nn.Module) -> None:
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "head-parallel execution needs processes: start with torchrun or accelerate launch, and create "
            "accelerate.PartialState() first."
        )
    configs = getattr(model, "peft_config", {})
    config = next(iter(configs.values()), None)
    if len(configs) != 1 or not getattr(config, "head_parallel", False):
        raise ValueError(
            f"{type(model).__name__} has adapters {list(configs)}; HeadParallel needs exactly one, made by "
            "get_peft_model(model, D2FTConfig(head_parallel=True, ...))."
        )
    size = dist.get_world_size()
    if config.num_devices not in (None, size) or len(config.device_capacities or range(size)) != size:
        raise ValueError(
            f"num_devices={config.num_devices} and device_capacities={config.device_capacities} do not fit {size} "
            "processes, which are the devices under head_parallel=True; leave num_devices out, and give one capacity "
            "per process."
        )
