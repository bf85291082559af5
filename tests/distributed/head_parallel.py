"""What the head-parallel tests share: cases, micro-batches, random schedules, and training on one process or many."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from peft import get_peft_model

from d2ft_peft import D2FTConfig, D2FTPlanner, Schedule, partition_model
from d2ft_peft.head_parallel import HeadParallel
from tests.models import TINY
from tests.tuners.cases import MODES
from tests.zoo_decoders import DECODERS


STEPS = 2
_MODELS = TINY | DECODERS


@dataclass(frozen=True)
class Case:
    """A run: which model, how it trains, and the samples of each micro-batch."""

    name: str
    mode: str
    sizes: tuple[int, ...]
    heads_per_subnet: int = 1
    shortcut: str = "zero"
    momentum: float = 0.9

    def __str__(self) -> str:
        return f"{self.name}, {self.mode}, {len(self.sizes)} micro-batches, {self.shortcut}"


def join(timeout: float = 60) -> None:
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))


def model_of(case: Case, head_parallel: bool, seed: int = 0, **kwargs):
    """The adapted model in float64; LoRA's B does not start at zero."""
    model = _MODELS[case.name].build(seed=seed).double()
    lora = {"init_lora_weights": False} if case.mode == "lora" else {}
    config = D2FTConfig(
        **MODES[case.mode], **lora, heads_per_subnet=case.heads_per_subnet, shortcut=case.shortcut,
        head_parallel=head_parallel, **kwargs,
    )  # fmt: skip
    torch.manual_seed(7)
    return get_peft_model(model, config).train()


def batches_of(case: Case, step: int) -> list[dict[str, torch.Tensor]]:
    """Micro-batches; of texts every other one is padded, so that they differ in masks and in tokens that count."""
    batches = [_MODELS[case.name].batch(size, seed=100 * step + i) for i, size in enumerate(case.sizes)]
    for i, batch in enumerate(batches):
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].double()
        elif case.name == "llama":  # a second tensor that differs between samples, beside the mask
            batch["position_ids"] = (torch.arange(7) + 3 * i + torch.arange(case.sizes[i])[:, None]) % 50
        if "attention_mask" in batch and i % 2:
            batch["attention_mask"][0, 5:] = 0
            if batch["labels"].ndim == 2:
                batch["labels"][0, 5:] = -100
    return batches


def random_schedule(case: Case, step: int) -> Schedule:
    """Independent random operations; in the second step a micro-batch that is not run, and a block without heads."""
    partition = partition_model(_MODELS[case.name].build(), case.heads_per_subnet)
    rng = np.random.default_rng(step)
    operations = rng.integers(0, 3, (len(case.sizes), partition.num_scheduled))
    if step:
        operations[1:2] = 0
        operations[:, partition.subnet_blocks == 1] = rng.integers(0, 2)
    operations[0, 0] = 2
    return Schedule(operations, case.sizes, blocks=partition.subnet_blocks)


def optimizer_of(model, case: Case):
    # Plain SGD: an optimizer that normalizes would hide a factor on the loss.
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=0.3, momentum=case.momentum)


def train_alone(case: Case, batches_of=batches_of, schedule_of=random_schedule) -> dict[str, torch.Tensor]:
    """The run on one process, micro-batch by micro-batch: the adapter's tensors and the losses."""
    model = model_of(case, head_parallel=False)
    planner, optimizer, losses = D2FTPlanner(model), optimizer_of(model, case), []
    for step in range(STEPS):
        loss = 0.0
        planner.use(schedule_of(case, step))
        planner.pass_over()
        for i, batch in enumerate(batches_of(case, step)):
            if planner.peek(i).skipped:
                continue
            with planner.micro_batch(i) as micro_batch:
                value = model(**batch).loss * micro_batch.weight
                value.backward()
                loss += value.item()
        norm = torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.5)
        losses += [loss, norm.item()]
        optimizer.step()
        optimizer.zero_grad()
    return {**adapter_of(model.state_dict()), "losses and norms": torch.tensor(losses, dtype=torch.float64)}


def train_together(case: Case, batches_of=batches_of, schedule_of=random_schedule, **kwargs) -> dict[str, torch.Tensor]:
    """The same run with heads shared out; whole tensors on rank 0, and on all what they can say."""
    join()
    model = model_of(case, head_parallel=True)
    parallel = HeadParallel(model, **kwargs)
    optimizer, losses = optimizer_of(model, case), []
    for step in range(STEPS):
        losses.append(parallel.forward_backward(batches_of(case, step), schedule_of(case, step)).item())
        losses.append(parallel.clip_grad_norm_(0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    state = parallel.gather_state_dict() or {}
    return {**adapter_of(state), "losses and norms": torch.tensor(losses, dtype=torch.float64)}


def adapter_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if "lora_" in name or "d2ft_layers" in name}


def rank() -> int:
    return int(os.environ["RANK"])
