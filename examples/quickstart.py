"""D2FT in about two minutes on two CPU cores, without a network: seven ways to fine-tune one small ViT.

    python examples/quickstart.py             # writes to out/quickstart
    python examples/quickstart.py --quick     # a toy model, two steps: does everything run?

A ViT learns the digits 0-4 of scikit-learn's data set; that is the pre-trained model, kept for the next run. It is
then fine-tuned on the digits 5-9, in full and by LoRA: plainly, plainly on fewer samples, and by D2FT. Fewer samples
at the same compute is the judge: whoever skips work has to beat the simplest way of skipping work.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from common import command_line, ignore_deprecations
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraModel
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTConfig, ViTForImageClassification
from transformers.trainer_callback import PrinterCallback

from d2ft_peft import D2FTConfig, D2FTTrainer, partition_model
from d2ft_peft.costs.flops import cost_model
from d2ft_peft.costs.probe import probe_model
from d2ft_peft.partition import base_model
from d2ft_peft.report import format_table, plot_device_loads, plot_loss_curves, plot_schedule


MICRO_BATCHES, MICRO_BATCH_SIZE = 5, 16
RATES = {"full": 5e-4, "lora": 5e-3}
"""Learning rates: the best of three for the plain run of each kind, on another split; D2FT gets the same."""


@dataclass(frozen=True)
class Way:
    """One way to fine-tune: what trains ("full" or "lora"), micro-batches of a step, and D2FT's settings if any."""

    name: str
    kind: str
    micro_batches: int = MICRO_BATCHES
    d2ft: dict | None = None


BY_HEAD = {"num_full": 2, "num_forward_only": 3, "backward_score": "fisher"}
"""Every head trains on the 2 of 5 micro-batches with the most Fisher information about it and only runs forward in the
others; forward is a third of the work, so this is 60 % as well."""
WAYS = [
    Way("full", "full"),
    Way("full, fewer samples", "full", micro_batches=3),
    Way("D2FT", "full", d2ft={"compute_budget": 0.6}),
    Way("D2FT, head by head", "full", d2ft=BY_HEAD),
    Way("LoRA", "lora"),
    Way("LoRA, fewer samples", "lora", micro_batches=3),
    Way("D2FT-LoRA", "lora", d2ft={"compute_budget": 0.6}),
]


@dataclass(frozen=True)
class Run:
    """What a way came to: its row of the table, its trainer, and points (FLOPs so far, loss)."""

    row: dict
    trainer: Trainer
    losses: list[tuple[float, float]]


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


def make_trainer(model, data: list[dict], name: str, rate: float, steps: int, micro_batches: int, cls=Trainer):
    """A Trainer of class `cls`; the same seed means the same order of the samples."""
    args = TrainingArguments(
        output_dir="unused", max_steps=steps, learning_rate=rate, per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=micro_batches, warmup_steps=steps // 10, lr_scheduler_type="cosine", seed=0,
        logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=[Bar(name)])
    trainer.remove_callback(PrinterCallback)
    return trainer


def pretrained(sizes: dict, steps: int, folder: Path) -> tuple[ViTForImageClassification, Path]:
    """The model that knows the digits 0-4, with a new head, and its file, from which a second run of the same recipe
    reads it."""
    recipe = {"config": sizes, "steps": steps, "rate": 5e-4, "batch": MICRO_BATCH_SIZE}
    fingerprint = hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
    path = folder / f"pretrained-{fingerprint}.safetensors"
    torch.manual_seed(0)
    model = ViTForImageClassification(ViTConfig(**sizes))
    if not path.exists():
        data = digits(range(5), sizes["image_size"])
        make_trainer(model, data, "pre-training", recipe["rate"], steps, micro_batches=1).train()
        save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path))
    torch.manual_seed(0)
    model.classifier.reset_parameters()
    return model, path


