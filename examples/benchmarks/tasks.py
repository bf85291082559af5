"""Tasks of the accuracy benchmark: real pre-trained weights and real data, prepared once and kept in memory.

Models and data lie in a folder (``--assets``) as ``models/NAME`` and ``data/NAME/{train,test,validation}.parquet``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from datasets import load_dataset


@dataclass
class Task:
    """What is trained on what.

    Attributes:
        model: Builds the pre-trained model, with a new head where the task needs one.
        head: Module that is new, trained in every variant; None if there is none.
        train, test: Lists of samples; texts are dictionaries of lists, whose lengths show before they are padded.
        collate: From samples to a batch; draws its augmentation from numpy's global stream.
        metric: ``"accuracy"``, in per cent, or ``"loss"``, in nats per token.
        learning_rate: Found for plain fine-tuning, by mode.
    """

    model: Callable[[], torch.nn.Module]
    head: str | None
    train: list
    test: list
    collate: Callable[[list], dict[str, Any]]
    metric: str
    learning_rate: dict[str, float]


def _rows(assets: Path, name: str, split: str, count: int | None) -> Any:
    folder = assets / "data" / name
    split = split if (folder / f"{split}.parquet").exists() else "validation"
    rows = load_dataset("parquet", data_files={"x": str(folder / f"{split}.parquet")}, split="x")
    return rows if count is None or count >= len(rows) else rows.shuffle(seed=0).select(range(count))


def image_task(name: str, classes: int, assets: Path, size: int, train: int | None, test: int | None) -> Task:
    """ViT-Tiny on images of `size` pixels; random horizontal flips."""

    def load(split: str, count: int | None) -> list[tuple[np.ndarray, int]]:
        rows = _rows(assets, name, split, count)
        image, label = (next(c for c in rows.column_names if key in c) for key in ("im", "label"))
        return [
            (np.asarray(row[image].convert("RGB").resize((size, size), 2)).transpose(2, 0, 1), row[label])
            for row in rows
        ]

    def collate(samples: list, flip: bool = False) -> dict[str, Any]:
        pixels = torch.from_numpy(np.stack([image for image, _ in samples])).float() / 127.5 - 1
        pixels = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(-1), pixels) if flip else pixels
        labels = torch.tensor([label for _, label in samples])
        return {"pixel_values": pixels, "labels": labels, "interpolate_pos_encoding": True}

    build = partial(
        tf.ViTForImageClassification.from_pretrained,
        assets / "models" / "vit-tiny-augreg-in1k", num_labels=classes, ignore_mismatched_sizes=True,
    )  # fmt: skip
    return Task(
        build, "classifier", load("train", train), load("test", test), collate, "accuracy", {"full": 3e-4, "lora": 2e-3}
    )


def draw_labels(task: Task, share: float) -> None:
    """Give a share of the training images a label at random, the same ones in every run.

    Raises:
        ValueError: If the task is not one of images.
    """
    if not isinstance(task.train[0], tuple):
        raise ValueError(
            f"label_noise={share:g} is for tasks of images; choose cifar10 or stanford_cars, or leave it out"
        )
    rng = np.random.default_rng(0)
    classes = 1 + max(label for _, label in task.train)
    task.train = [(image, int(rng.integers(classes)) if rng.random() < share else label) for image, label in task.train]


def text_task(name: str, columns: list[str], classes: int, assets: Path, train: int | None, test: int | None) -> Task:
    """MiniLM on sentences or pairs of them, padded to the longest of a batch."""
    encode = partial(_encode, _tokenizer(assets, "minilm-l6"), max_length=96)

    def load(split: str, count: int | None) -> list[dict]:
        rows = _rows(assets, name, split, count)
        return encode([list(rows[column]) for column in columns], rows["label"])

    if name in ("sst2", "mrpc"):  # their own test sets are too small to tell rows apart; phrases of one sentence of
        # SST-2 may be on both sides
        if train is None or test is None:
            raise ValueError(f"task={name!r} takes its test samples from its training set; give --train and --test")
        samples = load("train", train + test)
        return _classifier(assets, classes, samples[:train], samples[train:])
    return _classifier(assets, classes, load("train", train), load("test", test))


def long_text_task(assets: Path, train: int | None, test: int | None) -> Task:
    """MiniLM on documents: 1 to 8 articles of AG News of one class, one after the other, up to 400 tokens."""
    encode = partial(_encode, _tokenizer(assets, "minilm-l6"), max_length=400)

    def load(split: str, count: int | None) -> list[dict]:
        rows = _rows(assets, "ag_news", split, None)
        texts, labels = np.array(rows["text"], dtype=object), np.array(rows["label"])
        rng = np.random.default_rng(0)
        chosen = rng.integers(4, size=count or len(labels))
        documents = [
            "\n".join(rng.choice(texts[labels == label], rng.integers(1, 9), replace=False)) for label in chosen
        ]
        return encode([documents], chosen)

    return _classifier(assets, 4, load("train", train), load("test", test))


def _tokenizer(assets: Path, model: str) -> Any:
    return tf.AutoTokenizer.from_pretrained(assets / "models" / model)


def _encode(tokenizer: Any, columns: list[list[str]], labels: Any, max_length: int) -> list[dict]:
    encoded = tokenizer(*columns, truncation=True, max_length=max_length)
    return [
        {"input_ids": ids, "token_type_ids": types, "labels": int(label)}
        for ids, types, label in zip(encoded["input_ids"], encoded["token_type_ids"], labels, strict=True)
    ]


def _classifier(assets: Path, classes: int, training: list[dict], testing: list[dict]) -> Task:
    pad = tf.DataCollatorWithPadding(_tokenizer(assets, "minilm-l6"))
    build = partial(
        tf.BertForSequenceClassification.from_pretrained,
        assets / "models" / "minilm-l6", num_labels=classes, dtype=torch.float32,
    )  # fmt: skip
    return Task(
        build, "classifier", training, testing, lambda samples, flip=False: dict(pad(samples)),
        "accuracy", {"full": 1e-4, "lora": 1e-3},
    )  # fmt: skip


def language_task(name: str, assets: Path, length: int, train: int | None, test: int | None) -> Task:
    """The small Llama on blocks of text; the end of the text is held out."""
    tokenizer = _tokenizer(assets, "stories260k-llama")
    if name == "shakespeare":
        text = (assets / "data" / "text" / "tinyshakespeare.txt").read_text()
    else:
        rows = _rows(assets, name, "train", None)
        text = "\n\n".join(f"{question}\n{answer}" for question, answer in zip(rows["question"], rows["answer"]))  # noqa: B905
    lines = text.splitlines(keepends=True)
    tokens = np.concatenate([tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines])
    blocks = tokens[: len(tokens) // length * length].reshape(-1, length).astype(int).tolist()
    samples = [{"input_ids": block} for block in blocks]
    held_out = len(blocks) // 10

    def collate(samples: list, flip: bool = False) -> dict[str, Any]:
        ids = torch.tensor([sample["input_ids"] for sample in samples])
        return {"input_ids": ids, "labels": ids}

    return _language_model(assets, samples[:-held_out][:train], samples[-held_out:][:test], collate)


def answers_task(assets: Path, length: int, train: int | None, test: int | None) -> Task:
    """The small Llama on questions and answers of GSM8K, with the loss on the answers; pairs that are longer than
    `length` tokens are left out, the others padded to the longest of a batch."""
    tokenizer = _tokenizer(assets, "stories260k-llama")
    tokenizer.pad_token = tokenizer.eos_token

    def load(split: str, count: int | None) -> list[dict]:
        rows, samples = _rows(assets, "gsm8k", split, None).shuffle(seed=0), []
        for row in rows:
            ids = [tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("question", "answer")]
            prompt, answer = [tokenizer.bos_token_id, *ids[0]], [*ids[1], tokenizer.eos_token_id]
            if len(prompt) + len(answer) <= length:
                samples.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
            if len(samples) == count:
                break
        return samples

    pad = tf.DataCollatorForSeq2Seq(tokenizer)
    return _language_model(
        assets, load("train", train), load("test", test), lambda samples, flip=False: dict(pad(samples))
    )


def _language_model(assets: Path, training: list[dict], testing: list[dict], collate: Callable) -> Task:
    build = partial(tf.LlamaForCausalLM.from_pretrained, assets / "models" / "stories260k-llama", dtype=torch.float32)
    return Task(build, None, training, testing, collate, "loss", {"full": 2e-3, "lora": 4e-3})


def load_task(name: str, assets: str, size: int = 96, train: int | None = None, test: int | None = None) -> Task:
    """A task by name; `size` is the side of an image in pixels or the length of a block, or the largest of a pair, in
    tokens."""
    folder = Path(assets)
    if name in ("cifar10", "stanford_cars"):
        return image_task(name, 10 if name == "cifar10" else 196, folder, size, train, test)
    if name in ("sst2", "ag_news", "mrpc"):
        columns = {"sst2": ["sentence"], "ag_news": ["text"], "mrpc": ["sentence1", "sentence2"]}[name]
        return text_task(name, columns, 4 if name == "ag_news" else 2, folder, train, test)
    if name in ("shakespeare", "gsm8k"):
        return language_task(name, folder, size, train, test)
    if name == "ag_news_long":
        return long_text_task(folder, train, test)
    if name == "gsm8k_answers":
        return answers_task(folder, size, train, test)
    raise ValueError(
        f"task={name!r} is unknown; choose cifar10, stanford_cars, sst2, ag_news, ag_news_long, mrpc, shakespeare, "
        "gsm8k, gsm8k_answers"
    )
