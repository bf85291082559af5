"""Whatever breaks between edge and cloud, a run ends with the bits of one where nothing did."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from contextlib import contextmanager

import pytest
import torch
from transformers import Trainer, TrainingArguments

from d2ft_peft.dlora import BaseModel, Cloud, KillReviveCallback, connect
from d2ft_peft.dlora.edge import link
from d2ft_peft.dlora.wire import frames, protocol

from .cases import adapter, collate, edge_like, eventually, ragged, samples, step, tiny_base, whole
from .fault_proxy import FAULTS, Fault, FaultProxy, Plan


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"), num_hidden_layers=2)
    return base, BaseModel.load(base, torch.float64)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """What falls silent is given up after moments, and messages take several frames."""
    monkeypatch.setattr(protocol, "FIRST_ANSWER_SECONDS", 0.2)
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
    """A server and a proxy before it; afterwards nothing of them is left."""
    before = set(threading.enumerate())
    server = Server(base, **options)
    try:
        with FaultProxy(server.address, plan, server.restart) as proxy:
            yield server, proxy
            gc.collect()
            assert eventually(lambda: server.in_use() == 0 and proxy.open_calls == 0)
    finally:
        server.cloud.stop()
    assert eventually(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("d2ft-cloud")])


def no_fault(method):
    return None


class Queue:
    """One fault after the other for the calls of one method."""

    def __init__(self, method, *faults):
        self.method, self.left = method, deque(faults)

    def __call__(self, method):
        return self.left.popleft() if method == self.method and self.left else None


def run(
    address, base, folder, rule=None, in_cloud=False, lora=None, resume=None, steps=5, save_steps=None, **options
):  # fmt: skip
    """Weights and logged losses of a Trainer's run, and the model."""
    torch.manual_seed(0)
    config = adapter(**{"lora_dropout": 0.1, "init_lora_weights": True, **(lora or {})})
    model = connect(address, base, config, dtype=torch.float64, **options)
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=steps, learning_rate=1e-2,
        logging_steps=1, report_to=[], disable_tqdm=True, save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or 1, dataloader_pin_memory=False,
    )  # fmt: skip
    decides = {"decide": model.decide_in_cloud} if in_cloud else {}
    callbacks = [] if rule is None else [KillReviveCallback(**rule, **decides)]
    trainer = Trainer(model, args, data_collator=collate, train_dataset=samples(7), callbacks=callbacks)
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
    "killed": {"rule": {"active": 5, "interval": 1, "choose": "redrawn"}},
    "killed in cloud": {"rule": {"active": 5, "interval": 1, "idle": "last"}},
    "in_flight": {"in_flight": 3, **NO_DROPOUT},
    "core": {"crossing": "core", **NO_DROPOUT},
    "head": {"head": "cloud"},
}


def run_setting(address, base, folder, setting, **more):
    return run(address, base, folder, **SETTINGS[setting], in_cloud="cloud" in setting, **more)


QUICK = ("plain", "killed", "in_flight")


@pytest.mark.thorough
@pytest.mark.parametrize(
    "setting", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SETTINGS]
)
def test_a_run_with_faults_ends_with_the_same_bits(llama, tmp_path, setting):
    base, model = llama
    with through(model, no_fault) as (_, proxy):
        expected = run_setting(proxy.address, base, tmp_path, setting)
        expected[2].disconnect()
    with through(model, Plan(0.7, seed=3)) as (_, proxy):
        found = run_setting(proxy.address, base, tmp_path, setting)
        assert proxy.injected.total() >= 4 and found[2].remote_span.link.traffic.replays >= 3
        check_same(found, expected)
        found[2].disconnect()


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["Open", "Install", "Decide", "Factors", "MicroBatch"])
def test_every_fault_of_every_call_is_survived(llama, tmp_path, method):
    base, model = llama
    faults = [
        Fault(kind, upward) for kind in FAULTS if kind != "before backward" or method == "MicroBatch"
        for upward in (True, False)
    ]  # fmt: skip
    setting = "core" if method == "Factors" else "killed in cloud"
    with through(model, no_fault) as (_, proxy):
        expected = run_setting(proxy.address, base, tmp_path, setting, steps=2)
        expected[2].disconnect()
    with through(model, Queue(method, *faults)) as (_, proxy):
        while proxy.plan.left:
            found = run_setting(proxy.address, base, tmp_path, setting, steps=2)
            check_same(found, expected)
            found[2].disconnect()
        assert {kind for of, kind in proxy.injected} == {fault.kind for fault in faults}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["plain", "killed"])
def test_a_thousand_faults(llama, tmp_path, setting):
    base, model = llama
    with through(model, no_fault) as (_, proxy):
        expected = run_setting(proxy.address, base, tmp_path, setting, steps=500)
        expected[2].disconnect()
    with through(model, Plan(0.9, seed=1, most=2000)) as (_, proxy):
        began = time.monotonic()
        found = run_setting(proxy.address, base, tmp_path, setting, steps=500)
        seconds = time.monotonic() - began
        by_kind = {kind: sum(n for (_, k), n in proxy.injected.items() if k == kind) for kind in FAULTS}
        traffic = found[2].remote_span.link.traffic
        print(f"{setting}: {proxy.injected.total()} faults {by_kind}, {traffic.replays} replays, {seconds:.0f} s")
        assert proxy.injected.total() >= 1000
        check_same(found, expected)
        found[2].disconnect()


