"""From a name to a task: data that are read, prepared for a model, and collated; and models that fit them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers as tf
from datasets import Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from torch import nn

from .architecture_choice import PLANNED_ONLY, TASKS, choose_task, read_config
from .data_columns import Columns, find_columns


_KINDS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_MOST_TOKENS = 256
IGNORED = -100


@dataclass
class Task:
    """What is trained on what.

    Attributes:
        model: Folder or Hub id of the pre-trained model.
        name: See `TASKS`.
        columns: What was read.
        train, held_out: Samples as a Trainer takes them.
        collate: From samples to a batch.
        processor: Tokenizer or image processor, which is saved beside the model.
        options: What `from_pretrained` takes besides the model's name: classes, what pads.
        classes: Names of the classes, or None.
    """

    model: str
    name: str
    columns: Columns
    train: Any
    held_out: Any
    collate: Callable[[list], dict[str, Any]]
    processor: Any
    options: dict[str, Any] = field(default_factory=dict)
    classes: list[str] | None = None

    @property
    def model_class(self) -> Any:
        """The Auto class of such models."""
        return TASKS[self.name]

    def build(self) -> nn.Module:
        """The model, pre-trained, with a new head where the task needs one."""
        return self.model_class.from_pretrained(self.model, dtype=torch.float32, **self.options)


def read_data(name: str, held_out_share: float = 0.1, cache_dir: str | None = None) -> DatasetDict:
    """Splits ``train`` and ``held_out`` of a data set.

    Args:
        name: A file (csv, json, parquet, text), a folder of such files or of images, one that `datasets` saved, or a
            Hub id.
        held_out_share: Held out where there is no validation or test split; texts are cut at the end, all others at
            random.
        cache_dir: Where `datasets` keeps what it has read.

    Raises:
        ValueError: If there is nothing to read, or no training split.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(f"held_out={held_out_share} must be in (0, 1).")
    splits = _load(name, cache_dir)
    splits = DatasetDict(train=splits) if isinstance(splits, Dataset) else splits
    if "train" not in splits:
        raise ValueError(f"data={name!r} has the splits {sorted(splits)} and no 'train'.")
    other = next((one for one in ("validation", "test") if one in splits and len(splits[one])), None)
    if other is not None:
        return DatasetDict(train=splits["train"], held_out=splits[other])
    if len(splits["train"]) < 2:
        raise ValueError(f"data={name!r} has {len(splits['train'])} rows; at least 2 are needed to hold one out.")
    parts = splits["train"].train_test_split(held_out_share, seed=0, shuffle=splits["train"].column_names != ["text"])
    return DatasetDict(train=parts["train"], held_out=parts["test"])


