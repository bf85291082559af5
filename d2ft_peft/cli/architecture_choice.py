"""Which model class a name and a task stand for, from the configuration alone."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers as tf
from torch import nn
from transformers.models.auto import modeling_auto


TASKS = {
    "causal-lm": tf.AutoModelForCausalLM,
    "seq2seq-lm": tf.AutoModelForSeq2SeqLM,
    "sequence-classification": tf.AutoModelForSequenceClassification,
    "image-classification": tf.AutoModelForImageClassification,
    "image-text-to-text": tf.AutoModelForImageTextToText,
}
"""What the command line knows, and the class that stands for it."""

PLANNED_ONLY = ("seq2seq-lm", "image-text-to-text")
"""Tasks of which the command line reads no data."""

_NAMES_OF = {
    "causal-lm": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq-lm": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "sequence-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
}
_USUAL_TOKENS = {"causal-lm": 512, "seq2seq-lm": 512, "image-text-to-text": 512, "sequence-classification": 128}
_USUAL_PIXELS = 224


def has_new_head(task: str) -> bool:
    """Whether a task gives a pre-trained model a head that is new."""
    return task.endswith("-classification")


def read_config(model: str) -> tf.PretrainedConfig:
    """The configuration of a model.

    Args:
        model: A folder with ``config.json``, a model type such as ``llama``, or a Hub id.

    Raises:
        ValueError: If it is none of these.
    """
    if not os.path.exists(model) and model in tf.CONFIG_MAPPING:
        return tf.CONFIG_MAPPING[model]()
    if os.path.isdir(model) and not os.path.isfile(os.path.join(model, "config.json")):
        raise ValueError(f"model={model!r} is a folder without config.json; give the folder of a model, or a Hub id.")
    try:
        return tf.AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"model={model!r} is neither a folder with config.json, nor a model type of transformers, nor a model of "
            f"the Hub that can be reached ({str(error).splitlines()[0]})"
        ) from error


def choose_task(config: tf.PretrainedConfig, task: str | None) -> str:
    """The task, or that which a model was made for: by its class if the configuration names one, else by its type.

    Raises:
        ValueError: If the task is unknown, or the type of model has no class for it.
    """
    if task is None:
        task = _usual_task(config)
    if task not in TASKS:
        raise ValueError(f"task={task!r} is unknown; choose one of {sorted(TASKS)}.")
    if config.model_type not in _NAMES_OF[task]:
        fitting = [name for name, names in _NAMES_OF.items() if config.model_type in names]
        raise ValueError(
            f"task={task!r} is nothing that transformers has a {config.model_type} model for; "
            f"choose {' or '.join(fitting) or 'another model'}."
        )
    if config.is_encoder_decoder and task == "causal-lm":
        raise ValueError(
            f"task='causal-lm' of a {config.model_type} model is its decoder without an encoder to attend to; choose "
            "another task, or another model."
        )
    return task


def _usual_task(config: tf.PretrainedConfig) -> str:
    named = (config.architectures or [""])[0]
    for task, names in _NAMES_OF.items():
        if named and named == names.get(config.model_type):
            return task
    if config.model_type in _NAMES_OF["image-classification"]:
        return "image-classification"
    if config.is_encoder_decoder and config.model_type in _NAMES_OF["seq2seq-lm"]:
        return "seq2seq-lm"
    decodes = config.model_type in _NAMES_OF["causal-lm"]
    if decodes and config.model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "causal-lm"
    if config.model_type in _NAMES_OF["sequence-classification"]:
        return "sequence-classification"
    return next((task for task, names in _NAMES_OF.items() if config.model_type in names), "sequence-classification")


def model_on_meta(config: tf.PretrainedConfig, task: str) -> nn.Module:
    """The model with names and shapes, and no weights."""
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        # A type's own configuration may leave it to a checkpoint.
        config.decoder_start_token_id = config.pad_token_id or 0
    with torch.device("meta"):
        model = TASKS[task].from_config(config)
    for module in model.modules():
        if isinstance(module, tf.PreTrainedModel):
            module.warn_if_padding_and_no_attention_mask = _look_at_no_ids
    return model


def _look_at_no_ids(*args: Any) -> None:
    """Ids on the meta device have no values that one of them could be padding by."""


def batch_on_meta(
    config: tf.PretrainedConfig, task: str, length: int | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """One sample as the model takes it, without values.

    Args:
        config: The model's configuration.
        task: The task.
        length: Tokens; by default 512 for language models and 128 for classifiers, or as many as the model has
            positions for.
        image_size: Pixels of a side; by default the model's own.

    Raises:
        ValueError: If the model has no positions for so many tokens.
    """
    if task == "image-classification":
        config = getattr(config, "vision_config", config)
        own = getattr(config, "image_size", _USUAL_PIXELS)
        height, width = own if isinstance(own, list | tuple) else (own, own)
        options = {} if image_size in (None, own) else {"interpolate_pos_encoding": True}
        height, width = (height, width) if image_size is None else (image_size, image_size)
        with torch.device("meta"):
            pixels = torch.ones(1, getattr(config, "num_channels", 3), height, width)
            return {"pixel_values": pixels, "labels": torch.zeros(1, dtype=torch.long), **options}
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or length or _USUAL_TOKENS[task]
    if length is not None and not 1 <= length <= positions:
        raise ValueError(f"sequence_length={length} must be between 1 and the model's {positions} positions.")
    shape = 1, length or min(_USUAL_TOKENS[task], positions)
    with torch.device("meta"):
        ids = torch.ones(shape, dtype=torch.long)
        return {"input_ids": ids, "labels": torch.zeros(1, dtype=torch.long) if has_new_head(task) else ids}
