"""The loss of a micro-batch, weighted so that the step's gradient is the mean over what ran; and what it shows.

It stands around `compute_loss`, whoever wrote that: a model's own loss, label smoothing, ``compute_loss_func``, a
subclass, TRL.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils._pytree import tree_leaves
from transformers import Trainer

from ..engine.touch_loss import nothing, touch
from ..partition import base_model
from ..planning import D2FTPlanner, MicroBatch
from ..planning.facts import BatchFacts
from ..processes import is_sharded
from .normalization import WatchedItems
from .parallelism import shards_modules
from .rollouts import Rollouts


def computes_stock_loss(trainer: Trainer) -> bool:
    """Whether nobody but the model itself looks at the logits of a training step."""
    own = "compute_loss" in vars(trainer) or type(trainer).compute_loss is not Trainer.compute_loss
    return not own and trainer.compute_loss_func is None and trainer.label_smoother is None


class StepLoss:
    """Weights losses, shows them to scores that follow training, and lets every parameter hear of them.

    Args:
        trainer: The Trainer.
        planner: Whose scores may follow training.
        processes: Number of processes whose gradients DistributedDataParallel averages.
        rollouts: What the Trainer generates within its steps, or None.
    """

    def __init__(self, trainer: Trainer, planner: D2FTPlanner, processes: int, rollouts: Rollouts | None = None):
        self.trainer, self.planner, self.processes, self.rollouts = trainer, planner, processes, rollouts
        self._is_compiled: bool | None = None
        self._used: list[str] | None = None
        self._warned = False

    @contextmanager
    def around(self, micro_batch: MicroBatch, facts: BatchFacts) -> Iterator[None]:
        """Weight what `compute_loss` returns for a micro-batch."""
        trainer = self.trainer
        if self.rollouts is not None:
            micro_batch = dataclasses.replace(micro_batch, weight=self.rollouts.weight(micro_batch.weight))
        original, of_instance = trainer.compute_loss, vars(trainer).get("compute_loss")

        def weighted(model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if not (model.training and torch.is_grad_enabled()):  # somebody evaluates in the middle of a step
                return original(model, inputs, *args, **kwargs)
            return self._compute(original, micro_batch, facts, model, inputs, *args, **kwargs)

        trainer.compute_loss = weighted
        try:
            yield
        finally:
            del trainer.compute_loss
            if of_instance is not None:
                trainer.compute_loss = of_instance

    def _compute(
        self,
        original: Callable,
        micro_batch: MicroBatch,
        facts: BatchFacts,
        model: nn.Module,
        inputs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        given = args[1] if len(args) > 1 else kwargs.get("num_items_in_batch")
        items = None if given is None else WatchedItems.watch(given, self.trainer.args.device)
        with (
            self._observing(inputs, facts),
            self._part_of_step(micro_batch, inputs) as inputs,
            self._unscaled_by_processes(),
            self._noting_outputs(facts) as seen,
            self._watching(model, items) as shown,
        ):
            if len(args) > 1:  # handed on as they came: a loss of one's own may not know all of the Trainer's names
                args = (args[0], shown, *args[2:])
            elif items is not None:
                kwargs["num_items_in_batch"] = shown
            result = original(model, inputs, *args, **kwargs)
        loss, *outputs = result if isinstance(result, tuple) else (result,)
        loss = nothing(loss, seen) if seen else self._weight(loss, items, micro_batch, facts)
        runtime = self.planner.runtime
        if runtime.touch_gradients or runtime.after_backward is not None or not loss.requires_grad:
            loss = touch(loss, self.planner.model.parameters(), runtime.after_backward)
        return (loss, *outputs) if outputs else loss

    def _part_of_step(self, micro_batch: MicroBatch, inputs: dict[str, Any]) -> AbstractContextManager[dict[str, Any]]:
        """The inputs as the loss of a trainer that generates them is to see them."""
        return nullcontext(inputs) if self.rollouts is None else self.rollouts.as_part(micro_batch.weight, inputs)

    @contextmanager
    def _noting_outputs(self, facts: BatchFacts) -> Iterator[list[Tensor]]:
        """What the model returns for a batch without a label, where the other processes meet this one in backward."""
        model, outputs = self.planner.model, []
        if facts.items != 0 or not is_sharded(model):  # None: a loss without labels
            yield outputs
            return
        if shards_modules(self.trainer):
            raise ValueError(
                "a micro-batch has no label, so that backward takes another way through the model than in the other "
                "processes, which ZeRO-3 does not allow; leave such samples out of the data set, or use ZeRO-2."
            )

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            outputs.extend(value for value in tree_leaves(output) if isinstance(value, Tensor) and value.requires_grad)

        handle = model.register_forward_hook(note)
        try:
            yield outputs
        finally:
            handle.remove()

    @contextmanager
    def _watching(self, model: nn.Module, items: WatchedItems | None) -> Iterator[Tensor | None]:
        """The number of items as the loss is to see it. Dynamo cannot trace what watches it: of a compiled model the
        first micro-batch runs uncompiled, and what it showed holds for the others."""
        if self._is_compiled is None:
            self._is_compiled = any(
                isinstance(module, OptimizedModule) or module._compiled_call_impl is not None
                for module in model.modules()
            )
        if items is None or not self._is_compiled:
            yield items
        elif self._used is None:
            with torch.compiler.set_stance("force_eager"):
                yield items
            self._used = list(items.uses)
        else:
            items.uses.extend(self._used)
            yield items.as_subclass(Tensor)

    def _weight(self, loss: Tensor, items: WatchedItems | None, micro_batch: MicroBatch, facts: BatchFacts) -> Tensor:
        declared = self.trainer.loss_is_scaled_for_ga
        used = items is not None and items.used
        if declared is None and used and items.given_away and not self._warned:
            self._warned = True
            warnings.warn(
                "the loss reads num_items_in_batch as a number, and is taken for one that is divided by it; set "
                "loss_is_scaled_for_ga on the Trainer to say whether it is (True) or is the mean of its batch (False).",
                stacklevel=2,
            )
        if declared:
            factor = 1
        elif used and declared is None:
            factor = self.processes if self.trainer.args.average_tokens_across_devices else 1
        elif facts.items == 0:
            # Its mean is over nothing, not a number; nothing is what it adds to the step.
            return loss.new_zeros(()).requires_grad_().clone()
        else:
            factor = micro_batch.weight
        factor *= self._trainer_divides_by(items)
        return loss if factor == 1 else loss * factor

    def _trainer_divides_by(self, items: WatchedItems | None) -> int:
        """What `Trainer.training_step` divides the loss by afterwards, by its own rule."""
        trainer = self.trainer
        scaled = trainer.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
        return 1 if scaled else trainer.current_gradient_accumulation_steps

    @contextmanager
    def _unscaled_by_processes(self) -> Iterator[None]:
        """Keep `Trainer.compute_loss` from multiplying by the number of processes: that is right for losses that are
        divided by the items of all processes, and it takes every loss for one."""
        args = self.trainer.args
        before, args.average_tokens_across_devices = args.average_tokens_across_devices, False
        try:
            yield
        finally:
            args.average_tokens_across_devices = before

    @contextmanager
    def _observing(self, inputs: dict[str, Any], facts: BatchFacts) -> Iterator[None]:
        """Let scores that follow training see the outputs of the forward pass that trains; there is no other."""
        if not self.planner.source.live:
            yield
            return
        labels, seen = inputs.get("labels"), []  # before a loss of one's own takes them out
        layout = {name: inputs.get(name) for name in ("position_ids", "shift_labels")}
        layout["cu_seq_lens"] = inputs.get("cu_seq_lens_q")

        def note(module: nn.Module, args: tuple, output: Any) -> None:
            if module.training and torch.is_grad_enabled():
                logits = output.get("logits") if isinstance(output, dict) else None
                seen.append(logits if isinstance(logits, Tensor) else None)

        handle = base_model(self.planner.model).register_forward_hook(note)
        try:
            yield
        finally:
            handle.remove()
        has_labels = isinstance(labels, Tensor) or isinstance(layout["shift_labels"], Tensor)
        if len(seen) != 1 or seen[0] is None or not has_labels or facts.indices is None:
            raise ValueError(
                f"score {list(self.planner.source.live)} is read from the logits and labels of one forward pass, and "
                f"this step ran {len(seen)} of them with logits {[getattr(x, 'shape', None) for x in seen]} and "
                f"labels {type(labels).__name__} (TRL's SFTTrainer, for one, has its loss without logits); choose "
                "policy='fewer_samples', or 'bilevel' with backward_score='weight_magnitude'."
            )
        self.planner.observe(facts.indices, seen[0], labels, **layout)
