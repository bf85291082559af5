"""Kill-and-Revive in a training loop: freezes and thaws modules between optimizer steps."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ... import processes
from .adapted_modules import AdaptedModule, base_of, find_modules, train_only, unwrap
from .gate import Gate, owner_of
from .gradient_probe import GradientProbe, norms, square_of
from .input_gradients import let_backward_end
from .reducer import rebuild_reducer
from .rule import Decision, KillReviveRule, KillReviveState, Observations, check_decision, first_state, is_due
from .rule import decide as decide_here
from .saved_state import KEY, SavedState


class KillRevive:
    """Trains k of a model's adapter modules at a time (DLoRA, arXiv 2404.05182).

        kill_revive = KillRevive(model, optimizer, active=16, interval=50)
        for batch in loader:
            model(**batch).loss.backward()
            optimizer.step()
            kill_revive.step()
            optimizer.zero_grad()
        kill_revive.close()

    A module is one adapted layer, such as the query projection of block 5 with its LoRA weights. One that is killed
    still computes, but has no gradient and is not updated, not even by momentum or weight decay; backward passes end
    below the lowest active one. Its optimizer state stays as it is until it is revived. Modules in ``modules_to_save``
    always train and are not counted.

    Everything that a resumed run needs lies in ``optimizer.param_groups[0]["kill_revive"]``, so it is saved and loaded
    with the optimizer.

    Args:
        model: A PEFT model, or one that is wrapped in DistributedDataParallel.
        optimizer: Holds the parameters of all modules: make it before this object.
        steps_per_epoch: Optimizer steps in an epoch, for ``unit="epochs"``.
        resume: Whether to go on from the state that the optimizer holds; None: if it holds one.
        on_change: Called with the names of killed and revived modules after each change, the first one included; None
            calls the model's own ``on_modules_changed``, if it has one.
        decide: Makes decisions in the place of `rule.decide`, with the same arguments and results; None: that one.
        **rule: Fields of `KillReviveRule`: ``active``, ``interval``, ``idle``, ...

    Attributes:
        rule: How modules are chosen.
        names: Of all modules, within the base model, in its order.
        state: The modules that are active, and what is known of each.
        steps: Optimizer steps so far.

    Raises:
        ValueError: If modules of the model cannot be killed one by one, the optimizer lacks some of them, or it holds
            the state of other modules or settings.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        steps_per_epoch: int | None = None,
        resume: bool | None = None,
        on_change: Callable[[list[str], list[str]], None] | None = None,
        decide: Callable[[KillReviveRule, KillReviveState, Observations], Decision] | None = None,
        **rule: Any,
    ):
        self.rule = KillReviveRule(**rule)
        self._warmup, self._interval = self.rule.in_steps(steps_per_epoch)
        model, self._ddp = unwrap(model)
        release(model)
        self._modules = find_modules(model)
        self.names = [module.name for module in self._modules]
        _check_optimizer(optimizer, self._modules)
        self._optimizer, self._decide = optimizer, decide or decide_here
        self._on_change = on_change or getattr(model, "on_modules_changed", None)
        self._probes = self.rule.probes and self.rule.active < len(self._modules)
        self._probe: GradientProbe | None = None
        self._gradient: list[float | None] | None = None
        self._closed = False
        if self.rule.active >= len(self._modules):
            warnings.warn(
                f"active={self.rule.active}, and the model has {len(self._modules)} modules: all of them train, and "
                "nothing is ever killed.",
                stacklevel=2,
            )
        base = base_of(model)
        self._gate = Gate(self)
        self._gate.open(base)
        self._embeddings_hook = let_backward_end(base)
        about = {
            **vars(self.rule), "warmup": self._warmup, "interval": self._interval, "names": self.names,
            "sizes": [module.size for module in self._modules],
        }  # fmt: skip
        self._saved = SavedState(about)
        self.state, self.steps = first_state(self.rule, len(self._modules)), 0
        everything = tuple(range(len(self._modules)))
        try:
            if resume is not False and KEY in optimizer.param_groups[0]:
                self._load(everything)
            else:
                if resume:
                    warnings.warn(
                        "the run that is resumed left no state of Kill-and-Revive: modules are drawn anew.",
                        stacklevel=2,
                    )
                self._saved.attach(optimizer)
                self._begin_interval(everything)
        except BaseException:
            self.close()
            raise

    @property
    def active(self) -> list[str]:
        """Names of the modules that train now."""
        return [self.names[index] for index in self.state.active]

    @property
    def share(self) -> float:
        """Values that train now as a share of those of all modules."""
        sizes = [module.size for module in self._modules]
        return sum(sizes[index] for index in self.state.active) / sum(sizes)

    @property
    def activity(self) -> tuple[np.ndarray, np.ndarray]:
        """Which modules were active, bool [intervals, modules], and the step at which each interval began."""
        return self._saved.activity()

    def step(self) -> bool:
        """Count an optimizer step; call it after each ``optimizer.step()``.

        Returns:
            Whether a decision was made.

        Raises:
            ValueError: If an adapter was merged or switched meanwhile.
        """
        if self._closed:
            raise ValueError("this KillRevive was closed; make another one to go on.")
        self._check()
        self._follow_optimizer()
        self._end_probe()
        self.steps += 1
        self._saved.steps = self.steps
        if not is_due(self.steps, self._warmup, self._interval):
            return False
        before = self.state
        state, killed, revived = self._decide(self.rule, before, self._observe())
        check_decision(before, state, killed, revived)
        self.state = state
        self._begin_interval(before.active)
        return True

    def close(self) -> None:
        """Let all modules train again; the state stays in the optimizer."""
        if self._closed:
            return
        self._closed = True
        self._end_probe()
        self._gate.close()
        if self._embeddings_hook is not None:
            self._embeddings_hook.remove()
        if train_only(self._modules, range(len(self._modules))) and self._ddp is not None:
            rebuild_reducer(self._ddp)

    def __enter__(self) -> KillRevive:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _begin_interval(self, active_before: Sequence[int]) -> None:
        """Note the parameters from which changes are measured, and make the change of modules."""
        modules = self._modules
        shot = {modules[i].name: [p.detach().clone() for p in modules[i].parameters] for i in self.state.active}
        self._saved.store(self.state, self.steps, shot if self.rule.compares else {})
        self._apply(active_before)

    def _apply(self, active_before: Sequence[int]) -> None:
        """Freeze and thaw, and say what changed."""
        changed = train_only(self._modules, self.state.active)
        if changed and self._ddp is not None:
            rebuild_reducer(self._ddp)
        before, now = set(active_before), set(self.state.active)
        if before != now and self._on_change is not None:
            self._on_change(
                [self.names[i] for i in sorted(before - now)], [self.names[i] for i in sorted(now - before)]
            )

    def _load(self, active_before: Sequence[int]) -> None:
        """Go on from the state that the optimizer holds."""
        self.state, self.steps = self._saved.load(self._optimizer)
        self._apply(active_before)

    def _follow_optimizer(self) -> None:
        """Notice that somebody loaded a state into the optimizer."""
        held = self._optimizer.param_groups[0].get(KEY)
        if held is None:  # a checkpoint from before: what is active now stays active
            self._saved.attach(self._optimizer)
        elif held is not self._saved.held:
            self._load(self.state.active)

    def before_forward(self) -> None:
        """Before a forward pass of the model: freeze what PEFT's methods thawed, and begin or end a probe."""
        if not torch.is_grad_enabled() or any(module.layer.disable_adapters for module in self._modules):
            return
        self._check()
        self._follow_optimizer()
        if self._probe is not None:
            if self._probe.ran:
                self._end_probe()
            return
        train_only(self._modules, self.state.active)
        last = self._gradient is None and is_due(self.steps + 1, self._warmup, self._interval)
        if last and self._probes:
            self._probe = GradientProbe(self._modules, self.state.active)

    def before_backward(self) -> None:
        """Before a backward pass of the model: freeze what PEFT's methods thawed since the forward pass."""
        if self._probe is None and not self._closed:
            train_only(self._modules, self.state.active)

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._gradient, self._probe = self._probe.close(), None

    def _observe(self) -> Observations:
        """What the rule asks for, averaged over processes, so that all of them decide alike."""
        modules, size = self._modules, len(self._modules)
        gradient, self._gradient = self._gradient, None
        if self._probes and gradient is None:
            warnings.warn(
                "Kill-and-Revive saw no forward pass of the model with gradients in the step before this decision, so "
                "it knows nothing of idle modules; call the model itself in training steps, or use idle='last'.",
                stacklevel=3,
            )
        if not self.rule.compares:
            return Observations([None] * size)
        changes: list[Any] = [None] * size
        for i in self.state.active:
            old = self._saved.snapshot(modules[i].name)
            if old is not None:
                pairs = zip(modules[i].parameters, old, strict=True)
                changes[i] = [square_of(p.detach() - shot.to(p.device)) for p, shot in pairs]
        scale: list[float | None] | None = None
        if self.rule.norm == "rms":
            scale = [math.sqrt(module.size) for module in modules]
        elif self.rule.norm == "relative":
            scale = [value or None for value in norms([[square_of(p) for p in m.parameters] for m in modules])]
        return Observations(_mean(norms(changes)), None if gradient is None else _mean(gradient), scale)

    def _check(self) -> None:
        """Raise ValueError if the adapter is not the one that was found at the start."""
        for module in self._modules:
            if module.layer.merged or tuple(module.layer.active_adapters) != module.adapters:
                what = "merged" if module.layer.merged else f"switched to {module.layer.active_adapters}"
                raise ValueError(
                    f"{module.name}: adapter {list(module.adapters)} was {what} while Kill-and-Revive trains it; undo "
                    "that before training goes on, or call close() and make another KillRevive."
                )


def release(model: nn.Module) -> None:
    """Close what a run that broke off left on a model."""
    owner = owner_of(base_of(model))
    if owner is not None:
        owner.close()


def _mean(values: Sequence[float | None]) -> list[float | None]:
    """Mean over those processes that know a finite value."""
    known = [0.0 if value is None or not math.isfinite(value) else 1.0 for value in values]
    numbers = [float(value) if there else 0.0 for value, there in zip(values, known, strict=True)]
    sums, counts = processes.all_reduce(np.array([numbers, known]))
    return [float(total / count) if count else None for total, count in zip(sums, counts, strict=True)]


def _check_optimizer(optimizer: torch.optim.Optimizer, modules: Sequence[AdaptedModule]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [module.name for module in modules if any(id(p) not in held for p in module.parameters)]
    if missing:
        raise ValueError(
            f"optimizer lacks parameters of {len(missing)} of {len(modules)} modules (e.g. {missing[0]}), which could "
            "never be revived; make it of all trainable parameters, before Kill-and-Revive."
        )
