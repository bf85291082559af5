"""Adapters of full fine-tuning beside each other: weighted sums, batches with several of them, saving and loading."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from .config import D2FTConfig
from .layer import D2FTLayer


BASE = "__base__"


class FullAdapters(BaseTuner):
    """What PEFT offers for several adapters of a model, for adapters that are copies of layers."""

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        **kwargs: Any,
    ) -> None:
        """Add an adapter that is the base plus the weighted sum of what others change (arXiv 2212.04089).

        Args:
            adapters: Names of the adapters.
            weights: Weight of each.
            adapter_name: Name of the new one.
            combination_type: ``"linear"``; the others of PEFT's LoRA are for low-rank factors.
            **kwargs: Fields of those others, which are refused.

        Raises:
            ValueError: If an adapter is unknown, or holds what cannot be added up.
        """
        if combination_type != "linear" or kwargs:
            raise ValueError(
                f"combination_type={combination_type!r} with {sorted(kwargs)} is for LoRA; adapters of full "
                "fine-tuning are combined by combination_type='linear', which takes no other arguments."
            )
        if len(adapters) != len(weights):
            raise ValueError(f"weights={list(weights)!r} must be as many as adapters={list(adapters)!r}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"adapter_name={adapter_name!r} is an adapter already; choose another name.")
        configs = [self._config_of(name) for name in adapters]
        saved = [name for name, config in zip(adapters, configs, strict=True) if config.modules_to_save]
        if saved:
            raise ValueError(f"adapters {saved} have modules_to_save, which cannot be added up; merge one at a time.")
        targets = set().union(*(config.target_modules for config in configs))
        self.peft_config[adapter_name] = dataclasses.replace(
            configs[0],
            target_modules=targets,
            train_boundary=any(config.train_boundary for config in configs),
        )
        try:
            self.inject_adapter(self.model, adapter_name)
        except Exception:
            del self.peft_config[adapter_name]
            raise
        for layer in self._layers():
            if adapter_name in layer.d2ft_layers:
                layer.combine(adapter_name, dict(zip(adapters, map(float, weights), strict=True)))

    def _config_of(self, name: str) -> D2FTConfig:
        if name not in self.peft_config:
            raise ValueError(f"adapters names {name!r}; the model has {sorted(self.peft_config)}.")
        return self.peft_config[name]

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Let ``adapter_names`` of a forward pass reach the layers."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode; call model.eval().")
        unknown = sorted(set(names) - {BASE} - set(self.peft_config))
        if unknown:
            raise ValueError(f"adapter_names names {unknown}; the model has {sorted(self.peft_config)} and {BASE!r}.")
        beams = kwargs.get("num_beams")
        names = [name for name in names for _ in range(beams if isinstance(beams, int) else 1)]
        with ExitStack() as hooks:
            for module in self.modules():
                if isinstance(module, D2FTLayer | AuxiliaryTrainingWrapper):
                    hook = module.register_forward_pre_hook(_hand_on(names), with_kwargs=True)
                    hooks.callback(hook.remove)
            yield

    def _layers(self) -> list[D2FTLayer]:
        return [module for module in self.model.modules() if isinstance(module, D2FTLayer)]

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        # What is kept aside while an adapter is merged belongs to the base.
        selected = super()._get_adapter_state_dict(*args, **kwargs)
        return {key: value for key, value in selected.items() if ".d2ft_original." not in key}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # PEFT expects the name next to the last part of a key; in a container's copy it stands further ahead.
        return key.replace(f".d2ft_layers.{adapter_name}.", ".d2ft_layers.", 1)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: D2FTConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        known = model.state_dict(keep_vars=True)
        own = {key for key in known if f".d2ft_layers.{adapter_name}." in key}
        missing, unexpected = own - remapped.keys(), remapped.keys() - known.keys()
        if missing or unexpected:
            # PEFT would warn and leave the untrained copies in place.
            raise ValueError(
                f"the checkpoint does not fit adapter {adapter_name!r}: {len(missing)} of its {len(own)} tensors are "
                f"missing (e.g. {min(missing, default='-')}) and {len(unexpected)} are unknown "
                f"(e.g. {min(unexpected, default='-')}); load it with the base model and the config that it was saved "
                "with."
            )
        # low_cpu_mem_usage puts what it loads in the place of the copies: one parameter for those that are tied.
        tied: dict[int, nn.Parameter] = {}
        for key in own & remapped.keys():
            if isinstance(known[key], nn.Parameter):
                value = remapped[key].to(known[key].dtype)
                remapped[key] = tied.setdefault(id(known[key]), nn.Parameter(value, requires_grad=False))
        return remapped


def _hand_on(adapter_names: list[str]) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {**kwargs, "adapter_names": adapter_names}

    return hook
