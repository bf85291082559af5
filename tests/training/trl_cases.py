"""TRL's trainers on tiny models and data as they come: what each is given, and how one is made."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.experimental.gmpo import GMPOConfig, GMPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer

from tests.models import TINY


def words(n: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{int(i)}" for i in torch.randint(3, 60, (n,), generator=generator))


def tokenizer():
    tokens = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="w0", eos_token="w2", bos_token="w1", padding_side="left",
        chat_template="{% for turn in messages %}{{ turn['content'] }} {% endfor %}",
    )  # fmt: skip


TEXTS = [{"text": words(4 + i % 5, i)} for i in range(16)]
PROMPTS = [{"prompt": words(4, i)} for i in range(8)]
PAIRS = [
    {"prompt": words(4, i) + " ", "chosen": words(3 + i % 3, 100 + i), "rejected": words(2 + i % 4, 200 + i)}
    for i in range(16)
]
RATED = [{"prompt": words(4, i) + " ", "completion": words(3 + i % 3, 100 + i), "label": i % 2 == 0} for i in range(16)]
TRIPLES = [{**pair, "reference": words(3 + i % 2, 300 + i)} for i, pair in enumerate(PAIRS)]
CHATS = [
    {"messages": [{"role": "user", "content": words(4, i)}, {"role": "assistant", "content": words(3 + i % 3, 99 + i)}]}
    for i in range(16)
]
GENERATES = {"num_generations": 2, "max_completion_length": 4}

KINDS: dict[str, tuple[type, type, list, dict[str, Any]]] = {
    "sft": (SFTTrainer, SFTConfig, TEXTS, {"max_length": 16}),
    "sft_packing": (SFTTrainer, SFTConfig, TEXTS, {"max_length": 16, "packing": True}),
    "sft_padding_free": (SFTTrainer, SFTConfig, TEXTS, {"max_length": None, "padding_free": True}),
    "dpo": (DPOTrainer, DPOConfig, PAIRS, {}),
    "dpo_precomputed": (DPOTrainer, DPOConfig, PAIRS, {"precompute_ref_log_probs": True}),
    "kto": (KTOTrainer, KTOConfig, RATED, {}),
    "reward": (RewardTrainer, RewardConfig, PAIRS, {}),
    "orpo": (ORPOTrainer, ORPOConfig, PAIRS, {"max_length": 32}),
    "cpo": (CPOTrainer, CPOConfig, PAIRS, {"max_length": 32}),
    "tpo": (TPOTrainer, TPOConfig, TRIPLES, {"max_length": 32}),
    "gkd": (GKDTrainer, GKDConfig, CHATS, {"max_length": 32, "lmbda": 0.0}),
    "gmpo": (GMPOTrainer, GMPOConfig, PROMPTS, GENERATES),
    "grpo": (GRPOTrainer, GRPOConfig, PROMPTS, GENERATES),
    "rloo": (RLOOTrainer, RLOOConfig, PROMPTS, GENERATES),
}
"""Trainer, its arguments' class, data and arguments, by name."""


GENERATING = ("grpo", "rloo", "gmpo")


def reward(completions: list[str], **_: Any) -> list[float]:
    """A number that differs between most completions."""
    return [float(sum(map(ord, one)) % 7) for one in completions]


def base_of(kind: str):
    if kind != "reward":
        return TINY["llama"].build()
    torch.manual_seed(0)
    return tf.LlamaForSequenceClassification(tf.LlamaConfig(**TINY["llama"].kwargs, num_labels=1))


def make(kind: str, folder: Any, model: Any = None, trainer_class: type | None = None, callbacks=(), **kwargs: Any):
    """A trainer: two steps of four micro-batches of two samples. Keyword arguments go to where they belong."""
    cls, arguments, data, own = KINDS[kind]
    named = ("peft_config", "ref_model", "teacher_model", "reward_funcs", "eval_dataset", "rollout_func")
    to_trainer = {name: kwargs.pop(name) for name in named if name in kwargs}
    args = arguments(**{
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 2, "max_steps": 2, "seed": 0,
        "gradient_accumulation_steps": 4, "max_grad_norm": 0.0, "gradient_checkpointing": False, **own, **kwargs,
    })  # fmt: skip
    if kind in GENERATING:
        to_trainer.setdefault("reward_funcs", reward)
    if kind == "gkd":
        torch.manual_seed(1)
        to_trainer.setdefault("teacher_model", tf.LlamaForCausalLM(tf.LlamaConfig(**TINY["llama"].kwargs)))
    return (trainer_class or cls)(
        model=base_of(kind) if model is None else model, args=args, train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(), callbacks=list(callbacks), **to_trainer,
    )  # fmt: skip
