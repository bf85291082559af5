"""The two tuners: D2FT on full fine-tuning and on PEFT's LoRA. Both put interceptions before the same modules."""

from __future__ import annotations

from typing import Any

from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, _ExcludedModule, check_target_module_exists
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..engine.block_region import BlockRegion
from ..engine.checkpointing import unbind_checkpointing
from ..engine.dequantize import keep_unpacked
from ..engine.feature_mean import FeatureMean
from ..engine.frozen_below import NoteEmbedded, install_entries
from ..engine.intercept import Intercept, find_runtime
from ..engine.projection import ProjectionForward
from ..engine.region import RegionForward
from ..engine.region_view import HeadsOfOutput
from ..engine.runtime import Runtime
from ..engine.token_rows import check_takes_tokens, install_token_rows
from ..engine.touch_loss import TouchLoss
from ..partition import Partition, parts_elsewhere, unwrap
from .adapter_checks import (
    check_beside_others,
    check_loads_in_peft,
    check_names,
    check_one_place,
    check_stacks,
    copied_boundary,
    leave_out_what_peft_renames,
    places_of_modules,
)
from .config import D2FTConfig
from .converted_lora import subtract_initial_adapter
from .full_adapters import FullAdapters
from .layer import D2FTLayer
from .subnets import default_targets, linear_layers, partition_for, transformed_blocks


class SubnetTuner(BaseTuner):
    """What both tuners add to a PEFT tuner: the partition, the runtime and the interceptions."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, then put the interceptions before the layers that there are now.

        Raises:
            ValueError: If the model cannot be cut, or PEFT refuses the config; adapters already there still work.
        """
        self.runtime = find_runtime(model) or Runtime()
        partitions, config = self.runtime.partitions, self.peft_config[adapter_name]
        others = {name: self.peft_config[name] for name in partitions if name != adapter_name}
        if others:
            check_beside_others(config, adapter_name, others, partitions[next(iter(others))])
        if not config.inference_mode:
            keep_unpacked(model)
        partition = partition_for(model, config, partitions[next(iter(others))] if others else None)
        check_names(model, partition, config)
        check_stacks(partition, config)
        if config.rows == "tokens":
            check_takes_tokens(model, partition, config.token_margins, config.token_choice)
        partitions[adapter_name] = partition
        self._remove_interceptions()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            del partitions[adapter_name]
            raise
        finally:
            if partitions:
                # Adapters differ in how they group heads into subnets, not in where the heads are.
                self._install_interceptions(next(iter(partitions.values())))

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Activate an adapter, and what its config puts in the place of skipped heads."""
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._follow_active_adapter()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its partition."""
        super().delete_adapter(adapter_name)
        self.runtime.partitions.pop(adapter_name, None)
        self._follow_active_adapter()

    def _follow_active_adapter(self) -> None:
        runtime: Runtime = self.runtime
        active = next((name for name in self.active_adapters if name in runtime.partitions), None)
        if active is None:
            return
        runtime.shortcut = self.peft_config[active].shortcut
        if runtime.shortcut != "mean":
            runtime.means.clear()
            return
        for index, branch in enumerate(runtime.partitions[active].branches):
            runtime.means.setdefault(index, FeatureMean(branch.row.layout))

    def _partition_of(self, peft_config: D2FTConfig) -> Partition:
        name = next(name for name, config in self.peft_config.items() if config is peft_config)
        return self.runtime.partitions[name]

    def _prepare_adapter_config(self, peft_config: D2FTConfig, model_config: dict) -> D2FTConfig:
        partition = self._partition_of(peft_config)
        if peft_config.layers_to_transform is not None and not peft_config.layers_pattern:
            # PEFT guesses where the index of a block stands, and does not find it in models without a task head.
            peft_config.layers_pattern = partition.blocks[0].split(".")[-2]
        if peft_config.target_modules is None:
            blocks = transformed_blocks(peft_config, partition)
            peft_config.target_modules = default_targets(self.model, peft_config, partition, blocks)
        return peft_config

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._remove_interceptions()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _install_interceptions(self, partition: Partition) -> None:
        runtime: Runtime = self.runtime
        runtime.blocks = [self.model.get_submodule(name) for name in partition.blocks]
        runtime.gauges = partition.gauges
        for index, branch in enumerate(partition.branches):
            if branch.row is None:
                BlockRegion(self.model.get_submodule(branch.region), runtime, branch, index).install()
                continue
            region = RegionForward(self.model.get_submodule(branch.region), runtime, branch, index)
            forwards = []
            for projection in branch.projections:
                inside = projection.kind == "column" or branch.row_inside
                module = self.model.get_submodule(projection.name)
                forwards.append(ProjectionForward(module, runtime, projection, index, inside))
            *columns, region.row = forwards
            for column in columns:
                column.siblings = tuple(c for c in columns if c.projection in branch.siblings(column.projection))
            outputs = [
                HeadsOfOutput(region.module.get_submodule(entry.name), runtime, entry, branch.heads)
                for entry in branch.per_head
                if entry.kind == "module"
            ]
            for interception in (*forwards, *outputs, region):
                interception.install()
        over_tokens = [config for name in runtime.partitions if (config := self.peft_config[name]).rows == "tokens"]
        if over_tokens:
            images = any(config.token_choice == "variance" for config in over_tokens)
            install_token_rows(self.model, runtime, partition, images)
        self.model.register_forward_hook(TouchLoss(self.model, runtime))
        if not parts_elsewhere(self.model):  # a block that stands for others learns what they learn
            install_entries(self.model, runtime, partition)

    def _remove_interceptions(self) -> None:
        if self.runtime.unread is not None:
            self.runtime.unread.remove()
        self.runtime.entries.clear()
        for module in self.model.modules():
            hooks = module._forward_hooks
            for key in [key for key, hook in hooks.items() if isinstance(hook, TouchLoss | NoteEmbedded)]:
                del hooks[key]
            while isinstance(module.__dict__.get("forward"), Intercept):  # one may stand before another
                module.forward.remove()
        for block in self.runtime.blocks:
            unbind_checkpointing(block)


