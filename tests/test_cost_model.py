"""The cost model against counted FLOPs of real steps: within 2 %, full and LoRA, dense and cut."""

import numpy as np
import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, Operation
from d2ft_peft.costs.counter import flop_counter
from d2ft_peft.costs.flops import cost_model
from d2ft_peft.costs.probe import probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY


WIDER = {
    "vit": {"hidden_size": 64, "intermediate_size": 256, "image_size": 32},
    "bert": {"hidden_size": 64, "intermediate_size": 256},
    "llama": {"hidden_size": 64, "intermediate_size": 192},
    "qwen3": {"hidden_size": 64, "intermediate_size": 192},
    "gpt2": {"n_embd": 64, "n_inner": 256},
}


def batch_of(name, n=2):
    batch = TINY[name].batch(n)
    if name == "vit":
        batch["pixel_values"] = torch.randn(n, 3, 32, 32)
    return batch


def counted(model, batch, plan):
    with get_runtime(model).use(plan), flop_counter() as counter:
        model(**batch).loss.backward()
    return counter.get_total_flops()


def rows(partition, seed):
    rng = np.random.default_rng(seed)
    full = np.full(partition.num_scheduled, Operation.FULL)
    top = np.where(partition.subnet_blocks >= 1, Operation.FULL, Operation.FORWARD_ONLY)
    return [full, top, *(rng.integers(0, 3, partition.num_scheduled) for _ in range(3))]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("mode", ["full", "full with boundary", "lora"])
@pytest.mark.parametrize("name", TINY)
def test_predicted_flops_are_the_counted_ones(name, mode, attention):
    model = TINY[name].build(**WIDER[name], attn_implementation=attention)
    config = D2FTConfig(r=4) if mode == "lora" else D2FTConfig(train_boundary="boundary" in mode)
    model = get_peft_model(model, config).train()
    batch, runtime = batch_of(name), get_runtime(model)
    partition = runtime.partitions["default"]
    costs = cost_model(model, partition, probe_model(model, partition, batch))
    for row in rows(partition, seed=len(name)):
        predicted = costs.step_flops(row[None], np.array([2]))
        assert predicted == pytest.approx(counted(model, batch, compile_plan(partition, row)), rel=0.02)


def test_forward_only_costs_a_third_in_full_fine_tuning_and_a_half_under_lora():
    for config, share in ((D2FTConfig(), 1 / 3), (D2FTConfig(r=1), 1 / 2)):
        model = get_peft_model(TINY["vit"].build(hidden_size=256, intermediate_size=1024), config)
        partition, batch = get_runtime(model).partitions["default"], TINY["vit"].batch()
        table = cost_model(model, partition, probe_model(model, partition, batch)).costs
        assert table[:, Operation.FORWARD_ONLY] / table[:, Operation.FULL] == pytest.approx(share, rel=0.03)
        assert not table[:, Operation.SHORTCUT].any()


def test_the_papers_cost_can_be_selected():
    model = get_peft_model(TINY["vit"].build(), D2FTConfig())
    partition, batch = get_runtime(model).partitions["default"], TINY["vit"].batch()
    probe = probe_model(model, partition, batch)
    table = cost_model(model, partition, probe, forward_only_cost=0.4).costs
    assert table[:, Operation.FORWARD_ONLY] / table[:, Operation.FULL] == pytest.approx(0.4)


def test_probing_leaves_the_model_as_it_was():
    model = get_peft_model(TINY["bert"].build(), D2FTConfig()).train()
    model.base_model.model.bert.pooler.eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    probe = probe_model(model, get_runtime(model).partitions["default"], TINY["bert"].batch())
    assert probe.sequence_length == 7
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
