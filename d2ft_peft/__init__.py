"""D2FT (arXiv 2504.12471) for the Hugging Face ecosystem: fine-tuning that runs part of the model per micro-batch."""

from .dlora import KillReviveCallback
from .head_start import HeadStart, fit_head
from .partition import Architecture, BranchSpec, partition_model, register_architecture
from .planning import D2FTPlanner
from .schedule import Operation, Schedule, register_policy
from .training import AveragedWeightsCallback, D2FTCallback, D2FTTrainer, D2FTTrainerMixin, ReportCallback
from .tuners import D2FTConfig, D2FTLoraModel, D2FTModel
from .tuners.peft_type import D2FTType, register
from .version import __version__ as __version__


register(D2FTType.D2FT, D2FTConfig, D2FTModel)
register(D2FTType.D2FT_LORA, D2FTConfig, D2FTLoraModel)

__all__ = [
    "Architecture",
    "AveragedWeightsCallback",
    "BranchSpec",
    "D2FTCallback",
    "D2FTConfig",
    "D2FTPlanner",
    "D2FTTrainer",
    "D2FTTrainerMixin",
    "HeadStart",
    "KillReviveCallback",
    "Operation",
    "ReportCallback",
    "Schedule",
    "fit_head",
    "partition_model",
    "register_architecture",
    "register_policy",
]