def adapt(base: ViTForImageClassification, way: Way) -> torch.nn.Module:
    """A copy of the model that is ready to be trained in this way."""
    model = copy.deepcopy(base)
    torch.manual_seed(0)
    lora = {"r": 8, "lora_alpha": 16, "modules_to_save": ["classifier"]}
    if way.d2ft is not None:
        what = lora if way.kind == "lora" else {"train_boundary": True}
        return get_peft_model(model, D2FTConfig(**what, **way.d2ft))
    if way.kind == "lora":
        return get_peft_model(model, LoraConfig(**lora, target_modules=set(partition_model(model).projections)))
    return model


def run(way: Way, base: ViTForImageClassification, train: list[dict], test: list[dict], steps: int) -> Run:
    """Fine-tune in one way and measure."""
    model = adapt(base, way)
    cls = Trainer if way.d2ft is None else D2FTTrainer
    trainer = make_trainer(model, train, way.name, RATES[way.kind], steps, way.micro_batches, cls)
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    per_sample = flops_per_sample(model, train[0])
    plain_step = per_sample * way.micro_batches * MICRO_BATCH_SIZE
    flops = np.cumsum([entry.get("step_flops", plain_step) for entry in logs])
    if way.d2ft is not None:  # Where the policy looks at samples, each took a forward and a backward pass before.
        flops += per_sample * sum(len(table.samples) for table in trainer.planner.scores.values())
    right = logits(model, test).argmax(1) == torch.stack([sample["labels"] for sample in test])
    row = {
        "fine-tuning": way.name, "test accuracy": right.float().mean().item(), "seconds": seconds,
        "compute": flops[-1], "peak memory, MiB": peak_memory(trainer, train, way) / 2**20,
    }  # fmt: skip
    print(f"  {way.name}: {seconds:.0f} s, {row['test accuracy']:.1%}", flush=True)
    return Run(row, trainer, list(zip(flops, [entry["loss"] for entry in logs], strict=True)))


def logits(model: torch.nn.Module, data: list[dict]) -> torch.Tensor:
    model.eval()
    images = torch.stack([sample["pixel_values"] for sample in data])
    with torch.inference_mode():
        return torch.cat([model(pixel_values=part).logits for part in images.split(64)])


def flops_per_sample(model: torch.nn.Module, sample: dict) -> float:
    """FLOPs of one forward and backward pass in which nothing is skipped, from the shapes of the layers."""
    partition = partition_model(base_model(model))
    probe = probe_model(model, partition, {key: value[None] for key, value in sample.items()})
    return cost_model(model, partition, probe).full_flops(np.ones(1))


def peak_memory(trainer: Trainer, train: list[dict], way: Way) -> int:
    """Bytes at the peak of one more forward and backward pass: weights, AdamW's state, gradients and activations."""
    model, size = trainer.model.train(), MICRO_BATCH_SIZE
    batches = [trainer.data_collator(train[i * size : (i + 1) * size]) for i in range(way.micro_batches)]
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for index, batch in enumerate(batches):
            if way.d2ft is None:
                model(**batch).loss.backward()
                continue
            with trainer.planner.micro_batch(index) as micro_batch:  # By the schedule of the last step.
                if not micro_batch.skipped:
                    model(**batch).loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    # AdamW keeps two numbers for each trained weight.
    return int(np.cumsum(changes).max()) + sum(p.nbytes * (3 if p.requires_grad else 1) for p in model.parameters())


def save_and_reload(name: str, trainer: Trainer, base: ViTForImageClassification, test: list[dict], folder: Path):
    """Save an adapter, load it by PEFT onto the pre-trained model, and compare what the two predict."""
    folder = folder / name.lower().replace(",", "").replace(" ", "-")
    trainer.model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder)
    difference = (logits(loaded, test) - logits(trainer.model, test)).abs().max().item()
    if difference > 1e-5:
        raise RuntimeError(f"{folder}: the logits of the loaded adapter are off by {difference:.2g}.")
    kind = "a plain LoRA adapter" if type(loaded.base_model) is LoraModel else "D2FT's own adapter type"
    print(f"  {folder}: {kind}, loaded back, largest difference of a logit {difference:.1g}")


