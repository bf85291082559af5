"""The two tuners: D2FT on full fine-tuning and on PEFT's LoRA. Both put interceptions before the same modules."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import Tensor, nn

from ..config import D2FTConfig
from ..partition import Partition, partition_model
from .intercept import Intercept, ProjectionForward, RegionForward
from .layer import D2FTLayer
from .runtime import FeatureMean, Runtime, unbind_checkpointing


def get_runtime(model: nn.Module) -> Runtime:
    """The runtime of a model that D2FT was applied to, through whatever wraps it.

    Raises:
        ValueError: If there is none.
    """
    for module in model.modules():
        forward = module.__dict__.get("forward")
        if isinstance(forward, Intercept):
            return forward.runtime
    raise ValueError(f"{type(model).__name__} is not a D2FT model; wrap it with get_peft_model(model, D2FTConfig(...)).")


class SubnetTuner(BaseTuner):
    """What both tuners add to a PEFT tuner: the partition, the runtime and the interceptions."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, then put the interceptions before the layers that there are now."""
        runtime = self.__dict__.setdefault("runtime", Runtime())
        config = self.peft_config[adapter_name]
        runtime.partitions[adapter_name] = partition_model(model, config.heads_per_subnet)
        self._remove_interceptions()
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._install_interceptions(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; under DistributedDataParallel every trainable parameter then receives a gradient."""
        outputs = self.model(*args, **kwargs)
        return self._touch(outputs) if self.runtime.touch_gradients and self.training else outputs

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its partition."""
        super().delete_adapter(adapter_name)
        self.runtime.partitions.pop(adapter_name, None)

    def _prepare_adapter_config(self, peft_config: D2FTConfig, model_config: dict) -> D2FTConfig:
        partition = next(p for name, p in self.runtime.partitions.items() if self.peft_config[name] is peft_config)
        if peft_config.target_modules is None:
            peft_config.target_modules = set(partition.projections)
        peft_config.fan_in_fan_out = all(p.transposed for p in partition.projections.values())
        return peft_config

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._remove_interceptions()
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _install_interceptions(self, adapter_name: str) -> None:
        runtime: Runtime = self.runtime
        partition: Partition = runtime.partitions[adapter_name]
        runtime.shortcut = self.peft_config[adapter_name].shortcut
        runtime.blocks = [self.model.get_submodule(name) for name in partition.blocks]
        for index, branch in enumerate(partition.branches):
            region = RegionForward(self.model.get_submodule(branch.region), runtime, branch, index)
            for projection in branch.projections:
                inside = projection.kind == "column" or branch.row_inside
                module = self.model.get_submodule(projection.name)
                forward = ProjectionForward(module, runtime, projection, index, inside)
                forward.install()
            region.row = forward
            region.install()
            layout = branch.row.layout
            if runtime.shortcut == "mean" and index not in runtime.means:
                runtime.means[index] = FeatureMean(layout.heads, layout.width)

    def _remove_interceptions(self) -> None:
        for module in self.model.modules():
            if isinstance(module.__dict__.get("forward"), Intercept):
                module.forward.remove()
        for block in self.runtime.blocks:
            unbind_checkpointing(block)

    def _touch(self, outputs: Any) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        if isinstance(outputs, Tensor):
            return _Touch.apply(outputs, *parameters)
        # The loss where the model computes it, else what the caller computes it from.
        for name, value in outputs.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                outputs[name] = _Touch.apply(value, *parameters)
                break
        return outputs


class _Touch(torch.autograd.Function):
    """Identity that hands every parameter a zero gradient, so that DistributedDataParallel need not look for unused
    ones: whatever a rank skips, all ranks reduce the same buckets."""

    @staticmethod
    def forward(ctx, value, *parameters):
        ctx.save_for_backward(*parameters)
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return grad, *(torch.zeros_like(p) for p in ctx.saved_tensors)


class D2FTModel(SubnetTuner):
    """Full fine-tuning by D2FT (arXiv 2504.12471): trainable copies of the subnets' projections.

    Args:
        model: The transformers model.
        config: A `D2FTConfig` with ``r=None``.
        adapter_name: Name of the adapter.
    """

    prefix = "d2ft_"
    tuner_layer_cls = D2FTLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter: copies of the projections and, with ``train_boundary``, of everything around them."""
        self._copies: dict[int, Any] = {}
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        del self._copies

    def _prepare_adapter_config(self, peft_config: D2FTConfig, model_config: dict) -> D2FTConfig:
        targets_given = peft_config.target_modules is not None
        peft_config = super()._prepare_adapter_config(peft_config, model_config)
        if peft_config.train_boundary and not targets_given:
            partition = next(p for name, p in self.runtime.partitions.items() if self.peft_config[name] is peft_config)
            peft_config.target_modules |= set(partition.boundary)
        return peft_config

    @staticmethod
    def _check_target_module_exists(peft_config: D2FTConfig, key: str) -> Any:
        return check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self, peft_config: D2FTConfig, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module,
        current_key: str, parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, D2FTLayer):
            target.update_layer(adapter_name, peft_config.inference_mode, self._copies)
            return
        layer = D2FTLayer(target, adapter_name, peft_config.inference_mode, self._copies)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The copies stand in for the model's own layers, whose dtype the layers around them expect.
        pass

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: D2FTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict().keys()
        own = {key for key in known if f".d2ft_layers.{adapter_name}." in key}
        missing, unexpected = own - remapped.keys(), remapped.keys() - known
        if missing or unexpected:
            # PEFT would warn and leave the untrained copies in place.
            raise ValueError(
                f"the checkpoint does not fit adapter {adapter_name!r}: {len(missing)} of its {len(own)} tensors are "
                f"missing (e.g. {min(missing, default='-')}) and {len(unexpected)} are unknown "
                f"(e.g. {min(unexpected, default='-')}); load it with the base model and the config that it was saved "
                "with."
            )
        return remapped


class D2FTLoraModel(SubnetTuner, LoraModel):
    """LoRA by D2FT: PEFT's own LoRA layers, run on some of their heads.

    Args:
        model: The transformers model.
        config: A `D2FTConfig` with a rank ``r``.
        adapter_name: Name of the adapter.
    """
