"""DLoRA (arXiv 2404.05182): fine-tuning on an edge device of a model that a cloud runs, with few adapter modules alive
at a time. `KillRevive`, which chooses those modules, works without a cloud as well, for any PEFT method."""

from .kill_revive import KillRevive, KillReviveCallback, KillReviveRule


__all__ = ["KillRevive", "KillReviveCallback", "KillReviveRule"]
