"""Two gloo processes under DeepSpeed's ZeRO end with the weights of two under DistributedDataParallel.

They need deepspeed, which installs without a GPU: ``DS_BUILD_OPS=0 pip install deepspeed``; run with
``DS_ACCELERATOR=cpu``.
"""

import contextlib
import os
import tempfile
import types
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from d2ft_peft import partition_model
from tests.distributed.launch import run
from tests.distributed.test_fsdp import InOrder, collate, drive, ragged, sample_choice, without_labels
from tests.models import TINY
from tests.test_trainer import adapt, arguments, samples


pytestmark = [pytest.mark.distributed, pytest.mark.thorough]
STAGES = ("zero1", "zero2", "zero3")
EXACT = {"skip_unread_rows": False, "head_start": False}
FEWER = {"policy": "fewer_samples", "compute_budget": 0.5, **EXACT}
RANDOM = {"policy": "random", "compute_budget": 0.5, **EXACT}


@pytest.fixture(autouse=True)
def deepspeed() -> types.ModuleType:
    return pytest.importorskip("deepspeed")


def start(stage):
    """Let accelerate, which drives CPUs one by one under DeepSpeed, see all processes; arguments for the Trainer."""
    import deepspeed

    os.environ.pop("ACCELERATE_USE_CPU", None)
    AcceleratorState._reset_state(reset_partial_state=True)
    if deepspeed.comm.cdb is None:
        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    zero = {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True}
    by_trainer = ("gradient_clipping", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    config = {"zero_optimization": zero, "zero_allow_untested_optimizer": True, "bf16": {"enabled": "auto"}}
    return {"deepspeed": config | dict.fromkeys(by_trainer, "auto"), "use_cpu": False}


def make_trainer(folder, way, name, mode, config, cls=InOrder, data=None, **kwargs):
    """A Trainer of a tiny model in float32 under DeepSpeed, or with ``way="ddp"`` under DistributedDataParallel."""
    model = adapt(name, mode, **config).float()
    given = {key: kwargs.pop(key) for key in ("data_collator", "eval_dataset", "compute_metrics") if key in kwargs}
    settings = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "max_grad_norm": 0.5, **kwargs}
    if way in STAGES:
        with mock.patch("transformers.training_args.is_torch_bf16_gpu_available", lambda: True):
            args = arguments(folder, **start(STAGES.index(way) + 1), **settings)
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        here = {"num_processes": world, "process_index": rank, "local_process_index": rank, "backend": "gloo"}
        PartialState._shared_state.update(here)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        args = arguments(folder, **settings)
        drive(DistributedType.MULTI_CPU)
    sample_choice.OVERHEAD_TOKENS = 1  # these samples are shorter than what another micro-batch costs
    return cls(model=model, args=args, train_dataset=data or samples(name, n=32), **given)


