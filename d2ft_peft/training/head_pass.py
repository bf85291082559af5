"""The pass over the training samples before the first step: scores, and the features that a new head is fitted to."""

from __future__ import annotations

import logging
import math
import time
from typing import Any

from torch.utils.data import IterableDataset
from transformers import Trainer

from ..head_start import HeadFeatures, HeadStart, HeadStartRefused, LinearHead, find_head, fit_features, looks_new
from ..head_start.fit import agree, capacity, collect
from ..partition import base_model
from ..processes import is_sharded, world_size
from ..scores import preserved_rng
from .data import TrainingData


logger = logging.getLogger(__name__)

_SHARE_OF_RUN = 0.25
_SAMPLES_PER_CLASS = 50
_FEWEST_CLASSES = 10
"""Classes from which on "auto" fits a head: with ten it gains, with four it costs accuracy (docs/head_start.md)."""


def start_head(trainer: Trainer, data: TrainingData, batch: dict[str, Any] | None) -> HeadStart | None:
    """Score samples and fit the head, as the configuration says; one pass does both where the head reads one row a
    sample.

    Args:
        trainer: The Trainer; its FLOPs and its log are added to.
        data: Gives out the samples.
        batch: A training batch, on whose first sample the head is found; None in a run that goes on.

    Returns:
        What was fitted, or None.

    Raises:
        ValueError: If head_start=True and the head cannot be fitted, or its features are no numbers.
    """
    started, config = time.perf_counter(), data.planner.config
    if not config.head_start or trainer.state.global_step or batch is None:
        data.score_once()
        return None
    try:
        with preserved_rng():
            head = _head(trainer, data, batch)
            result = _fit(trainer, data, head, started)
    except HeadStartRefused as reason:
        data.score_once()  # nothing, if it was done before
        if config.head_start != "auto":
            raise
        logger.info("The head starts as it is: %s", reason)
        return None
    trainer.current_flos += result.flops_here
    logger.info("The head was fitted before the first step: %s", result)
    trainer.log(result.logs())
    return result


def _head(trainer: Trainer, data: TrainingData, batch: dict[str, Any]) -> LinearHead:
    """The head that is to be fitted.

    Raises:
        HeadStartRefused: If there is none, or the samples cannot be passed over.
    """
    planner, dataset = data.planner, trainer.train_dataset
    if planner.config.head_parallel:
        raise HeadStartRefused("head_parallel=True cuts the model up; fit the head with fit_head before.")
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise HeadStartRefused(
            "a data set without length and indices is read once, so no pass can go before; give a map-style data set, "
            "or set head_start=False."
        )
    if data.is_dispatched(dataset):
        raise HeadStartRefused(
            "dispatch_batches=True lets the first process load for all, which then would not know their samples; leave "
            "it out, or set head_start=False."
        )
    if is_sharded(planner.model):
        raise HeadStartRefused("FSDP and DeepSpeed spread the head over processes; fit it with fit_head before.")
    head = find_head(planner.model, batch)
    if planner.config.head_start == "auto" and planner.config.is_lora:
        raise HeadStartRefused("a head start costs accuracy under LoRA; head_start=True fits the head all the same.")
    if planner.config.head_start == "auto" and head.layer.out_features < _FEWEST_CLASSES:
        raise HeadStartRefused(
            f"{head.name} has {head.layer.out_features} outputs, and a head start pays from {_FEWEST_CLASSES} on; "
            "head_start=True fits it all the same."
        )
    if planner.config.head_start == "auto" and not looks_new(head, base_model(planner.model).config):
        raise HeadStartRefused(f"{head.name} was trained before; head_start=True fits it all the same.")
    return head


def _fit(trainer: Trainer, data: TrainingData, head: LinearHead, started: float) -> HeadStart:
    planner = data.planner
    chosen = data.draw(_num_samples(trainer, data, head.layer.out_features))
    room = capacity(head.layer)
    features, flops, refusal = HeadFeatures(planner.model, head, room), 0.0, None
    if len(chosen) > room * world_size():
        logger.info("Features of %d samples are kept, instead of %d.", room * world_size(), len(chosen))
        chosen = chosen[: room * world_size()]
    try:
        if not head.selects and planner.source.before_training:
            data.score_once(features)
            chosen = chosen[data.num_scored :]
        if len(chosen):
            with trainer.compute_loss_context_manager():
                flops = collect(planner.model, features, data.pass_over(chosen), planner.progress)
    except HeadStartRefused as error:
        refusal = error
    agree(refusal)
    if features.dropped:
        logger.info("Features of %d rows are left out: a process keeps %d.", features.dropped, room)
    return fit_features(features, flops, started)


def _num_samples(trainer: Trainer, data: TrainingData, outputs: int) -> int:
    """How many training samples the pass looks at."""
    planner, args, rows = data.planner, trainer.args, len(trainer.train_dataset)
    if planner.config.head_start_fraction is not None:
        return max(1, round(rows * planner.config.head_start_fraction))
    of_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    usual = planner.num_micro_batches or planner.config.num_micro_batches
    share = 1.0
    if planner.config.policy != "all_full":
        _, forward_only, full = planner.costs.relative.sum(axis=0)
        share = planner.config.budget.of_rest(usual, usual, forward_only / full).compute
    costs = planner.cost_model
    run = trainer.state.max_steps * of_step * share * costs.full_flops([1.0])
    affordable = math.floor(_SHARE_OF_RUN * run / costs.forward_flops(1.0))
    return min(rows, max(1, affordable, _SAMPLES_PER_CLASS * outputs))
