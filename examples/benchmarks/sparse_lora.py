"""D2FT's columns under the rules of SparseLoRA (arXiv 2506.16500): does skipping heads keep the loss under them?

    python examples/benchmarks/sparse_lora.py --assets ASSETS --json examples/benchmarks/results/sparse_lora.jsonl
    python examples/benchmarks/sparse_lora.py --table --json examples/benchmarks/results/sparse_lora.jsonl

LoRA on all projections of the small Llama, GSM8K, questions as prompts without a loss. In some blocks, from some step
on, the *frozen* weights of some heads (with their share of the FFN) are left out for tokens that no loss reads; LoRA
runs for all. Which heads, is predicted for every batch from a rank-8 SVD of the frozen weights. Products run on the
rows and features that are left: nothing is masked, FLOPs are counted. A row is a kind with options:

``dense:share=0.8``
    The judge: dense LoRA on that share of the samples of every step.
``columns:skip=0.5``
    That share of the heads is left out, under all four rules. One rule is switched off by ``tokens=all`` (answers are
    cut as well), ``lora=cut`` (LoRA is left out where the frozen weights are), ``blocks=all`` (also the two that suffer
    most), ``start=0`` (from the first step on, instead of 5 %) or ``choice=random``.
``channels:skip=0.5``
    Single channels instead of heads, chosen for query and key, value and output, and the FFN each, as in the paper.

A line of the result file is a run: its loss on held-out answers, its FLOPs as a share of dense LoRA's (counted; the LM
head runs only for tokens with a loss, in all rows), and the share of the frozen products that ran. The table ends with
the loss above that of dense LoRA on fewer samples, interpolated between its measured shares and paired by seed, at the
same FLOPs and as if frozen products were all that costs, which is what a wide model comes close to.
"""

from __future__ import annotations

import os
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
import torch.nn.functional as F
import transformers as tf
from peft import LoraConfig, get_peft_model
from rows import command_line, read_rows, run_missing
from sparse_frozen import ROLES, Control, intercept
from tasks import _rows
from torch import Tensor, nn

from d2ft_peft.costs import flop_counter
from d2ft_peft.report import format_table


ROWS = [
    "dense", "dense:share=0.85", "dense:share=0.7", "columns:skip=0.5", "columns:skip=0.75", "channels:skip=0.75",
    *(f"columns:skip=0.75,{rule}" for rule in ("tokens=all", "lora=cut", "blocks=all", "start=0", "choice=random")),
]  # fmt: skip
OPTIONS = {
    "share": 1.0,
    "skip": 0.0,
    "tokens": "prompt",
    "lora": "dense",
    "blocks": "robust",
    "start": 0.05,
    "choice": "svd",
}


def parse(row: str) -> tuple[str, dict]:
    """Kind of a row, and all of its options."""
    kind, _, options = row.partition(":")
    given = dict(pair.split("=") for pair in options.split(",") if pair)
    return kind, {key: type(OPTIONS[key])(value) for key, value in (OPTIONS | given).items()}


def load_pairs(assets: str, split: str, count: int, length: int) -> list[dict]:
    """Questions and answers as token ids, those of up to `length` tokens; labels are -100 on the question."""
    tokenizer = tf.AutoTokenizer.from_pretrained(Path(assets) / "models" / "stories260k-llama")
    pairs = []
    for row in _rows(Path(assets), "gsm8k", split, None):
        prompt, answer = (
            tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for text in (row["question"] + "\n", row["answer"])
        )
        ids = [tokenizer.bos_token_id, *prompt, *answer, tokenizer.eos_token_id]
        if len(ids) <= length:
            pairs.append({"input_ids": ids, "labels": [-100] * (1 + len(prompt)) + ids[1 + len(prompt) :]})
        if len(pairs) == count:
            break
    return pairs


def collate(pairs: list[dict]) -> dict[str, Tensor]:
    """A batch, padded on the right, where causal attention never looks; ``real`` [B, T] says which tokens are none."""
    length = max(len(pair["input_ids"]) for pair in pairs)
    batch = {"input_ids": torch.zeros(len(pairs), length).long(), "labels": torch.full((len(pairs), length), -100)}
    for i, pair in enumerate(pairs):
        for name in batch:
            batch[name][i, : len(pair[name])] = torch.tensor(pair[name])
    batch["real"] = torch.arange(length) < torch.tensor([[len(pair["input_ids"])] for pair in pairs])
    return batch


def reads_loss(batch: dict[str, Tensor]) -> Tensor:
    """Tokens [B, T] whose next token has a label."""
    return F.pad(batch["labels"][:, 1:] != -100, (0, 1))


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of the answers' tokens."""
    base, rows = model.get_base_model(), reads_loss(batch)
    hidden = base.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    return F.cross_entropy(base.lm_head(hidden[rows]), batch["labels"][:, 1:][rows[:, :-1]])


def cut_tokens(batch: dict[str, Tensor], options: dict | None) -> Tensor:
    """Tokens [B, T] that are cut: without a loss, or all real ones; none without options."""
    if options is None:
        return torch.zeros_like(batch["real"])
    return batch["real"] if options["tokens"] == "all" else batch["real"] & ~reads_loss(batch)


@torch.no_grad()
def evaluate(model: nn.Module, pairs: list[dict], control: Control, options: dict | None = None) -> float:
    """Mean loss per token of the answers, in batches of similar length."""
    total = count = 0
    pairs = sorted(pairs, key=lambda pair: len(pair["input_ids"]))
    for start in range(0, len(pairs), 32):
        batch = collate(pairs[start : start + 32])
        control.set_rows(cut_tokens(batch, options), batch["real"])
        rows = int(reads_loss(batch).sum())
        total, count = total + rows * float(loss_of(model, batch)), count + rows
    return total / count


