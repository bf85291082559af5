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

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..batches import batch_size
from ..partition import base_model
from ..planning.facts import token_length
from ..schedule import Schedule
from ..scores import INDEX_KEY
from .agreement import Agreement
from .branch import BranchForward
from .exchange.gradients import Gradients
from .exchange.mesh import replicas
from .exchange.ranks import Ranks
from .exchange.route import Residence, choose_homes, make_routes
from .exchange.timeline import Timeline
from .exchange.traffic import Traffic
from .placement import heads_by_rank
from .rank_planner import HeadParallelPlanner
from .requirements import check_branches, check_mode, check_model, check_overlap, check_processes, check_whole
from .stack import BlockStack, concatenate
from .step import Step
from .storage.saving import SavingMixin
from .storage.shard import cut_model, shards_of


class HeadParallel(SavingMixin):
    """D2FT as the paper has it (arXiv 2504.12471, section 3): each rank owns subnets, and rows travel to them.

    Every rank calls everything here, with the same arguments. The constructor cuts the model: each rank keeps the
    weights, gradients and (in an optimizer made afterwards) optimizer state of its own heads, and a copy of what
    belongs to no head. At inference, under ``torch.no_grad()``, the model is called on all ranks with the same batch.

    Args:
        model: A model wrapped with ``D2FTConfig(head_parallel=True)``, with the same weights on every rank.
        num_micro_batches: Micro-batches of a usual step; by default those of the first.
        timeout: How long an exchange may wait for another rank before it fails. NCCL keeps to it only with
            ``TORCH_NCCL_BLOCKING_WAIT=1``.
        before_cut: Called with the planner while the model is still whole; may put scores that take a pass over the
            data into its ``scores``.
        mesh: With axes ``"data"`` and ``"heads"``: the ranks on the heads axis share out the heads of one replica of
            the model, and replicas have micro-batches of their own. By default all ranks share out one model.
        overlap: In how many waves the rows of a branch travel while heads run on other rows; 0 to wait for all rows
            before any head runs.

    Attributes:
        model: The model.
        planner: Makes the schedules; its ``pop_logs`` tells what was executed.
        overlap: See above; may change between steps, on all ranks alike.

    Raises:
        ValueError: If the processes, the configuration or the weights do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        num_micro_batches: int | None = None,
        timeout: timedelta = timedelta(minutes=10),
        before_cut: Callable[[HeadParallelPlanner], None] | None = None,
        mesh: DeviceMesh | None = None,
        overlap: int = 2,
    ):
        check_processes()
        numbers = replicas(mesh)
        check_model(model, numbers.shape[1])
        check_overlap(overlap)
        base = base_model(model)
        self.model, self.overlap = model, overlap
        self._ranks = Ranks(timeout, next(model.parameters()).device, numbers)
        self.planner = HeadParallelPlanner(model, self._ranks, num_micro_batches)
        partition, ranks = self.planner.partition, self.planner.ranks_of_subnets
        check_branches(partition)
        self._shards = shards_of(base, partition, ranks)
        # What was loaded as a part is another one on every rank.
        parts = {id(s.tensor) for s in self._shards if not s.is_whole(s.tensor.shape)}
        self._agreement = Agreement(self._ranks, self.planner.config.interval)
        self._agreement.compare_weights([p for p in model.parameters() if id(p) not in parts])
        if before_cut is not None:
            check_whole(not parts, self.planner.source.before_training)
            before_cut(self.planner)
        model.base_model._remove_interceptions()
        model.zero_grad()  # gradients of the whole model fit no part of it
        cut_model(self._shards, self._ranks.rank)
        self._branches = []
        for branch in partition.branches:
            heads = heads_by_rank(partition, ranks, branch.block)[self._ranks.rank]
            forward = BranchForward(base, branch, self._shards, self._ranks, len(heads))
            forward.install()
            self._branches.append(forward)
        self._stack = BlockStack(model, [base.get_submodule(name) for name in partition.blocks])
        projections = [base.get_submodule(name) for name in partition.projections]
        self._gradients = Gradients(model, projections, self._shards, self._ranks)
        self._guard_parts()

    def renew_planner(self, num_micro_batches: int | None = None) -> HeadParallelPlanner:
        """Make schedules anew, as before the first step: another data set, or other settings. Returns the planner."""
        self.planner = HeadParallelPlanner(self.model, self._ranks, num_micro_batches)
        return self.planner

    @property
    def traffic(self) -> Traffic:
        """Bytes that this rank sent and received."""
        return self._ranks.traffic

    @property
    def timeline(self) -> Timeline:
        """When this rank computed and when its exchanges were under way, if it is switched on."""
        return self._ranks.timeline

    @property
    def num_parameters(self) -> int:
        """Parameters that this rank holds."""
        return sum(p.numel() for p in self.model.parameters())

    def forward_backward(
        self,
        batches: list[dict[str, Any]],
        schedule: Schedule | None = None,
        backward: Callable[[dict[str, Any], float], Tensor] | None = None,
    ) -> Tensor:
        """Run one optimizer step's micro-batches; gradients are complete afterwards, and add to those that are there.

        Args:
            batches: The micro-batches, the same on every rank of a replica, with labels; samples of all have the same
                length.
            schedule: Its operations; by default the planner makes it.
            backward: For a loss that is not the model's own mean. It gets a micro-batch and its share of the samples
                that run, calls the model (whose blocks have run then) and ``backward`` on its part of the step's loss,
                and returns this part, detached.

        Returns:
            The step's loss, by default the mean over the samples that ran in all replicas; the same on every rank.

        Raises:
            ValueError: If ranks differ in their schedules or batches, or these do not fit; no rank has begun then. What
                batches contain is compared in the first step and every ``D2FTConfig.interval`` steps, for all steps
                since the last comparison.
            RuntimeError: If another rank dies or takes longer than the timeout.
        """
        self._ranks.step += 1
        check_mode(self.model, self._stack.blocks)
        self._agreement.compare_numbers(len(batches), self.overlap)
        schedule = self.planner.plan(batches) if schedule is None else schedule
        batches = [{key: value for key, value in batch.items() if key != INDEX_KEY} for batch in batches]
        self._check_step(batches, schedule)
        ran = np.flatnonzero(~schedule.skipped)
        batches = [batches[i] for i in ran]
        sizes = tuple(batch_size(batch) for batch in batches)
        routes = make_routes(self.planner.partition, schedule, self.planner.ranks_of_subnets)
        rescale = self.planner.config.shortcut == "rescale"
        residence = Residence(sizes, choose_homes(routes, sizes))
        ranks, subnets = self._ranks, schedule.num_subnets
        step = Step(residence, ranks.rank, routes, subnets, rescale, self.overlap, ranks.device)
        samples = float(ranks.sum_array(np.array([sum(sizes)]), "check", "before the blocks", "data")[0])
        with self._gradients.of_one_step():
            loss = self._run(step, batches, samples, backward or self._backward)
            loss, operations = self._gradients.reduce(loss, step.operations)
        self._note(schedule, ran, operations, token_length(batches[0]))
        return loss

    def _run(
        self,
        step: Step,
        batches: list[dict[str, Any]],
        samples: float,
        backward: Callable[[dict[str, Any], float], Tensor],
    ) -> Tensor:
        """Forward and backward of the micro-batches that live here, and of this rank's heads for all.

        Args:
            step: The step.
            batches: Its running micro-batches.
            samples: How many samples run, in all replicas.
            backward: See `forward_backward`.
        """
        stack, own = self._stack, step.own
        with torch.no_grad():
            _, of_all = stack.enter(concatenate(batches))
        # A rank on which nothing lives has to know what the rows look like all the same.
        entered = [stack.enter(batches[i]) for i in own or [0]]
        of_one, size = entered[0][1], step.sizes[own[0] if own else 0]
        inputs = [step.learn(all_, one, size) for all_, one in zip(of_all, of_one, strict=True)]
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
                with stack.leaving(part):
                    loss += backward(batches[i], step.sizes[i] / samples)
            if out.requires_grad:
                torch.autograd.backward(out, torch.zeros_like(out) if end.grad is None else end.grad)
            return loss
        finally:
            for branch in self._branches:
                branch.step = None

    def _backward(self, batch: dict[str, Any], share: float) -> Tensor:
        """Task head, loss, and their backward, of one micro-batch; returns its share of the mean loss."""
        loss = getattr(self.model(**batch), "loss", None)
        if loss is None:
            raise ValueError(f"the model returned no loss for a batch with keys {sorted(batch)}; give labels in it.")
        loss = loss * share
        loss.backward()
        return loss.detach()

    def _note(self, schedule: Schedule, ran: np.ndarray, operations: np.ndarray, tokens: int | None) -> None:
        """Let the planner's logs know what was executed."""
        executed = np.zeros_like(schedule.operations)
        executed[ran] = operations
        devices = self.planner.ranks_of_subnets
        as_executed = Schedule(executed, schedule.weights, devices, schedule.costs, None, schedule.blocks)
        self.planner.note_step(as_executed, tokens)
        self.traffic.steps += 1

    def _check_step(self, batches: list[dict[str, Any]], schedule: Schedule) -> None:
        expected = (len(batches), self.planner.partition.num_scheduled)
        problem = None
        if schedule.operations.shape != expected:
            problem = f"schedule has shape {schedule.operations.shape} instead of {expected} [micro-batches, subnets]"
        elif schedule.skipped.all():
            problem = "schedule is SHORTCUT everywhere, so nothing would train; give it FULL cells"
        # On every rank before anyone speaks: one rank's own error must not leave the others waiting.
        self._agreement.compare_step(batches, schedule)
        if problem:
            raise ValueError(f"{problem}.")

    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale gradients down to a norm over all ranks; `torch.nn.utils.clip_grad_norm_` would see one rank's only.

        Args:
            max_norm: Largest norm that is left as it is.

        Returns:
            The norm before.
        """
        return self._gradients.clip(max_norm)
