"""First epoch: can a cheap guess of each candidate's loss, from its first blocks, choose better samples than chance?

    python examples/benchmarks/screening.py --assets ASSETS --json examples/benchmarks/results/screening.jsonl
    python examples/benchmarks/screening.py --table --json examples/benchmarks/results/screening.jsonl

MiniLM on AG News, full fine-tuning, 60 steps of 32 candidates, none of which returns. Rows:

``plain``
    All candidates train.
``fewer_samples``
    As many of them as the budget has room for, drawn uniformly: the judge.
``oracle``
    As many, drawn in proportion to their loss at that very step, which a forward pass tells that is not charged.
``screened_probe``, ``screened_ridge``
    All candidates run the lowest two blocks without a gradient, which is charged. What these return, averaged over
    tokens, and the label predict the loss; candidates are drawn in proportion. ``probe`` is a logistic regression from
    features to labels, whose own loss is the prediction; ``ridge`` regresses the loss that samples had when they
    trained. Both learn from the samples that trained. A sample that trains starts again at the bottom.
``screened_probe+reuse``
    As if the two blocks need not run again for those that train: what a perfect execution would charge.

A line of the result file is a run, the oracle's with the mean rank correlation of both predictions with the loss. Runs
that the file holds are not made again. The table has differences to ``fewer_samples``, paired by seed.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
from loss_predictors import Probe, Ridge, rank_correlation
from rows import command_line, read_rows, run_missing
from tasks import Task, load_task
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup, set_seed

from d2ft_peft.costs import flop_counter
from d2ft_peft.report import format_table
from d2ft_peft.schedule.policies.samples import CAP, FLOOR


ROWS = ["fewer_samples", "oracle", "screened_probe", "screened_probe+reuse"]
LOWEST = 2  # blocks that all candidates run


@contextmanager
def lowest_blocks(model: nn.Module) -> Iterator[None]:
    """Within it the encoder ends after the lowest blocks."""
    encoder = model.base_model.encoder
    whole = encoder.layer
    encoder.layer = whole[:LOWEST]
    try:
        yield
    finally:
        encoder.layer = whole


@torch.no_grad()
def look(model: nn.Module, task: Task, samples: list[dict], whole: bool) -> tuple[Tensor, Tensor | None]:
    """Features [N, width] after the lowest blocks; and the losses [N], where the whole model runs."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    features, losses = [], []
    model.eval()
    for chosen in torch.tensor(order).split(16):
        batch = task.collate([samples[i] for i in chosen])
        labels, mask = batch.pop("labels"), batch["attention_mask"].unsqueeze(-1)
        if whole:
            out = model(**batch, output_hidden_states=True)
            hidden = out.hidden_states[LOWEST]
            losses.append(F.cross_entropy(out.logits, labels, reduction="none"))
        else:
            with lowest_blocks(model):
                hidden = model.base_model(**batch).last_hidden_state
        features.append((hidden * mask).sum(1) / mask.sum(1))
    model.train()
    back = torch.tensor(order).argsort()
    pooled = torch.cat(features)[back]
    return (pooled - pooled.mean(0)) / pooled.std(), torch.cat(losses)[back] if losses else None


