"""Fine-tune an image classifier by D2FT, and compare with plain fine-tuning.

    python examples/image_classification.py --model_name google/vit-base-patch16-224-in21k \
        --dataset_name uoft-cs/cifar10 --output_dir vit-cifar10 --compute_budget 0.6 --max_steps 200 \
        --per_device_train_batch_size 16 --gradient_accumulation_steps 5 --learning_rate 3e-4 --logging_steps 10

ends with one line. ViT-Tiny after 60 such steps on 4,000 images at 96 px (``--image_size 96 --max_train_samples 4000
--max_eval_samples 1000 --r 8 --lora_alpha 16 --learning_rate 1e-3``), on one CPU core:

    d2ft, LoRA r=8: accuracy 63.6%, 85 s, compute ratio 0.60

Add ``--r 16`` for LoRA, ``--method plain`` for ordinary fine-tuning of the same parameters, and to that one of the two
simplest ways to spend 60 % of the compute: fewer steps, ``--baseline_fewer_samples 0.6``, or smaller batches,
``--gradient_accumulation_steps 3``. Any argument of `transformers.TrainingArguments` is taken.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset
from peft import LoraConfig, get_peft_model
from PIL import ImageOps
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model


@dataclass
class DataArguments:
    """What is trained, and on what."""

    model_name: str = field(metadata={"help": "Hub id or folder of the pre-trained model"})
    dataset_name: str | None = field(default=None, metadata={"help": "Hub id or folder of the data set"})
    train_file: str | None = field(default=None, metadata={"help": "parquet file, instead of dataset_name"})
    validation_file: str | None = field(default=None, metadata={"help": "parquet file to evaluate on"})
    validation_share: float = field(default=0.1, metadata={"help": "held out where there is no other validation data"})
    image_size: int | None = field(
        default=None, metadata={"help": "other than the model's own, its position embeddings are interpolated"}
    )
    max_train_samples: int | None = None
    max_eval_samples: int | None = None
    cache_dir: str | None = None


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
        default=True, metadata={"help": "full fine-tuning: train embeddings and norms too, not the classifier alone"}
    )
    head: str = field(default="classifier", metadata={"help": "name of the module that is new and always trained"})
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
        return D2FTConfig(
            **given, train_boundary=boundary, modules_to_save=None if boundary else [self.head], seed=seed
        )


def load_splits(args: DataArguments, seed: int) -> tuple[Dataset, Dataset]:
    """The training and the validation (else test, else held-out) images."""
    if args.dataset_name is not None:
        splits = load_dataset(args.dataset_name, cache_dir=args.cache_dir)
    else:
        files = {"train": args.train_file, "validation": args.validation_file}
        files = {split: file for split, file in files.items() if file is not None}
        splits = load_dataset("parquet", data_files=files, cache_dir=args.cache_dir)
    name = next((name for name in ("validation", "test") if name in splits), None)
    if name is None:
        halves = splits["train"].train_test_split(args.validation_share, seed=seed)
        splits, name = DatasetDict(train=halves["train"], test=halves["test"]), "test"
    return take(splits["train"], args.max_train_samples, seed), take(splits[name], args.max_eval_samples, seed)


def take(dataset: Dataset, count: int | None, seed: int) -> Dataset:
    if count is None or count >= len(dataset):
        return dataset
    return dataset.shuffle(seed=seed).select(range(count))


def column_of(dataset: Dataset, kind: type) -> str:
    """Name of the first column whose feature is of a kind."""
    for name, feature in dataset.features.items():
        if isinstance(feature, kind):
            return name
    raise ValueError(f"the data set has no {kind.__name__} column, only {dataset.features}; cast one to it.")


def transform(rows: dict[str, list], image: str, label: str, process: Callable, flip: bool) -> dict[str, Any]:
    """What a few rows become as they are fetched; nothing is decoded ahead of time."""
    images = [picture.convert("RGB") for picture in rows[image]]
    if flip:
        images = [ImageOps.mirror(picture) if random.random() < 0.5 else picture for picture in images]
    return {"pixel_values": process(images, return_tensors="pt")["pixel_values"], "labels": rows[label]}


def collate(samples: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": torch.tensor([sample["labels"] for sample in samples]), **options}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    # Not by `evaluate`, which downloads the metric's script and fails where there is no network.
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def adapt(model: torch.nn.Module, args: MethodArguments, seed: int) -> torch.nn.Module:
    """The model with its trainable parameters: the same ones for D2FT and for plain fine-tuning."""
    if args.method == "d2ft":
        return get_peft_model(model, args.d2ft_config(seed))
    projections = partition_model(model).projections
    if args.r is not None:
        alpha = {} if args.lora_alpha is None else {"lora_alpha": args.lora_alpha}
        config = LoraConfig(r=args.r, target_modules=list(projections), modules_to_save=[args.head], **alpha)
        return get_peft_model(model, config)
    if not args.train_boundary:
        for name, parameter in model.named_parameters():
            module = name.rpartition(".")[0]
            parameter.requires_grad_(module in projections or f"{module}.".startswith(f"{args.head}."))
    return model


def train_on_fewer_samples(training: TrainingArguments, args: MethodArguments) -> None:
    """Shorten the run: plain fine-tuning at the compute that D2FT would spend."""
    if args.method != "plain":
        raise ValueError(f"baseline_fewer_samples={args.baseline_fewer_samples} needs method='plain'.")
    if training.max_steps > 0:
        training.max_steps = max(1, round(training.max_steps * args.baseline_fewer_samples))
    else:
        training.num_train_epochs *= args.baseline_fewer_samples


def make_trainer(data: DataArguments, args: MethodArguments, training: TrainingArguments) -> Trainer:
    """Model, data and Trainer."""
    train, validation = load_splits(data, training.seed)
    image, label = column_of(train, Image), column_of(train, ClassLabel)
    names = train.features[label].names
    model = AutoModelForImageClassification.from_pretrained(
        data.model_name, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    processor = AutoImageProcessor.from_pretrained(data.model_name)
    process, collator = processor, collate
    if data.image_size is not None:
        size = {"height": data.image_size, "width": data.image_size}
        process, collator = partial(processor, size=size), partial(collate, interpolate_pos_encoding=True)
    prepare = partial(transform, image=image, label=label, process=process)
    # The transform needs the columns that a Trainer would drop.
    training.remove_unused_columns = False
    return (D2FTTrainer if args.method == "d2ft" else Trainer)(
        model=adapt(model, args, training.seed), args=training, data_collator=collator,
        train_dataset=train.with_transform(partial(prepare, flip=True)),
        eval_dataset=validation.with_transform(partial(prepare, flip=False)),
        processing_class=processor, compute_metrics=accuracy,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; returns what the last line shows."""
    parser = HfArgumentParser((DataArguments, MethodArguments, TrainingArguments))
    data, args, training = parser.parse_args_into_dataclasses(args=argv)
    set_seed(training.seed)
    if args.baseline_fewer_samples is not None:
        train_on_fewer_samples(training, args)
    trainer = make_trainer(data, args, training)
    seconds = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint).metrics["train_runtime"]
    trainer.save_model()
    result = {"accuracy": trainer.evaluate()["eval_accuracy"], "seconds": seconds}
    ratios = [entry["compute_ratio"] for entry in trainer.state.log_history if "compute_ratio" in entry]
    result["compute_ratio"] = float(np.mean(ratios)) if ratios else args.baseline_fewer_samples or 1.0
    trainer.log_metrics("all", result)
    trainer.save_metrics("all", result)
    if training.push_to_hub:
        trainer.push_to_hub()
    print(
        f"{args.method}, {'full' if args.r is None else f'LoRA r={args.r}'}: accuracy {result['accuracy']:.1%}, "
        f"{seconds:.0f} s, compute ratio {result['compute_ratio']:.2f}"
    )
    return result


if __name__ == "__main__":
    main()