def _load(name: str, cache_dir: str | None) -> DatasetDict | Dataset:
    ending = os.path.splitext(name)[1].lower()
    if os.path.isfile(name):
        if ending not in _KINDS:
            raise ValueError(f"data={name!r} ends in {ending or 'nothing'}; give one of {sorted(_KINDS)}, or a folder.")
        if not os.path.getsize(name):
            raise ValueError(f"data={name!r} is empty.")
    elif name.startswith((".", "/", "~")) and not os.path.isdir(name):
        raise ValueError(f"data={name!r} does not exist.")
    try:
        if os.path.isfile(name):
            options = {"sep": "\t"} if ending == ".tsv" else {}
            return load_dataset(_KINDS[ending], data_files={"train": name}, cache_dir=cache_dir, **options)
        if any(os.path.isfile(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")):
            return load_from_disk(name)
        return load_dataset(name, cache_dir=cache_dir)
    except (DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"data={name!r} cannot be read: {error.__cause__ or error}") from error


def load_task(
    model: str,
    data: str,
    given: Columns = Columns(),  # noqa: B008 - immutable
    task: str | None = None,
    length: int | None = None,
    image_size: int | None = None,
    most: tuple[int | None, int | None] = (None, None),
    held_out_share: float = 0.1,
    cache_dir: str | None = None,
) -> Task:
    """Data for a model.

    Args:
        model: Folder or Hub id of a pre-trained model.
        data: See `read_data`.
        given: Columns that the user named.
        task: See `TASKS`; by default what the columns suggest.
        length: Tokens of a sample; longer ones are cut.
        image_size: Pixels of a side.
        most: Samples to train on and to hold out, or None for all.
        held_out_share, cache_dir: See `read_data`.

    Raises:
        ValueError: If data and model do not fit together.
    """
    config = read_config(model)
    splits = read_data(data, held_out_share, cache_dir)
    columns = find_columns(splits["train"].features, given)
    _check_filled(splits, columns)
    name = choose_task(config, task or columns.task)
    if task is None and name == "causal-lm" and choose_task(config, None) == "sequence-classification":
        raise ValueError(
            f"the columns {splits['train'].column_names} have no label, and a {config.model_type} model is no language "
            "model; name a label_column, or give task='causal-lm' if it is one all the same."
        )
    if name in PLANNED_ONLY:
        raise ValueError(
            f"task={name!r} can be planned only; train it with a Trainer of its kind and d2ft_peft.D2FTTrainerMixin."
        )
    if (name == "image-classification") != (columns.image is not None):
        raise ValueError(f"task={name!r} does not go with the columns {columns}; name other ones, or another task.")
    for split, count in zip(("train", "held_out"), most, strict=True):
        if count is not None and count < len(splits[split]):
            ordered = name == "causal-lm" and columns.text is not None
            chosen = splits[split] if ordered else splits[split].shuffle(seed=0)
            splits[split] = chosen.select(range(count))
    if name == "causal-lm":
        return _language_task(model, splits, columns, length)
    classes = _classes(splits, columns.label)
    prepare = _image_task if name == "image-classification" else _text_task
    return prepare(model, splits, columns, classes, image_size if columns.image else length)


def _check_filled(splits: DatasetDict, columns: Columns) -> None:
    """Raises ValueError where a row has nothing to learn from; labels are looked at when they are counted."""
    for name in filter(None, (columns.image, columns.text, columns.prompt, columns.completion)):
        for data in splits.values():
            column = data.data.column(name)
            if column.null_count:
                raise ValueError(
                    f"column {name!r} is empty in {column.null_count} of {len(column)} rows; fill them, or leave them "
                    "out."
                )


def _classes(splits: DatasetDict, label: str | None) -> dict[Any, int]:
    """Number of each label; raises ValueError where there is none to tell apart."""
    if label is None:
        raise ValueError(f"sequence-classification needs labels, and {splits['train'].column_names} has none.")
    names = getattr(splits["train"].features[label], "names", None)
    if names is not None:
        return dict(zip(range(len(names)), range(len(names)), strict=True))
    found = sorted(set(splits["train"][label]) | set(splits["held_out"][label]), key=str)
    if any(isinstance(one, float) or one is None for one in found) or len(found) < 2:
        raise ValueError(
            f"column {label!r} has the labels {found[:5]}; at least two are needed, no floats and no gaps."
        )
    return {one: number for number, one in enumerate(found)}


def _names(splits: DatasetDict, label: str, classes: dict[Any, int]) -> list[str]:
    return list(getattr(splits["train"].features[label], "names", None) or map(str, classes))


def _new_head(names: list[str]) -> dict[str, Any]:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    return {"ignore_mismatched_sizes": True, **labels}


def _image_task(model: str, splits: DatasetDict, columns: Columns, classes: dict[Any, int], size: int | None) -> Task:
    processor = _beside(model, tf.AutoImageProcessor)
    options = {} if size is None else {"size": {"height": size, "width": size}}
    extra = {} if size is None else {"interpolate_pos_encoding": True}
    splits = splits.cast_column(columns.image, Image())

    def transform(rows: dict[str, list]) -> dict[str, Any]:
        images = [picture.convert("RGB") for picture in rows[columns.image]]
        pixels = processor(images, return_tensors="pt", **options)["pixel_values"]
        return {"pixel_values": pixels, "labels": [classes[one] for one in rows[columns.label]]}

    def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
        pixels = torch.stack([sample["pixel_values"] for sample in samples])
        return {"pixel_values": pixels, "labels": torch.tensor([sample["labels"] for sample in samples]), **extra}

    names = _names(splits, columns.label, classes)
    return Task(
        model, "image-classification", columns, splits["train"].with_transform(transform),
        splits["held_out"].with_transform(transform), collate, processor, _new_head(names), names,
    )  # fmt: skip


def _beside(model: str, kind: type) -> Any:
    """The tokenizer or image processor of a model."""
    what = "tokenizer" if kind is tf.AutoTokenizer else "image processor"
    try:
        found = kind.from_pretrained(model)
        if what == "tokenizer" and set(found.get_vocab()) <= set(found.all_special_tokens):
            raise ValueError("it knows no words")  # transformers makes some without their files, of nothing
        return found
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"model={model!r} has no {what} that can be read ({reason}); save one beside it with save_pretrained."
        ) from error


def _tokenizer(model: str) -> Any:
    tokenizer = _beside(model, tf.AutoTokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _text_task(model: str, splits: DatasetDict, columns: Columns, classes: dict[Any, int], length: int | None) -> Task:
    tokenizer = _tokenizer(model)
    most = length or min(tokenizer.model_max_length, 2 * _MOST_TOKENS)

    def encode(rows: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer(list(map(str, rows[columns.text])), truncation=True, max_length=most)
        return {**encoded, "labels": [classes[one] for one in rows[columns.label]]}

    names = _names(splits, columns.label, classes)
    splits = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    options = _new_head(names)
    if read_config(model).get_text_config().pad_token_id is None:
        options["pad_token_id"] = tokenizer.pad_token_id
    return Task(
        model, "sequence-classification", columns, splits["train"], splits["held_out"],
        tf.DataCollatorWithPadding(tokenizer), tokenizer, options, names,
    )  # fmt: skip


def _language_task(model: str, splits: DatasetDict, columns: Columns, length: int | None) -> Task:
    tokenizer = _tokenizer(model)
    most = length or min(tokenizer.model_max_length, _MOST_TOKENS)
    if columns.prompt is not None:
        encode = partial(_pairs, columns=columns, tokenizer=tokenizer, most=most)
    else:
        between = "\n" if columns.text == "text" and splits["train"].column_names == ["text"] else "\n\n"
        encode = partial(_blocks, column=columns.text, tokenizer=tokenizer, between=between, size=most)
    splits = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    for name, split in splits.items():
        if not len(split):
            raise ValueError(
                f"sequence_length={most} leaves no sample in the {name} split: texts are too short for a block of it, "
                "or prompts too long; choose another one."
            )
    collate = tf.DataCollatorForSeq2Seq(tokenizer) if columns.prompt is not None else tf.default_data_collator
    return Task(model, "causal-lm", columns, splits["train"], splits["held_out"], collate, tokenizer)


def _blocks(rows: dict[str, list], column: str, tokenizer: Any, between: str, size: int) -> dict[str, list]:
    """Rows as one text, cut into blocks of equal size; a rest is dropped."""
    text = between.join(map(str, rows[column])) + between
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    blocks = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    return {"input_ids": blocks, "labels": blocks}


def _pairs(rows: dict[str, list], columns: Columns, tokenizer: Any, most: int) -> dict[str, list]:
    """Prompts with their completions; the loss is on these, and a pair whose prompt fills everything is left out."""
    found: dict[str, list] = {"input_ids": [], "attention_mask": [], "labels": []}
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, completion in zip(rows[columns.prompt], rows[columns.completion], strict=True):
        given, wanted = (tokenizer(str(one), add_special_tokens=False)["input_ids"] for one in (prompt, completion))
        ids = [*start, *given, *wanted, *end][:most]
        labels = [*[IGNORED] * (len(start) + len(given)), *wanted, *end][:most]
        if any(label != IGNORED for label in labels[1:]):
            found["input_ids"].append(ids)
            found["attention_mask"].append([1] * len(ids))
            found["labels"].append(labels)
    return found
