"""Blocks that run on chosen tokens, against the twin that indexes by hand; what they leave alone, and refuse."""

import copy
from functools import partial

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from d2ft_peft import D2FTConfig, D2FTPlanner
from d2ft_peft.costs.counter import flop_counter
from d2ft_peft.engine import get_runtime
from tests.engine.token_cases import TOKENS, adapted, base_of, batch_of, blocks_of, run
from tests.models import TINY
from tests.token_twin import token_twin
from tests.tuners.cases import assert_plain
from tests.tuners.test_equality import (
    CHECKPOINTING,
    LORA,
    assert_same_gradients,
    enable_checkpointing,
    plain_twin,
    step,
)


CASES = [
    ("vit", "random_per_block", "sdpa", "none"), ("vit", "grid", "eager", "none"), ("vit", "variance", "sdpa", "none"),
    ("vit", "attention", "sdpa", "none"), ("bert", "random", "sdpa", "none"), ("bert", "grid", "eager", "left"),
    ("bert", "attention", "sdpa", "right"), ("llama", "random_per_block", "sdpa", "left"),
    ("llama", "grid", "sdpa", "right"),
    ("llama", "grid", "sdpa", "none"), ("llama", "random", "eager", "right"), ("qwen3", "random", "sdpa", "left"),
    ("gpt2", "random_per_block", "sdpa", "right"), ("gpt2", "grid", "eager", "left"),
    ("bert", "grid", "sdpa", "right, over keys"),
]  # fmt: skip


@pytest.mark.quick(2)
@pytest.mark.parametrize(("name", "choice", "attention", "padding"), CASES)
def test_chosen_tokens_equal_the_twin(name, choice, attention, padding):
    base, batch = base_of(name, attn_implementation=attention), batch_of(name, padding)
    model, twin = adapted(base, token_choice=choice), plain_twin(base, "full", False).train()
    outputs, chosen, _ = run(model, batch)
    for positions in chosen.values():
        kept, real = positions.shape[1], batch.get("attention_mask", positions.new_ones(3, TOKENS))
        real = real.reshape(3, TOKENS).long()
        assert kept < TOKENS and (real.gather(1, positions).sum(1) == real.sum(1).clamp(max=kept)).all()
    with token_twin(blocks_of(twin), chosen):
        expected = step(twin, batch)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.logits, expected.logits)
    assert_same_gradients(model, twin, "full")


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("kind", CHECKPOINTING)
@pytest.mark.parametrize("name", ["vit", "llama"])
def test_recomputation_runs_on_the_tokens_of_its_forward_pass(name, kind, mode):
    base = base_of(name)
    model, batch = adapted(base, mode, token_choice="random_per_block"), batch_of(name, "left")
    twin = plain_twin(base, mode, False).train()
    enable_checkpointing(model, kind)
    _, chosen, _ = run(model, batch)
    with token_twin(blocks_of(twin.base_model.model if mode == "lora" else twin), chosen):
        step(twin, batch)
    assert_same_gradients(model, twin, mode)


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_two_passes_of_a_micro_batch_keep_their_choices_apart(kind):
    """As of pairs: both forward passes are recomputed after the second has chosen anew."""
    assert_same(of_two_passes(kind), of_two_passes("off"))


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_checkpoints_around_the_call_of_a_block_keep_its_choice_too(kind, monkeypatch):
    """As earlier versions of transformers have them: the interception itself is recomputed."""
    expected = of_two_passes("off")

    def called(block, *args, **kwargs):
        return block._gradient_checkpointing_func(partial(nn.Module.__call__, block, **kwargs), *args)

    def around_the_call(model):
        for block in blocks_of(model.base_model.model):
            block.gradient_checkpointing = False
            monkeypatch.setattr(type(block), "__call__", called)

    assert_same(of_two_passes(kind, around_the_call), expected)


def of_two_passes(kind, change=lambda model: None):
    """Gradients of a micro-batch that runs its model twice."""
    model, batch = adapted(base_of("llama"), token_choice="random_per_block"), batch_of("llama")
    enable_checkpointing(model, kind)
    change(model)
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with planner.micro_batch(0):
        (model(**batch).loss - 0.5 * model(**batch).loss).backward()
        assert [len(one) for one in planner.runtime.passes] == [3, 3]
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient)


@pytest.mark.parametrize("name", ["vit", "llama"])
def test_a_budget_of_one_is_plain_fine_tuning_to_the_bit(name):
    base, batch = base_of(name), batch_of(name, "right")
    model = adapted(base, compute_budget=1.0, skip_unread_rows=False)
    twin = plain_twin(base, "full", False).train()
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with planner.micro_batch(0):
        assert step(model, batch).loss.equal(step(twin, batch).loss)
    assert_same_gradients(model, twin, "full", rtol=0, atol=0)
    assert planner.pop_logs()["flops_ratio"] == 1.0


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize(("model", "length"), [("bert", 320), ("llama", 320)])
def test_counted_flops_meet_the_budget_and_are_what_was_foreseen(model, length, mode):
    name, overrides = model, {"num_hidden_layers": 6, "max_position_embeddings": length, "intermediate_size": 96}
    base, ids = TINY[name].build(**overrides), torch.randint(3, 60, (1, length))
    batch = {"input_ids": ids, "labels": ids if TINY[name].kind == "causal" else torch.tensor([1])}
    model = adapted(base, mode, compute_budget=0.6, skip_unread_rows=False)
    planner = D2FTPlanner(model)
    flops = []
    for budget in (0.6, 1.0):
        model.peft_config["default"].compute_budget = budget
        planner.plan([dict(batch)])
        with planner.micro_batch(0), flop_counter() as counter:
            step(model, batch)
        flops.append(counter.get_total_flops())
        assert planner.last_flops() == pytest.approx(flops[-1], rel=0.02)
    assert flops[0] / flops[1] == pytest.approx(0.6, abs=0.006)
    logs = planner.pop_logs()
    assert logs["flops_ratio"] == pytest.approx((0.6 + 1) / 2, abs=0.004) and 0.7 < logs["compute_ratio"] < 0.85


