"""Fine-tune a small ViT and a small Llama whose heads live on different processes, and compare with one process.

    torchrun --nproc_per_node 2 examples/head_parallel.py

Every process keeps the weights, gradients and optimizer state of its own heads, and rows of hidden states travel to
the processes that run heads on them. The ViT learns handwritten digits by full fine-tuning, the Llama learns the text
of Python's own help pages by LoRA; both models are tiny and untrained, since this shows how, not how well. It runs in
float64, so that the last line of each part can say that nothing but rounding differs from training on one process,
which the first process starts for itself afterwards. (Language models compute their loss in float32: in a longer run a
logit is rounded the other way once, which shows as 1e-8.)
"""

from __future__ import annotations

import os
import pydoc_data.topics
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from common import command_line, ignore_deprecations
from peft import get_peft_model
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from d2ft_peft import D2FTConfig, D2FTTrainer


LENGTH = 32


def vision(**kwargs) -> tuple[torch.nn.Module, D2FTConfig, list[dict], float]:
    """A ViT on scikit-learn's digits, by full fine-tuning; 3 of 5 micro-batches FULL, the rest not run."""
    digits = load_digits()
    data = [{"pixel_values": torch.tensor(x[None] / 8 - 1), "labels": int(y)}
            for x, y in zip(digits.images, digits.target, strict=True)]  # fmt: skip
    model = ViTForImageClassification(
        ViTConfig(
            hidden_size=64, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=8,
            patch_size=2, num_channels=1, num_labels=10,
        )
    )  # fmt: skip
    return (
        model,
        D2FTConfig(train_boundary=True, num_full=3, head_start=False, skip_unread_rows=False, **kwargs),
        data,
        1e-3,
    )


def language(**kwargs) -> tuple[torch.nn.Module, D2FTConfig, list[dict], float]:
    """A Llama with grouped-query attention on bytes of text, by LoRA; heads choose their micro-batches at random."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    tokens = torch.tensor(list(text.encode()[: 1600 * LENGTH])).view(-1, LENGTH)
    data = [{"input_ids": row, "labels": row} for row in tokens]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4,
        )
    )  # fmt: skip
    config = D2FTConfig(
        r=8, lora_alpha=16, policy="random", num_full=2, num_forward_only=1, skip_unread_rows=False, **kwargs
    )
    return model, config, data, 1e-2


PARTS = {"ViT, full fine-tuning": vision, "Llama, LoRA": language}


def train(name: str, folder: Path, steps: int) -> D2FTTrainer:
    """Train on the processes that there are, and save the adapter."""
    set_seed(0)  # model and adapter start at random: alike on all processes
    model, config, data, rate = PARTS[name](head_parallel=PartialState().num_processes > 1)
    model = get_peft_model(model.double(), config, autocast_adapter_dtype=False)
    args = TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=4, gradient_accumulation_steps=5, learning_rate=rate,
        logging_steps=5, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    trainer.save_model(folder)  # gathered: an ordinary adapter
    return trainer


def folder_of(folder: Path, name: str, how: str) -> Path:
    return folder / name.partition(",")[0] / how


def compare(name: str, trainer: D2FTTrainer, folder: Path) -> float:
    """Print what was trained together, and how far its weights are from those that one process trained."""
    whole = sum(p.numel() for p in get_peft_model(*PARTS[name]()[:2]).parameters())
    print(f"\n{name}\nparameters on rank 0: {trainer.head_parallel.num_parameters:,} of {whole:,}")
    print(f"rank 0, {trainer.head_parallel.traffic}")
    together, by_one = (
        load_file(folder_of(folder, name, how) / "adapter_model.safetensors") for how in ("together", "alone")
    )
    largest = max((together[key] - value).abs().max().item() for key, value in by_one.items())
    print(f"largest difference of a trained weight from one process: {largest:.1e}")
    if largest > 1e-6:
        raise RuntimeError(f"{name}: training together gave other weights than training alone.")
    return largest


def train_alone(folder: Path, steps: int) -> None:
    """Start a process that trains both parts by itself."""
    distributed = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    environment = {key: value for key, value in os.environ.items() if key not in distributed}
    command = [sys.executable, __file__, "--steps", str(steps), "--folder", str(folder), "--alone"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> list[float]:
    """Run both parts; returns for each the largest difference of a weight, on the first process."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of each part")
    parser.add_argument("--folder", type=Path, default=Path("out/head_parallel"), help="where adapters are saved")
    parser.add_argument("--alone", action="store_true", help="train on one process, and compare nothing")
    args = parser.parse_args(argv)
    ignore_deprecations()
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    how = "alone" if args.alone else "together"
    trainers = {name: train(name, folder_of(args.folder, name, how), args.steps) for name in PARTS}
    if args.alone or not state.is_main_process:
        return []
    train_alone(args.folder, args.steps)
    return [compare(name, trainer, args.folder) for name, trainer in trainers.items()]


if __name__ == "__main__":
    main()
    PartialState().destroy_process_group()
