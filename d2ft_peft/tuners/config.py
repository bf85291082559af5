"""D2FTConfig: PEFT's words for the adapter, and D2FT's for what each step may cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig

from ..schedule import Budget
from .config_checks import LIVE_SCORES as LIVE_SCORES
from .config_checks import SHARED_FIELDS, check_full, check_lora, check_names_of_modules, check_own_fields
from .peft_type import D2FTType


D2FT_CONFIG_NAME = "d2ft_config.json"
DEFAULT_COMPUTE_BUDGET = 0.6


@dataclass
class D2FTConfig(LoraConfig):
    """Configuration of D2FT, for full fine-tuning (``r=None``) and for LoRA (``r`` set).

    Fields of `peft.LoraConfig` keep their meaning (``target_modules``, ``modules_to_save``, ``lora_alpha``, ...).
    ``target_modules=None`` targets every projection of the subnets.

    Args:
        r: Rank of LoRA, or None for full fine-tuning.
        keep_base: Full fine-tuning: whether the original weights are kept beside the trained ones. With False the
            model's own weights are trained in place, in the memory of plain fine-tuning. The adapter is saved as ever
            and loads into a fresh base, but it cannot be disabled or unloaded, nor have a second one beside it.
        train_boundary: Full fine-tuning: also train and save what lies outside the subnets (embeddings, norms, head).
        subnets: What a subnet is: ``"heads"`` of a block, or whole ``"blocks"``; None is heads where the model can be
            cut into them, and blocks, with a warning, elsewhere (other architectures; quantized weights under a policy
            that would slice them, which ``"heads"`` does where their kind is known, at a cost).
        heads_per_subnet: Heads that one subnet groups (key/value heads under grouped-query attention).
        stacks: Which stacks of blocks are scheduled, of a model that has several: their paths, or successive parts of
            them (``"decoder"``, ``"language_model"``, ``"vision_tower"``), one or a list. The others always run.
            None is both stacks of an encoder-decoder, both towers of a CLIP-like model, and of a vision-language model
            the language model alone. An error lists the stacks that there are.
        num_micro_batches: Micro-batches that are scheduled together where the Trainer accumulates no gradients;
            otherwise its gradient accumulation steps.
        compute_budget: Share of the full compute that training may take, in (0, 1]; 0.6 if no budget is given. Under
            ``policy="exact_first"`` of what plain training computes on the same batches, padding included, and on
            average over the run; under other policies of all subnets FULL, in every step.
        communication_budget: Share of the full communication instead.
        num_full: Number of micro-batches that each subnet runs FULL, instead of a budget.
        num_forward_only: Number that it runs FORWARD_ONLY besides.
        num_devices: Devices that the subnets are spread over, block by block; None is one device per subnet, the
            paper's setting.
        device_capacities: Compute budget of each device, one number in (0, 1] each, instead of ``compute_budget``.
            ``"auto"`` is for data parallelism on unequal devices: ``compute_budget`` is then the mean over the
            processes, and each runs as many of its samples as its measured speed allows, so that all reach the gradient
            exchange together. It needs a policy over samples.
        head_parallel: Whether the subnets live on the processes of the run, each process holding its own only; train
            with `D2FTTrainer` or `d2ft_peft.head_parallel.HeadParallel`. The processes are then the devices.
        policy: Name of the scheduling policy, see `d2ft_peft.schedule.policy_names`. None is ``"exact_first"``, which
            meets the budget first by work that no loss ever sees and then by leaving samples out, unless a field asks
            for what only the paper's ``"bilevel"`` does (counts, devices, scores, ties, ``head_parallel``).
        rows: What the policy schedules: ``"micro_batches"`` as they come, or ``"samples"``, from which micro-batches
            are then composed; None is what the policy is meant for (``"exact_first"``: samples, where the data let them
            be told apart). ``"tokens"`` belongs to ``policy="fewer_tokens"``: the middle blocks run on some tokens of
            every sample.
        padding: ``"compose"``: where samples are scheduled, those of about the same length share a micro-batch, so that
            little of it is padding; a step's gradient stays the same. ``"flatten"``: those of a causal language model
            lie one after the other in one row, without any, for attention that keeps them apart at no cost
            (flash_attention_2). ``"keep"``: samples share a micro-batch in their order.
        interval: Optimizer steps for which a policy keeps what it does not choose anew at every step, and for which
            the magnitude of the weights is kept.
        tie_break: ``"aligned"`` breaks ties towards the same micro-batches on every device, ``"spread"`` against it.
        backward_score: Contribution score by which FULL is given; None is the one that the policy is meant for.
            ``"loss"`` and ``"el2n"`` follow training, the others but ``"weight_magnitude"`` take a pass before it.
        forward_score: Contribution score by which FORWARD_ONLY is given; None is ``"weight_magnitude"``, which costs no
            pass over the data. ``"fisher"`` is the paper's: before the first step it takes a forward and a backward
            pass over ``score_fraction`` of the training samples, about as much as that share of an epoch.
        score_fraction: Share of the training samples that are scored before training, in (0, 1].
        shortcut: What stands in for skipped heads: ``"zero"`` (the paper), their running ``"mean"``, or
            ``"rescale"``, which scales up the heads that run.
        forward_only_cost: Cost of FORWARD_ONLY relative to FULL in the schedule; None takes it from the model's own
            FLOPs, 0.4 is the paper's.
        head_learning_rate_factor: Learning rate of the new head, as a multiple of the Trainer's: of what
            ``modules_to_save`` trains, and with ``train_boundary`` of the layer whose output are the logits.
            `D2FTTrainer` makes parameter groups for it.
        learning_rate_follows_batch: Whether `D2FTTrainer` scales the learning rate of each step by the share r of its
            samples that run: ``"sqrt"`` by the root of r (adaptive optimizers: Malladi et al., arXiv 2205.10287),
            ``"linear"`` by r (plain gradient descent: Goyal et al., arXiv 1706.02677), or None.
        head_start: Whether a linear head starts from a regularised linear fit on what it reads, which takes one pass
            without gradients over the training samples before the first step: ``"auto"`` where the head is a new one of
            at least ten classes and fine-tuning is full, True for any head (an error where there is none), False never.
        head_start_fraction: Share of the training samples that this pass looks at, in (0, 1]; None is all, but at most
            as many as cost a quarter of the run's compute, and at least 50 for each class.
        skip_unread_rows: Whether the last block leaves out the rows (token positions) that no loss reads, and the head
            of a language model with it: classifiers read one token, causal language models the rows that predict a
            label. The gradient is the same; which rows are read is found at the first batch, and tried. Not under
            ``head_parallel``.
        seed: Seed of policies that draw at random.
        cache_frozen: Folder for what comes out of the frozen lower blocks, by sample, so that later epochs begin above
            them; None keeps nothing. It needs blocks that draw nothing at random (dropout 0). Exact where inputs are
            the same in every epoch; what is augmented is only computed. Not saved with the adapter.
        cache_dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"`` to keep it in; None keeps its bits.
        cache_gigabytes: Most bytes in that folder, in units of 1e9; what comes later is computed in every epoch.
        token_choice: Which tokens pass the middle blocks: a regular ``"grid"``, drawn at ``"random"``, anew by every
            block (``"random_per_block"``), by the pixel ``"variance"`` of their patches, or by the ``"attention"`` that
            the mean token would pay them.
        token_margins: How many of the first (at least 1) and of the last blocks see all tokens.
        token_dense_share: Share of the last steps that run on all tokens, in [0, 1); the budget holds for the whole
            run all the same.
        token_ramp: Share of the first steps over which the number of tokens falls to that of the others, in [0, 1).
    """

    r: int | None = field(default=None, metadata={"help": "LoRA rank, or None for full fine-tuning"})
    train_boundary: bool = False
    keep_base: bool = True
    subnets: Literal["heads", "blocks"] | None = None
    heads_per_subnet: int = 1
    stacks: list[str] | str | None = None
    num_micro_batches: int = 5
    compute_budget: float | None = None
    communication_budget: float | None = None
    num_full: int | None = None
    num_forward_only: int | None = None
    num_devices: int | None = None
    device_capacities: list[float] | Literal["auto"] | None = None
    head_parallel: bool = False
    policy: str | None = None
    rows: Literal["micro_batches", "samples", "tokens"] | None = None
    padding: Literal["compose", "flatten", "keep"] = "compose"
    interval: int = 10
    tie_break: Literal["aligned", "spread"] = "aligned"
    backward_score: str | None = None
    forward_score: str | None = None
    score_fraction: float = 1.0
    shortcut: Literal["zero", "mean", "rescale"] = "zero"
    forward_only_cost: float | None = None
    head_learning_rate_factor: float = 1.0
    learning_rate_follows_batch: Literal["sqrt", "linear"] | None = None
    head_start: Literal["auto"] | bool = "auto"
    head_start_fraction: float | None = None
    skip_unread_rows: bool = True
    seed: int = 0
    cache_frozen: str | None = None
    cache_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    cache_gigabytes: float = 8.0
    token_choice: Literal["grid", "random", "random_per_block", "variance", "attention"] = "grid"
    token_margins: tuple[int, int] = (1, 1)
    token_dense_share: float = 0.1
    token_ramp: float = 0.0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.generic):  # JSON knows Python's numbers only
                setattr(self, f.name, value.item())
        check_names_of_modules(self)
        check_own_fields(self)
        if self.r is None:
            check_full(self)
            super().__post_init__()
            self.peft_type = D2FTType.D2FT
        else:
            check_lora(self)
            super().__post_init__()
            self.peft_type = D2FTType.D2FT_LORA

    @property
    def is_lora(self) -> bool:
        """Whether this configures the LoRA variant."""
        return self.r is not None

    @property
    def is_auto(self) -> bool:
        """Whether samples are shared out over processes by the speed of each."""
        return isinstance(self.device_capacities, str) and self.device_capacities == "auto"

    @property
    def budget(self) -> Budget:
        """The one budget that the fields state."""
        if self.num_full is not None:
            return Budget(num_full=self.num_full, num_forward_only=self.num_forward_only or 0)
        if self.communication_budget is not None:
            return Budget(communication=self.communication_budget)
        if self.device_capacities is not None and not self.is_auto:
            return Budget(compute=tuple(self.device_capacities))
        return Budget(compute=DEFAULT_COMPUTE_BUDGET if self.compute_budget is None else self.compute_budget)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, without the fields of LoRA where there is none."""
        values = super().to_dict()
        values.pop("cache_frozen")  # where a machine keeps things is nothing to share
        if not self.is_lora:
            lora_only = {f.name for f in dataclasses.fields(LoraConfig)} - SHARED_FIELDS
            values = {name: value for name, value in values.items() if name not in lora_only}
        return values

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write ``adapter_config.json``; under LoRA a plain LoRA adapter's, with ``d2ft_config.json`` beside it."""
        base = self.base_model_name_or_path
        if base and os.path.isdir(base):
            warnings.warn(
                f"the adapter's base model is the local path {base!r}; before you share it, set "
                "model.peft_config['default'].base_model_name_or_path to the model's Hub id.",
                stacklevel=2,
            )
        if not self.is_lora:
            super().save_pretrained(save_directory, **kwargs)
        else:
            plain = LoraConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)})
            plain.save_pretrained(save_directory, **kwargs)
            self.save_own_fields(save_directory)
        from .model_card import mark_model_card

        mark_model_card(save_directory, is_lora=self.is_lora)

    def save_own_fields(self, save_directory: str | os.PathLike) -> None:
        """Write ``d2ft_config.json``, which belongs beside a LoRA adapter; the full variant needs none.

        For whoever copies adapter files that PEFT names, as the Trainer does when it pushes checkpoints to the Hub.
        """
        if not self.is_lora:
            return
        own = {f.name: getattr(self, f.name) for f in _own_fields() if f.name != "cache_frozen"}
        with open(os.path.join(save_directory, D2FT_CONFIG_NAME), "w", encoding="utf-8") as file:
            json.dump(own, file, indent=2, sort_keys=True)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read the configuration of either variant back, from a folder or the Hub.

        Raises:
            ValueError: If the adapter there was not trained by D2FT, or the file that says how is damaged.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        if isinstance(config, cls):
            return config
        path = os.path.join(pretrained_model_name_or_path, subfolder or "", D2FT_CONFIG_NAME)
        if not os.path.isfile(path) and not os.path.isdir(pretrained_model_name_or_path):
            hub_kwargs, _, _ = cls._split_kwargs(kwargs)
            with contextlib.suppress(EntryNotFoundError):
                path = hf_hub_download(
                    pretrained_model_name_or_path, D2FT_CONFIG_NAME, subfolder=subfolder, **hub_kwargs
                )
        if not os.path.isfile(path):
            raise ValueError(
                f"{pretrained_model_name_or_path!r} holds a {config.peft_type.value} adapter and no "
                f"{D2FT_CONFIG_NAME}: it was not trained by D2FT. Give its LoRA fields to D2FTConfig by hand."
            )
        lora = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig)}
        own = _read_own_fields(path)
        try:
            return cls(**lora, **own)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{path}: {error}") from error


def _read_own_fields(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            own = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} is damaged, it holds no JSON ({error}); save the adapter again.") from error
    if not isinstance(own, dict):
        raise ValueError(f"{path} holds {own!r}; it must be a JSON object with the fields of D2FTConfig.")
    return {f.name: own[f.name] for f in _own_fields() if f.name in own}


def _own_fields() -> list[dataclasses.Field]:
    theirs = {f.name for f in dataclasses.fields(LoraConfig)}
    return [f for f in dataclasses.fields(D2FTConfig) if f.name not in theirs]