def test_whatever_is_not_trained_sees_all_tokens():
    model, batch = adapted(base_of("llama")), batch_of("llama")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected, logits = model.eval().generate(**inputs, **settings), model(**inputs).logits
    model.train()
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with planner.micro_batch(0):
        assert model.generate(**inputs, **settings).equal(expected)
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs, use_cache=False).logits, logits)
        hidden = model(**batch, output_hidden_states=True).hidden_states
    assert {state.shape[1] for state in hidden} == {TOKENS}


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_nothing_of_the_model_changes_but_for_a_forward_that_unload_takes_away(mode):
    base = base_of("vit")
    model = adapted(base, mode, token_choice="variance")
    plain = get_peft_model(copy.deepcopy(base), D2FTConfig(**(LORA if mode == "lora" else {})))
    assert model.state_dict().keys() == plain.state_dict().keys()
    twin, batch = copy.deepcopy(model), batch_of("vit")
    _, chosen, _ = run(model, batch)
    _, again, _ = run(twin, batch)
    assert get_runtime(twin) is not get_runtime(model)
    assert all(positions.equal(again[block]) for block, positions in chosen.items())
    unloaded = model.unload()
    assert_plain(unloaded)
    torch.testing.assert_close(unloaded.eval()(**batch).logits, base.eval()(**batch).logits)


@pytest.mark.thorough
def test_an_adapter_over_tokens_and_one_over_samples_stand_side_by_side():
    model, batch = adapted(base_of("vit"), "lora"), batch_of("vit")
    model.add_adapter("whole", D2FTConfig(r=4, policy="fewer_samples"))
    model.add_adapter("less", D2FTConfig(r=4, policy="fewer_tokens", token_dense_share=0.0, token_margins=(2, 2)))
    model.peft_config["less"].compute_budget = 0.9
    kept = {}
    for adapter in ("default", "less"):
        model.set_adapter(adapter)
        kept[adapter] = set(run(model.train(), batch)[1])
    assert kept == {"default": {1, 2, 3}, "less": {2}}


REFUSED = {
    "experts": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2,
            num_local_experts=2, vocab_size=32,
        )), {}, "model_type='mixtral': its blocks have experts",
    ),
    "too few blocks": (lambda: TINY["vit"].build(), {"token_margins": (2, 1)}, r"token_margins=\[2, 1\] leaves none"),
    "later tokens": (lambda: TINY["gpt2"].build(), {"token_choice": "attention"}, "looks at later tokens"),
    "no patches": (lambda: TINY["bert"].build(), {"token_choice": "variance"}, "token_choice='variance' is for images"),
    "flex attention": (
        lambda: TINY["llama"].build(attn_implementation="flex_attention"), {}, "its attention is 'flex_attention'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_run_on_some_tokens_is_refused_with_the_reason(case):
    build, fields, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        get_peft_model(build(), D2FTConfig(policy="fewer_tokens", **fields))


PACKED = torch.cat([torch.arange(10), torch.arange(TOKENS - 10)]).expand(3, -1)
BAD_INPUTS = {
    "packed rows": ({"position_ids": PACKED}, "position_ids start again within a row"),
    "packed lengths": ({"cu_seq_lens_q": torch.tensor([0, 10, TOKENS])}, "cu_seq_lens_q packs several samples"),
    "an unknown axis": ({"bias": torch.zeros(3, TOKENS)}, "the blocks take 'bias' with an axis of 24"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_arguments_that_chosen_tokens_do_not_fit_are_refused(case):
    inputs, message = BAD_INPUTS[case]
    model, batch = adapted(base_of("llama")), batch_of("llama")
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with pytest.raises(ValueError, match=message), planner.micro_batch(0):
        model(**batch, **inputs)


def test_blocks_that_run_on_all_tokens_all_the_same_are_an_error():
    model, batch = adapted(base_of("vit")), batch_of("vit")
    for block in blocks_of(model.base_model.model)[1:]:
        block.eval()
    with pytest.raises(RuntimeError, match="the middle blocks ran on all tokens"):
        planner = D2FTPlanner(model)
        planner.plan([dict(batch)])
        with planner.micro_batch(0):
            step(model, batch)


def test_a_checkpoint_of_ones_own_around_a_block_is_refused():
    model, batch = adapted(base_of("vit")), batch_of("vit")
    block = blocks_of(model.base_model.model)[2]
    intercepted = block.forward
    block.forward = lambda *args, **kwargs: checkpoint(intercepted, *args, use_reentrant=False, **kwargs)
    planner = D2FTPlanner(model)
    planner.plan([dict(batch)])
    with pytest.raises(RuntimeError, match="a checkpoint that D2FT does not know"), planner.micro_batch(0):
        step(model, batch)