def whole(trainer):
    """What is trained, as whole tensors."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    parts, gathered = [p for p in parameters.values() if hasattr(p, "ds_id")], contextlib.nullcontext()
    if parts:
        import deepspeed

        gathered = deepspeed.zero.GatheredParameters(parts)
    with gathered:
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def trained(*case, **kwargs):
    """A use that only trains."""

    def use(way, folder):
        trainer = make_trainer(folder, way, *case, **kwargs)
        before = whole(trainer)
        trainer.train()
        after = whole(trainer)
        assert not all(value.equal(before[name]) for name, value in after.items())
        assert trainer.accelerator.distributed_type == (DistributedType.DEEPSPEED if way in STAGES else "MULTI_CPU")
        return after

    return use


def evaluates_and_predicts(way, folder):
    data = samples("vit", n=7, seed=9)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 2}
    trainer = make_trainer(folder, way, "vit", "full", FEWER, eval_dataset=data, **settings)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    predictions = trainer.predict(data).predictions
    return whole(trainer) | {"losses": torch.tensor(losses), "predictions": torch.tensor(predictions)}


def keeps_the_best(way, folder):
    """Which is the first by its metric."""
    each = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings = {**each, "load_best_model_at_end": True, "metric_for_best_model": "rank"}
    ranks = iter((3.0, 2.0, 1.0))
    given = {"eval_dataset": samples("vit", n=8, seed=9), "compute_metrics": lambda _: {"rank": next(ranks)}}
    trainer = make_trainer(folder, way, "vit", "full", FEWER, **given, **settings)
    trainer.train()
    assert trainer.state.best_global_step == 1
    return whole(trainer)


def resumes_and_saves(way, folder):
    config = {"policy": "importance", "compute_budget": 0.5, "interval": 1}
    settings = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    for steps in (2, 4):
        trainer = make_trainer(folder, way, "llama", "lora", config, max_steps=steps, **settings)
        trainer.train(resume_from_checkpoint=steps == 4)
    trainer.save_model(f"{folder}/saved")
    trainer.accelerator.wait_for_everyone()
    saved = PeftModel.from_pretrained(TINY["llama"].build(0), f"{folder}/saved")
    saved, found = dict(saved.named_parameters()), whole(trainer)
    assert all(saved[name].equal(value) for name, value in found.items())
    return found


USES = {
    "adapter": trained("llama", "lora", FEWER),
    "copies": trained("vit", "full", {**FEWER, "policy": "importance", "interval": 1}),
    "in place, recomputed": trained("bert", "full", {**FEWER, "keep_base": False}, gradient_checkpointing=True),
    "head": trained("vit", "full", {**EXACT, "compute_budget": 0.5, "modules_to_save": ["classifier"]}),
    "one micro-batch a step": trained("vit", "full", FEWER, gradient_accumulation_steps=1, max_steps=5),
    "rests of epochs": trained("vit", "full", FEWER, data=samples("vit", n=27), max_steps=-1, num_train_epochs=2),
    "ragged": trained(
        "llama", "full", {**EXACT, "compute_budget": 0.3}, data=ragged("llama", 32, seed=2), max_steps=1,
        data_collator=collate,
    ),
    "more micro-batches than counted": trained(
        "llama", "full", {**EXACT, "compute_budget": 0.9}, data=ragged("llama", 32, seed=2), max_steps=1,
        per_device_train_batch_size=8, gradient_accumulation_steps=1, data_collator=collate,
    ),
    "evaluates and predicts": evaluates_and_predicts,
    "keeps the best": keeps_the_best,
    "resumes and saves": resumes_and_saves,
}  # fmt: skip
# Where weights stay whole, heads may be cut.
OF_HEADS = {
    "heads": trained("llama", "full", RANDOM),
    "heads, one micro-batch a step": trained("vit", "full", RANDOM, gradient_accumulation_steps=1, max_steps=5),
    "the last trains nothing": trained("gpt2", "lora", {"policy": "round_robin", "num_full": 1, "num_forward_only": 3}),
    "depth": trained("bert", "full", {"policy": "depth", "compute_budget": 0.5}),
    "blocks": trained("llama", "full", {"policy": "lisa", "compute_budget": 0.6, "interval": 1}),
    "no label in one process": trained("bert", "full", FEWER, data=without_labels("bert", 32)),
}


def use(way):
    uses = USES if way == "zero3" else {**USES, **OF_HEADS}
    return {name: one(way, f"{os.environ['SHARED_FOLDER']}/{way}/{name}") for name, one in uses.items()}


@pytest.fixture(scope="module")
def by_ddp(tmp_path_factory):
    return ended(tmp_path_factory.mktemp("ddp"), "ddp")


def ended(folder, way):
    os.environ["SHARED_FOLDER"] = str(folder)
    return run(__name__, "use", folder, way, timeout=300)


@pytest.mark.parametrize("way", STAGES)
def test_it_ends_as_whole_parameters_do(tmp_path, by_ddp, way):
    for whole, sharded in zip(by_ddp, ended(tmp_path, way), strict=True):
        assert sharded.keys() == USES.keys() | (set() if way == "zero3" else OF_HEADS.keys())
        for name, found in sharded.items():
            assert found.keys() == whole[name].keys()
            for key, value in found.items():
                torch.testing.assert_close(value, whole[name][key], rtol=1e-5, atol=1e-6, msg=f"{name}: {key}")


class Stock(Trainer):
    _get_train_sampler = InOrder._get_train_sampler


def stock(model, **kwargs):
    base = TINY["llama"].build(0)
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=list(partition_model(base).projections), init_lora_weights=False)
    return Stock(model=get_peft_model(base, config), **kwargs)


def in_half_precision(way):
    found = []
    for make in (InOrder, stock):
        with tempfile.TemporaryDirectory() as folder:
            config = {"policy": "all_full", "skip_unread_rows": False}
            trainer = make_trainer(folder, way, "llama", "lora", config, cls=make, bf16=True)
            trainer.train()
            found.append(whole(trainer))
    return found


@pytest.mark.parametrize("way", ["zero2", "zero3"])
def test_in_half_precision_it_is_the_stock_trainer_to_the_bit(tmp_path, way):
    for ours, theirs in run(__name__, "in_half_precision", tmp_path, way):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=0, atol=0, msg=name)
