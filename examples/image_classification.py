"""Fine-tune an image classifier by D2FT, and compare with plain fine-tuning.

`d2ft train` does this without a line of code. This is what to begin with for a script of your own: it mirrors images,
names the parameters that train, takes every field of LoRA and a baseline of fewer samples, and resumes to the same
bits.

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

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from common import MethodArguments, adapt, fine_tune, load_splits, parse
from datasets import ClassLabel, Dataset, Image
from PIL import ImageOps
from PIL.Image import Image as Picture
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    EvalPrediction,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from d2ft_peft import D2FTTrainer


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
class ImageMethodArguments(MethodArguments):
    """How it is trained. What is left out has `D2FTConfig`'s default."""

    train_boundary: bool = field(
        default=True, metadata={"help": "full fine-tuning: train embeddings and norms too, not the classifier alone"}
    )
    head: str = field(default="classifier", metadata={"help": "name of the module that is new and always trained"})


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


class Flips(TrainerCallback):
    """Which images are mirrored, drawn anew for every image in every epoch.

    Not by a generator that everybody shares: loaders are ahead of the state that a checkpoint holds, so a resumed run
    would draw others.
    """

    def __init__(self, seed: int):
        self.seed, self.epoch = seed, torch.zeros((), dtype=torch.int64).share_memory_()  # workers of a loader see it

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.epoch.fill_(int(state.epoch))

    def __call__(self, picture: Picture) -> bool:
        rng = np.random.default_rng([self.seed, int(self.epoch), zlib.crc32(picture.tobytes())])
        return bool(rng.random() < 0.5)


def transform(
    rows: dict[str, list], image: str, label: str, process: Callable, flips: Callable[[Picture], bool] | None
) -> dict[str, Any]:
    """What a few rows become as they are fetched; nothing is decoded ahead of time."""
    images = [picture.convert("RGB") for picture in rows[image]]
    if flips is not None:
        images = [ImageOps.mirror(picture) if flips(picture) else picture for picture in images]
    return {"pixel_values": process(images, return_tensors="pt")["pixel_values"], "labels": rows[label]}


def collate(samples: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    return {"pixel_values": pixels, "labels": torch.tensor([sample["labels"] for sample in samples]), **options}


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    # Not by `evaluate`, which downloads the metric's script and fails where there is no network.
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


def make_trainer(data: DataArguments, args: MethodArguments, training: TrainingArguments) -> Trainer:
    """Model, data and Trainer."""
    train, validation = load_splits(data, (data.dataset_name,), "parquet", {"seed": training.seed})
    train = take(train, data.max_train_samples, training.seed)
    validation = take(validation, data.max_eval_samples, training.seed)
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
    flips = Flips(training.seed)
    prepare = partial(transform, image=image, label=label, process=process)
    # The transform needs the columns that a Trainer would drop.
    training.remove_unused_columns = False
    return (D2FTTrainer if args.method == "d2ft" else Trainer)(
        model=adapt(model, args, training.seed), args=training, data_collator=collator,
        train_dataset=train.with_transform(partial(prepare, flips=flips)),
        eval_dataset=validation.with_transform(partial(prepare, flips=None)),
        processing_class=processor, compute_metrics=accuracy, callbacks=[flips],
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Train, evaluate, save; returns what the last line shows."""
    data, args, training = parse(DataArguments, ImageMethodArguments, argv)
    trainer = make_trainer(data, args, training)
    result = fine_tune(trainer, args, lambda metrics: {"accuracy": metrics["eval_accuracy"]})
    print(
        f"{args}: accuracy {result['accuracy']:.1%}, {result['seconds']:.0f} s, "
        f"compute ratio {result['compute_ratio']:.2f}"
    )
    return result


if __name__ == "__main__":
    main()
