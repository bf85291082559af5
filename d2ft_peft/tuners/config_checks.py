"""What the fields of a `D2FTConfig` may be: a ValueError names field, value and constraint."""

from __future__ import annotations

import dataclasses
import os
from numbers import Integral
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftConfig

from ..schedule import policy_facts
from ..value_checks import check, check_integer, is_number
from .lora_field_checks import check_lora_fields, check_placement


if TYPE_CHECKING:
    from .config import D2FTConfig

LIVE_SCORES = ("loss", "el2n")
CACHE_DTYPES = ("float32", "float16", "bfloat16")
TOKEN_CHOICES = ("grid", "random", "random_per_block", "variance", "attention")
SCORES = ("weight_magnitude", "fisher", "gradient_magnitude", "taylor", *LIVE_SCORES)

# What a LoraConfig can ask for and the head-wise execution of LoRA does not do.
_UNSUPPORTED_LORA = (
    "use_dora", "use_qalora", "use_bdlora", "megatron_config", "layer_replication", "target_parameters",
    "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip
# LoraConfig fields that mean the same for full fine-tuning.
SHARED_FIELDS = {f.name for f in dataclasses.fields(PeftConfig)} | {
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern", "runtime_config",
}  # fmt: skip


def check_names_of_modules(config: D2FTConfig) -> None:
    """Check PEFT's fields that list names of modules."""
    for name in ("target_modules", "exclude_modules", "modules_to_save"):
        names, also = getattr(config, name), "" if name == "modules_to_save" else " (or a string: a regular expression)"
        if names is None or (also and isinstance(names, str)):
            continue
        fits = isinstance(names, (list, tuple, set)) and all(isinstance(one, str) and one for one in names)
        check(fits, name, names, f"must be a list of names of modules{also}, or None")


def check_own_fields(config: D2FTConfig) -> None:
    """Check what D2FT adds to PEFT's fields, and put in what the policy decides where a field was left open."""
    _check_plain_fields(config)
    _check_stacks(config)
    check_placement(config)
    config.policy = _default_policy(config) if config.policy is None else config.policy
    _check_learning_rates(config)
    _check_head_start(config)
    _follow_policy(config)
    _check_choices(config)
    _check_budget(config)
    _check_capacities(config)
    _check_cache(config)
    config.budget  # noqa: B018 - a budget that is out of range speaks here, not at the first step
    if config.head_parallel:
        _check_head_parallel(config)
    _check_tokens(config)
    if config.subnets == "blocks":
        check_whole_blocks(config, "subnets='blocks'")


def _check_plain_fields(config: D2FTConfig) -> None:
    for name in ("heads_per_subnet", "num_micro_batches", "interval"):
        check_integer(name, getattr(config, name), 1)
    if config.num_devices is not None:
        check_integer("num_devices", config.num_devices, 1, " or None")
    check_integer("seed", config.seed, 0)
    for name in ("train_boundary", "keep_base", "head_parallel", "skip_unread_rows"):
        check(isinstance(getattr(config, name), bool), name, getattr(config, name), "must be True or False")
    fraction, cost = config.score_fraction, config.forward_only_cost
    check(is_number(fraction) and 0 < fraction <= 1, "score_fraction", fraction, "must be a number in (0, 1]")
    check(
        cost is None or (is_number(cost) and 0 < cost < 1),
        "forward_only_cost", cost, "must be a number in (0, 1), or None",
    )  # fmt: skip
    check(config.subnets in (None, "heads", "blocks"), "subnets", config.subnets, "must be 'heads', 'blocks' or None")
    given = config.policy is None or isinstance(config.policy, str)
    check(given, "policy", config.policy, "must be the name of a policy, or None")


def _follow_policy(config: D2FTConfig) -> None:
    """What was left open is as the policy has it."""
    facts = policy_facts(config.policy)
    if facts.budget_of == "schedule":
        config.rows = facts.rows if config.rows is None else config.rows
    else:
        _check_share_of_plain(config)
    for name, usual in (("backward_score", facts.backward_score), ("forward_score", "weight_magnitude")):
        if getattr(config, name) is None:
            setattr(config, name, usual)


def _check_choices(config: D2FTConfig) -> None:
    for name, allowed in (
        ("backward_score", SCORES), ("forward_score", SCORES), ("rows", ("micro_batches", "samples", "tokens")),
        ("tie_break", ("aligned", "spread")), ("shortcut", ("zero", "mean", "rescale")),
        ("padding", ("compose", "flatten", "keep")),
    ):  # fmt: skip
        if name == "rows" and config.rows is None:
            continue  # left to what the data allow
        value = getattr(config, name)
        check(isinstance(value, str) and value in allowed, name, value, f"must be one of {', '.join(allowed)}")


def _check_budget(config: D2FTConfig) -> None:
    given = [n for n in ("compute_budget", "communication_budget", "num_full", "device_capacities")
             if getattr(config, n) is not None and not (n == "device_capacities" and config.is_auto)]  # fmt: skip
    check(len(given) <= 1, " and ".join(given), [getattr(config, n) for n in given], "are both given; keep one")
    check(
        config.num_forward_only is None or config.num_full is not None,
        "num_forward_only", config.num_forward_only, "needs num_full beside it",
    )  # fmt: skip
    check(
        config.rows != "samples" or not config.num_forward_only,
        "num_forward_only", config.num_forward_only, "counts micro-batches; with rows='samples' give compute_budget",
    )  # fmt: skip
    share = config.compute_budget
    check(
        share is None or is_number(share), "compute_budget", share,
        "must be a number in (0, 1]; device_capacities is what has one for each device",
    )  # fmt: skip


def check_whole_blocks(config: D2FTConfig, why: str) -> None:
    """Refuse what needs heads where subnets are whole blocks.

    Args:
        config: The configuration.
        why: What makes them whole blocks.
    """
    for name, allowed, needs in (
        ("heads_per_subnet", (1,), "groups heads; leave it out"),
        ("stacks", (None,), "names what is cut into heads; leave it out"),
        ("shortcut", ("zero",), "stands in for heads that are skipped; use 'zero'"),
        ("head_parallel", (False,), "shares out heads; leave it out"),
        ("rows", (None, "samples", "micro_batches"), "runs heads on some tokens; choose a policy over samples"),
    ):
        check(getattr(config, name) in allowed, name, getattr(config, name), f"{needs} ({why})")


def _check_stacks(config: D2FTConfig) -> None:
    if isinstance(config.stacks, tuple):
        config.stacks = list(config.stacks)
    names = [config.stacks] if isinstance(config.stacks, str) else config.stacks
    fits = names is None or (isinstance(names, list) and names and all(isinstance(n, str) and n for n in names))
    check(fits, "stacks", config.stacks, "must be the path of a stack of blocks, a list of such paths, or None")


def _check_learning_rates(config: D2FTConfig) -> None:
    factor, rule = config.head_learning_rate_factor, config.learning_rate_follows_batch
    check(
        is_number(factor) and 0 < factor < float("inf"),
        "head_learning_rate_factor", factor, "must be a positive number",
    )  # fmt: skip
    check(rule in (None, "sqrt", "linear"), "learning_rate_follows_batch", rule, "must be 'sqrt', 'linear' or None")


def _check_capacities(config: D2FTConfig) -> None:
    capacities = config.device_capacities
    if config.is_auto:
        _check_auto(config)
    elif capacities is not None:
        fits = isinstance(capacities, (list, tuple))
        check(fits and len(capacities) > 0, "device_capacities", capacities, "must be a list of numbers, or 'auto'")
        check(
            config.num_devices == len(capacities) or (config.head_parallel and config.num_devices is None),
            "device_capacities", capacities, f"needs num_devices={len(capacities)}, not {config.num_devices}",
        )  # fmt: skip


def _check_tokens(config: D2FTConfig) -> None:
    fields = {f.name: f for f in dataclasses.fields(config) if f.name.startswith("token_")}
    if isinstance(config.token_margins, list):  # as JSON has it
        config.token_margins = tuple(config.token_margins)
    over_tokens = config.policy == "fewer_tokens"
    check(
        (config.rows == "tokens") == over_tokens, "rows", config.rows,
        f"does not go with policy={config.policy!r}; rows='tokens' and policy='fewer_tokens' belong together",
    )  # fmt: skip
    if not over_tokens:
        for name, f in fields.items():
            value = getattr(config, name)
            usual = value == f.default and not isinstance(value, bool)
            check(usual, name, value, f"is for policy='fewer_tokens', not {config.policy!r}; leave it out")
        return
    for name in ("communication_budget", "num_full", "device_capacities", "cache_frozen"):
        value = getattr(config, name)
        check(value is None, name, value, "is not possible with policy='fewer_tokens'; give compute_budget alone")
    check(
        config.shortcut == "zero", "shortcut", config.shortcut, "is for heads; policy='fewer_tokens' runs all of them"
    )
    check(
        config.token_choice in TOKEN_CHOICES, "token_choice", config.token_choice,
        f"must be one of {', '.join(TOKEN_CHOICES)}",
    )  # fmt: skip
    margins = config.token_margins
    check(
        isinstance(margins, tuple) and len(margins) == 2
        and all(isinstance(n, Integral) and not isinstance(n, bool) for n in margins)
        and margins[0] >= 1 and margins[1] >= 0,
        "token_margins", margins, "must be two integers, at least 1 for the first blocks and 0 for the last",
    )  # fmt: skip
    for name in ("token_dense_share", "token_ramp"):
        value = getattr(config, name)
        check(is_number(value) and 0 <= value < 1, name, value, "must be a number in [0, 1)")
    dense, ramp = config.token_dense_share, config.token_ramp
    check(dense + ramp <= 1, "token_ramp", ramp, f"and token_dense_share={dense} are more than all steps; lower one")


def _default_policy(config: D2FTConfig) -> str:
    """The policy of a configuration that names none: the paper's, where a field asks for what only it reads."""
    if config.is_auto:
        return "fewer_samples"
    of_paper = ("communication_budget", "num_full", "num_devices", "device_capacities", "backward_score",
                "forward_score", "forward_only_cost")  # fmt: skip
    asked = any(getattr(config, name) is not None for name in of_paper)
    return "bilevel" if asked or config.head_parallel or config.tie_break != "aligned" else "exact_first"


def _check_share_of_plain(config: D2FTConfig) -> None:
    def require(condition: bool, name: str, constraint: str) -> None:
        check(condition, name, getattr(config, name), f"{constraint} under policy={config.policy!r}, whose budget is a "
              "share of plain training's compute; choose policy='bilevel' or 'fewer_samples'")  # fmt: skip

    for name in ("communication_budget", "num_full", "device_capacities", "num_devices"):
        require(getattr(config, name) is None, name, "is not possible")
    require(not config.head_parallel, "head_parallel", "is not possible")


def _check_cache(config: D2FTConfig) -> None:
    directory, size = config.cache_frozen, config.cache_gigabytes
    fits = directory is None or (isinstance(directory, (str, os.PathLike)) and os.fspath(directory) != "")
    check(fits, "cache_frozen", directory, "must be the path of a folder, or None")
    check(config.cache_dtype in (None, *CACHE_DTYPES), "cache_dtype", config.cache_dtype,
          f"must be one of {', '.join(CACHE_DTYPES)}, or None")  # fmt: skip
    check(is_number(size) and 0 < size < float("inf"), "cache_gigabytes", size, "must be a positive number")
    check(
        directory is None or not config.head_parallel,
        "cache_frozen", directory, "keeps what whole blocks return, and is not possible with head_parallel=True",
    )  # fmt: skip


def _check_auto(config: D2FTConfig) -> None:
    def require(condition: bool, name: str, constraint: str) -> None:
        check(condition, name, getattr(config, name), f"{constraint} with device_capacities='auto'")

    require(not config.head_parallel, "head_parallel", "takes numbers, one per process, and is not possible")
    require(
        config.rows == "samples", "policy",
        f"with rows={config.rows!r} schedules the same micro-batches in all processes; choose 'fewer_samples', "
        "'importance' or 'selective_backprop'",
    )  # fmt: skip
    for name in ("communication_budget", "num_full", "num_devices"):
        require(getattr(config, name) is None, name, "is not possible; give compute_budget, the mean over processes,")
    require(
        config.compute_budget != 1, "compute_budget",
        "leaves every process all of its samples and nothing to share out; give a smaller mean over processes "
        "(at most 0.75 if one of two is half as fast), and larger batches instead,",
    )  # fmt: skip


def _check_head_start(config: D2FTConfig) -> None:
    start, fraction = config.head_start, config.head_start_fraction
    check(isinstance(start, bool) or start == "auto", "head_start", start, "must be 'auto', True or False")
    check(
        fraction is None or (is_number(fraction) and 0 < fraction <= 1),
        "head_start_fraction", fraction, "must be a number in (0, 1], or None",
    )  # fmt: skip


def _check_head_parallel(config: D2FTConfig) -> None:
    for name, refused, why in (
        ("shortcut", ("mean",), "needs the features of all heads on one process; use 'zero' or 'rescale'"),
        (
            "rows",
            ("samples",),
            "skips whole samples, as plain data parallelism can, and is not available under head_parallel=True; choose "
            "a policy over micro-batches",
        ),
        ("rows", ("tokens",), "is not available under head_parallel=True; choose a policy over micro-batches"),
        ("backward_score", LIVE_SCORES, "is not followed under head_parallel=True; use 'weight_magnitude'"),
        ("forward_score", LIVE_SCORES, "is not followed under head_parallel=True; use 'weight_magnitude' or 'fisher'"),
        ("keep_base", (False,), "trains the base itself, which head_parallel=True cuts up; leave it True"),
        ("lora_bias", (True,), "is not available under head_parallel=True; leave it out"),
        ("head_start", (True,), "is not available under head_parallel=True; fit the head with fit_head before"),
    ):
        check(getattr(config, name) not in refused, name, getattr(config, name), why)


def check_full(config: D2FTConfig) -> None:
    """Check that full fine-tuning was given no field of LoRA."""
    for f in dataclasses.fields(LoraConfig):
        if f.name in SHARED_FIELDS or f.name == "r":
            continue
        check(getattr(config, f.name) == _default(f), f.name, getattr(config, f.name), "is for LoRA; set r as well")


def check_lora(config: D2FTConfig) -> None:
    """Check what LoRA needs, and what it cannot do under D2FT."""
    check_integer("r", config.r, 1, " (LoRA) or None (full fine-tuning)")
    check_lora_fields(config)
    check(not config.train_boundary, "train_boundary", True, "is for full fine-tuning; name modules_to_save")
    check(config.keep_base, "keep_base", False, "is for full fine-tuning; LoRA leaves the base as it is")
    for name in _UNSUPPORTED_LORA:
        check(not getattr(config, name), name, getattr(config, name), "is not available under D2FT; leave it out")


def _default(f: dataclasses.Field) -> Any:
    return f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
