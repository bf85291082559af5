"""What comes out of the frozen lower blocks, kept on disk by sample: later epochs begin above them.

Embeddings always run, and their output names the sample: one that is augmented is another sample. Where all of a batch
is known the frozen blocks do not run; where some of it is, they run on the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..batches import of_samples
from ..hidden_states import content_key, with_padding
from ..partition.body import bound_arguments
from .checkpointing import in_backward
from .row_store import RowStore
from .runtime import Runtime


# Arguments that a model turns into the embeddings' output, or that blocks see as mask and positions only.
_KNOWN = {
    "input_ids", "inputs_embeds", "token_type_ids", "pixel_values", "bool_masked_pos", "attention_mask", "position_ids",
    "cache_position", "labels", "num_items_in_batch",
}  # fmt: skip
_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


@dataclass
class _Lookup:
    """A pass on its way through the frozen blocks.

    Attributes:
        hidden: Output of the embeddings [batch, tokens, width].
        real: Which tokens are no padding, bool [batch, tokens].
        keys: Name of each sample.
        found: Their kept hidden states; None where they are not known.
        rows: Rows that the blocks run on.
    """

    hidden: Tensor
    real: Tensor
    keys: list[bytes]
    found: list[Tensor | None]
    rows: list[int]

    @property
    def is_partial(self) -> bool:
        """Whether the blocks run on some rows only."""
        return 0 < len(self.rows) < len(self.keys)


class FrozenCache:
    """Stands beside the blocks of one model while it is open.

    Args:
        runtime: The model's state.
        body: The part of the model that makes mask and positions, see `partition.body.find_body`.
        cut: Index of the lowest block that learns.
        open_store: Opens the store for hidden states of this width and dtype.
        samples: Samples that this process meets in an epoch, where that is known.

    Attributes:
        hits, misses: Samples that were known, or not.
        passes: Samples and tokens that the frozen blocks did not run on, one entry for each pass of the micro-batch.
    """

    def __init__(
        self,
        runtime: Runtime,
        body: nn.Module,
        cut: int,
        open_store: Callable[[int, torch.dtype], RowStore],
        samples: int | None = None,
    ):
        self.runtime, self.body, self.cut, self.samples = runtime, body, cut, samples
        self.hits = self.misses = 0
        self._hits_of_first_epoch: int | None = None
        self.passes: list[tuple[int, int]] = []
        self._open_store = open_store
        self.store: RowStore | None = None
        self._given: dict[str, Any] | None = None
        self._lookup: _Lookup | None = None
        self._passed_by = False
        self._outputs: dict[int, int] = {}
        self._told: set[str] = set()
        self._handle = body.register_forward_pre_hook(self._enter_body, with_kwargs=True)
        rope = str(getattr(body.config, "rope_parameters", None) or getattr(body.config, "rope_scaling", ""))
        self._length_counts = "dynamic" in rope or "longrope" in rope
        runtime.cache = self

    def close(self) -> None:
        """Leave the model as it was."""
        self._handle.remove()
        self.runtime.cache = None
        if self.store is not None:
            self.store.close()

    def enter(self, index: int, args: tuple, kwargs: dict[str, Any]) -> tuple[bool, tuple, dict[str, Any]]:
        """Whether a block is left out, and the arguments that it runs on.

        Args:
            index: Index of the block.
            args, kwargs: Its arguments.
        """
        if index > self.cut:
            return False, args, kwargs
        hidden = args[0] if args else kwargs["hidden_states"]
        if index == 0:
            self._begin(hidden)
        lookup = self._lookup
        if lookup is None:
            self._check_begun()
            return False, args, kwargs
        if index < self.cut:
            if lookup.is_partial:
                count, rows = len(lookup.keys), lookup.rows
                args, kwargs = map_tensors(lambda value: of_samples(value, rows, count), (args, kwargs))
            return not lookup.rows, args, kwargs
        hidden, self._lookup, self._passed_by = self._merge(lookup, hidden), None, False
        return False, (hidden, *args[1:]) if args else args, kwargs if args else {**kwargs, "hidden_states": hidden}

    def left_out(self, index: int, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What stands for the output of a block that is left out: its input."""
        hidden = args[0] if args else kwargs["hidden_states"]
        length = self._outputs[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    def ran(self, index: int, output: Any) -> None:
        """Learn what blocks return."""
        self._outputs[index] = len(output) if isinstance(output, tuple) else 0

    def _enter_body(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._given = bound_arguments(type(module).forward, (module, *args), kwargs)

    def _begin(self, hidden: Tensor) -> None:
        given, self._given = self._given, None
        self._lookup, why = None, self._reason(hidden, given)
        self._passed_by = why is not None
        if why is not None:
            self._say(f"frozen blocks ran although their output is kept in a cache: {why}")
            return
        if self.store is None:
            self.store = self._open_store(hidden.shape[-1], hidden.dtype)
        mask = given.get("attention_mask")
        real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
        values = hidden.detach().cpu()
        keys = [self._key(values[row], real[row], given.get("position_ids"), row) for row in range(len(values))]
        if self.store.sharers > 1 and not all(key in self.store for key in keys):
            self.store.refresh()
        found = [self._get(key, int(of_sample.sum())) for key, of_sample in zip(keys, real, strict=True)]
        missing = [row for row, rows in enumerate(found) if rows is None]
        self._count(len(keys) - len(missing), len(missing))
        # Tensors that blocks get are told apart by their length: those that go with samples have that of the batch.
        ambiguous = len(keys) in (1, hidden.shape[1])
        unseen = not self._outputs
        rows = range(len(keys)) if unseen or (missing and ambiguous) else missing
        self._lookup = _Lookup(hidden, real, keys, found, [*rows])

    def _reason(self, hidden: Tensor, given: dict[str, Any] | None) -> str | None:
        """Why this pass has to run as it is; None if it can be looked up."""
        runtime, config = self.runtime, self.body.config
        if runtime.cut < self.cut:
            return "something in them, which was frozen when training began, learns now"
        if given is None or hidden.ndim != 3:
            return "the blocks were run by something else than the model's forward"
        branches = next(iter(runtime.partitions.values())).branches
        below = [cell for branch, cell in zip(branches, runtime.plan.cells, strict=True) if branch.block < self.cut]
        if any(cell is not None and cell.skipped for cell in below):
            return "the schedule leaves out some of their heads; choose a policy over samples, or 'depth'"
        if any(given.get(name, getattr(config, name, None)) not in (None, False) for name in _OUTPUTS):
            return f"the model is asked for what they return ({', '.join(_OUTPUTS)})"
        mask = given.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != hidden.shape[:2]):
            return "attention_mask is not of shape [batch, tokens], from which padding could be told"
        others = sorted(name for name, value in given.items() if isinstance(value, Tensor) and name not in _KNOWN)
        return f"the model was given {', '.join(others)}, which may matter to them" if others else None

    def _key(self, hidden: Tensor, real: Tensor, positions: Tensor | None, row: int) -> bytes:
        positions = torch.arange(len(hidden)) if positions is None else positions[row % len(positions)].cpu()
        if real.any():  # blocks see differences of positions: where the padding is does not matter
            positions = positions - positions[real][0]
        about = f"{len(hidden) if self._length_counts else ''} {torch.is_autocast_enabled(self._device)}"
        if torch.is_autocast_enabled(self._device):
            about += str(torch.get_autocast_dtype(self._device))
        return content_key(about, hidden, real, positions)

    @property
    def _device(self) -> str:
        return next(self.body.parameters()).device.type

    def _get(self, key: bytes, tokens: int) -> Tensor | None:
        rows = self.store.get(key)
        return rows if rows is not None and len(rows) == tokens else None

    def _merge(self, lookup: _Lookup, computed: Tensor) -> Tensor:
        """Hidden states of all samples at the cut, from the store and from the blocks; what is new is kept."""
        count, tokens = lookup.hidden.shape[:2]
        if lookup.rows:
            on_host = computed.detach().cpu()
            for values, row in zip(on_host, lookup.rows, strict=True):
                if lookup.found[row] is None:
                    self._keep(lookup.keys[row], values[lookup.real[row]], lookup.hidden.dtype)
        if not in_backward():
            passes = self.runtime.passes
            if lookup.rows:
                passes.pop()
            passes.append((count, tokens))
            self.passes.append((count - len(lookup.rows), tokens))
        if len(lookup.rows) == count:
            return computed
        whole = torch.empty(lookup.hidden.shape, dtype=lookup.hidden.dtype)
        for row, rows in enumerate(lookup.found):
            if rows is not None:
                whole[row] = rows if len(rows) == tokens else with_padding(rows, lookup.real[row])
        whole = whole.to(computed.device)
        if lookup.rows:
            whole[lookup.rows] = computed
        return whole

    def _keep(self, key: bytes, values: Tensor, dtype: torch.dtype) -> None:
        if values.dtype != dtype:
            self._say(f"the cache stays empty: frozen blocks turn {dtype} into {values.dtype}.")
            return
        if values.dtype != self.store.dtype and not values.to(self.store.dtype).isfinite().all():
            self._say(f"hidden states are too large for cache_dtype={self.store.dtype}; choose 'bfloat16'.")
            return
        self.store.put(key, values)

    def _count(self, hits: int, misses: int) -> None:
        self.hits, self.misses = self.hits + hits, self.misses + misses
        if self.samples is None or not self.store:
            return
        if self._hits_of_first_epoch is None and self.hits + self.misses >= self.samples:
            self._hits_of_first_epoch = self.hits
        elif self.hits + self.misses >= 2 * self.samples and self.hits == self._hits_of_first_epoch:
            self._say(
                "the cache of frozen blocks does nothing: no sample came a second time with the same input. "
                "Augmentation and noise change the inputs in every epoch; leave cache_frozen out, or fix them "
                "beforehand."
            )

    def _check_begun(self) -> None:
        if not self._passed_by:
            raise RuntimeError(
                "blocks above the frozen ones were run again without those; switch checkpointing on with "
                "model.gradient_checkpointing_enable(), or leave cache_frozen out."
            )

    def _say(self, what: str) -> None:
        if what not in self._told:
            self._told.add(what)
            warnings.warn(what, stacklevel=6)


def map_tensors(change: Callable[[Tensor], Tensor], values: Any) -> Any:
    """Nested tuples, lists and dictionaries, such as the arguments of a block, with other tensors in them."""
    if isinstance(values, Tensor):
        return change(values)
    if type(values) in (tuple, list):
        return type(values)(map_tensors(change, value) for value in values)
    if type(values) is dict:
        return {name: map_tensors(change, value) for name, value in values.items()}
    return values