def learn_step(model: nn.Module, task: Task, samples: list[dict]) -> Tensor:
    """Gradients of the mean loss of some samples, in micro-batches of similar length; returns their losses [N]."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i]["input_ids"]))
    losses = []
    for chosen in torch.tensor(order).split(16):
        batch = task.collate([samples[i] for i in chosen])
        labels = batch.pop("labels")
        each = F.cross_entropy(model(**batch).logits, labels, reduction="none")
        (each.sum() / len(samples)).backward()
        losses.append(each.detach())
    return torch.cat(losses)[torch.tensor(order).argsort()]


def screening_cost(model: nn.Module, task: Task) -> float:
    """FLOPs of the lowest blocks forward, as a share of those of training."""
    batch = task.collate(task.train[:4])
    with flop_counter() as screening, torch.no_grad(), lowest_blocks(model):
        model.base_model(**{name: value for name, value in batch.items() if name != "labels"})
    with flop_counter() as training:
        model(**batch).loss.backward()
    model.zero_grad()
    return screening.get_total_flops() / training.get_total_flops()


def share_to_train(row: str, budget: float, cost: float) -> float:
    """Share of the candidates that train within the budget, of which screening costs `cost` per candidate."""
    if "screened" not in row:
        return 1.0 if row == "plain" else budget
    return (budget - cost) / (1 - cost) if row.endswith("+reuse") else budget - cost


class Choice:
    """Which candidates of a step train, by the rule of a row, and what it learns from those that did."""

    def __init__(self, row: str, model: nn.Module, task: Task, rng: np.random.Generator):
        width, classes = model.config.hidden_size, model.config.num_labels
        predictors = {"ridge": Ridge(width, classes), "probe": Probe(width, classes)}
        self.oracle = row == "oracle"
        self.predictors = {name: p for name, p in predictors.items() if self.oracle or name in row}
        self.correlations: dict[str, list[float]] = {name: [] for name in self.predictors}
        self.model, self.task, self.rng = model, task, rng

    def draw(self, samples: list[dict], count: int) -> np.ndarray:
        """Positions of those that train, without replacement."""
        chances = torch.ones(len(samples))
        if self.predictors:
            features, losses = look(self.model, self.task, samples, whole=self.oracle)
            labels = torch.tensor([sample["labels"] for sample in samples])
            guesses = {name: p.predict(features, labels) for name, p in self.predictors.items()}
            self._seen = features, labels
            chances = losses if self.oracle else next(iter(guesses.values()))
            if self.oracle:
                for name, guess in guesses.items():
                    self.correlations[name].append(rank_correlation(guess, losses))
        chances = (chances / chances.mean().clip(1e-9)).clip(FLOOR, CAP).double().numpy()
        order = np.argsort(-(np.log(chances) + self.rng.gumbel(size=len(samples))), kind="stable")
        self._chosen = order[:count]
        return self._chosen

    def learn(self, losses: Tensor) -> None:
        """From the losses of those that trained."""
        for predictor in self.predictors.values():
            predictor.learn(*(of_all[self._chosen] for of_all in self._seen), losses)


def run(task: Task, row: str, seed: int, steps: int, candidates: int, budget: float) -> dict:
    """One run: what it reached, and what it cost."""
    set_seed(seed)
    model = task.model().train()
    cost = screening_cost(model, task)
    set_seed(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(task.train))[: steps * candidates].reshape(steps, candidates)
    choice = Choice(row, model, task, rng)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate["full"], weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, min(10, steps // 4), steps)
    share = share_to_train(row, budget, cost)
    counts = np.diff(np.floor(share * candidates * np.arange(steps + 1) + 0.5).astype(int))
    tokens, started = 0, time.process_time()
    for indices, count in zip(order, counts, strict=True):
        samples = [task.train[i] for i in indices]
        chosen = [samples[i] for i in choice.draw(samples, count)]
        choice.learn(learn_step(model, task, chosen))
        tokens += sum(len(sample["input_ids"]) for sample in chosen)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - started
    correlations = {f"{name}_correlation": mean(values) for name, values in choice.correlations.items() if values}
    return {
        "row": row, "seed": seed, "steps": steps, "candidates": candidates, "budget": budget,
        "value": evaluate(model, task), "trained": float(counts.sum()) / order.size, "tokens": tokens,
        "screening_cost": cost, "cpu_seconds": seconds, **correlations,
    }  # fmt: skip


@torch.no_grad()
def evaluate(model: nn.Module, task: Task) -> float:
    """Accuracy in per cent."""
    model.eval()
    test, right = sorted(task.test, key=lambda sample: len(sample["input_ids"])), 0
    for start in range(0, len(test), 50):
        batch = task.collate(test[start : start + 50])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return 100 * right / len(test)


def table(rows: list[dict]) -> str:
    """Means over seeds, and differences to `fewer_samples`, paired by seed, with the standard error of their mean."""
    judge = {row["seed"]: row["value"] for row in rows if row["row"] == "fewer_samples"}
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        runs = sorted((row for row in rows if row["row"] == name), key=lambda row: row["seed"])
        gains = [run["value"] - judge[run["seed"]] for run in runs if run["seed"] in judge]
        error = f" ± {stdev(gains) / len(gains) ** 0.5:.2f}" if len(gains) > 1 else ""
        values = [run["value"] for run in runs]
        lines.append({
            "row": name, "trained": f"{mean(run['trained'] for run in runs):.3f}",
            "accuracy": f"{mean(values):.2f}", "seeds": ", ".join(f"{value:.1f}" for value in values),
            "to fewer_samples": f"{mean(gains):+.2f}{error}" if gains else "-",
            "CPU seconds": f"{mean(run['cpu_seconds'] for run in runs):.0f}",
        })  # fmt: skip
    return format_table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=32, help="samples of a step that may train")
    parser.add_argument("--budget", type=float, default=0.6)
    parser.add_argument("--train", type=int, default=2000)
    parser.add_argument("--json", required=True, help="file that gets one line a run")
    parser.add_argument("--table", action="store_true", help="show what the file holds")
    args = parser.parse_args(argv)
    if args.table:
        print(table(list(read_rows(args.json))))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    task = load_task("ag_news", args.assets, train=args.train)
    if args.steps * args.candidates > len(task.train):
        raise ValueError(
            f"train={len(task.train)} is less than steps x candidates = {args.steps * args.candidates}: samples would "
            "return; raise it or lower one of these."
        )
    fixed = {"steps": args.steps, "candidates": args.candidates, "budget": args.budget}
    settings = [{"row": row, "seed": seed, **fixed} for seed in args.seeds for row in args.rows]
    run_missing(args.json, settings, lambda setting: run(task, **setting))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
