"""A Trainer's arguments from a command line: the command's own options, and all others that `transformers` knows."""

from __future__ import annotations

from pathlib import Path

import transformers as tf


def trainer_arguments(
    command: str, others: list[str], folder: Path, rate: float, batch: int, micro_batches: int
) -> tf.TrainingArguments:
    """Training arguments: those of the command, and any that `transformers` knows besides.

    Args:
        command: Whose they are.
        others: What the command line holds besides the command's own options.
        folder: For checkpoints, and what is saved in the end.
        rate: Learning rate.
        batch, micro_batches: Samples of a micro-batch, and micro-batches of a step.

    Raises:
        ValueError: If an option is known to neither.
    """
    own = {
        "output_dir": str(folder), "learning_rate": str(rate), "per_device_train_batch_size": str(batch),
        "gradient_accumulation_steps": str(micro_batches), "disable_tqdm": "False",  # quiet logging would switch it off
    }  # fmt: skip
    line = [part for name, value in own.items() for part in (f"--{name}", value)]
    usual = [] if any(one.startswith("--report") for one in others) else ["--report_to", "none"]
    try:
        arguments, unknown = tf.HfArgumentParser(tf.TrainingArguments).parse_args_into_dataclasses(
            [*line, *usual, *others], return_remaining_strings=True
        )
    except SystemExit as error:  # argparse has said on stderr what is wrong
        raise ValueError("an option of transformers.TrainingArguments has no fitting value") from error
    if unknown:
        raise ValueError(f"{unknown[0]!r} is no option of d2ft {command}, nor of transformers.TrainingArguments.")
    arguments.remove_unused_columns = False
    return arguments
