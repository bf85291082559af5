"""Weights averaged along training, which are evaluated and kept in the place of the last ones."""

from __future__ import annotations

import functools
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..value_checks import is_number
from ..whole_files import reading, replacing
from .calling import calling_trainer, resumed_from
from .head_parallel_engine import is_head_parallel


AVERAGES_FILE = "averaged_weights.safetensors"


class AveragedWeightsCallback(TrainerCallback):
    """Averages the weights that a Trainer trains, over the last of its steps; any Trainer, any PEFT model.

        Trainer(model=model, callbacks=[AveragedWeightsCallback()], ...)

    Where averages are there, evaluation and prediction during training use them, and they are the model's weights when
    ``train()`` returns. Without `decay` they are the plain mean over the last steps (stochastic weight averaging,
    Izmailov et al., arXiv 1803.05407), with it the exponential moving average
    ``decay * average + (1 - decay) * weights``.

    Averages take one copy of the trained parameters, in float32 at least, and one more while something is evaluated.
    Buffers are left alone. Processes of a distributed run make the same averages and exchange nothing for them. A
    checkpoint holds the weights as training goes on from, and the averages in ``averaged_weights.safetensors`` beside
    them; ``load_best_model_at_end`` loads the averages that were the best.

    Args:
        share: Share of all steps whose weights are averaged, the last ones, in (0, 1]; None is a quarter, and with
            `decay` all of them.
        decay: Of an exponential moving average, in (0, 1), or None.

    Attributes:
        num_averaged: Steps of which there are averages.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, share: float | None = None, decay: float | None = None):
        for name, value, fits, interval in (
            ("share", share, share is None or (is_number(share) and 0 < share <= 1), "(0, 1]"),
            ("decay", decay, decay is None or (is_number(decay) and 0 < decay < 1), "(0, 1)"),
        ):
            if not fits:
                raise ValueError(f"{name}={value!r} must be a number in {interval}, or None.")
        self.share = share or (0.25 if decay is None else 1.0)
        self.decay, self.num_averaged = decay, 0
        self._update = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)
        self._parameters: dict[str, nn.Parameter] = {}
        self._averages: dict[str, Tensor] = {}
        self._trainer: Trainer | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Begin anew, or go on with the averages of a checkpoint."""
        self._release()
        self._trainer = trainer = calling_trainer(self)
        for engine in ("deepspeed", "fsdp"):
            if getattr(trainer, f"is_{engine}_enabled", False):
                raise ValueError(
                    f"AveragedWeightsCallback averages whole parameters, which {engine} shards; leave it out, or use "
                    "one process, or DistributedDataParallel."
                )
        if is_head_parallel(trainer.model):
            raise ValueError(
                "AveragedWeightsCallback averages whole parameters, which head_parallel=True shares out over "
                "processes; leave one of them out."
            )
        # Not by requires_grad: what Kill-and-Revive has frozen for now trains again.
        trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
        named = trainer.accelerator.unwrap_model(trainer.model).named_parameters()
        self._parameters = {name: parameter for name, parameter in named if id(parameter) in trained}
        self._averages, self.num_averaged = {}, 0
        folder = resumed_from(trainer)
        if folder is not None and self._is_due(state):
            self._resume(os.path.join(folder, AVERAGES_FILE), state)
        # Before an evaluation no event is called.
        trainer.evaluation_loop = self._evaluating(trainer.evaluation_loop)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Take the weights into the averages, if the step changed them."""
        runs = optimizer.gradient_state.sync_gradients and not optimizer.step_was_skipped
        if not runs or not self._is_due(state):
            return
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                weights = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
                if name not in self._averages:
                    self._averages[name] = weights.clone()
                else:
                    self._update([self._averages[name]], [weights], self.num_averaged)
        self.num_averaged += 1

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write the averages beside the weights."""
        if self.num_averaged and args.should_save:
            folder = self._trainer._get_output_dir(trial=getattr(self._trainer, "_trial", None))
            path = os.path.join(folder, f"checkpoint-{state.global_step}", AVERAGES_FILE)
            with replacing(path) as partial:
                tensors = {name: value.cpu().contiguous() for name, value in self._averages.items()}
                save_file(tensors, partial, {"num_averaged": str(self.num_averaged)})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let the averages be the model's weights: the last ones, or those of the best checkpoint."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._trainer.accelerator.wait_for_everyone()  # the first process may be writing them
            path = os.path.join(state.best_model_checkpoint, AVERAGES_FILE)
            # A checkpoint from before the first average was evaluated, and is loaded, as it is.
            self._averages = self._read(path)[0] if os.path.isfile(path) else {}
        elif not self.num_averaged:
            warnings.warn(
                f"AveragedWeightsCallback averaged nothing: training ended at step {state.global_step}, before the "
                f"last {self.share:.0%} of {state.max_steps} steps. The weights are the last ones; raise share.",
                stacklevel=2,
            )
        self._put(self._averages)
        self._release()
        self._averages = {}

    def _is_due(self, state: TrainerState) -> bool:
        """Whether the steps that are averaged have begun; the last step is always one of them."""
        return state.global_step > min(math.floor(state.max_steps * (1 - self.share)), state.max_steps - 1)

    def _resume(self, path: str, state: TrainerState) -> None:
        if os.path.isfile(path):
            self._averages, self.num_averaged = self._read(path)
        else:
            warnings.warn(
                f"the checkpoint has no {AVERAGES_FILE}: the weights of steps up to {state.global_step} are missing in "
                "the averages, which begin now.",
                stacklevel=2,
            )

    def _read(self, path: str) -> tuple[dict[str, Tensor], int]:
        with reading(path) as file:
            named, known = set(file.keys()), set(self._parameters)
            if named != known:
                raise ValueError(
                    f"{path!r} holds averages of other parameters, e.g. {min(named ^ known)}; resume with the model "
                    "and the adapter that it was saved with."
                )
            averages = {n: file.get_tensor(n).to(parameter.device) for n, parameter in self._parameters.items()}
            return averages, int(file.metadata()["num_averaged"])

    @torch.no_grad()
    def _put(self, weights: dict[str, Tensor]) -> None:
        for name, value in weights.items():
            self._parameters[name].copy_(value)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The model with averaged weights; afterwards it has its own again, to the bit."""
        own = {name: self._parameters[name].detach().clone() for name in self._averages}
        self._put(self._averages)
        try:
            yield
        finally:
            self._put(own)

    def _evaluating(self, loop: Any) -> Any:
        @functools.wraps(loop)
        def averaged_loop(*args: Any, **kwargs: Any) -> Any:
            with self._averaged():
                return loop(*args, **kwargs)

        averaged_loop.by_averages_of = self  # type: ignore[attr-defined]
        return averaged_loop

    def _release(self) -> None:
        """Give the Trainer its own evaluation back, also after a run that broke off."""
        loop = vars(self._trainer).get("evaluation_loop") if self._trainer is not None else None
        if getattr(loop, "by_averages_of", None) is self:
            del self._trainer.evaluation_loop
        self._trainer = None
