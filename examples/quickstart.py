"""D2FT in about two minutes on two CPU cores, without a network: seven ways to fine-tune one small ViT.

    python examples/quickstart.py             # writes to out/quickstart
    python examples/quickstart.py --quick     # a toy model and a few steps, in seconds: does everything run?

A ViT learns the digits 0-4 of scikit-learn's data set; that is the pre-trained model, kept for the next run. It is then
fine-tuned on the digits 5-9: in full and by LoRA, plainly, plainly on fewer samples, and by D2FT. Fewer samples at the
same compute is the judge: whoever skips work has to beat the simplest way of skipping work.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_callback import PrinterCallback

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model
from d2ft_peft.report import format_table, plot_device_loads, plot_loss_curves, plot_schedule
from d2ft_peft.tuners.flops import base_model, cost_model, probe_model


MICRO_BATCHES, MICRO_BATCH_SIZE, BUDGET, NUM_TRAIN = 5, 8, 0.6, 400
RATES = {"full": 1e-3, "lora": 3e-3}
"""Learning rates: the best of the plain run, for each kind of fine-tuning; D2FT gets the same."""


@dataclass(frozen=True)
class Way:
    """One way to fine-tune: what trains ("full" or "lora"), the share of samples and steps, and D2FT's settings."""

    name: str
    kind: str
    share: float = 1.0
    d2ft: dict | None = None


FEWER = f"fewer samples ({BUDGET:.0%})"
BY_HEAD = {"num_full": 2, "num_forward_only": 3, "backward_score": "fisher"}
"""Every head trains on the 2 of 5 micro-batches with the most Fisher information for it and only runs forward in the
others; a forward pass is a third of the work, so this is 60 % too."""
WAYS = [
    Way("full fine-tuning", "full"),
    Way(f"full, {FEWER}", "full", share=BUDGET),
    Way("D2FT", "full", d2ft={"compute_budget": BUDGET}),
    Way("D2FT, head by head", "full", d2ft=BY_HEAD),
    Way("LoRA", "lora"),
    Way(f"LoRA, {FEWER}", "lora", share=BUDGET),
    Way("D2FT-LoRA", "lora", d2ft={"compute_budget": BUDGET}),
]


def digits(classes: range, size: int) -> list[dict]:
    """The images of some classes as samples of the Trainer, shuffled; 8x8 pixels become size x size."""
    data = load_digits()
    chosen = np.random.default_rng(0).permutation(np.flatnonzero(np.isin(data.target, classes)))
    images = torch.tensor(data.images[chosen, None] / 8 - 1, dtype=torch.float32)
    images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.tensor(data.target[chosen] - classes[0])
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


class Bar(TrainerCallback):
    """One progress bar a run, gone at its end."""

    def __init__(self, name: str):
        self.name = name

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, desc=self.name, leave=False)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def make_trainer(model, data: list[dict], name: str, rate: float, steps: int, cls: type = Trainer) -> Trainer:
    """A Trainer; the same seed means the same order of the samples."""
    args = TrainingArguments(
        output_dir="unused", max_steps=steps, learning_rate=rate, per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=MICRO_BATCHES, warmup_steps=steps // 10, lr_scheduler_type="cosine", seed=0,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=[Bar(name)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def pretrained(config: ViTConfig, steps: int, folder: Path) -> tuple[ViTForImageClassification, Path]:
    """The model that knows the digits 0-4, from its file if this very recipe was run before; with a fresh head."""
    recipe = {"config": config.to_diff_dict(), "steps": steps, "rate": RATES["full"], "batch": MICRO_BATCH_SIZE}
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"pretrained-{fingerprint}.safetensors"
    torch.manual_seed(0)
    model = ViTForImageClassification(config)
    if not path.exists():
        make_trainer(model, digits(range(5), config.image_size), "pre-training", RATES["full"], steps).train()
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    torch.manual_seed(0)
    model.classifier.reset_parameters()
    return model, path


def adapt(base: ViTForImageClassification, way: Way) -> torch.nn.Module:
    """A copy of the model, ready to be trained in this way."""
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    lora = {"r": 8, "lora_alpha": 16, "modules_to_save": ["classifier"]}
    if way.d2ft is not None:
        return get_peft_model(model, D2FTConfig(**way.d2ft, **(lora if way.kind == "lora" else {"train_boundary": True})))
    if way.kind == "lora":
        return get_peft_model(model, LoraConfig(**lora, target_modules=set(partition_model(model).projections)))
    return model


def logits(model: torch.nn.Module, data: list[dict]) -> torch.Tensor:
    model.eval()
    with torch.inference_mode():
        images = torch.stack([sample["pixel_values"] for sample in data])
        return torch.cat([model(pixel_values=part).logits for part in images.split(64)])


def run(way: Way, base: ViTForImageClassification, train: list[dict], test: list[dict], steps: int):
    """Fine-tune in one way.

    Returns:
        The row of the table, the trainer, and the loss after so many FLOPs: pairs (FLOPs, loss).
    """
    steps, train = round(way.share * steps), train[: round(way.share * len(train))]
    model = adapt(base, way)
    trainer = make_trainer(model, train, way.name, RATES[way.kind], steps, Trainer if way.d2ft is None else D2FTTrainer)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    right = logits(model, test).argmax(1) == torch.stack([sample["labels"] for sample in test])
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    sample_flops = flops_per_sample(model, train[0])
    full_step = sample_flops * MICRO_BATCHES * MICRO_BATCH_SIZE
    flops = np.cumsum([entry.get("step_flops", full_step) for entry in logs])
    if way.d2ft is not None:  # Scores that look at samples take a forward and a backward pass of each first.
        flops += sample_flops * sum(len(table.samples) for table in trainer.planner.scores.values())
    row = {
        "way": way.name, "test accuracy": right.float().mean().item(), "seconds": seconds, "compute": flops[-1],
        "peak memory (MiB)": peak_memory(trainer, train) / 2**20,
    }  # fmt: skip
    print(f"  {way.name}: {seconds:.0f} s, {row['test accuracy']:.1%} of {len(test)} test images right", flush=True)
    return row, trainer, list(zip(flops, [entry["loss"] for entry in logs], strict=True))


def flops_per_sample(model: torch.nn.Module, sample: dict) -> float:
    """FLOPs of one forward and backward pass where nothing is skipped, from the shapes of the layers."""
    partition = partition_model(base_model(model))
    probe = probe_model(model, partition, {key: value[None] for key, value in sample.items()})
    return cost_model(model, partition, probe).full_flops(np.ones(1))


def peak_memory(trainer: Trainer, train: list[dict]) -> int:
    """Bytes at the peak of one more optimizer step: weights, gradients, AdamW's state and activations."""
    model, planner = trainer.model.train(), getattr(trainer, "planner", None)
    batches = [trainer.data_collator(train[i * MICRO_BATCH_SIZE :][:MICRO_BATCH_SIZE]) for i in range(MICRO_BATCHES)]
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for index, batch in enumerate(batches):
            if planner is None:
                model(**batch).loss.backward()
                continue
            with planner.micro_batch(index) as micro_batch:  # As scheduled in the last step.
                if not micro_batch.skipped:
                    model(**batch).loss.backward()
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]).step()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return sum(p.nbytes for p in model.parameters()) + int(np.cumsum(changes).max())


