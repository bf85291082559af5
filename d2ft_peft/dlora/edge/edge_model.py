"""What a PEFT model can do besides, or cannot do, while its middle blocks are elsewhere."""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import save_file

from ...whole_files import reading, replacing
from ..kill_revive.rule import KillReviveRule, KillReviveState, Observations
from ..wire import protocol
from .across_link import check_adapter, modules_across
from .core_adapter import CoreB
from .remote_span import RemoteSpan
from .skeleton import is_empty


_CORES = "dlora_cores.safetensors"


class EdgeModel:
    """Stands before a PEFT model's class; see `connect`.

    Attributes:
        remote_span: The span in the cloud: its link's traffic, its adapters.
    """

    remote_span: RemoteSpan

    @classmethod
    def adopt(cls, model: PeftModel, remote: RemoteSpan, stack: str) -> PeftModel:
        """Make a PEFT model an edge's; `stack` is the path of its blocks."""
        model.__class__ = type(f"Edge{type(model).__name__}", (cls, type(model)), {})
        model.__dict__.update(remote_span=remote, _stack=stack)
        return model

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """Names of weights that are not here: DistributedDataParallel is not to hand them to other processes."""
        named = (*self.named_parameters(), *self.named_buffers())
        return [name for name, value in named if is_empty(value)]

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """Add an adapter; if it has modules in the cloud's blocks that no other one has, the session is opened anew.

        Raises:
            ValueError: If it cannot live across a link.
        """
        remote = self.remote_span
        if self._cores():
            raise ValueError(f"adapter_name={adapter_name!r}: cores are made by connect, one adapter a model.")
        check_adapter(peft_config, remote.in_flight, "hidden")
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        names = modules_across(self, self._stack, remote.span)
        if set(names) != set(remote.adapters.layers):
            told = remote.link.open(targets=names)
            remote.adapters.take(self.get_base_model(), names, told["groups"])

    def on_modules_changed(self, killed: list[str], revived: list[str]) -> None:
        """Kill-and-Revive chose other modules: under ``killed="drop"`` the killed ones go back to adding nothing.

        Args:
            killed, revived: Paths within the base model.
        """
        adapters = self.remote_span.adapters
        if adapters.killed == "drop":
            adapters.reset([name for name in killed if name in adapters.layers])

    def decide_in_cloud(
        self, rule: KillReviveRule, state: KillReviveState, observations: Observations
    ) -> tuple[KillReviveState, tuple[int, ...], tuple[int, ...]]:
        """Let the cloud decide which modules are killed and revived, as in the paper.

            KillReviveCallback(active=16, decide=model.decide_in_cloud)

        Norms of the modules' changes leave the edge, which otherwise stay here. Arguments and result are those of
        `d2ft_peft.dlora.kill_revive.decide`.
        """
        question = {
            "rule": vars(rule), "state": json.loads(state.to_json()), "observations": vars(observations),
        }  # fmt: skip
        answer = self.remote_span.link.call(protocol.DECIDE, question)
        after = KillReviveState.from_json(json.dumps(answer["state"]))
        return after, tuple(answer["killed"]), tuple(answer["revived"])

    def disconnect(self) -> None:
        """End the session; the adapter can still be saved."""
        self.remote_span.link.close()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Write a plain LoRA adapter; of cores also their own numbers, so that a resumed run has the same bits."""
        super().save_pretrained(save_directory, *args, **kwargs)
        cores = {name: part.core.detach().cpu() for name, part in self._cores()}
        if cores and kwargs.get("is_main_process", True):
            with replacing(os.path.join(save_directory, _CORES)) as partial:
                save_file(cores, partial)

    def load_adapter(self, model_id: str | os.PathLike, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load a plain LoRA adapter; onto cores only what was trained between the same factors."""
        result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        path = os.path.join(model_id, _CORES)
        if self._cores() and os.path.isfile(path):
            with reading(path) as file, torch.no_grad():
                for name, part in self._cores():
                    part.core.copy_(file.get_tensor(name))
        return result

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights to merge into are elsewhere."""
        raise ValueError(_ELSEWHERE.format("merge_and_unload"))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the weights to merge into are elsewhere."""
        raise ValueError(_ELSEWHERE.format("merge_adapter"))

    def unload(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: what would be left is no model."""
        raise ValueError(_ELSEWHERE.format("unload"))

    def _cores(self) -> list[tuple[str, CoreB]]:
        return [(name, module) for name, module in self.named_modules() if isinstance(module, CoreB)]


_ELSEWHERE = (
    "{} needs weights that the cloud owns; save the adapter with save_pretrained, and load it onto the whole base "
    "model with PeftModel.from_pretrained."
)