def robust_blocks(model: nn.Module, pairs: list[dict], control: Control, options: dict, dense: int = 2) -> frozenset:
    """All blocks but the `dense` whose being cut alone raises the untrained model's loss most."""
    count, losses = len(model.get_base_model().model.layers), []
    for block in range(count):
        control.blocks = frozenset([block])
        losses.append(evaluate(model, pairs, control, options))
    return frozenset(np.argsort(losses)[: count - dense].tolist())


def flops(model: nn.Module, batches: list[dict[str, Tensor]], control: Control, options: dict | None) -> float:
    with flop_counter() as counter:
        for batch in batches:
            control.set_rows(cut_tokens(batch, options), batch["real"])
            loss_of(model, batch).backward()
    model.zero_grad()
    return counter.get_total_flops()


def run(row: str, seed: int, build, train: list[dict], test: list[dict], args) -> dict:
    """One run: its loss on held-out answers, and what it cost."""
    kind, options = parse(row)
    tf.set_seed(seed)
    model = get_peft_model(build(), LoraConfig(r=8, lora_alpha=16, target_modules=list(ROLES)))
    control = Control(kind, options["skip"], options["choice"], options["lora"] == "cut")
    intercept(model, control)
    cuts = None if kind == "dense" else options
    if cuts:
        blocks = frozenset(range(model.config.num_hidden_layers))
        control.blocks = blocks if options["blocks"] == "all" else robust_blocks(model, train[:32], control, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    schedule = tf.get_linear_schedule_with_warmup(optimizer, min(10, args.steps // 4), args.steps)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(train)) for _ in range(1 + args.steps * args.batch // len(train))])
    counts = np.diff(np.floor(options["share"] * args.batch * np.arange(args.steps + 1) + 0.5).astype(int))
    dense_steps = round(options["start"] * args.steps) if cuts else args.steps
    started = time.process_time()
    for step, count in enumerate(counts):
        batch = collate([train[i] for i in order[step * args.batch :][:count]])
        control.set_rows(cut_tokens(batch, cuts if step >= dense_steps else None), batch["real"])
        loss_of(model, batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    seconds = time.process_time() - started
    batches = [collate(train[start : start + args.batch]) for start in range(0, 2 * args.batch, args.batch)]
    cut_share = flops(model, batches, control, cuts) / flops(model, batches, control, None) if cuts else 1.0
    whole = dense_steps / args.steps
    tokens = sum(float(cut_tokens(b, cuts).sum()) for b in batches) / sum(float(b["real"].sum()) for b in batches)
    frozen_share = 1 - tokens * options["skip"] * len(control.blocks) / model.config.num_hidden_layers
    return {
        "row": row, "seed": seed, "steps": args.steps, "batch": args.batch, "lr": args.lr,
        "value": evaluate(model, test, control), "blocks": sorted(control.blocks),
        "flops": options["share"] * (whole + (1 - whole) * cut_share),
        "frozen": options["share"] * (whole + (1 - whole) * frozen_share),
        "cpu_seconds": seconds,
    }  # fmt: skip


def behind_judge(run: dict, rows: list[dict], cost: str) -> float:
    """Its loss above that of dense LoRA on fewer samples, at the same cost and of the same seed."""
    judge = [r for r in rows if r["row"].startswith("dense") and r["seed"] == run["seed"]]
    shares, losses = zip(*sorted((r["flops"], r["value"]) for r in judge), strict=True)
    return run["value"] - float(np.interp(run[cost], shares, losses))


def table(rows: list[dict]) -> str:
    """Means over seeds, with the standard error of differences."""
    lines = []
    for name in dict.fromkeys(row["row"] for row in rows):
        runs = sorted((row for row in rows if row["row"] == name), key=lambda row: row["seed"])
        values = [run["value"] for run in runs]
        line = {
            "row": name, "loss": f"{mean(values):.3f}", "seeds": ", ".join(f"{value:.3f}" for value in values),
            "FLOPs": f"{mean(run['flops'] for run in runs):.3f}",
            "frozen": f"{mean(run['frozen'] for run in runs):.3f}",
        }  # fmt: skip
        for cost in ("flops", "frozen") if not name.startswith("dense") else ():
            losses = [behind_judge(run, rows, cost) for run in runs]
            error = f" ± {stdev(losses) / len(losses) ** 0.5:.3f}" if len(losses) > 1 else ""
            line[f"to fewer samples by {cost}"] = f"{mean(losses):+.3f}{error}"
        lines.append({**line, "CPU seconds": f"{mean(run['cpu_seconds'] for run in runs):.0f}"})
    return format_table(lines)


def main(argv: list[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--assets", help="folder with models/ and data/")
    parser.add_argument("--rows", nargs="+", default=ROWS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=1.2e-2)
    parser.add_argument("--length", type=int, default=256, help="longest pair, in tokens")
    parser.add_argument("--json", required=True, help="file that gets one line a run")
    parser.add_argument("--table", action="store_true", help="show what the file holds")
    args = parser.parse_args(argv)
    if args.table:
        print(table(list(read_rows(args.json))))
        return
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    train, test = load_pairs(args.assets, "train", 5000, args.length), load_pairs(args.assets, "test", 200, args.length)
    folder = Path(args.assets) / "models" / "stories260k-llama"
    build = partial(tf.LlamaForCausalLM.from_pretrained, folder, dtype=torch.float32)
    fixed = {"steps": args.steps, "batch": args.batch, "lr": args.lr}
    settings = [{"row": row, "seed": seed, **fixed} for seed in args.seeds for row in args.rows]
    run_missing(args.json, settings, lambda one: run(one["row"], one["seed"], build, train, test, args))


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
