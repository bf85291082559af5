"""Whatever a Trainer does under FSDP2 comes to what it comes to under DistributedDataParallel."""

import os
import tempfile

import pytest
import torch
from accelerate import ParallelismConfig
from peft import LoraConfig, PeftModel, get_peft_model
from torch.distributed.tensor import DTensor
from torch.utils.data import IterableDataset
from transformers import Trainer

from d2ft_peft import D2FTCallback, partition_model
from tests.distributed.launch import run
from tests.distributed.test_fsdp import SHARDED, InOrder, collate, make_trainer, ragged, whole
from tests.models import TINY
from tests.test_trainer import adapt, doubles, samples


pytestmark = pytest.mark.distributed
RANDOM = {"policy": "random", "compute_budget": 0.5}
SAVING = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


class Stock(Trainer):
    _get_train_sampler = InOrder._get_train_sampler


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
    # The first process runs two samples in two micro-batches, the second five in three.
    "fewer samples than micro-batches": trained(
        "llama",
        "full",
        {**EXACT, "compute_budget": 0.3},
        data=ragged("llama", 32, seed=2),
        max_steps=1,
        data_collator=collate,
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


def saves(folder):
    """What the two ways to save write, and what was trained."""
    trainer = make_trainer(f"{folder}/run", "llama", "lora", RANDOM, **fsdp("fsdp"))
    trainer.train()
    state, first = trainer.accelerator.get_state_dict(trainer.model), not trainer.args.process_index
    if first:
        with pytest.raises(RuntimeError, match="invalid python storage"):  # PEFT's words; docs/troubleshooting.md
            trainer.model.save_pretrained(f"{folder}/parts")
        trainer.model.save_pretrained(f"{folder}/by_hand", state_dict=state)
    trainer.save_model(f"{folder}/by_trainer")
    return whole(trainer.model)


@pytest.mark.thorough
def test_a_saved_adapter_loads_in_stock_peft(tmp_path):
    trained, _ = run(__name__, "saves", tmp_path, str(tmp_path))
    for folder in ("by_hand", "by_trainer"):
        loaded = PeftModel.from_pretrained(TINY["llama"].build(0).double(), tmp_path / folder)
        assert loaded.peft_config["default"].peft_type == "LORA"
        parameters = dict(loaded.named_parameters())
        for name, value in trained.items():
            torch.testing.assert_close(parameters[name].detach(), value, rtol=0, atol=0, msg=f"{folder}: {name}")


def in_half_precision(way, make):
    """What a run in bfloat16 changes: parameters are cast by FSDP's units, or by autocast."""
    with tempfile.TemporaryDirectory() as folder:
        data = samples("llama", n=32)
        trainer = make_trainer(folder, "llama", "lora", {}, cls=make, data=data, bf16=True, **fsdp(way))
        before = whole(trainer.model)
        trainer.train()
        return {name: value - before[name] for name, value in whole(trainer.model).items()}


def stock(model, **kwargs):
    base = TINY["llama"].build(0)
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=list(partition_model(base).projections), init_lora_weights=False)
    return Stock(model=get_peft_model(base, config), **kwargs)


def ours(**config):
    def make(model, **kwargs):
        return InOrder(model=adapt("llama", "lora", skip_unread_rows=False, **config).float(), **kwargs)

    return make


def half_precision():
    makers = {"ours": ours(policy="all_full"), "stock": stock, "some heads": ours(**RANDOM)}
    return {name: {way: in_half_precision(way, make) for way in ("ddp", "fsdp")} for name, make in makers.items()}


@pytest.mark.thorough
def test_in_half_precision_it_is_the_stock_trainer_to_the_bit(tmp_path):
    def deviation(found):
        ddp, fsdp = (torch.cat([v.flatten() for v in found[way].values()]) for way in ("ddp", "fsdp"))
        return torch.linalg.norm(fsdp - ddp) / torch.linalg.norm(ddp)

    for found in run(__name__, "half_precision", tmp_path):
        for name, value in found["stock"]["fsdp"].items():
            torch.testing.assert_close(found["ours"]["fsdp"][name], value, rtol=0, atol=0, msg=name)
        # FSDP casts norms and gradients as well: under a plan that makes no more of a difference than under none.
        assert 0 < deviation(found["some heads"]) < 1.5 * deviation(found["stock"])


def sharded_and_replicated(way):
    """Two groups of two processes: each shards, and gradients are reduced between them."""
    axes = {"parallelism_config": ParallelismConfig(dp_replicate_size=2, dp_shard_size=2)} if way == "fsdp" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, "llama", "full", RANDOM, max_steps=2, **axes, **fsdp(way))
        trainer.train()
    for parameter in trainer.model.parameters():
        assert isinstance(parameter, DTensor) == (way == "fsdp")
        assert way == "ddp" or parameter.device_mesh.shape == (2, 2)
    return whole(trainer.model)


def hybrid():
    return [sharded_and_replicated(way) for way in ("ddp", "fsdp")]


@pytest.mark.thorough
def test_groups_that_shard_and_groups_that_replicate(tmp_path):
    for ddp, sharded in run(__name__, "hybrid", tmp_path, processes=4):
        for name, value in ddp.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-7, atol=1e-9, msg=name)
