"""Fine-tune a language model whose frozen blocks are in a cloud, with the stock Trainer; about a minute on two cores.

    python examples/dlora.py                 # everything on this machine: a cloud is started on loopback
    python examples/dlora.py --restart 30    # and killed at step 30, and started again: the losses are the same

With a cloud of your own, in two terminals (or on two machines, then with a certificate, see docs/dlora.md):

    d2ft-cloud BASE --port 50051
    python examples/dlora.py --server localhost:50051 --base BASE --text my.txt

Without ``--base`` a small Llama learns the text of Python's help pages first, and is then fine-tuned on the source code
of Python's library, by LoRA, with an eighth of its modules alive at a time (Kill-and-Revive). The progress bar shows
what crosses. At the end the adapter is loaded by stock PEFT onto the whole model:

    held-out loss: 2.93 before, 2.77 after; 2.77 with the adapter loaded by stock PEFT
"""

from __future__ import annotations

import argparse
import os
import pydoc_data.topics
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch
from common import command_line, ignore_deprecations
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from d2ft_peft.dlora import CloudProgressCallback, KillReviveCallback, connect


LENGTH = 128
SOURCES = ("argparse", "ast", "dataclasses", "inspect", "json/decoder", "logging/__init__", "pathlib", "typing")


def blocks(tokens: list[int]) -> list[dict[str, torch.Tensor]]:
    """Samples of equal length; a rest is dropped."""
    rows = torch.tensor(tokens[: len(tokens) // LENGTH * LENGTH]).view(-1, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def pre_trained(folder: Path, steps: int) -> Path:
    """A small Llama on bytes that has learned Python's help pages; made once."""
    if not (folder / "config.json").exists():
        set_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4,
                num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
            )
        )  # fmt: skip
        text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
        arguments = training(folder / "run", steps, 3e-3)
        Trainer(model, arguments, train_dataset=blocks(list(text.encode()))).train()
        model.save_pretrained(folder)
    return folder


def text_blocks(base: str, path: Path | None) -> tuple[list, list]:
    """Samples to train on, and held-out ones."""
    if path is not None:
        text = path.read_text()
    else:
        library = Path(sysconfig.get_path("stdlib"))
        text = "\n".join((library / f"{name}.py").read_text() for name in SOURCES)
    if (Path(base) / "run").exists():  # the model that was made here reads bytes
        tokens = list(text.encode())
    else:
        tokens = AutoTokenizer.from_pretrained(base)(text, add_special_tokens=False, verbose=False)["input_ids"]
    samples = blocks(tokens)
    held_out = max(1, min(64, len(samples) // 10))
    return samples[:-held_out], samples[-held_out:]


def training(folder: Path, steps: int, rate: float) -> TrainingArguments:
    """Settings of both runs."""
    return TrainingArguments(
        folder, max_steps=steps, per_device_train_batch_size=8, learning_rate=rate, warmup_steps=5,
        lr_scheduler_type="cosine", logging_steps=10, report_to=[], save_strategy="no", use_cpu=True,
        per_device_eval_batch_size=16, dataloader_pin_memory=False,
    )  # fmt: skip


class LocalCloud:
    """A cloud in a process of its own, on loopback."""

    def __init__(self, base: str):
        self.base, self.port = base, 0
        self.start()

    def start(self) -> None:
        """Start it; again on the same port."""
        command = [sys.executable, "-m", "d2ft_peft.dlora.cloud", self.base, "--port", str(self.port)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        said = self.process.stdout.readline()
        if not said:
            raise RuntimeError("the cloud did not start; what it printed above says why.")
        self.port = int(said.rpartition(":")[2])

    def kill(self) -> None:
        """End it without a warning."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class RestartCallback(TrainerCallback):
    """Kills the cloud after a step, and starts it again."""

    def __init__(self, cloud: LocalCloud, step: int):
        self.cloud, self.step = cloud, step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """Once."""
        if state.global_step == self.step:
            self.cloud.kill()
            self.cloud.start()


def main(argv: list[str] | None = None) -> dict[str, float]:
    """Fine-tune; returns losses and what crossed."""
    parser = command_line(__doc__)
    parser.add_argument("--server", help="host:port of a cloud that runs; without it one is started here")
    parser.add_argument("--base", help="folder or Hub id; without it a small model is made")
    parser.add_argument("--text", type=Path, help="text file to learn; Python's library without it")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pre-training-steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--active", type=int, default=5, help="modules that are alive at a time")
    parser.add_argument("--packing", default="none", choices=["none", "bf16", "int8"])
    parser.add_argument("--restart", type=int, help="kill the cloud after this step, and start it again")
    parser.add_argument("--folder", type=Path, default=Path("out/dlora"))
    args = parser.parse_args(argv)
    if args.server is not None and (args.base is None or args.restart is not None):
        parser.error("--server needs the --base that it serves, and cannot be restarted from here")
    ignore_deprecations()
    torch.set_num_threads(1)
    base = args.base or str(pre_trained(args.folder / "base", args.pre_training_steps))
    cloud = None if args.server is not None else LocalCloud(base)
    try:
        return fine_tune(args, base, args.server or f"localhost:{cloud.port}", cloud)
    finally:
        if cloud is not None:
            cloud.kill()


def fine_tune(args: argparse.Namespace, base: str, server: str, cloud: LocalCloud | None) -> dict[str, float]:
    """Train on the edge, save, and load what was saved onto the whole model."""
    train, held_out = text_blocks(base, args.text)
    set_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = connect(server, base, config, dtype=torch.float32, packing=args.packing)
    callbacks = [
        KillReviveCallback(active=args.active, interval=max(1, args.steps // 10), plot=True),
        CloudProgressCallback(),
    ]
    if args.restart is not None:
        callbacks.append(RestartCallback(cloud, args.restart))
    arguments = training(args.folder / "adapter", args.steps, args.learning_rate)
    trainer = Trainer(model, arguments, train_dataset=train, eval_dataset=held_out, callbacks=callbacks)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("training losses:", ", ".join(f"{loss:.4f}" for loss in losses))
    whole = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), args.folder / "adapter")
    stock = Trainer(whole, arguments, eval_dataset=held_out).evaluate()["eval_loss"]
    traffic = model.remote_span.link.traffic
    print(
        f"crossed: {traffic.sent / 1e6:.1f} MB up, {traffic.received / 1e6:.1f} MB down, {traffic.round_trips} round "
        f"trips, {traffic.replays} attempts in vain; adapter and kill_revive.png are in {args.folder / 'adapter'}"
    )
    print(f"held-out loss: {before:.2f} before, {after:.2f} after; {stock:.2f} with the adapter loaded by stock PEFT")
    model.disconnect()
    return {"before": before, "after": after, "stock": stock, "losses": losses, "sent": traffic.sent}


if __name__ == "__main__":
    main()