def save_and_reload(trainer: Trainer, base: ViTForImageClassification, test: list[dict], folder: Path) -> None:
    """Save an adapter, load it with PEFT onto the pre-trained model, and compare what the two predict."""
    trainer.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    difference = (logits(loaded, test) - logits(trainer.model, test)).abs().max().item()
    if difference > 1e-5:
        raise RuntimeError(f"{folder}: the loaded adapter's logits differ by {difference:.2g} from those saved")
    kind = type(loaded.base_model).__name__
    print(f"  {folder}: loads as {kind}, logits differ by {difference:.1g}")


def draw(trainers: dict[str, Trainer], curves: dict[str, list], unit: float, folder: Path) -> list[Path]:
    """The pictures: schedules and device loads of the two D2FT runs in full, and all losses over FLOPs."""
    schedules = {name: trainers[name].planner.schedule for name in ("D2FT", "D2FT, head by head")}
    curves = {name: [(flops / unit, loss) for flops, loss in points] for name, points in curves.items()}
    return [
        plot_schedule(schedules["D2FT"], folder / "schedule.png"),
        plot_schedule(schedules["D2FT, head by head"], folder / "schedule_head_by_head.png"),
        plot_device_loads(schedules["D2FT, head by head"], folder / "device_loads.png"),
        plot_loss_curves(curves, folder / "losses.png", "compute (1 = one step of full fine-tuning)", window=9),
    ]


def main(argv: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="optimizer steps of a plain run")
    parser.add_argument("--quick", action="store_true", help="a toy model and 5 steps")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    steps, width, blocks = (5, 32, 6) if args.quick else (args.steps, 128, 6)
    config = ViTConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=blocks, num_attention_heads=4,
        image_size=24, patch_size=4, num_channels=1, num_labels=5,
    )  # fmt: skip
    base, base_path = pretrained(config, steps, args.output)
    samples = digits(range(5, 10), config.image_size)
    train, test = samples[:NUM_TRAIN], samples[NUM_TRAIN:]
    rows, trainers, curves = [], {}, {}
    for way in WAYS:
        row, trainers[way.name], curves[way.name] = run(way, base, train, test, steps)
        rows.append(row)
    unit = rows[0]["compute"]
    for row in rows: row["compute"] /= unit
    print(format_table(rows, formats={"test accuracy": ".1%", "seconds": ".1f", "compute": ".1%", "peak memory (MiB)": ".1f"}))
    for way in WAYS:
        if way.d2ft: save_and_reload(trainers[way.name], base, test, args.output / way.name.lower().replace(" ", "_").replace(",", ""))
    print(draw(trainers, curves, unit/steps, args.output))
    return rows


if __name__ == "__main__":
    main()
