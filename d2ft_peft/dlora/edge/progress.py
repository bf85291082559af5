"""What a run shows of its link: on the progress bar, and in the log."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ...training.calling import calling_trainer
from .link import Traffic
from .remote_span import RemoteSpan


class CloudProgressCallback(TrainerCallback):
    """Shows bytes, round trips and active modules beside the Trainer's own progress bar, and logs them.

    Trainer(model=connect(...), callbacks=[CloudProgressCallback()], ...)
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Look for the span, and for the bar.

        Raises:
            ValueError: If the model has no span in a cloud.
        """
        self._span: RemoteSpan | None = getattr(model, "remote_span", None)
        if self._span is None:
            raise ValueError(f"model is a {type(model).__name__} without a span in a cloud; make it with connect(...).")
        self._begun = _as_numbers(self._span.link.traffic)
        callbacks = calling_trainer(self).callback_handler.callbacks
        self._bar = next((callback for callback in callbacks if isinstance(callback, ProgressCallback)), None)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Refresh the bar."""
        bar = getattr(self._bar, "training_bar", None)
        if bar is not None:
            seen = self._seen()
            bar.set_postfix(
                {
                    "up": _in_words(seen["cloud_sent_bytes"]), "down": _in_words(seen["cloud_received_bytes"]),
                    "trips": seen["cloud_round_trips"], "active": seen["cloud_active_modules"],
                },
                refresh=False,
            )  # fmt: skip

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        """Write what crossed since the run began beside the loss."""
        if logs is not None and "loss" in logs and state.log_history:
            seen = self._seen()
            logs.update(seen)
            state.log_history[-1].update(seen)

    def _seen(self) -> dict[str, int]:
        now = _as_numbers(self._span.link.traffic)
        since = {f"cloud_{name}": value - self._begun[name] for name, value in now.items()}
        return {**since, "cloud_active_modules": self._span.active_modules}


def _as_numbers(traffic: Traffic) -> dict[str, int]:
    return {
        "sent_bytes": traffic.sent, "received_bytes": traffic.received, "round_trips": traffic.round_trips,
        "replays": traffic.replays,
    }  # fmt: skip


def _in_words(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"
