"""What the example scripts share: arguments of the method, data from a hub or from files, one run with its figures."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from d2ft_peft import D2FTConfig, partition_model


@dataclass
class MethodArguments:
    """How it is trained. What is left out has `D2FTConfig`'s default."""

    method: Literal["d2ft", "plain"] = "d2ft"
    baseline_fewer_samples: float | None = field(
        default=None, metadata={"help": "train plainly on this share of the steps"}
    )
    r: int | None = field(default=None, metadata={"help": "rank of LoRA; full fine-tuning without it"})
    lora_alpha: int | None = None
    train_boundary: bool = field(
        default=True, metadata={"help": "full fine-tuning: train embeddings, norms and head too"}
    )
    head: ClassVar[str | None] = None
    """Name of a module that is new and always trained, where there is one."""
    compute_budget: float | None = None
    num_full: int | None = None
    num_forward_only: int | None = None
    policy: str | None = None
    backward_score: str | None = None
    forward_score: str | None = None
    score_fraction: float | None = None
    heads_per_subnet: int | None = None
    shortcut: str | None = None

    def d2ft_config(self, seed: int) -> D2FTConfig:
        """The D2FT configuration that these arguments ask for."""
        other = ("method", "baseline_fewer_samples", "train_boundary", "head")
        given = {name: value for name, value in asdict(self).items() if value is not None and name not in other}
        boundary = self.r is None and self.train_boundary
        # The boundary includes the head.
        saved = None if boundary or self.head is None else [self.head]
        return D2FTConfig(**given, train_boundary=boundary, modules_to_save=saved, seed=seed)

    def __str__(self) -> str:
        return f"{self.method}, {'full' if self.r is None else f'LoRA r={self.r}'}"


def parse(data: type, method: type, argv: list[str] | None) -> tuple[Any, Any, TrainingArguments]:
    """The command line as data, method and training arguments; a run on fewer samples is shortened."""
    parsed = HfArgumentParser((data, method, TrainingArguments)).parse_args_into_dataclasses(args=argv)
    _, args, training = parsed
    set_seed(training.seed)
    if args.baseline_fewer_samples is not None:
        train_on_fewer_samples(training, args)
    return parsed


def train_on_fewer_samples(training: TrainingArguments, args: MethodArguments) -> None:
    """Shorten the run: plain fine-tuning at the compute that D2FT would spend."""
    if args.method != "plain":
        raise ValueError(f"baseline_fewer_samples={args.baseline_fewer_samples} needs method='plain'.")
    if training.max_steps > 0:
        training.max_steps = max(1, round(training.max_steps * args.baseline_fewer_samples))
    else:
        training.num_train_epochs *= args.baseline_fewer_samples


def load_splits(
    args: Any, name: tuple[str | None, ...], kind: str, held_out: dict[str, Any], **options: Any
) -> tuple[Dataset, Dataset]:
    """The training and the validation (else test, else held-out) split.

    Args:
        args: ``train_file``, ``validation_file``, ``validation_share`` and ``cache_dir``.
        name: Hub id or folder of the data set, and its configuration if it has any; or None first: then files are read.
        kind: What kind of files.
        held_out: How a part is held out where there is no other validation data.
        options: How files are read.
    """
    if name[0] is not None:
        splits = load_dataset(*name, cache_dir=args.cache_dir)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        files = {split: file for split, file in files.items() if file is not None}
        splits = load_dataset(kind, data_files=files, cache_dir=args.cache_dir, **options)
    found = next((split for split in ("validation", "test") if split in splits), None)
    if found is not None:
        return splits["train"], splits[found]
    halves = splits["train"].train_test_split(args.validation_share, **held_out)
    return halves["train"], halves["test"]


def adapt(model: torch.nn.Module, args: MethodArguments, seed: int) -> torch.nn.Module:
    """The model with its trainable parameters: the same ones for D2FT and for plain fine-tuning."""
    if args.method == "d2ft":
        return get_peft_model(model, args.d2ft_config(seed))
    projections = partition_model(model).projections
    heads = [] if args.head is None else [args.head]
    if args.r is not None:
        alpha = {} if args.lora_alpha is None else {"lora_alpha": args.lora_alpha}
        config = LoraConfig(r=args.r, target_modules=list(projections), modules_to_save=heads or None, **alpha)
        return get_peft_model(model, config)
    if not args.train_boundary:
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            in_head = any(f"{module}.".startswith(f"{head}.") for head in heads)
            parameter.requires_grad_(module in projections or in_head)
    return model


def fine_tune(
    trainer: Trainer, args: MethodArguments, measure: Callable[[dict[str, float]], dict[str, float]]
) -> dict[str, float]:
    """Train, save, evaluate; returns and saves what was measured, the seconds and the share of compute that was run.

    Args:
        trainer: The Trainer, D2FT's or a plain one.
        args: The method.
        measure: From the metrics of the evaluation to what counts.
    """
    resumed = trainer.args.resume_from_checkpoint
    seconds = trainer.train(resume_from_checkpoint=resumed).metrics["train_runtime"]
    trainer.save_model()
    result = {**measure(trainer.evaluate()), "seconds": seconds}
    ratios = [entry["compute_ratio"] for entry in trainer.state.log_history if "compute_ratio" in entry]
    result["compute_ratio"] = float(np.mean(ratios)) if ratios else args.baseline_fewer_samples or 1.0
    trainer.log_metrics("all", result)
    trainer.save_metrics("all", result)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()
    return result


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser whose help begins with a script's own words, as they stand there."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def ignore_deprecations() -> None:
    """Leave out what transformers says of PEFT's code, which nobody can change here."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
