"""By what a loss is divided: seen while it is computed, never guessed.

The Trainer hands the number of items (labels that carry loss) of an optimizer step to the model and to losses of one's
own. Some divide by it, so that micro-batches add up to the step's mean; others ignore it and return the mean of their
micro-batch (BERT's classifier, a `compute_loss` of one's own). The Trainer cannot tell which; here the number itself
notices whether anybody computed with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# What may be done with the number without any value depending on it.
_PASSING_ON = {
    Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.clone, Tensor.contiguous, Tensor.dim, Tensor.size,
    Tensor.numel, Tensor.is_floating_point, Tensor.ndimension, Tensor.__repr__, Tensor.__format__, torch.is_tensor,
    Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.eq, Tensor.ne, Tensor.__gt__, Tensor.__ge__, Tensor.__lt__,
    Tensor.__le__, Tensor.__eq__, Tensor.__ne__, Tensor.__bool__,
}  # fmt: skip
# What gives the number away to code that cannot be watched.
_GIVING_AWAY = {"item", "tolist", "numpy", "__float__", "__int__", "__index__", "__array__"}


class WatchedItems(Tensor):
    """A number of items that notices whether it takes part in a computation.

    Results of computations with it are ordinary tensors; copies on other devices are watched like itself.

    Attributes:
        uses: Names of the computations, shared with the copies.
    """

    uses: list[str]

    @classmethod
    def watch(cls, items: Tensor | int | float, device: torch.device) -> WatchedItems:
        """A watched copy of a number, on `device`; at least 1, so that a step without any item divides by something."""
        watched = torch.as_tensor(items, device=device).clamp(min=1).as_subclass(cls)
        watched.uses = []
        return watched

    @property
    def used(self) -> bool:
        """Whether anybody computed with it."""
        return bool(self.uses)

    @property
    def given_away(self) -> bool:
        """Whether it was only read as a number, of which nobody knows what became."""
        return self.used and set(self.uses) <= _GIVING_AWAY

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        watched = _first(cls, (*args, *kwargs.values()))
        name = getattr(function, "__name__", "")
        passed_on = function in _PASSING_ON or name == "__get__"
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        if not passed_on:
            watched.uses.append(name)
        if not isinstance(result, Tensor):
            return result
        if not passed_on:
            return result.as_subclass(Tensor) if isinstance(result, cls) else result
        copy = result.as_subclass(cls)
        copy.uses = watched.uses
        return copy


def _first(kind: type, values: Any) -> Any:
    """The first value of a kind, in lists as well."""
    for value in values:
        found = _first(kind, value) if isinstance(value, list | tuple) else value
        if isinstance(found, kind):
            return found
    return None