class D2FTModel(FullAdapters, SubnetTuner):
    """Full fine-tuning by D2FT (arXiv 2504.12471): trainable copies of the subnets' projections.

    Args:
        model: The transformers model.
        config: A `D2FTConfig` with ``r=None``.
        adapter_name: Name of the adapter.
    """

    prefix = "d2ft_"
    tuner_layer_cls = D2FTLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Add an adapter: copies of the projections and, with ``train_boundary``, of everything around them."""
        self._copies: dict[int, Any] = {}
        self._places = places_of_modules(model)
        self._on_meta = low_cpu_mem_usage
        try:
            super().inject_adapter(model, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        finally:
            del self._copies, self._places, self._on_meta

    def _prepare_adapter_config(self, peft_config: D2FTConfig, model_config: dict) -> D2FTConfig:
        self._boundary = frozenset(self._trained_boundary(peft_config))
        return super()._prepare_adapter_config(peft_config, model_config)

    def _trained_boundary(self, peft_config: D2FTConfig) -> list[str]:
        """Modules to copy besides ``target_modules``. Not listed there: PEFT would save embeddings twice for it."""
        if not peft_config.train_boundary:
            return []
        partition = self._partition_of(peft_config)
        blocks = transformed_blocks(peft_config, partition)
        frozen = tuple(f"{name}." for index, name in enumerate(partition.blocks) if index not in blocks)
        boundary = [name for name in partition.boundary if not name.startswith(frozen)]
        return copied_boundary(self.model, partition, boundary)

    def _check_target_module_exists(self, peft_config: D2FTConfig, key: str) -> Any:
        found = check_target_module_exists(peft_config, key)
        return found if found or isinstance(found, _ExcludedModule) else key in self._boundary

    def _check_merge_allowed(self) -> None:
        # Tied weights are copied once and stay tied; where only one of them is trained, PEFT says so after merging.
        pass

    def _create_and_replace(
        self,
        peft_config: D2FTConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, D2FTLayer):
            target.update_layer(adapter_name, peft_config.inference_mode, self._copies, self._on_meta)
            return
        check_one_place(target, current_key, self._places)
        keep_base = peft_config.keep_base
        layer = D2FTLayer(target, adapter_name, peft_config.inference_mode, self._copies, keep_base, self._on_meta)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def disable_adapter_layers(self) -> None:
        """Let the original weights compute.

        Raises:
            ValueError: If they were trained in place (``keep_base=False``).
        """
        self._check_base_is_kept("disabled")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; refused where its weights are the model's own (``keep_base=False``)."""
        self._check_base_is_kept("deleted")
        super().delete_adapter(adapter_name)

    def unload(self) -> nn.Module:
        """Give the original model back; refused where it was trained in place (``keep_base=False``)."""
        self._check_base_is_kept("unloaded")
        return super().unload()

    def _check_base_is_kept(self, verb: str) -> None:
        trained_in_place = [name for name, config in self.peft_config.items() if not config.keep_base]
        if trained_in_place:
            raise ValueError(
                f"adapter {trained_in_place[0]!r} cannot be {verb}: keep_base=False trained the model's own weights in "
                "place, the original ones are gone; merge_and_unload() gives the trained model, loading "
                "it afresh the original."
            )

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # A copy is complete and lies where its original does; a container has no weight that PEFT could look at.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The copies stand in for the model's own layers, whose dtype the layers around them expect.
        pass


class D2FTLoraModel(SubnetTuner, LoraModel):
    """LoRA by D2FT: PEFT's own LoRA layers, run on some of their heads.

    Args:
        model: The transformers model.
        config: A `D2FTConfig` with a rank ``r``.
        adapter_name: Name of the adapter.
    """

    def _prepare_adapter_config(self, peft_config: D2FTConfig, model_config: dict) -> D2FTConfig:
        every_projection = peft_config.target_modules is None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if every_projection:
            leave_out_what_peft_renames(self.model, peft_config)
        linears = linear_layers(self.model, self._partition_of(peft_config))
        check_loads_in_peft(self.model, linears, peft_config)
        kinds = {type(unwrap(self.model.get_submodule(name))) for name in linears}
        peft_config.fan_in_fan_out = kinds == {Conv1D}
        return peft_config

    @classmethod
    def _convert_state_dict_for_initial_model(
        cls, peft_model: nn.Module, peft_config: D2FTConfig, path: str, state_dict: dict[str, Tensor], kwargs: dict
    ) -> dict[str, Tensor]:
        return subtract_initial_adapter(peft_model, path, state_dict, kwargs)
