"""Whatever a Trainer does under FSDP2 comes to what it comes to under DistributedDataParallel."""

import os
import tempfile

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from d2ft_peft import D2FTCallback, partition_model
from tests.distributed.launch import run
from tests.distributed.test_fsdp import SHARDED, InOrder, make_trainer, ragged, whole
from tests.models import TINY
from tests.test_trainer import doubles, samples


pytestmark = pytest.mark.distributed
RANDOM = {"policy": "random", "compute_budget": 0.5}
SAVING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


def fsdp(way, **config):
    """Arguments of a run that `way` shards or leaves whole."""
    return {"fsdp": True, "fsdp_config": {**SHARDED["fsdp_config"], **config}} if way == "fsdp" else {}


def evaluated(trainer):
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def trained(*case, **kwargs):
    """A use that only trains."""

    def use(way, folder):
        trainer = make_trainer(folder, *case, **kwargs, **fsdp(way))
        trainer.train()
        return whole(trainer.model) | {"steps": torch.tensor(trainer.state.global_step)}

    return use


def evaluates_and_predicts(way, folder):
    """With a number of samples that neither processes nor batches divide."""
    data = doubles(samples("vit", n=7, seed=9))
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = make_trainer(folder, "vit", "full", RANDOM, eval_dataset=data, **settings, **fsdp(way))
    trainer.train()
    predictions = torch.tensor(trainer.predict(data).predictions)
    assert len(predictions) == 7
    return whole(trainer.model) | {"predictions": predictions} | evaluated(trainer)


def trains_twice(way, folder):
    trainer = make_trainer(folder, "llama", "lora", RANDOM, **fsdp(way))
    trainer.train()
    first = whole(trainer.model)
    trainer.train()
    assert not all(value.equal(first[name]) for name, value in whole(trainer.model).items())
    return whole(trainer.model)


def keeps_the_best(mode):
    """Which is the one of the highest loss, so that it is not the last."""

    def use(way, folder):
        settings = {**SAVING, "load_best_model_at_end": True, "greater_is_better": True}
        data = doubles(samples("vit", n=8, seed=9))
        trainer = make_trainer(folder, "vit", mode, RANDOM, eval_dataset=data, **settings, **fsdp(way))
        trainer.train()
        assert trainer.state.best_global_step < 3
        return whole(trainer.model) | evaluated(trainer)

    return use


def resumes_from_parts(way, folder):
    """Checkpoints of which each process writes its part."""
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    config = {"policy": "importance", "compute_budget": 0.5, "interval": 1}
    for steps in (2, 4):
        sharding = fsdp(way, state_dict_type="SHARDED_STATE_DICT")
        trainer = make_trainer(folder, "llama", "full", config, max_steps=steps, **settings, **sharding)
        trainer.train(resume_from_checkpoint=steps == 4)
    return whole(trainer.model)


def merges(name, mode):
    def use(way, folder):
        trainer = make_trainer(folder, name, mode, RANDOM, **fsdp(way))
        trainer.train()
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        assert not any("lora" in key or "d2ft" in key for key, _ in merged.named_parameters())
        return whole(merged.requires_grad_(True))

    return use


def another_trainer(way, folder):
    """The stock Trainer with the callback, and a report."""

    class Stock(Trainer):
        _get_train_sampler = InOrder._get_train_sampler

    def with_callback(**kwargs):
        return Stock(callbacks=[D2FTCallback()], **kwargs)

    trainer = make_trainer(folder, "vit", "full", RANDOM, cls=with_callback, **fsdp(way))
    trainer.train()
    return whole(trainer.model)


def writes_a_report(way, folder):
    trainer = make_trainer(folder, "vit", "lora", RANDOM, report=f"{folder}/report.html", **fsdp(way))
    trainer.train()
    assert os.path.isfile(f"{folder}/report.html") or trainer.args.process_index
    return whole(trainer.model)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(doubles(samples("vit", n=22)))


