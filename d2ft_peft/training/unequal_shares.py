"""Training on unequal devices: processes that run different numbers of samples, and wait for each other once a step."""

from __future__ import annotations

import torch

from ..scores.live import IGNORED


class SharesMixin:
    """The part of `D2FTTrainerMixin` that deals with ``device_capacities="auto"``."""

    def _prepare_shares(self) -> None:
        """Let nothing but the gradient exchange make the processes wait for each other."""
        if not self.args.average_tokens_across_devices:
            raise ValueError(
                "average_tokens_across_devices=False would weigh the processes alike, which run different numbers of "
                "samples under device_capacities='auto'; leave it out."
            )
        if self.args.ddp_broadcast_buffers is None:
            # Else every step begins with waiting for process 0. No buffer of a transformer changes in training.
            self.accelerator.ddp_handler.broadcast_buffers = False

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor | int | None:
        """Items of all processes. Where every sample has one label their number is known without asking around."""
        shares = None if self.planner is None else self.planner.shares
        if shares is None or self.args.world_size == 1:
            return super()._get_num_items_in_batch(batch_samples, device)
        labels = [batch["labels"] for batch in batch_samples if "labels" in batch]
        counts = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        if counts and labels and all(label.ndim == 1 for label in labels):
            if any((label == IGNORED).any() for label in labels):
                raise ValueError(
                    f"a sample has the label {IGNORED}, which carries no loss, and device_capacities='auto' counts "
                    "samples; leave such samples out of the data set."
                )
            return torch.tensor(int(shares.counts.sum()), device=device)
        items = super()._get_num_items_in_batch(batch_samples, device)
        if items is not None:
            shares.pace.begin_together()
        return items
