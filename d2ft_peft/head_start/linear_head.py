"""The linear layer that makes a model's logits, found by what it does and not by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from ..batches import some_samples
from ..costs import inference
from ..partition import base_model
from ..scores import INDEX_KEY, preserved_rng, shifts_labels


# Added to the number of a row, so that no output of a model is taken for one.
_CODE = 0.25


class HeadStartRefused(ValueError):
    """The head cannot be fitted, or need not be; the message says why."""


@dataclass(frozen=True)
class LinearHead:
    """The layer whose outputs are a model's logits.

    Attributes:
        name: Its name in the model.
        layer: The layer, of d inputs and C outputs.
        selects: Whether the model picks one row of its output for each sample (a decoder's last token), instead of
            taking all rows.
    """

    name: str
    layer: nn.Linear
    selects: bool


def find_head(model: nn.Module, batch: dict[str, Any]) -> LinearHead:
    """Find the trained linear layer that makes the logits.

    It is the last layer of as many outputs that runs. Whether the logits are its outputs is seen by running the model
    once more, on one sample, with numbers of rows in the place of these outputs. The model is left as it was.

    Args:
        model: Any model.
        batch: Its inputs; the first sample is looked at.

    Raises:
        HeadStartRefused: If there is no such layer, or the model does not take the batch.
    """
    if shifts_labels(model):
        raise HeadStartRefused(
            f"{type(base_model(model)).__name__} predicts the next token, and its head is no new one; leave "
            "head_start='auto' or set head_start=False."
        )
    inputs = {name: value for name, value in batch.items() if name not in (INDEX_KEY, "labels")}
    sample = some_samples(inputs, slice(1))
    factors = {inner for module in model.modules() if isinstance(module, LoraLayer) for inner in module.modules()}
    layers = {module: name for name, module in model.named_modules() if module not in factors and _trains(module)}
    ran: list[tuple[nn.Linear, Tensor]] = []

    def note(layer: nn.Linear, args: tuple, output: Tensor) -> None:
        ran.append((layer, output))

    with preserved_rng(), torch.no_grad(), inference(model):
        logits = _run(model, sample, list(layers), note)
        wide = [layer for layer, output in ran if output.shape[-1:] == logits.shape[-1:]]
        selects = _codes_arrive(model, sample, wide[-1]) if wide else None
    if selects is None:
        raise HeadStartRefused(
            f"no trained nn.Linear makes the logits {list(logits.shape)} of {type(base_model(model)).__name__}: name "
            "its head in modules_to_save or set train_boundary=True; if it is no linear layer, set head_start=False."
        )
    return LinearHead(layers[wide[-1]], wide[-1], selects)


def looks_new(head: LinearHead, config: Any) -> bool:
    """Whether a head is as transformers makes one whose weights a checkpoint lacks.

    That is: the bias is zero, where there is one, and the weights are zero, or have the standard deviation s of
    ``PreTrainedModel._init_weights`` (``initializer_range``, ``init_std`` or ``initializer_factor`` of the
    configuration, else 0.02), within 10 % and five standard errors, and the mean 0 within five standard errors:
    ``abs(std - s) <= (0.1 + 5 / sqrt(2 n)) s`` and ``abs(mean) <= 5 s / sqrt(n)`` for n weights.

    A head with a bias that was trained for one step is not new by this rule. One without (decoders) is told from a new
    one only once its weights have moved that far.
    """
    layer = head.layer
    if layer.bias is not None and bool(layer.bias.detach().any()):
        return False
    weight = layer.weight.detach().double()
    if not bool(weight.any()):
        return True
    n, expected = weight.numel(), _initial_deviation(config)
    deviation, mean = float(weight.std(correction=0)), float(weight.mean())
    return abs(deviation - expected) <= (0.1 + 5 / (2 * n) ** 0.5) * expected and abs(mean) <= 5 * expected / n**0.5


@contextmanager
def coded(layer: nn.Linear) -> Iterator[None]:
    """Let a layer return numbers of rows instead of what it computes: `decode` reads them off the logits."""

    def hook(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        return _codes(output)

    handle = layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def decode(logits: Tensor) -> Tensor:
    """Numbers of the rows, int64 [n], that a model picked from the outputs of a `coded` layer; logits [n, C]."""
    return (logits[:, 0].float() - _CODE).round().long()


def _codes(output: Tensor) -> Tensor:
    # In float32 whatever the model's type: bfloat16 cannot count to 1,000.
    rows = torch.arange(output[..., 0].numel(), device=output.device, dtype=torch.float32) + _CODE
    return rows.view(*output.shape[:-1], 1).expand(output.shape).contiguous()


def _codes_arrive(model: nn.Module, sample: dict[str, Any], layer: nn.Linear) -> bool | None:
    """Whether the logits are rows chosen (True) among a layer's outputs, or all of them (False); None if neither."""
    sent: list[Tensor] = []

    def hook(layer: nn.Linear, args: tuple, output: Tensor) -> Tensor:
        sent.append(_codes(output))
        return sent[-1]

    logits = _run(model, sample, [layer], hook).float()
    codes = sent[-1]
    if logits.shape == codes.shape and torch.equal(logits, codes):
        return False
    chosen = logits.ndim == 2 and codes.ndim == 3 and bool((logits == logits[:, :1]).all())
    return True if chosen and bool(torch.isin(logits[:, 0], codes[..., 0].flatten()).all()) else None


def _run(model: nn.Module, sample: dict[str, Any], layers: list[nn.Module], hook: Callable) -> Tensor:
    """The model's logits on a sample, with a hook on some layers."""
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        output = model(**send_to_device(sample, next(model.parameters()).device))
    except Exception as error:
        raise HeadStartRefused(
            f"a batch with keys {sorted(sample)} is not what the model takes, so no features can be read; set "
            f"head_start=False. The model said: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or not logits.ndim:
        raise HeadStartRefused(f"the model returns no logits ({type(output).__name__}); set head_start=False.")
    return logits


def _trains(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and all(p.requires_grad for p in module.parameters(recurse=False))


def _initial_deviation(config: Any) -> float:
    for name in ("initializer_range", "init_std", "initializer_factor"):
        if hasattr(config, name):
            return getattr(config, name) or 0.02
    return getattr(config.get_text_config(), "initializer_range", 0.02)
