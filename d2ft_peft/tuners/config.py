"""D2FTConfig: PEFT's words for the adapter, and D2FT's for what each step may cost."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, Literal

import numpy as np
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftConfig

from ..schedule import Budget, policy_facts
from .peft_type import D2FTType


D2FT_CONFIG_NAME = "d2ft_config.json"
LIVE_SCORES = ("loss", "el2n")
SCORES = ("weight_magnitude", "fisher", "gradient_magnitude", "taylor", *LIVE_SCORES)
DEFAULT_COMPUTE_BUDGET = 0.6

# What a LoraConfig can ask for and the head-wise execution of LoRA does not do.
_UNSUPPORTED_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "megatron_config", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# LoraConfig fields that mean the same for full fine-tuning.
_SHARED = {f.name for f in dataclasses.fields(PeftConfig)} | {
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "runtime_config",
}  # fmt: skip


@dataclass
class D2FTConfig(LoraConfig):
    """Configuration of D2FT, for full fine-tuning (``r=None``) and for LoRA (``r`` set).

    Fields of `peft.LoraConfig` keep their meaning (``target_modules``, ``modules_to_save``, ``lora_alpha``, ...).
    ``target_modules=None`` targets every projection of the subnets.

    Args:
        r: Rank of LoRA, or None for full fine-tuning.
        train_boundary: Full fine-tuning: also train and save what lies outside the subnets (embeddings, norms, head).
        heads_per_subnet: Heads that one subnet groups (key/value heads under grouped-query attention).
        num_micro_batches: Micro-batches that are scheduled together where the Trainer accumulates no gradients;
            otherwise its gradient accumulation steps.
        compute_budget: Share of the full compute that a step may take, in (0, 1]; 0.6 if no budget is given.
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
        policy: Name of the scheduling policy, see `d2ft_peft.schedule.policy_names`.
        rows: What the policy schedules: ``"micro_batches"`` as they come, or ``"samples"``, from which micro-batches
            are then composed; None is what the policy is meant for.
        interval: Optimizer steps for which a policy keeps what it does not choose anew at every step, and for which
            the magnitude of the weights is kept.
        tie_break: ``"aligned"`` breaks ties towards the same micro-batches on every device, ``"spread"`` against it.
        backward_score: Contribution score by which FULL is given; None is the one that the policy is meant for.
            ``"loss"`` and ``"el2n"`` follow training, the others but ``"weight_magnitude"`` take a pass before it.
        forward_score: Contribution score by which FORWARD_ONLY is given.
        score_fraction: Share of the training samples that are scored before training, in (0, 1].
        shortcut: What stands in for skipped heads: ``"zero"`` (the paper), their running ``"mean"``, or
            ``"rescale"``, which scales up the heads that run.
        forward_only_cost: Cost of FORWARD_ONLY relative to FULL in the schedule; None takes it from the model's own
            FLOPs, 0.4 is the paper's.
        seed: Seed of policies that draw at random.
    """

    r: int | None = field(default=None, metadata={"help": "LoRA rank, or None for full fine-tuning"})
    train_boundary: bool = False
    heads_per_subnet: int = 1
    num_micro_batches: int = 5
    compute_budget: float | None = None
    communication_budget: float | None = None
    num_full: int | None = None
    num_forward_only: int | None = None
    num_devices: int | None = None
    device_capacities: list[float] | Literal["auto"] | None = None
    head_parallel: bool = False
    policy: str = "bilevel"
    rows: Literal["micro_batches", "samples"] | None = None
    interval: int = 10
    tie_break: Literal["aligned", "spread"] = "aligned"
    backward_score: str | None = None
    forward_score: str = "fisher"
    score_fraction: float = 1.0
    shortcut: Literal["zero", "mean", "rescale"] = "zero"
    forward_only_cost: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, np.generic):  # JSON knows Python's numbers only
                setattr(self, f.name, value.item())
        self._check_own_fields()
        if self.r is None:
            self._check_full()
            super().__post_init__()
            self.peft_type = D2FTType.D2FT
        else:
            self._check_lora()
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

    def _check_own_fields(self) -> None:
        for name in ("heads_per_subnet", "num_micro_batches", "interval"):
            _check_integer(name, getattr(self, name), 1)
        if self.num_devices is not None:
            _check_integer("num_devices", self.num_devices, 1, " or None")
        _check_integer("seed", self.seed, 0)
        _check(isinstance(self.train_boundary, bool), "train_boundary", self.train_boundary, "must be True or False")
        fraction, cost = self.score_fraction, self.forward_only_cost
        _check(_is_number(fraction) and 0 < fraction <= 1, "score_fraction", fraction, "must be a number in (0, 1]")
        _check(
            cost is None or (_is_number(cost) and 0 < cost < 1),
            "forward_only_cost", cost, "must be a number in (0, 1), or None",
        )  # fmt: skip
        _check(isinstance(self.policy, str), "policy", self.policy, "must be the name of a policy")
        facts = policy_facts(self.policy)
        self.rows = self.rows or facts.rows
        self.backward_score = self.backward_score or facts.backward_score
        for name, allowed in (
            ("backward_score", SCORES), ("forward_score", SCORES), ("rows", ("micro_batches", "samples")),
            ("tie_break", ("aligned", "spread")), ("shortcut", ("zero", "mean", "rescale")),
        ):  # fmt: skip
            _check(getattr(self, name) in allowed, name, getattr(self, name), f"must be one of {', '.join(allowed)}")
        given = [n for n in ("compute_budget", "communication_budget", "num_full", "device_capacities")
                 if getattr(self, n) is not None and not (n == "device_capacities" and self.is_auto)]  # fmt: skip
        _check(len(given) <= 1, " and ".join(given), [getattr(self, n) for n in given], "are both given; keep one")
        _check(
            self.num_forward_only is None or self.num_full is not None,
            "num_forward_only", self.num_forward_only, "needs num_full beside it",
        )  # fmt: skip
        _check(
            self.rows != "samples" or not self.num_forward_only,
            "num_forward_only", self.num_forward_only, "counts micro-batches; with rows='samples' give compute_budget",
        )  # fmt: skip
        capacities = self.device_capacities
        if self.is_auto:
            self._check_auto()
        elif capacities is not None:
            fits = isinstance(capacities, (list, tuple))
            _check(fits, "device_capacities", capacities, "must be a list of numbers, or 'auto'")
            _check(
                self.num_devices == len(capacities) or (self.head_parallel and self.num_devices is None),
                "device_capacities", capacities, f"needs num_devices={len(capacities)}, not {self.num_devices}",
            )  # fmt: skip
        self.budget  # noqa: B018 - a budget that is out of range speaks here, not at the first step
        _check(isinstance(self.head_parallel, bool), "head_parallel", self.head_parallel, "must be True or False")
        if self.head_parallel:
            self._check_head_parallel()

    def _check_auto(self) -> None:
        def check(condition: bool, name: str, constraint: str) -> None:
            _check(condition, name, getattr(self, name), f"{constraint} with device_capacities='auto'")

        check(not self.head_parallel, "head_parallel", "takes numbers, one per process, and is not possible")
        check(
            self.rows == "samples", "policy",
            f"with rows={self.rows!r} schedules the same micro-batches in all processes; choose 'fewer_samples', "
            "'importance' or 'selective_backprop'",
        )  # fmt: skip
        for name in ("communication_budget", "num_full", "num_devices"):
            check(getattr(self, name) is None, name, "is not possible; give compute_budget, the mean over processes,")
        check(
            self.compute_budget != 1, "compute_budget",
            "leaves every process all of its samples and nothing to share out; give a smaller mean over processes "
            "(at most 0.75 if one of two is half as fast), and larger batches instead,",
        )  # fmt: skip

    def _check_head_parallel(self) -> None:
        for name, refused, why in (
            ("shortcut", ("mean",), "needs the features of all heads on one process; use 'zero' or 'rescale'"),
            (
                "rows",
                ("samples",),
                "skips whole samples, as plain data parallelism can; choose a policy over micro-batches",
            ),
            ("backward_score", LIVE_SCORES, "is not followed under head_parallel=True; use 'weight_magnitude'"),
            ("forward_score", LIVE_SCORES, "is not followed under head_parallel=True; use 'fisher'"),
            ("lora_bias", (True,), "is not available under head_parallel=True; leave it out"),
        ):
            _check(getattr(self, name) not in refused, name, getattr(self, name), why)

    def _check_full(self) -> None:
        for f in dataclasses.fields(LoraConfig):
            if f.name in _SHARED or f.name == "r":
                continue
            _check(getattr(self, f.name) == _default(f), f.name, getattr(self, f.name), "is for LoRA; set r as well")

    def _check_lora(self) -> None:
        _check_integer("r", self.r, 1, " (LoRA) or None (full fine-tuning)")
        _check(not self.train_boundary, "train_boundary", True, "is for full fine-tuning; name modules_to_save")
        for name in _UNSUPPORTED_LORA:
            _check(not getattr(self, name), name, getattr(self, name), "is not available under D2FT; leave it out")

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a dictionary, without the fields of LoRA where there is none."""
        values = super().to_dict()
        if not self.is_lora:
            lora_only = {f.name for f in dataclasses.fields(LoraConfig)} - _SHARED
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
            own = {f.name: getattr(self, f.name) for f in _own_fields()}
            with open(os.path.join(save_directory, D2FT_CONFIG_NAME), "w") as file:
                json.dump(own, file, indent=2, sort_keys=True)
        from .model_card import mark_model_card

        mark_model_card(save_directory, is_lora=self.is_lora)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read the configuration of either variant back, from a folder or the Hub.

        Raises:
            ValueError: If the adapter there was not trained by D2FT.
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
        with open(path) as file:
            own = json.load(file)
        lora = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig)}
        known = {f.name for f in _own_fields()}
        return cls(**lora, **{name: value for name, value in own.items() if name in known})


def _own_fields() -> list[dataclasses.Field]:
    theirs = {f.name for f in dataclasses.fields(LoraConfig)}
    return [f for f in dataclasses.fields(D2FTConfig) if f.name not in theirs]


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_integer(name: str, value: Any, minimum: int, otherwise: str = "") -> None:
    fits = isinstance(value, Integral) and not isinstance(value, bool) and value >= minimum
    _check(fits, name, value, f"must be an integer of at least {minimum}{otherwise}")


def _check(condition: bool, name: str, value: Any, constraint: str) -> None:
    if not condition:
        raise ValueError(f"{name}={value!r} {constraint}.")
