"""Two gloo processes, each an edge with a session of its own on one cloud: the weights of local training in two."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from d2ft_peft.dlora import KillReviveCallback
from tests.distributed.launch import run
from tests.dlora.cases import adapter, check_close, collate, edge_like, samples, serve, tiny_base, whole
from tests.dlora.test_killed_modules import trained


pytestmark = pytest.mark.distributed


def in_two_processes(folder: str, base: str, address: str, kills: str) -> dict[str, torch.Tensor]:
    """Trained weights of a local model, and of an edge where there is an address."""
    model = whole(base, adapter(init_lora_weights=True))
    if address:
        model = edge_like(model, address, base, adapter(init_lora_weights=True))
    args = TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=2, learning_rate=1e-2,
        report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False, use_cpu=True,
    )  # fmt: skip
    callbacks = [KillReviveCallback(active=5, interval=1)] if kills else []
    Trainer(model, args, data_collator=collate, train_dataset=samples(), callbacks=callbacks).train()
    return trained(model)


@pytest.mark.thorough
@pytest.mark.parametrize("kills", ["", "kills"])
def test_edges_in_two_processes_train_what_two_local_ones_train(tmp_path, kills):
    base = tiny_base(tmp_path / "base")
    with serve(base) as (cloud, address):
        found = []
        for where in ("", address):
            (tmp_path / f"out{where}").mkdir()
            args = str(tmp_path), base, where, kills
            found.append(run(__name__, "in_two_processes", tmp_path / f"out{where}", *args))
        assert cloud.room.used == 0
    for local, edge in zip(*found, strict=True):
        check_close(edge, local, 1e-9)
    check_close(found[1][0], found[1][1], 0)
