"""Fine-tune a small ViT and a small Llama whose heads live on different processes, and compare with one process.

    torchrun --nproc_per_node 2 examples/head_parallel.py

Every process keeps the weights, gradients and optimizer state of its own heads, and rows of hidden states travel to
the processes that run heads on them. The ViT learns handwritten digits by full fine-tuning, the Llama learns the text
of Python's own help pages by LoRA; both models are tiny and untrained, since this shows how, not how well. It runs in
float64, so that the last line of each part can say that nothing but rounding differs from training on one process.
"""

from __future__ import annotations

import argparse
import copy
import pydoc_data.topics
import warnings
from dataclasses import dataclass

import torch
from accelerate import PartialState
from peft import get_peft_model
from sklearn.datasets import load_digits
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification, set_seed

from d2ft_peft import D2FTConfig, D2FTPlanner, Schedule
from d2ft_peft.distributed import HeadParallel


MICRO_BATCHES, MICRO_BATCH_SIZE, LENGTH = 5, 4, 32
Batch = dict[str, torch.Tensor]


@dataclass
class Part:
    """One of the two models: what it is, how it trains, and its micro-batches."""

    name: str
    model: torch.nn.Module
    config: D2FTConfig
    rate: float
    steps: list[list[Batch]]


def vision(num_steps: int) -> Part:
    """A ViT on scikit-learn's digits, by full fine-tuning; 3 of 5 micro-batches FULL, the rest not run."""
    data = load_digits()
    images = torch.tensor(data.images[:, None] / 8 - 1)
    labels = torch.tensor(data.target)
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=8,
            patch_size=2, num_channels=1, num_labels=10,
        )
    )  # fmt: skip
    config = D2FTConfig(head_parallel=True, train_boundary=True, num_full=3)
    batches = [{"pixel_values": images[part], "labels": labels[part]} for part in chunks(len(labels))]
    return Part("ViT, full fine-tuning, 3 FULL + 2 SHORTCUT", model, config, 1e-3, in_steps(batches, num_steps))


def language(num_steps: int) -> Part:
    """A Llama with grouped-query attention on bytes of text, by LoRA; heads choose their micro-batches at random."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = torch.tensor(list(text.encode()[: 1600 * LENGTH])).view(-1, LENGTH)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4,
        )
    )  # fmt: skip
    config = D2FTConfig(head_parallel=True, r=8, lora_alpha=16, policy="random", compute_budget=0.6)
    batches = [{"input_ids": tokens[part], "labels": tokens[part]} for part in chunks(len(tokens))]
    return Part("Llama, LoRA, random operations", model, config, 1e-2, in_steps(batches, num_steps))


def chunks(samples: int) -> list[slice]:
    return [slice(i, i + MICRO_BATCH_SIZE) for i in range(0, samples - MICRO_BATCH_SIZE + 1, MICRO_BATCH_SIZE)]


def in_steps(batches: list[Batch], num_steps: int) -> list[list[Batch]]:
    """The micro-batches of each optimizer step: the same on every process."""
    n = MICRO_BATCHES
    return [batches[step * n : (step + 1) * n] for step in range(num_steps)]


def adapt(part: Part, **changes) -> torch.nn.Module:
    config = copy.deepcopy(part.config)
    for name, value in changes.items():
        setattr(config, name, value)
    set_seed(0)  # LoRA's matrices start at random: alike on all processes
    return get_peft_model(copy.deepcopy(part.model).double(), config, autocast_adapter_dtype=False).train()


def optimizer_of(model: torch.nn.Module, part: Part) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=part.rate)


def train_together(parallel: HeadParallel, part: Part) -> tuple[list[float], list[Schedule]]:
    """Train with the heads shared out. This is the loop to copy."""
    optimizer = optimizer_of(parallel.model, part)  # after HeadParallel: it keeps the state of this process's heads
    losses, schedules = [], []
    for batches in part.steps:
        losses.append(parallel.forward_backward(batches).item())
        parallel.clip_grad_norm_(1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedules.append(parallel.planner.schedule)
    return losses, schedules


def bytes_if_all_full(parallel: HeadParallel, part: Part) -> int:
    """Bytes of rows of a step that skips nothing, which are those of sequence-sharded tensor parallelism."""
    subnets = parallel.planner.partition.num_scheduled
    parallel.forward_backward(part.steps[0], Schedule.all_full(MICRO_BATCHES, subnets))
    parallel.model.zero_grad()
    rows = parallel.traffic.rows
    parallel.traffic.reset()
    parallel.planner.executed.clear()
    return rows


def train_alone(part: Part, schedules: list[Schedule]) -> torch.nn.Module:
    """Train on this process alone, one micro-batch after the other, by the same schedules."""
    model = adapt(part, head_parallel=False)
    planner, optimizer = D2FTPlanner(model), optimizer_of(model, part)
    for batches, schedule in zip(part.steps, schedules, strict=True):
        planner.use(Schedule(schedule.operations, [MICRO_BATCH_SIZE] * MICRO_BATCHES, blocks=schedule.blocks))
        ran = ~schedule.skipped
        for i in ran.nonzero()[0]:
            with planner.micro_batch(int(i)):
                (model(**batches[i]).loss / ran.sum()).backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


def run(part: Part, state: PartialState) -> float | None:
    """Train both ways and print; returns the largest difference of a weight, on the first process."""
    parallel = HeadParallel(adapt(part), num_micro_batches=MICRO_BATCHES)
    all_full = bytes_if_all_full(parallel, part)
    losses, schedules = train_together(parallel, part)
    traffic, logs, here = copy.deepcopy(parallel.traffic), parallel.planner.pop_logs(), parallel.num_parameters
    weights = parallel.gather_state_dict()
    if weights is None:
        state.wait_for_everyone()
        return None
    whole = sum(p.numel() for p in adapt(part).parameters())
    loads = schedules[-1].loads
    print(f"\n{part.name}\n\nloss {losses[0]:.3f} -> {losses[-1]:.3f} in {len(losses)} steps")
    print(f"parameters on rank 0: {here:,} of {whole:,}")
    print(f"load of each rank in the last step: {', '.join(f'{load:.3g}' for load in loads)} "
          f"(max/mean {loads.max() / loads.mean():.3f}); compute ratio {logs['compute_ratio']:.2f}")  # fmt: skip
    print(f"rank 0, {traffic}\nrows of hidden states: {traffic.rows / len(losses):,.0f} bytes a step, "
          f"{traffic.rows / len(losses) / all_full:.2f} of what they are if all heads are FULL")  # fmt: skip
    alone = {name: p.detach() for name, p in train_alone(part, schedules).named_parameters() if p.requires_grad}
    largest = max((weights[name] - value).abs().max().item() for name, value in alone.items())
    print(f"largest difference of a trained weight from one process: {largest:.1e}")
    if largest > 1e-9:
        raise RuntimeError(f"{part.name}: training together gave other weights than training alone.")
    state.wait_for_everyone()
    return largest


def main(argv: list[str] | None = None) -> list[float | None]:
    """Run both parts; returns for each the largest difference of a weight, on the first process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of each part")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")  # PEFT reads it.
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    differences = []
    for make in (vision, language):
        set_seed(0)  # the model is made anew on every process, with the same weights
        differences.append(run(make(args.steps), state))
    state.destroy_process_group()
    return differences


if __name__ == "__main__":
    main()
