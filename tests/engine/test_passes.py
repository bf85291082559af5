"""Which forward passes follow a plan, what is recorded of them, and what a pass that broke off leaves behind."""

import warnings

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from d2ft_peft import Operation
from d2ft_peft.engine import compile_plan, get_runtime
from tests.tuners.test_equality import assert_same_gradients, enable_checkpointing, step
from tests.tuners.test_execution import build


CHECKPOINTING = ["off", "non-reentrant", "reentrant"]


def mixed(partition):
    return compile_plan(partition, np.resize([2, 1, 0], partition.num_scheduled))


def checkpoint(model, kind):
    if kind != "off":
        enable_checkpointing(model, kind)


def test_generation_within_a_micro_batch_is_that_of_the_whole_model():
    model, _, _, partition, batch = build("llama")
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.eval().generate(**inputs, **settings)
    model.train()
    runtime = get_runtime(model)
    with runtime.use(mixed(partition)):
        assert model.generate(**inputs, **settings).equal(expected)
        assert not runtime.executed and not runtime.passes


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_reference_pass_between_forward_and_backward_is_whole_and_changes_nothing(kind):
    model, twin, _, partition, batch = build("llama")
    batch = {**batch, "use_cache": False}
    checkpoint(model, kind)
    runtime, plan = get_runtime(model), mixed(partition)
    with runtime.use(plan):
        step(model, batch)
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with runtime.use(plan):
        loss = model(**batch).loss
        with torch.no_grad():
            reference = model(**batch).logits
        loss.backward()
        assert len(runtime.passes) == 1
    with torch.no_grad():
        torch.testing.assert_close(reference, twin(**batch).logits)
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name])


def test_a_planned_pass_refuses_a_cache_that_holds_something():
    model, _, _, partition, batch = build("llama")
    cache = DynamicCache()
    with torch.no_grad():
        model.eval()(input_ids=batch["input_ids"], past_key_values=cache)
    model.train()
    with get_runtime(model).use(mixed(partition)), pytest.raises(ValueError, match="past_key_values holds keys"):
        model(input_ids=batch["input_ids"], past_key_values=cache)


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_every_planned_pass_is_recorded_once(kind):
    model, _, _, partition, batch = build("llama")
    checkpoint(model, kind)
    runtime = get_runtime(model)
    short = {key: value[:2, :5] for key, value in batch.items()}
    with runtime.use(mixed(partition)):
        (model(**batch).loss + model(**short).loss).backward()
    assert runtime.passes == [(3, 7), (2, 5)]
    with runtime.use(mixed(partition)):
        assert runtime.passes == []


def test_a_region_in_eval_mode_is_reported_as_it_ran():
    model, _, _, partition, batch = build("vit")
    model.get_base_model().get_submodule(partition.blocks[0]).eval()
    runtime, plan = get_runtime(model), compile_plan(partition, np.zeros(partition.num_scheduled, dtype=int))
    with runtime.use(plan):
        model(**batch)
    for index, branch in enumerate(partition.branches):
        assert runtime.executed[index] == (None if branch.block == 0 else plan.cells[index])


def test_evaluation_with_gradients_is_not_recorded():
    model, _, _, partition, batch = build("vit")
    runtime = get_runtime(model)
    with runtime.use(mixed(partition)):
        model.eval()(**batch)
    assert not runtime.executed and not runtime.passes


@pytest.mark.quick(4)
@pytest.mark.parametrize("row", [[2, 1, 0], [0]])
@pytest.mark.parametrize("leave", [True, False])
@pytest.mark.parametrize("name", ["bert", "vit", "llama"])
def test_an_interrupted_pass_leaves_nothing_behind(name, leave, row):
    """Whether the micro-batch ends with it, or the exception is caught inside."""
    model, twin, _, partition, batch = build(name, shortcut="mean")
    runtime = get_runtime(model)
    plan = compile_plan(partition, np.resize(row, partition.num_scheduled))

    def interrupt(*args):
        raise KeyboardInterrupt

    def evaluate():
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**batch).logits, twin.eval()(**batch).logits)
        model.train()

    base = model.get_base_model()
    # BERT: between a region and the row-parallel projection that follows it. Elsewhere: with half of the blocks run.
    where = partition.branches[2].row.name.rsplit(".", 1)[0] if name == "bert" else partition.blocks[1]
    hook = base.get_submodule(where).register_forward_pre_hook(interrupt)
    if leave:
        with pytest.raises(KeyboardInterrupt), runtime.use(plan):
            model(**batch)
        assert runtime.plan is None and not runtime.follow
        assert not any(mean._seen for mean in runtime.means.values())
        hook.remove()
        evaluate()
    else:
        with runtime.use(plan):
            with pytest.raises(KeyboardInterrupt):
                model(**batch)
            hook.remove()
            evaluate()
    assert runtime.run is None


@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_loop_that_knows_no_plan_trains_every_head_and_is_told_once(kind):
    model, twin, _, _, batch = build("llama")
    batch = {**batch, "use_cache": False}
    checkpoint(model, kind)
    step(twin, batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            step(model, batch)
    assert sum("without a schedule" in str(warning.message) for warning in caught) == 1
    assert_same_gradients(model, twin, "full")


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_by_hand_is_right_or_an_error(reentrant):
    model, _, _, partition, batch = build("vit")
    plan, runtime = mixed(partition), get_runtime(model)
    with runtime.use(plan):
        step(model, batch)
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    block = model.get_base_model().get_submodule(partition.blocks[0])
    own = block.forward
    block.forward = lambda x, *args, **kwargs: torch.utils.checkpoint.checkpoint(
        own, x, *args, use_reentrant=reentrant, **kwargs
    )
    model.enable_input_require_grads()
    model.get_base_model().vit.embeddings.register_forward_hook(lambda m, a, out: out.requires_grad_())
    with runtime.use(plan):
        loss = model(**batch).loss
        if reentrant:
            with pytest.raises(RuntimeError, match="recomputed in backward otherwise than it ran"):
                loss.backward()
            return
        loss.backward()
    for name, p in model.named_parameters():
        if name in expected:
            torch.testing.assert_close(p.grad, expected[name])


def test_all_full_is_reported_where_every_head_ran():
    model, _, _, partition, batch = build("vit")
    runtime = get_runtime(model)
    with runtime.use(compile_plan(partition, np.full(partition.num_scheduled, Operation.FULL))):
        model(**batch)
    assert set(runtime.executed.values()) == {None} and len(runtime.executed) == len(partition.branches)
