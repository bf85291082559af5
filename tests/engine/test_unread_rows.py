"""Rows that no loss reads are left out of the last block and the head: loss and every gradient stay what they are."""

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn

from d2ft_peft import D2FTConfig, D2FTPlanner, Operation
from d2ft_peft.costs import flop_counter, probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.engine.intercept import Intercept
from d2ft_peft.engine.read_rows import IGNORED, RULES
from d2ft_peft.engine.unread_rows import UnreadRows
from d2ft_peft.partition import base_model
from d2ft_peft.planning.model_costs import ModelCosts
from tests.models import TINY, Tiny
from tests.tuners.test_equality import enable_checkpointing


RULE = {rule.name: rule for rule in RULES}
MODELS = {
    **TINY,
    "llama classifier": Tiny(
        tf.LlamaConfig, tf.LlamaForSequenceClassification, {**TINY["llama"].kwargs, "num_labels": 5},
    ),
    "gpt2 classifier": Tiny(
        tf.GPT2Config, tf.GPT2ForSequenceClassification, {**TINY["gpt2"].kwargs, "num_labels": 5},
    ),
    "bert tagger": Tiny(tf.BertConfig, tf.BertForTokenClassification, TINY["bert"].kwargs),
    "bert masked lm": Tiny(tf.BertConfig, tf.BertForMaskedLM, TINY["bert"].kwargs),
}  # fmt: skip
RULE_OF = {
    "vit": "first", "bert": "first", "llama classifier": "last_token", "gpt2 classifier": "last_token",
    "llama": "shifted_labels", "qwen3": "shifted_labels", "gpt2": "shifted_labels",
    "bert tagger": "labels", "bert masked lm": "labels",
}  # fmt: skip
HAS_HEAD = ("llama", "qwen3", "gpt2")


def padded(ids, labels=None):
    """Samples of 9, 4 and 6 tokens, two padded on the right and one on the left."""
    mask = torch.ones_like(ids)
    mask[1, 4:], mask[2, :3] = 0, 0
    ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask} | ({} if labels is None else {"labels": labels})


def batch_of(name, labels="masked prompts"):
    """As data comes: ragged lengths; where there is a label for each token, none on prompts and padding."""
    if name == "vit":
        return {k: v.double() if v.is_floating_point() else v for k, v in TINY["vit"].batch().items()}
    generator = torch.Generator().manual_seed(1)
    batch = padded(torch.randint(3, 60, (3, 9), generator=generator))
    if RULE_OF[name] in ("first", "last_token"):
        return batch | {"labels": torch.tensor([1, 4, 0])}
    targets = batch["input_ids"] % 5 if name == "bert tagger" else batch["input_ids"].clone()
    if labels != "every label counts":
        targets[batch["attention_mask"] == 0] = IGNORED
        targets[0, :5] = targets[2, :6] = IGNORED
        targets[1] = IGNORED if labels == "none in one sample" else targets[1]
    return batch | {"labels": targets}


def build(name, mode="full", attention="sdpa", **config):
    model = MODELS[name].build(attn_implementation=attention).double()
    config |= {"r": 4, "init_lora_weights": False} if mode == "lora" else {"train_boundary": True}
    return get_peft_model(model, D2FTConfig(**config)).train()


def leave_out(model, rule, head=False):
    runtime = get_runtime(model)
    unread = UnreadRows(base_model(model), runtime, runtime.partitions["default"], RULE[rule], head)
    unread.install()
    return unread


def full_plan(model, row=None):
    partition = get_runtime(model).partitions["default"]
    return compile_plan(partition, np.full(partition.num_scheduled, Operation.FULL) if row is None else row)