@pytest.mark.thorough
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("kind", ["restarted", "lost within", "half-open"])
def test_generation_goes_on_after_its_cache_is_lost(llama, kind, beams):
    base, model = llama
    local = whole(base, adapter()).eval()
    ids = ragged()["input_ids"][:, :4]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "num_beams": beams, "do_sample": False}
    with through(model, Queue("MicroBatch", Fault(kind, False, 30))) as (_, proxy):
        edge = edge_like(local, proxy.address, base, adapter()).eval()
        assert torch.equal(edge.generate(ids, **asked), local.generate(ids, **asked))
        assert proxy.injected["MicroBatch", kind] == 1
        edge.disconnect()


@pytest.mark.thorough
def test_a_replay_leaves_the_random_numbers_of_the_run_alone(llama):
    base, model = llama
    after = []
    for plan in (no_fault, Queue("MicroBatch", Fault("lost within", True, 3), Fault("before backward"))):
        with through(model, plan) as (_, proxy):
            edge = connect(proxy.address, base, adapter(lora_dropout=0.5), dtype=torch.float64)
            torch.manual_seed(3)
            random.seed(3)
            for _ in range(4):
                step(edge, ragged())
            after.append((random.getstate(), torch.get_rng_state().tolist()))
            assert plan is no_fault or edge.remote_span.link.traffic.replays == 2
            edge.disconnect()
    assert after[0] == after[1]


def test_an_output_that_is_dropped_leaves_nothing_in_the_cloud(llama):
    base, model = llama
    with through(model, no_fault) as (server, proxy):
        edge = connect(proxy.address, base, adapter(), dtype=torch.float64)
        out = edge(**ragged())
        assert server.cloud.room.used == ragged()["input_ids"].numel()
        del out
        gc.collect()
        assert eventually(lambda: server.in_use() == 0)
        edge.disconnect()


def tensors():
    gc.collect()
    return sum(isinstance(thing, torch.Tensor) for thing in gc.get_objects())


@pytest.mark.thorough
def test_many_micro_batches_leave_nothing_behind(llama):
    base, model = llama
    with through(model, Plan(0.3, seed=5, kinds=("lost within", "lost before", "damaged"))) as (server, proxy):
        edge = connect(proxy.address, base, adapter(), dtype=torch.float64)
        counts = []
        for _ in range(3):
            for _ in range(10):
                step(edge, ragged())
            assert eventually(lambda: server.in_use() == 0)
            counts.append(tensors())
        # Threads of broken streams take their time to end; what a single pass makes are hundreds.
        assert eventually(lambda: tensors() <= counts[0] + 60)
        edge.disconnect()


def test_an_edge_that_nobody_refers_to_leaves_no_thread(llama):
    base, model = llama
    with through(model, no_fault) as (_, proxy):
        before = set(threading.enumerate())
        edge = connect(proxy.address, base, adapter(), dtype=torch.float64, in_flight=2)
        step(edge, ragged())
        started = [thread.name for thread in set(threading.enumerate()) - before]
        assert {name.rstrip("_0123456789") for name in started} >= {"d2ft-deadlines", "d2ft-in-flight"}
        del edge
        gc.collect()
        assert eventually(lambda: not [t for t in set(threading.enumerate()) - before if t.name.startswith("d2ft-in")])
        assert eventually(lambda: not [t for t in set(threading.enumerate()) - before if t.name == "d2ft-deadlines"])


_EDGE = """
import sys
sys.path.insert(0, {root!r})
from tests.dlora.test_faults import run
weights, losses, model = run({address!r}, {base!r}, {folder!r}, resume={resume!r}, steps=12, save_steps=2)
import torch
torch.save((weights, losses), {folder!r} + "/result")
"""


@pytest.mark.slow
def test_an_edge_that_is_killed_resumes_with_the_same_bits(llama, tmp_path, monkeypatch):
    monkeypatch.undo()  # the edge is another process, where nothing is patched
    base, model = llama
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    with through(model, no_fault) as (server, _):
        expected = run(server.address, base, tmp_path / "whole", steps=12)
        folder = str(tmp_path / "killed")
        said = {"root": root, "address": server.address, "base": base, "folder": folder}
        edge = subprocess.Popen([sys.executable, "-c", _EDGE.format(**said, resume=None)])
        assert eventually(lambda: os.path.isdir(folder + "/checkpoint-8") or edge.poll() is not None, 120)
        edge.send_signal(signal.SIGKILL)
        assert edge.wait() == -signal.SIGKILL
        assert eventually(lambda: server.in_use() == 0)
        subprocess.run([sys.executable, "-c", _EDGE.format(**said, resume=folder + "/checkpoint-6")], check=True)
        weights, losses = torch.load(folder + "/result", weights_only=True)
        check_same((weights, losses), expected)
        expected[2].disconnect()
