"""Two gloo processes under FSDP2 (torch's fully_shard, through the Trainer) end with the weights of two under
DistributedDataParallel, and of one."""

import os
import tempfile

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from d2ft_peft import D2FTTrainer
from d2ft_peft.planning import sample_choice
from tests.distributed.launch import run
from tests.models import TINY
from tests.test_trainer import adapt, arguments, doubles, samples
from tests.training.test_padding import collate, ragged


pytestmark = pytest.mark.distributed
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2}}
BLOCKS = {"vit": "ViTLayer", "bert": "BertLayer", "llama": "LlamaDecoderLayer", "gpt2": "GPT2Block"}
MOMENTUM = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "max_grad_norm": 0.5}


class InOrder(D2FTTrainer):
    """Reads the data in order: micro-batch i of two processes is micro-batch i of one, split in two."""

    def _get_train_sampler(self, *args):
        return None


def drive(as_if=DistributedType.MULTI_CPU):
    """Let the next Trainer decide how processes are driven, which accelerate keeps for the whole process; it shards no
    parameters on CPUs, so that it is to take them for GPUs."""
    AcceleratorState._reset_state()
    PartialState._shared_state["distributed_type"] = as_if
    for name in [name for name in os.environ if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))]:
        del os.environ[name]


def whole(model):
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.full_tensor() if isinstance(p, DTensor) else p.clone() for name, p in values.items()}


def without_labels(name, n):
    """Nothing that process 1 sees has a label."""
    data = samples(name, n)
    for item in (*data[2::4], *data[3::4]):
        item["labels"] = torch.full_like(item["labels"], -100)
    return data


def make_trainer(folder, name, mode, config, data=samples, cls=InOrder, **kwargs):
    """A Trainer of a tiny model under FSDP2, or without `fsdp` under DistributedDataParallel."""
    model = adapt(name, mode, **config)
    given = {key: kwargs.pop(key) for key in ("data_collator", "eval_dataset", "report") if key in kwargs}
    if kwargs.get("fsdp"):
        # Else accelerate shards ViT's embeddings, and what is within them once more, which torch refuses.
        kwargs["fsdp_config"] = {"transformer_layer_cls_to_wrap": [BLOCKS[name]], **kwargs["fsdp_config"]}
    args = arguments(folder, **{**MOMENTUM, **kwargs})
    drive(DistributedType.MULTI_GPU if args.fsdp else DistributedType.MULTI_CPU)
    sample_choice.OVERHEAD_TOKENS = (
        1  # any saving is worth a micro-batch: these samples are shorter than what one costs
    )
    if data is ragged:
        given["data_collator"] = collate
    data = ragged(name) if data is ragged else doubles(data(name, n=32)) if callable(data) else data
    return cls(model=model, args=args, train_dataset=data, **given)


def train(name, mode, config, **kwargs):
    """Train; what was trained, as whole tensors."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(folder, name, mode, config, **kwargs)
        trainer.train()
    if kwargs.get("fsdp"):
        assert isinstance(trainer.model, FSDPModule)
        assert all(isinstance(p, DTensor) for p in trainer.model.parameters() if p.requires_grad)
    assert trainer.planner.counts.of_run.logs()["compute_ratio"] < 1 or config["policy"] == "all_full"
    return whole(trainer.accelerator.unwrap_model(trainer.model))


CASES = {
    "heads at random": ("vit", "full", {"policy": "random", "compute_budget": 0.5}, {}),
    "in place": ("bert", "full", {"policy": "random", "compute_budget": 0.5, "keep_base": False}, {}),
    "checkpointing": ("llama", "lora", {"policy": "random", "compute_budget": 0.5}, {"gradient_checkpointing": True}),
    "the last micro-batch trains nothing": (
        "gpt2", "lora", {"policy": "round_robin", "num_full": 1, "num_forward_only": 3}, {},
    ),
    "blocks": ("llama", "full", {"policy": "lisa", "compute_budget": 0.6, "interval": 1, "train_boundary": True}, {}),
    "magnitudes": ("vit", "full", {"num_full": 2, "interval": 1, "modules_to_save": ["classifier"]}, {}),
    "samples": ("bert", "lora", {"policy": "fewer_samples", "compute_budget": 0.5}, {}),
    "losses": ("vit", "full", {"policy": "importance", "compute_budget": 0.5, "interval": 1}, {}),
    "one step each": (
        "vit", "full", {"policy": "random", "compute_budget": 0.5, "num_micro_batches": 3},
        {"gradient_accumulation_steps": 1},
    ),
    "no label in one process": (
        "bert", "full", {"policy": "random", "compute_budget": 0.5, "seed": 1}, {"data": without_labels},
    ),
    "another number of micro-batches": (
        "llama", "lora", {"policy": "exact_first", "compute_budget": 0.6},
        {"data": ragged, "max_steps": 1},
    ),
}  # fmt: skip


def train_both_ways(names):
    found = []
    for name in names.split(","):
        *case, kwargs = CASES[name]
        pair = []
        for way in ({}, SHARDED):
            pair.append(train(*case, **kwargs, **way))
        found.append(pair)
    return found


@pytest.mark.thorough
@pytest.mark.parametrize("names", [list(CASES)[i::3] for i in range(3)], ids=["first", "second", "third"])
def test_sharded_parameters_train_as_whole_ones_do(tmp_path, names):
    for found in run(__name__, "train_both_ways", tmp_path, ",".join(names)):
        for name, (ddp, fsdp) in zip(names, found, strict=True):
            assert ddp.keys() == fsdp.keys()
            for parameter, value in ddp.items():
                torch.testing.assert_close(fsdp[parameter], value, rtol=1e-7, atol=1e-9, msg=f"{name}: {parameter}")


def save_and_resume(folder):
    """Weights after four steps, of a whole run and of one that stops after the second of a window of four; and whether
    what a checkpoint and `save_model` wrote is what was trained."""
    found = []
    for steps in (4, 2, 4):
        model = adapt("llama", "full", policy="importance", compute_budget=0.5, num_micro_batches=4, interval=1)
        args = arguments(
            f"{folder}/{'whole' if not found else 'stopped'}", max_steps=steps, save_strategy="steps", save_steps=2,
            gradient_accumulation_steps=1, lr_scheduler_type="constant", **SHARDED,
        )  # fmt: skip
        drive(DistributedType.MULTI_GPU)
        trainer = D2FTTrainer(model=model, args=args, train_dataset=samples("llama", n=32))
        trainer.train(resume_from_checkpoint=len(found) == 2)
        found.append(whole(model))
    trainer.save_model(f"{folder}/saved")
    return found


def test_a_run_resumes_and_saves_whole_tensors(tmp_path):
    for uninterrupted, stopped, resumed in run(__name__, "save_and_resume", tmp_path, str(tmp_path)):
        assert not all(uninterrupted[name].equal(stopped[name]) for name in uninterrupted)
        for name, value in uninterrupted.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)
    for folder in (tmp_path / "saved", tmp_path / "stopped" / "checkpoint-4"):
        saved = PeftModel.from_pretrained(TINY["llama"].build(0).double(), folder)
        saved = dict(saved.named_parameters())
        for name, value in resumed.items():
            torch.testing.assert_close(saved[name].detach(), value, rtol=0, atol=0, msg=name)