def step(model, batch, plan=None):
    """Loss and gradients of two micro-batches."""
    model.zero_grad()
    for _ in range(2):
        with get_runtime(model).use(full_plan(model) if plan is None else plan):
            loss = model(**batch).loss
            loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # Causal language models compute their loss in float32.
        tolerance = {"rtol": 1e-9, "atol": 1e-12} if value.dtype == torch.float64 else {}
        torch.testing.assert_close(ours[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def left_out(model):
    (reading,) = get_runtime(model).readings
    return reading and reading.ran


CASES = [
    *[(name, "full", "non-reentrant") for name in MODELS],
    *[(name, "lora", "off") for name in MODELS],
    ("vit", "full", "reentrant"), ("llama", "lora", "reentrant"),
]  # fmt: skip


@pytest.mark.quick(4)
@pytest.mark.parametrize("name, mode, checkpointing", CASES)
def test_loss_and_every_gradient_stay(name, mode, checkpointing):
    model, batch = build(name, mode), batch_of(name)
    enable_checkpointing(model, checkpointing)
    expected = step(model, batch)
    leave_out(model, RULE_OF[name], name in HAS_HEAD)
    assert_same(step(model, batch), expected)
    names, rows = left_out(model)
    assert rows < 0.5 * 3 * 9 and len(names) >= 3


@pytest.mark.quick(2)
@pytest.mark.parametrize("name", ["vit", "bert", "gpt2 classifier", "llama", "gpt2"])
def test_loss_and_every_gradient_stay_under_eager_attention(name):
    model, batch = build(name, attention="eager"), batch_of(name)
    batch = {key: value[:2] for key, value in batch.items()}  # in float64 it makes no numbers of padding on the left
    expected = step(model, batch)
    leave_out(model, RULE_OF[name], name in HAS_HEAD)
    assert_same(step(model, batch), expected)
    assert left_out(model)


@pytest.mark.quick(2)
@pytest.mark.parametrize("labels", ["none in one sample", "every label counts"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert masked lm"])
def test_labels_may_be_anywhere(name, labels):
    model, batch = build(name), batch_of(name, labels)
    expected = step(model, batch)
    leave_out(model, RULE_OF[name], name in HAS_HEAD)
    assert_same(step(model, batch), expected)


def test_labels_that_are_shifted_already_and_a_number_of_items_are_handed_on():
    model, batch = build("llama"), batch_of("llama")
    shifted = nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].contiguous()
    batch |= {"shift_labels": shifted, "num_items_in_batch": torch.tensor(17)}
    expected = step(model, batch)
    leave_out(model, "shifted_labels", head=True)
    assert_same(step(model, batch), expected)
    assert left_out(model)[1] == int((shifted != IGNORED).sum())


def test_a_batch_in_which_no_label_counts_runs_whole():
    model, batch = build("llama"), batch_of("llama")
    batch |= {"labels": torch.full_like(batch["labels"], IGNORED), "num_items_in_batch": torch.tensor(1)}
    expected = step(model, batch)
    leave_out(model, "shifted_labels", head=True)
    assert_same(step(model, batch), expected)
    assert left_out(model) is None


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_a_plan_that_leaves_heads_out_of_the_last_block_is_followed(name):
    model, batch = build(name), batch_of(name)
    partition = get_runtime(model).partitions["default"]
    row = np.resize([2, 1, 0], partition.num_scheduled)
    plan, top_full = full_plan(model, row), full_plan(model, np.where(partition.subnet_blocks == 2, 2, row))
    expected = step(model, batch, plan), step(model, batch, top_full)
    leave_out(model, RULE_OF[name], name in HAS_HEAD)
    assert_same(step(model, batch, plan), expected[0])
    assert left_out(model) is None or left_out(model)[0] == {"lm_head"}
    assert_same(step(model, batch, top_full), expected[1])
    assert len(left_out(model)[0]) > 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode, attention", [("full", "sdpa"), ("lora", "eager")])
@pytest.mark.parametrize("name", ["vit", "bert", "llama classifier", "llama", "gpt2"])
def test_counted_flops_are_the_foreseen_ones(name, mode, attention):
    wider = {"n_embd": 64, "n_inner": 256} if "gpt2" in name else {"hidden_size": 64, "intermediate_size": 256}
    model = MODELS[name].build(**wider, attn_implementation=attention)
    config = D2FTConfig(r=4) if mode == "lora" else D2FTConfig(train_boundary=True)
    model, batch = get_peft_model(model, config).train(), batch_of(name)
    batch = {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}
    runtime = get_runtime(model)
    partition = runtime.partitions["default"]
    costs = ModelCosts(model, partition)
    costs.probe = probe_model(model, partition, batch)
    leave_out(model, RULE_OF[name], name in HAS_HEAD)
    top = np.where(partition.subnet_blocks == 2, Operation.FULL, Operation.FORWARD_ONLY)
    for row in (np.full(partition.num_scheduled, Operation.FULL), top):
        with runtime.use(full_plan(model, row)), flop_counter() as counter:
            model(**batch).loss.backward()
            unread = [left_out(model)]
        assert costs.flops(row, runtime.passes, unread) == pytest.approx(counter.get_total_flops(), rel=0.02)
        assert costs.flops(row, runtime.passes, unread) < 0.97 * costs.flops(row, runtime.passes)


def test_evaluation_reference_passes_and_generation_see_the_whole_model():
    model, batch = build("llama"), batch_of("llama")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.eval()(**batch).logits.detach(), model.generate(**inputs, **settings)
    leave_out(model, "shifted_labels", head=True)
    with get_runtime(model).use(full_plan(model)):
        assert model(**batch).logits.equal(expected[0])
        assert model.generate(**inputs, **settings).equal(expected[1])
        with torch.no_grad():
            torch.testing.assert_close(model.train()(**batch).logits, expected[0])
        assert model(**batch).logits.shape[:2] == (1, left_out(model)[1])


def test_who_asks_for_hidden_states_gets_all_of_them():
    model, batch = build("bert"), batch_of("bert")
    leave_out(model, "first")
    with get_runtime(model).use(full_plan(model)):
        states = model(**batch, output_hidden_states=True).hidden_states
    assert left_out(model) is None
    torch.testing.assert_close(states[-1], model.eval()(**batch, output_hidden_states=True).hidden_states[-1])


def traces(model):
    base = base_model(model)
    forwards = [m for m in base.modules() if isinstance(m.__dict__.get("forward"), Intercept)]
    return len(forwards), len(base._forward_hooks), len(base._forward_pre_hooks), "_loss_function" in base.__dict__


def test_removing_unloading_and_copies_leave_no_trace():
    model, batch = build("llama"), batch_of("llama")
    before, plain = traces(model), copy.deepcopy(model).unload()
    expected = step(model, batch)
    unread = leave_out(model, "shifted_labels", head=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same(step(copied, batch), expected)
        assert left_out(copied)
        assert traces(copied.unload()) == (0, 0, 0, False)
    unread.remove()
    assert traces(model) == before and get_runtime(model).unread is None
    leave_out(model, "shifted_labels", head=True)
    D2FTPlanner(model)  # begins anew
    assert traces(model) == before
    leave_out(model, "shifted_labels", head=True)
    unloaded = model.unload()
    assert traces(unloaded) == traces(plain) == (0, 0, 0, False)
