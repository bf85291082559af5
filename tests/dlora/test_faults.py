"""Whatever breaks between edge and cloud, a run ends with the bits of one where nothing did."""

import threading
import time
from contextlib import contextmanager

import pytest
import torch
from transformers import Trainer, TrainingArguments

from d2ft_peft.dlora import BaseModel, Cloud, KillReviveCallback, connect
from d2ft_peft.dlora.edge import link
from d2ft_peft.dlora.wire import frames, protocol

from ..models import TINY
from .cases import adapter, tiny_base
from .fault_proxy import FaultProxy, Plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)
    return base, BaseModel.load(base, torch.float64)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What falls silent is given up after moments, and messages take several frames."""
    monkeypatch.setattr(protocol, "FIRST_ANSWER_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "SLOWEST_BYTES_PER_SECOND", 1 << 20)
    monkeypatch.setattr(link, "_LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(frames, "CHUNK_BYTES", 2000)


class Server:
    """A cloud that can be ended, and started again on its port."""

    def __init__(self, base, **options):
        self.base, self.options = base, options
        self.clouds = [Cloud(base, **options)]
        self.port = self.clouds[0].start()
        self.address = f"localhost:{self.port}"
        self._lock = threading.Lock()

    @property
    def cloud(self):
        return self.clouds[-1]

    def restart(self):
        with self._lock:
            self.cloud.stop()
            self.clouds.append(Cloud(self.base, **self.options))
            self.cloud.start(self.port)

    def in_use(self):
        """Tokens, bytes and streams in flight, of all that ever served."""
        return sum(
            cloud.room.used + cloud.arriving.used + sum(s.streams.used for s in cloud.sessions._sessions.values())
            for cloud in self.clouds
        )


@contextmanager
def through(base, plan, **options):
    server = Server(base, **options)
    try:
        with FaultProxy(server.address, plan, server.restart) as proxy:
            yield server, proxy
    finally:
        server.cloud.stop()


def no_fault(method):
    return None


def eventually(condition):
    until = time.monotonic() + 20
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def samples(n=7):
    batch = TINY["llama"].batch(n)
    return [{name: value[i, : 3 + i % 5] for name, value in batch.items()} for i in range(n)]


def collate(rows):
    pad = torch.nn.utils.rnn.pad_sequence
    filler = {"input_ids": 0, "attention_mask": 0, "labels": -100}
    return {name: pad([row[name] for row in rows], True, value) for name, value in filler.items()}


def run(address, base, folder, callbacks=(), lora=None, resume=None, steps=8, **options):
    """Weights and logged losses of a Trainer's run, and the model."""
    torch.manual_seed(0)
    config = adapter(**{"lora_dropout": 0.1, "init_lora_weights": True, **(lora or {})})
    model = connect(address, base, config, dtype=torch.float64, **options)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, learning_rate=1e-2,
        logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, args, data_collator=collate, train_dataset=samples(), callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}, losses, model


def check_same(found, expected):
    assert found[1] == expected[1] and len(found[1]) > 1
    assert found[0].keys() == expected[0].keys()
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name


NO_DROPOUT = {"lora": {"lora_dropout": 0.0}}
SETTINGS = {
    "plain": {},
    "killed": {"callbacks": {"active": 5, "interval": 1, "choose": "redrawn"}},
    "in_flight": {"in_flight": 3, **NO_DROPOUT},
    "core": {"crossing": "core", **NO_DROPOUT},
    "head": {"head": "cloud"},
}


def run_setting(address, base, folder, setting, **more):
    options = dict(SETTINGS[setting])
    callbacks = [KillReviveCallback(**options.pop("callbacks"))] if "callbacks" in options else []
    return run(address, base, folder, callbacks, **options, **more)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_run_with_faults_ends_with_the_same_bits(llama, tmp_path, setting):
    base, model = llama
    with through(model, no_fault) as (server, proxy):
        expected = run_setting(proxy.address, base, tmp_path, setting)
    with through(model, Plan(0.6, seed=len(setting))) as (server, proxy):
        found = run_setting(proxy.address, base, tmp_path, setting)
        assert proxy.injected.total() >= 5 and found[2].remote_span.link.traffic.replays >= 5
        check_same(found, expected)
        found[2].disconnect()
        assert eventually(lambda: server.in_use() == 0 and proxy.open_calls == 0)