def plugin(**config):
    def use(way, folder):
        trainer = make_trainer(folder, "llama", "full", RANDOM, **fsdp(way, **config))
        trainer.train()
        return whole(trainer.model)

    return use


def data(name, n):
    return doubles(samples(name, n))


EPOCHS = {"max_steps": -1, "num_train_epochs": 2}
EXACT = {"policy": "exact_first", "compute_budget": 0.6, "skip_unread_rows": False}
# What runs in one after the other of the processes of a test; equal lengths keep tests short.
USES = {
    "evaluates and predicts": evaluates_and_predicts,
    "trains twice": trains_twice,
    "keeps the best adapter": keeps_the_best("lora"),
    "keeps the best copies": keeps_the_best("full"),
    "resumes from parts": resumes_from_parts,
    "merges an adapter": merges("llama", "lora"),
    "merges copies": merges("vit", "full"),
    "a plain Trainer": another_trainer,
    "writes a report": writes_a_report,
    "rests of epochs": trained("vit", "full", RANDOM, data=data("vit", 26), **EPOCHS),
    "a process with fewer samples": trained("bert", "full", RANDOM, data=data("bert", 27), **EPOCHS),
    "by depth": trained("llama", "full", {"policy": "depth", "compute_budget": 0.5}),
    "by depth, recomputed": trained(
        "bert", "lora", {"policy": "depth", "compute_budget": 0.5}, gradient_checkpointing=True
    ),
    "recomputed": trained("llama", "full", RANDOM, gradient_checkpointing=True),
    "ragged": trained("bert", "full", RANDOM, data=ragged),
    "ragged, fewer samples": trained(
        "llama", "lora", {"policy": "fewer_samples", "compute_budget": 0.6}, data=ragged, max_steps=1
    ),
    "ragged, exact first": trained("llama", "full", EXACT, data=ragged, max_steps=1),
    "fewer samples than micro-batches": trained(
        "llama", "full", {**EXACT, "compute_budget": 0.3}, data=ragged, max_steps=1
    ),
    "a head of its own": trained("vit", "full", {**EXACT, "modules_to_save": ["classifier"], "head_start": False}),
    "one micro-batch a step": trained("vit", "full", EXACT, gradient_accumulation_steps=1, max_steps=5),
    "a stream": trained("vit", "full", RANDOM, data=Stream()),
    "Adam": trained("vit", "full", RANDOM, optim="adamw_torch", optim_args=None, learning_rate=1e-3),
    "found batch size": trained("vit", "full", RANDOM, auto_find_batch_size=True),
    "loaded by the first process": plugin(cpu_ram_efficient_loading=True),
    "kept after forward": plugin(reshard_after_forward=False),
    "one unit": plugin(auto_wrap_policy="NO_WRAP"),
}


def use_both_ways(names):
    found = []
    for name in names.split(";"):
        pair = []
        for way in ("ddp", "fsdp"):
            with tempfile.TemporaryDirectory() as folder:
                folder = os.environ["SHARED_FOLDER"] if name in SHARE else folder
                pair.append(USES[name](way, f"{folder}/{name}/{way}"))
        found.append(pair)
    return found


SHARE = ("keeps the best adapter", "keeps the best copies", "resumes from parts")  # both processes read one folder


@pytest.mark.thorough
@pytest.mark.parametrize("names", [list(USES)[i::5] for i in range(5)], ids=range(5))
def test_it_ends_as_whole_parameters_do(tmp_path, monkeypatch, names):
    monkeypatch.setenv("SHARED_FOLDER", str(tmp_path))
    for found in run(__name__, "use_both_ways", tmp_path, ";".join(names)):
        for name, (ddp, sharded) in zip(names, found, strict=True):
            assert ddp.keys() == sharded.keys()
            for key, value in ddp.items():
                torch.testing.assert_close(sharded[key], value, rtol=1e-7, atol=1e-9, msg=f"{name}: {key}")
