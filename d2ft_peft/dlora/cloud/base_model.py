"""The base model that a server holds once, whatever the number of edges, and what has to be known of it."""

from __future__ import annotations

import copy
import math
import os
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...partition.body import find_body
from ...value_checks import check
from ..blocks import find_stack
from ..wire.fingerprint import fingerprint, name_of
from .cut_check import check_cut
from .singular_vectors import leading_directions


@dataclass(frozen=True)
class Group:
    """Projections of a block that share their input, in the order in which they run; their exchange is one.

    Attributes:
        block: Index of the block.
        names: Their paths in the model.
        in_features: Width of the input.
        out_features: Width of each output.
    """

    block: int
    names: tuple[str, ...]
    in_features: int
    out_features: tuple[int, ...]


@dataclass
class BaseModel:
    """A frozen model, and what a probe of one short forward pass found.

    Attributes:
        model: The model, in eval mode: frozen blocks run without dropout.
        name: Its Hub id or the name of its folder.
        prints: Its fingerprint.
        stack: Path of its stack of blocks.
        groups: All projections of its blocks, grouped by input, in running order.
        returns_tuple: Whether its blocks return tuples.
        bytes_per_token: What a token's graph keeps, of all blocks together, from forward to backward.
    """

    model: PreTrainedModel
    name: str
    prints: dict[str, str]
    stack: str = ""
    groups: tuple[Group, ...] = ()
    returns_tuple: bool = False
    bytes_per_token: int = 0
    _factors: dict[tuple[str, int], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _lock: Any = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.model.eval().requires_grad_(False)
        self.stack = find_stack(self.model)[0]
        _probe(self)

    @classmethod
    def load(cls, base: str, dtype: torch.dtype | str = "auto", device: str = "cpu", **hub: Any) -> BaseModel:
        """Read a model from a folder or the Hub; weights in safetensors, no code of the model's own.

        Args:
            base: Folder or model id.
            dtype: Of the weights, and of what is computed.
            device: Where it runs.
            hub: See `transformers.PreTrainedModel.from_pretrained`.

        Raises:
            ValueError: If the type or the device is none.
        """
        kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
        fits = dtype == "auto" or (isinstance(kind, torch.dtype) and kind.is_floating_point)
        check(fits, "dtype", dtype, "must be 'auto' or a floating-point type of torch, such as 'bfloat16'")
        try:
            torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device={device!r} must be a device of torch, such as 'cpu' or 'cuda:0'.") from error
        config = AutoConfig.from_pretrained(base, **hub)
        named = getattr(transformers, (config.architectures or [""])[0], None)
        known = isinstance(named, type) and issubclass(named, PreTrainedModel)
        model = (named if known else AutoModelForCausalLM).from_pretrained(
            base, dtype=dtype, use_safetensors=True, **hub
        )
        return cls(model.to(device), name_of(os.fspath(base)), fingerprint(base, config, **hub))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.model.get_submodule(self.stack))

    @property
    def width(self) -> int:
        """Features of a hidden state."""
        return self.model.config.get_text_config().hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states are computed in."""
        return next(self.model.get_submodule(self.stack).parameters()).dtype

    def copy(self) -> PreTrainedModel:
        """A model of its own whose tensors are this one's: modules may be replaced and hooked in it."""
        shared = chain(self.model.parameters(), self.model.buffers(), [self.model.config])
        return copy.deepcopy(self.model, {id(part): part for part in shared})

    def factors(self, name: str, rank: int) -> tuple[Tensor, Tensor]:
        """Frozen A [rank, in] and B [out, rank] of a projection, for crossing at width `rank`.

        They span the directions of the weight's largest singular values (LoRA-XS, arXiv 2405.17604). A's rows are
        orthonormal; B's columns are orthogonal and of length sqrt(out / (3 rank)). A step of Adam then changes the
        projection as much as it does in LoRA, whose B has `out` rows where the core has `rank`, and whose A is drawn
        with rows of length sqrt(1/3): so learning rates of LoRA serve cores too.
        """
        found = self._factors.get((name, rank))
        if found is None:
            layer = self.model.get_submodule(name)
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            left, right = leading_directions(weight, rank)
            left = left * math.sqrt(len(weight) / (3 * rank))
            found = (right.T.to(self.dtype).contiguous(), left.to(self.dtype).contiguous())
            self._keep(name, rank, found)
        return found

    def _keep(self, name: str, rank: int, pair: tuple[Tensor, Tensor]) -> None:
        """Keep factors for the next who asks, but no more of them than there are weights: edges choose the rank."""
        with self._lock:
            self._factors[name, rank] = pair
            most = sum(parameter.nbytes for parameter in self.model.parameters())
            while len(self._factors) > 1 and sum(a.nbytes + b.nbytes for a, b in self._factors.values()) > most:
                del self._factors[next(iter(self._factors))]

    def body(self, model: PreTrainedModel) -> nn.Module:
        """The module of a copy that runs embedding, blocks and final norm."""
        return find_body(model, self.stack)

    def dummy_inputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Arguments under which the body reaches its blocks; what it makes of them is put aside there."""
        if self.takes_pixels:
            return {"pixel_values": hidden.new_zeros(self.pixels)}
        width = getattr(self.body(self.model).get_input_embeddings(), "embedding_dim", self.width)
        return {"inputs_embeds": hidden.new_zeros(*hidden.shape[:2], width)}

    @property
    def takes_pixels(self) -> bool:
        """Whether the model sees images."""
        return self.body(self.model).main_input_name == "pixel_values"

    @property
    def pixels(self) -> tuple[int, ...]:
        """Shape of one image, as a batch."""
        config = self.body(self.model).config
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return (1, config.num_channels, *size)


def _probe(base: BaseModel) -> None:
    """Run a few tokens, and note which projections share an input, and what autograd keeps.

    Raises:
        ValueError: If the blocks cannot be run from hidden states alone.
    """
    model = base.copy()
    inputs: list[tuple[Tensor, str, nn.Module]] = []
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: inputs.append((args[0], name, module)))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name.startswith(base.stack + ".")
    ]
    with _kept_bytes() as kept:
        hidden, base.returns_tuple = check_cut(base, model)
    for handle in handles:
        handle.remove()
    together: dict[int, list[tuple[Tensor, str, nn.Module]]] = {}
    calls = Counter(name for _, name, _ in inputs)
    for entry in inputs:
        if calls[entry[1]] == 1:  # one that runs again within a block would be asked for what it was not
            together.setdefault(id(entry[0]), []).append(entry)
    base.groups = tuple(
        Group(
            int(entries[0][1].removeprefix(base.stack + ".").split(".")[0]),
            tuple(name for _, name, _ in entries),
            entries[0][0].shape[-1],
            tuple(module.nf if isinstance(module, Conv1D) else module.out_features for _, _, module in entries),
        )
        for entries in together.values()
    )
    base.bytes_per_token = max(1, sum(kept.values()) // hidden.shape[1])


@contextmanager
def _kept_bytes() -> Iterator[dict[int, int]]:
    """Bytes of what autograd saves, by storage; weights are not counted."""
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield kept
