"""Arguments and options that several commands have in common."""

from __future__ import annotations

from typing import Annotated

import typer


Model = Annotated[str, typer.Argument(help="Folder or Hub id of a pre-trained model.")]
Data = Annotated[str, typer.Argument(help="File (csv, json, parquet, txt), folder, or Hub id of a data set.")]
Rank = Annotated[int | None, typer.Option("--r", help="Rank of LoRA; full fine-tuning without it.")]
Policy = Annotated[str | None, typer.Option(help="Scheduling policy; D2FT's default without it.")]
LearningRate = Annotated[float | None, typer.Option(help="5e-5, or 3e-4 under LoRA.")]
Batch = Annotated[int, typer.Option(help="Samples of a micro-batch.")]
MicroBatches = Annotated[int, typer.Option(help="Micro-batches of an optimizer step.")]
MostTokens = Annotated[int | None, typer.Option(help="Most tokens of a sample.")]
ImageSize = Annotated[int | None, typer.Option(help="Pixels of a side.")]
TrainSamples = Annotated[int | None, typer.Option(help="Samples to train on.")]
TaskOfData = Annotated[str | None, typer.Option(help="As in d2ft plan; else what the columns suggest.")]
CacheDir = Annotated[str | None, typer.Option(help="Where data that were read are kept.")]
Column = Annotated[str | None, typer.Option()]