def draw(runs: dict[str, Run], unit: float, folder: Path) -> None:
    """The pictures; `unit` is what a step of full fine-tuning takes, in FLOPs."""
    aligned, by_head = (runs[name].trainer.planner.schedule for name in ("D2FT", "D2FT, head by head"))
    losses = {name: [(flops / unit, loss) for flops, loss in run.losses] for name, run in runs.items()}
    paths = [
        plot_schedule(aligned, folder / "schedule.png"),
        plot_schedule(by_head, folder / "schedule-head-by-head.png"),
        plot_device_loads(by_head, folder / "device-loads.png"),
        plot_loss_curves(losses, folder / "losses.png", "compute (1 = one step of full fine-tuning)", window=5),
    ]
    print("\n".join(f"  {path}" for path in paths))


def explain(accuracy: dict[str, float], num_test: int) -> None:
    """What the table shows, in words, whoever wins."""
    print("\nWhat the table shows, from one seed:")
    for ours, judge in (("D2FT", "full"), ("D2FT, head by head", "full"), ("D2FT-LoRA", "LoRA")):
        judge += ", fewer samples"
        a, b = accuracy[ours], accuracy[judge]
        gap, noise = 100 * (a - b), 200 * math.sqrt((a * (1 - a) + b * (1 - b)) / num_test)
        verdict = "too close to call" if abs(gap) <= noise else "better" if gap > 0 else "worse"
        print(f"- {ours}: {gap:+.1f} points against {judge!r}, where chance alone makes {noise:.1f}: {verdict}.")
    print(CAVEATS)


CAVEATS = """\
- By default D2FT gives FULL by the magnitude of weights, which is the same for every sample. All heads then pick the
  same micro-batches, and the others are skipped as a whole (schedule.png): on one machine that is training on fewer
  samples, and no more than that.
- Head by head, Fisher scores let every head pick its own micro-batches (schedule-head-by-head.png). No device waits
  for another (device-loads.png), but gradients are no longer complete, heads run as small matrix products, and the
  scores cost a pass over the samples first; compute and seconds include it.
- Compute is FLOPs as executed, relative to full fine-tuning. Peak memory is that of a training step: weights,
  optimizer, gradients, activations; D2FT in full keeps the original weights beside the trained ones."""


def main(argv: list[str] | None = None) -> list[dict]:
    """Run all ways and return the rows of the table."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of each way")
    parser.add_argument("--quick", action="store_true", help="a toy model, 2 steps: a check that everything runs")
    parser.add_argument("--output", type=Path, default=Path("out/quickstart"), help="folder of all files")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # The profiler announces its starts and stops otherwise.
    ignore_deprecations()
    width, blocks, steps, num_train = (16, 2, 2, 160) if args.quick else (128, 6, args.steps, 480)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": blocks}
    sizes |= {"num_attention_heads": 4, "image_size": 24, "patch_size": 6, "num_channels": 1, "num_labels": 5}
    base, path = pretrained(sizes, 2 if args.quick else 300, args.output)
    samples = digits(range(5, 10), sizes["image_size"])  # 480 of them are whole steps, of 5 and of 3 micro-batches.
    train, test = samples[:num_train], samples[480:]
    print(f"{len(train)} images to train on, {len(test)} to test, {steps} optimizer steps each")
    runs = {way.name: run(way, base, train, test, steps) for way in WAYS}
    rows = [run.row for run in runs.values()]
    total = rows[0]["compute"]
    rows = [{**row, "compute": row["compute"] / total} for row in rows]
    formats = {"test accuracy": ".1%", "seconds": ".1f", "compute": ".1%", "peak memory, MiB": ".1f"}
    print(f"\n{format_table(rows, formats=formats)}")
    if args.quick:
        print("\nTwo steps of a toy model: these figures mean nothing.")
    explain({row["fine-tuning"]: row["test accuracy"] for row in rows}, len(test))
    print(f"\nWritten:\n  {path}: the pre-trained model")
    for way in WAYS:
        if way.d2ft is not None:
            save_and_reload(way.name, runs[way.name].trainer, base, test, args.output)
    draw(runs, total / steps, args.output)
    return rows


if __name__ == "__main__":
    main()
