"""The part of `HeadParallel` that writes whole tensors and reads its own part of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ...planning.state import load_state, save_state
from ...whole_files import replacing_in
from ..exchange.ranks import Ranks
from ..rank_planner import HeadParallelPlanner
from . import optimizer_state as checkpoint
from .shard import Shard


class SavingMixin:
    """Saving and loading, of the adapter alone or with all that a run needs to go on."""

    model: nn.Module
    planner: HeadParallelPlanner
    _ranks: Ranks
    _shards: list[Shard]

    def _guard_parts(self) -> None:
        """Stand before methods that would work on this rank's part, which nobody would notice before its use."""
        self.model.save_pretrained = self._save_whole
        self.model.base_model._unload_and_optionally_merge = _refuse(
            "save it with HeadParallel.save_pretrained, and load and merge it in one process"
        )

    def gather_state_dict(self) -> dict[str, Tensor] | None:
        """The model's state dict with whole adapter tensors, on rank 0; None on the others.

        The frozen base model's own projections stay cut in it: adapters are saved without them.
        """
        state = self.model.state_dict(keep_vars=True)
        names: dict[int, list[str]] = {}
        for name, value in state.items():
            names.setdefault(id(value), []).append(name)
        for shard in self._shards:
            if not shard.of_adapter:
                continue
            whole = checkpoint.gathered(shard.tensor.detach(), shard, self._ranks)
            if whole is not None:
                state.update(dict.fromkeys(names[id(shard.tensor)], whole.cpu()))
        return {name: value.detach() for name, value in state.items()} if self._ranks.is_first else None

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write the ordinary adapter, which loads on any number of ranks.

        Args:
            save_directory: Folder that the first rank writes.
            kwargs: See `peft.PeftModel.save_pretrained`.
        """
        state = self.gather_state_dict()
        if state is not None:
            self.model.save_pretrained(save_directory, state_dict=state, **kwargs)
        self._ranks.barrier("while saving")

    def _save_whole(
        self, save_directory: str | os.PathLike, *args: Any, state_dict: dict[str, Tensor] | None = None, **kwargs: Any
    ) -> None:
        """Stands before the model's own method, which would save this rank's part."""
        if state_dict is None:
            _refuse("call HeadParallel.save_pretrained on every rank")()
        with replacing_in(save_directory) as folder:
            type(self.model).save_pretrained(self.model, folder, *args, state_dict=state_dict, **kwargs)

    def load_adapter(self, directory: str | os.PathLike) -> None:
        """Take the weights of a saved adapter, made on any number of ranks; each rank reads its own part.

        Args:
            directory: The adapter's folder.

        Raises:
            ValueError: If it does not fit the model.
        """
        checkpoint.load_adapter(self.model, directory, self._shards, self._ranks.rank)

    def save_optimizer(self, optimizer: torch.optim.Optimizer, directory: str | os.PathLike) -> None:
        """Write the optimizer's state with the shapes that it has on one process, as safetensors.

        Args:
            optimizer: Made after the model was cut.
            directory: Folder that the first rank writes.

        Raises:
            ValueError: If the optimizer keeps what is of another shape than its parameter.
        """
        checkpoint.save_optimizer(optimizer, self.model, directory, self._shards, self._ranks)

    def load_optimizer(self, optimizer: torch.optim.Optimizer, directory: str | os.PathLike) -> None:
        """Let an optimizer continue from a checkpoint, made on any number of ranks, or by a Trainer on one process.

        Args:
            optimizer: Made after the model was cut.
            directory: The checkpoint's folder.

        Raises:
            ValueError: If it has no optimizer's state, or one of other parameters.
        """
        checkpoint.load_optimizer(optimizer, self.model, directory, self._shards, self._ranks.rank)

    def save_checkpoint(self, directory: str | os.PathLike, optimizer: torch.optim.Optimizer) -> None:
        """Write adapter, optimizer and planner; of a bare loop only its learning-rate scheduler is missing.

        Args:
            directory: Folder that the first rank writes.
            optimizer: Made after the model was cut.
        """
        self.save_pretrained(directory)
        self.save_optimizer(optimizer, directory)
        if self._ranks.is_first:
            save_state(self.planner, directory)
        self._ranks.barrier("while saving")

    def load_checkpoint(self, directory: str | os.PathLike, optimizer: torch.optim.Optimizer) -> None:
        """Continue from what `save_checkpoint` wrote on any number of ranks.

        Args:
            directory: The folder.
            optimizer: Made after the model was cut, over the same parameters as the saved one.
        """
        self.load_adapter(directory)
        self.load_optimizer(optimizer, directory)
        load_state(self.planner, directory)


def _refuse(advice: str) -> Callable[..., NoReturn]:
    def refusal(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"this rank holds a part of the adapter only; {advice}.")

    return refusal
