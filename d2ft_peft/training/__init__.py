"""D2FT in the Hugging Face Trainer."""

from .averaged_weights import AveragedWeightsCallback
from .callback import D2FTCallback
from .report_callback import ReportCallback
from .trainer import D2FTTrainer, D2FTTrainerMixin


__all__ = ["AveragedWeightsCallback", "D2FTCallback", "D2FTTrainer", "D2FTTrainerMixin", "ReportCallback"]
