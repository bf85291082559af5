"""The full variant's layer: a trainable copy of any module beside the frozen original."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn


class D2FTLayer(nn.Module, BaseTunerLayer):
    """Holds one trainable copy of `base_layer` per adapter; merging swaps copy and original.

    Args:
        base_layer: A projection of a subnet, or a boundary module (embedding, norm, head).
        adapter_name: Name of the first adapter.
        inference_mode: Whether the copy starts frozen.
        copies: Parameters that were already copied for this adapter, by the id of the original (`copy.deepcopy`'s
            memo): tied weights stay tied.
        keep_base: Whether the original stays beside the copy. Otherwise the adapter's layer is the original itself.
    """

    adapter_layer_names = ("d2ft_layers",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        inference_mode: bool,
        copies: dict[int, Any],
        keep_base: bool = True,
    ):
        super().__init__()
        self.keep_base = keep_base
        if not keep_base:
            # Registered first: the one parameter that both names have is then listed under the adapter's.
            self.d2ft_layers = nn.ModuleDict({adapter_name: base_layer})
        self.base_layer = base_layer
        if keep_base:
            self.d2ft_layers = nn.ModuleDict({})
        self._active_adapter = adapter_name
        self.merged_adapters = []
        self.update_layer(adapter_name, inference_mode, copies)

    def update_layer(self, adapter_name: str, inference_mode: bool, copies: dict[int, Any]) -> None:
        """Add an adapter: a copy of the layer as it is without any."""
        if self.merged:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be added while {self.merged_adapters} is merged; "
                "call unmerge_adapter()."
            )
        if self.keep_base:
            self.d2ft_layers[adapter_name] = copy.deepcopy(self.base_layer, copies)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    def active_layer(self) -> nn.Module:
        """The module that computes: the active adapter's copy, or the original if there is none.

        Raises:
            ValueError: If several adapters are active: copies cannot be added up.
        """
        if self.disable_adapters or self.merged:
            return self.base_layer
        active = [name for name in self.active_adapters if name in self.d2ft_layers]
        if len(active) > 1:
            raise ValueError(f"adapters {active} are active; full fine-tuning by D2FT runs one at a time.")
        return self.d2ft_layers[active[0]] if active else self.base_layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the active layer; arguments and result are those of the wrapped module."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active_layer()(*args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Swap the adapter's copy with the original.

        Args:
            safe_merge: Check that the copy is finite first.
            adapter_names: The adapter to merge, the active one by default.

        Raises:
            ValueError: If more than one adapter is to be merged, or the copy holds infinities or NaNs.
        """
        adapter_names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.d2ft_layers]
        if not adapter_names:
            return
        if len(adapter_names) > 1 or self.merged:
            raise ValueError(
                f"adapters {[*self.merged_adapters, *adapter_names]} cannot be merged together; full fine-tuning by "
                "D2FT merges one at a time."
            )
        name = adapter_names[0]
        if safe_merge and not all(p.isfinite().all() for p in self.d2ft_layers[name].parameters()):
            raise ValueError(f"adapter {name!r} holds NaNs or infinities and was not merged.")
        self._swap(name)
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self._swap(self.merged_adapters.pop())

    def _swap(self, name: str) -> None:
        self.base_layer, self.d2ft_layers[name] = self.d2ft_layers[name], self.base_layer

    @property
    def weight(self) -> Tensor:
        """Weight of the active layer, for code that looks at dtype, device or shape."""
        return self.active_layer().weight

    @property
    def bias(self) -> Tensor | None:
        """Bias of the active layer."""
        return self.active_layer().bias

    def __getattr__(self, name: str) -> Any:
        # Containers such as an embedding block are reached into (`embeddings.patch_embeddings`).
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "d2ft_layers"):
                raise
            return getattr(self.active_layer(), name)

    def __repr__(self) -> str:
        return "d2ft." + super().__repr__()
