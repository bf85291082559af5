"""What stands before a module's own forward.

An interception is an attribute of the module instance: state-dict keys, class and parameters stay as they are, and it
travels with deepcopy and pickle, because it holds modules, runtime and other interceptions by reference.

`torch.compile` leaves interceptions alone: they read a plan that changes with every micro-batch, and would be compiled
anew for each. What is entered from outside of another interception is therefore under ``torch.compiler.disable``.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from .runtime import Runtime


def first_tensor(args: tuple, kwargs: dict[str, Any]) -> Tensor | None:
    """The first tensor among the arguments of a forward: what it works on."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)


class Intercept:
    """Stands before the forward of one module.

    Attributes:
        module: The module.
        runtime: The state shared by all D2FT modules of the model.
    """

    def __init__(self, module: nn.Module, runtime: Runtime):
        self.module, self.runtime = module, runtime
        self._previous = None

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the module's own forward, by which trainers know what a model takes."""
        return inspect.signature(type(self.module).forward.__get__(self.module))

    def install(self) -> None:
        """Take the place of the module's forward."""
        self._previous = self.module.__dict__.get("forward")
        self.module.forward = self

    def remove(self) -> None:
        """Give the module its own forward back."""
        if self._previous is None:
            del self.module.forward
        else:
            self.module.forward = self._previous

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward."""
        if self._previous is not None:
            return self._previous(*args, **kwargs)
        # Looked up on the class: a bound method would come back from pickle as this interception.
        return type(self.module).forward(self.module, *args, **kwargs)


def get_runtime(model: nn.Module) -> Runtime:
    """The runtime of a model that D2FT was applied to, through whatever wraps it.

    Raises:
        ValueError: If there is none.
    """
    runtime = find_runtime(model) if isinstance(model, nn.Module) else None
    if runtime is None:
        raise ValueError(
            f"{type(model).__name__} is not a D2FT model; wrap it with get_peft_model(model, D2FTConfig(...))."
        )
    return runtime


def find_runtime(model: nn.Module) -> Runtime | None:
    for module in model.modules():
        forward, own = module.__dict__.get("forward"), module.__dict__.get("runtime")
        if isinstance(forward, Intercept):
            return forward.runtime
        if isinstance(own, Runtime):  # the tuner's, whose interceptions may be put aside (head-parallel execution)
            return own
    return None
