"""What a data set is for, from the names and types of its columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Image, Value


_LABELS = ("label", "labels", "fine_label", "target", "class")
_TEXTS = ("text", "sentence", "content", "document", "review", "question", "sms")
_PROMPTS = (
    ("prompt", "completion"), ("question", "answer"), ("instruction", "output"), ("instruction", "response"),
    ("input", "output"),
)  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The columns that are read, by what they are; None where there is no such column.

    Attributes:
        image, text, label, prompt, completion: Names of columns.
    """

    image: str | None = None
    text: str | None = None
    label: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def task(self) -> str:
        """What a model learns from them."""
        if self.image is not None:
            return "image-classification"
        return "sequence-classification" if self.label is not None else "causal-lm"


def find_columns(features: Mapping[str, Any], given: Columns) -> Columns:
    """The columns of a data set: those that are named, and else what their names and types suggest.

    An image with a label is classified, and so is a text with one; a prompt with a completion is learned with the loss
    on the completion; a text alone is learned as it stands.

    Args:
        features: Of the data set, by column.
        given: Columns that the user named.

    Raises:
        ValueError: If a column that was named is not there, or nothing can be learned from those that are.
    """
    for name in (given.image, given.text, given.label, given.prompt, given.completion):
        if name is not None and name not in features:
            raise ValueError(f"column {name!r} is not in the data, which has {sorted(features)}.")
    for name in (given.text, given.prompt, given.completion):
        if name is not None and not isinstance(features[name], Value):
            raise ValueError(f"column {name!r} holds {features[name]}, which is no text; name another one.")
    if (given.prompt is None) != (given.completion is None):
        raise ValueError("prompt_column and completion_column belong together; give both.")
    strings = [name for name, one in features.items() if isinstance(one, Value) and "string" in one.dtype]
    image = given.image or next((name for name, one in features.items() if isinstance(one, Image)), None)
    label = given.label or _label(features)
    if image is not None:
        if label is None:
            raise ValueError(f"images need labels, and none of {sorted(features)} looks like one; give label_column.")
        return Columns(image=image, label=label)
    if given.prompt is not None:
        return Columns(prompt=given.prompt, completion=given.completion)
    asked_for_text = given.text is not None or given.label is not None
    pair = next((pair for pair in _PROMPTS if set(pair) <= set(strings)), None)
    if pair is not None and not asked_for_text and label is None:
        return Columns(prompt=pair[0], completion=pair[1])
    others = [name for name in strings if name != label]
    text = given.text or next((name for name in _TEXTS if name in others), others[0] if others else None)
    if text is None:
        raise ValueError(
            f"nothing can be learned from the columns {sorted(features)}: give an image or a text with a label, a "
            "prompt with a completion, or a text; name them by text_column, label_column, ..."
        )
    return Columns(text=text, label=label)


def _label(features: Mapping[str, Any]) -> str | None:
    found = [name for name, one in features.items() if isinstance(one, ClassLabel)]
    return next((name for name in (*found, *_LABELS) if name in features), None)
