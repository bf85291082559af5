"""Two gloo processes that generate their own completions take the step of the trainer alone on those that run; and
losses without labels train the same under FSDP2."""

import os

import pytest
import torch
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from d2ft_peft import D2FTCallback
from d2ft_peft.training.rollout_rows import join_rows
from tests.distributed.launch import run
from tests.distributed.test_fsdp import SHARDED, drive, whole
from tests.training.test_trl import config
from tests.training.test_trl_rollouts import LONG, assert_gradient_on, plain_twin, rows_that_ran, step_of
from tests.training.trl_cases import GENERATING, KINDS, base_of, make


pytestmark = [pytest.mark.distributed, pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]


def step(kind, policy, folder):
    trainer, found = step_of(kind, folder, policy=policy, beta=0.1)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    lengths = [inputs["completion_ids"].shape[1] for inputs in trainer.seen]
    return rows_that_ran(trainer), len(trainer.made[0]["advantages"]), lengths, found, weights


class Was:
    """A trainer of another process: what is left of it."""

    def __init__(self, weights):
        self.model = torch.nn.Module()
        self.model.named_parameters = lambda: iter(weights.items())


@pytest.mark.parametrize("policy", ["exact_first", "fewer_samples", "bilevel"])
@pytest.mark.parametrize("kind", GENERATING)
def test_two_processes_take_the_mean_over_what_ran_in_both(tmp_path, kind, policy):
    """Equally many completions in each, whose padding is cut off."""
    (one, made, *_), (other, _, lengths, found, weights) = results = run(
        __name__, "step", tmp_path, kind, policy, str(tmp_path)
    )
    assert len(one["advantages"]) == len(other["advantages"]) == made // 2
    assert not torch.equal(one["completion_ids"].sum(), other["completion_ids"].sum())
    for name, gradient in results[0][3].items():
        assert torch.equal(gradient, found[name])
    weights = {name: torch.nn.Parameter(value, "lora" in name) for name, value in weights.items()}
    both = join_rows([one, other])
    assert_gradient_on(plain_twin(kind, tmp_path, Was(weights), beta=0.1), both, found)


def train_both_ways(kind, policy, folder):
    """Under DistributedDataParallel and FSDP2: what was trained, as whole tensors."""

    class Driven(KINDS[kind][0]):
        def __init__(self, *args, **kwargs):
            asked = {name: value for name, value in os.environ.items() if "FSDP_" in name or name.endswith("_FSDP")}
            drive(DistributedType.MULTI_GPU if kwargs["args"].fsdp else DistributedType.MULTI_CPU)
            os.environ.update(asked)
            super().__init__(*args, **kwargs)

    trained = []
    for way in ({}, SHARDED):
        if way:
            way = {**way, "fsdp_config": {**way["fsdp_config"], "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
        trainer = make(
            kind, folder, base_of(kind).double(), Driven, [D2FTCallback()], peft_config=config("lora", policy=policy),
            learning_rate=0.1, optim="sgd", beta=0.1, **(LONG if kind in GENERATING else {}), **way,
        )  # fmt: skip
        before = {name: value.clone() for name, value in whole(trainer.model).items()}
        trainer.train()
        assert isinstance(trainer.model, FSDPModule) == bool(way)
        assert any(not torch.equal(before[name], value) for name, value in whole(trainer.model).items())
        trained.append(whole(trainer.model))
    return trained


@pytest.mark.parametrize("policy", ["fewer_samples", "bilevel"])
@pytest.mark.parametrize("kind", ["grpo", "rloo", "dpo"])
def test_fsdp_ends_with_the_same_weights(tmp_path, kind, policy):
    """Where batches have no labels that could be counted."""
    for whole_model, sharded in run(__name__, "train_both_ways", tmp_path, kind, policy, str(tmp_path)):
        assert whole_model.keys() == sharded.keys()
        for name, value in whole_model.items():
            torch.testing.assert_close(sharded[name], value, rtol=1e-5, atol=1e-7)
