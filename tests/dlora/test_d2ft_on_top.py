"""D2FT on top of DLoRA: what a schedule leaves out is neither computed in the cloud nor sent."""

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, TrainingArguments

from d2ft_peft import D2FTConfig, D2FTTrainer
from d2ft_peft.dlora import KillReviveCallback, connect

from .cases import check_close, collate, ragged, samples, serve, tiny_base
from .test_killed_modules import trained


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    base = tiny_base(tmp_path_factory.mktemp("llama"))
    with serve(base) as (_, address):
        yield base, address


def config(**options):
    return D2FTConfig(r=4, target_modules=PROJECTIONS, **options)


def train(model, folder, *callbacks):
    args = TrainingArguments(
        str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
        save_strategy="no",
    )  # fmt: skip
    trainer = D2FTTrainer(
        model=model, args=args, data_collator=collate, train_dataset=samples(18), callbacks=list(callbacks)
    )
    trainer.train()
    return trainer


def both(llama, options, **placement):
    base, address = llama
    torch.manual_seed(0)
    local = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64), config(**options))
    torch.manual_seed(0)
    return local, connect(address, base, config(**options), dtype=torch.float64, **placement)


BY_LOSS = {"backward_score": "loss", "forward_score": "loss"}
BY_BLOCK = {
    "fewer samples": {"policy": "fewer_samples", "compute_budget": 0.5},
    "samples by their loss": {"policy": "importance", "compute_budget": 0.5},
    "from a depth up": {"policy": "depth", "compute_budget": 0.6, **BY_LOSS},
    "blocks left out": {"policy": "stochastic_depth", "compute_budget": 0.6},
    "blocks that train in turns": {"policy": "lisa", "compute_budget": 0.7, "interval": 1},
    "constant for a part": {"num_full": 1, "num_forward_only": 2, **BY_LOSS},
}


PLACEMENTS = {
    "head in the cloud": ({"head": "cloud"}, ["fewer samples", "blocks left out"]),
    "edge blocks": ({"edge_blocks": (1, 1)}, ["from a depth up", "blocks that train in turns"]),
    "parts in flight": ({"in_flight": 2}, ["constant for a part"]),
}
CASES = [(name, {}) for name in BY_BLOCK] + [(name, where) for where, names in PLACEMENTS.values() for name in names]


@pytest.mark.quick(1)
@pytest.mark.parametrize(("name", "placement"), CASES, ids=str)
def test_a_scheduled_run_is_the_local_one(llama, tmp_path, name, placement):
    options = BY_BLOCK[name]
    local, edge = both(llama, options, **placement)
    logs = []
    for model in (local, edge):
        trainer = train(model, tmp_path)
        logs.append([entry["compute_ratio"] for entry in trainer.state.log_history if "loss" in entry])
    check_close(trained(edge), trained(local), 1e-7)
    assert logs[1] == pytest.approx(logs[0], rel=0.2)  # of the cloud's norms nothing is counted
    assert min(logs[1]) < 0.7


@pytest.mark.thorough
def test_what_is_not_run_is_not_sent(llama, tmp_path):
    sent = {}
    for share in (1.0, 0.5):
        _, edge = both(llama, {"policy": "fewer_samples", "compute_budget": share})
        train(edge, tmp_path)
        sent[share] = edge.remote_span.link.traffic.sent
    assert sent[0.5] == pytest.approx(0.5 * sent[1.0], rel=0.15)


@pytest.mark.thorough
def test_both_budgets_multiply(llama, tmp_path):
    sent = {}
    for share in (1.0, 0.5):
        for active in (None, 3):
            _, edge = both(llama, {"policy": "fewer_samples", "compute_budget": share})
            killing = [] if active is None else [KillReviveCallback(active=active, interval=100, choose="fixed")]
            train(edge, tmp_path, *killing)
            sent[share, active] = edge.remote_span.link.traffic.sent
    by_samples, by_modules = sent[0.5, None] / sent[1.0, None], sent[1.0, 3] / sent[1.0, None]
    assert by_modules < 0.4
    assert sent[0.5, 3] / sent[1.0, None] == pytest.approx(by_samples * by_modules, rel=0.15)


def test_single_heads_cannot_be_asked_of_the_cloud(llama, tmp_path):
    _, edge = both(llama, {"policy": "random", "num_full": 2})
    with pytest.raises(ValueError, match="different operations, and the cloud runs whole blocks"):
        train(edge, tmp_path)


@pytest.mark.thorough
def test_generation_between_steps_sees_the_whole_model(llama, tmp_path):
    local, edge = both(llama, {"policy": "stochastic_depth", "compute_budget": 0.6})
    for model in (local, edge):
        train(model, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(edge.eval()(**ragged()).logits, local.eval()(**ragged()).logits)


@pytest.mark.thorough
def test_the_size_of_subnets_stands_in_for_weights_that_are_elsewhere(llama, tmp_path):
    _, edge = both(llama, {"num_full": 2})
    with pytest.warns(UserWarning, match="weights of 3 blocks are elsewhere"):
        train(edge, tmp_path)
