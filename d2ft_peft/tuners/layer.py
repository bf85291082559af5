"""The full variant's layer: a trainable copy of any module beside the frozen original."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from ..batches import of_samples


class D2FTLayer(nn.Module, BaseTunerLayer):
    """Holds one trainable copy of `base_layer` per adapter; merging puts a copy in the place of the original.

    Args:
        base_layer: A projection of a subnet, or a boundary module (embedding, norm, head).
        adapter_name: Name of the first adapter.
        inference_mode: Whether the copy starts frozen.
        copies: Parameters that were already copied for this adapter, by the id of the original (`copy.deepcopy`'s
            memo): tied weights stay tied.
        keep_base: Whether the original stays beside the copy. Otherwise the adapter's layer is the original itself.
        on_meta: Whether parameters are to be loaded later, and take no memory until then.
    """

    adapter_layer_names = ("d2ft_layers",)
    cast_input_dtype_enabled = True  # PEFT switches it off and on; a copy sees what the original would

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        inference_mode: bool,
        copies: dict[int, Any],
        keep_base: bool = True,
        on_meta: bool = False,
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
        if isinstance(base_layer, Conv1D):  # which has other names for them
            self.in_features, self.out_features = base_layer.weight.shape
        self.update_layer(adapter_name, inference_mode, copies, on_meta)

    def update_layer(
        self, adapter_name: str, inference_mode: bool, copies: dict[int, Any], on_meta: bool = False
    ) -> None:
        """Add an adapter: a copy of the layer as it is without any."""
        if self.merged:
            raise ValueError(
                f"adapter {adapter_name!r} cannot be added while {self.merged_adapters} is merged; "
                "call unmerge_adapter()."
            )
        if self.keep_base:
            for parameter in self.base_layer.parameters() if on_meta else ():
                copies.setdefault(id(parameter), nn.Parameter(torch.empty_like(parameter, device="meta")))
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

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Run the active layer; arguments and result are those of the wrapped module.

        Args:
            *args, **kwargs: Of the wrapped module.
            adapter_names: Adapter of each sample, if they differ (``"__base__"`` for none).
        """
        if adapter_names is not None:
            return self._mixed(adapter_names, args, kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        return self.active_layer()(*args, **kwargs)

    def _mixed(self, adapter_names: list[str], args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """Each sample through the layer of its adapter."""
        if self.merged or self.disable_adapters:
            raise ValueError("adapter_names needs adapters that are neither merged nor disabled.")
        size, out = len(adapter_names), None
        layers = dict(self.d2ft_layers)
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, other in enumerate(adapter_names) if other == name]
            layer = layers.get(name, self.base_layer)
            its_args, its_kwargs = tree_map(partial(of_samples, which=rows, size=size), (args, kwargs))
            part = layer(*its_args, **its_kwargs)
            if not isinstance(part, Tensor) or len(part) not in (1, len(rows)):
                raise ValueError(
                    f"adapter_names names {size} adapters, and a {type(self.base_layer).__name__} has no sample for "
                    "each; run each adapter on a batch of its own."
                )
            out = part.new_empty(size, *part.shape[1:]) if out is None else out
            out[rows] = part
        return out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the adapter's copy in the place of the original.

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
                "D2FT merges one at a time: make one of them by model.add_weighted_adapter(adapters, weights, name)."
            )
        name = adapter_names[0]
        if safe_merge and not all(p.isfinite().all() for p in self.d2ft_layers[name].parameters()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken: it holds NaNs or "
                "infinities, and was not merged."
            )
        # Both stay where they are saved from; what is kept aside belongs to no adapter.
        self.d2ft_original, self.base_layer = self.base_layer, self.d2ft_layers[name]
        self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.merged_adapters.pop()
        self.base_layer = self.d2ft_original
        del self.d2ft_original

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the weight's shape."""
        return self.d2ft_layers[adapter].weight.detach() - self._original().weight.detach()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter is a change of one matrix: of a linear layer whose bias did not move."""
        if not self.keep_base or adapter_name not in self.d2ft_layers:
            return False
        own, original = self.d2ft_layers[adapter_name], self._original()
        return isinstance(original, nn.Linear | Conv1D) and (original.bias is None or own.bias.equal(original.bias))

    @torch.no_grad()
    def combine(self, adapter_name: str, weights: Mapping[str, float]) -> None:
        """Make an adapter the original plus the weighted sum of what others change (arXiv 2212.04089).

        Args:
            adapter_name: An adapter of this layer, which is overwritten.
            weights: Weight of each other adapter; those that this layer lacks change nothing.
        """
        others = [(weight, self.d2ft_layers[name]) for name, weight in weights.items() if name in self.d2ft_layers]
        parameters = zip(*(layer.parameters() for _, layer in others), strict=True) if others else ()
        own = self.d2ft_layers[adapter_name].parameters()
        for target, original, changed in zip(own, self._original().parameters(), parameters, strict=True):
            exact = original.to(torch.promote_types(original.dtype, torch.float32))
            changes = (w * (other - exact) for (w, _), other in zip(others, changed, strict=True))
            target.copy_(exact + sum(changes))

    def _original(self) -> nn.Module:
        return self.d2ft_original if self.merged else self.base_layer

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
            if name in ("base_layer", "d2ft_layers", "d2ft_original"):
                raise
            return getattr(self.active_layer(), name)

    def __repr__(self) -> str:
        return "d2ft." + super().__repr__()
