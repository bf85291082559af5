"""Below the lowest block that learns from a micro-batch nothing is kept for a backward pass, and none runs."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model

from d2ft_peft import D2FTConfig, Operation
from d2ft_peft.costs.counter import flop_counter
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import TINY
from tests.tuners.test_equality import CHECKPOINTING, step


S, O, F = Operation.SHORTCUT, Operation.FORWARD_ONLY, Operation.FULL  # noqa: E741
UPPER = {"layers_to_transform": [1, 2]}
SITUATIONS = {
    "LoRA on the upper blocks": ({"r": 4, **UPPER}, (F, F, F)),
    "full fine-tuning of the upper blocks": (UPPER, (F, F, F)),
    "FORWARD_ONLY below a depth": ({"r": 4}, (O, F, F)),
    "SHORTCUT below a depth": ({}, (S, F, F)),
    "frozen embeddings": ({"r": 4}, (F, F, F)),
}
MODELS = pytest.mark.parametrize(
    "name, situation", [*zip(["vit", "bert", "llama", "vit", "bert"], SITUATIONS, strict=True)]
)


def build(name, situation, dtype=torch.float64):
    fields, row = SITUATIONS[situation]
    model = get_peft_model(TINY[name].build().to(dtype), D2FTConfig(**fields)).train()
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data += 0.02 * torch.randn_like(parameter)
    partition = get_runtime(model).partitions["default"]
    plan = compile_plan(partition, np.array([row[block] for block in partition.subnet_blocks]))
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in TINY[name].batch().items()}
    return model, plan, batch


def lowest(situation):
    return 0 if situation == "frozen embeddings" else 1


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


def blocks_of(model):
    base = model.get_base_model()
    return [base.get_submodule(name) for name in get_runtime(model).partitions["default"].blocks]


def watch_saving(model):
    """A list that fills with the block within which each tensor is saved for backward, -1 outside of blocks."""
    saved, place = [], [-1]
    for index, block in enumerate(blocks_of(model)):
        block.register_forward_pre_hook(lambda *_, index=index: place.append(index))
        block.register_forward_hook(lambda *_: place.__delitem__(-1))

    def pack(tensor):
        saved.append(place[-1])
        return tensor

    return saved, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)


def counted(model, plan, batch):
    """FLOPs of backward alone."""
    with get_runtime(model).use(plan):
        loss = model(**batch).loss
        with flop_counter() as counter:
            loss.backward()
    return counter.get_total_flops()


@MODELS
def test_embeddings_that_are_made_to_require_a_gradient_change_nothing(name, situation):
    """Neither gradients nor what is saved nor what backward computes."""
    model, plan, batch = build(name, situation)
    required = copy.deepcopy(model)
    required.enable_input_require_grads()
    assert counted(required, plan, batch) == counted(model, plan, batch) > 0
    assert gradients(required).keys() == gradients(model).keys() != set()
    for key, gradient in gradients(model).items():
        assert gradients(required)[key].equal(gradient), key
    for one in (model, required):
        saved, hooks = watch_saving(one)
        with get_runtime(one).use(plan), hooks:
            step(one, batch)
        assert not {*range(lowest(situation))} & {*saved} and lowest(situation) in saved


@pytest.mark.quick(6)
@MODELS
@pytest.mark.parametrize("kind", [kind for kind in CHECKPOINTING if kind != "off"])
@pytest.mark.parametrize("required", [True, False], ids=["inputs require gradients", "they do not"])
def test_checkpointing_recomputes_only_what_learns(name, situation, kind, required):
    model, plan, batch = build(name, situation)
    with get_runtime(model).use(plan):
        step(model, batch)
    checkpointed = copy.deepcopy(model)
    checkpointed.zero_grad()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs=CHECKPOINTING[kind])
    (checkpointed.enable_input_require_grads if required else checkpointed.disable_input_require_grads)()
    calls = []
    partition = get_runtime(checkpointed).partitions["default"]
    for branch in (branch for branch in partition.branches if branch.name == "attention"):
        checkpointed.get_base_model().get_submodule(branch.row.name).register_forward_hook(
            lambda *_, block=branch.block: calls.append(block)
        )
    with get_runtime(checkpointed).use(plan):
        step(checkpointed, batch)
    for key, gradient in gradients(model).items():
        torch.testing.assert_close(gradients(checkpointed)[key], gradient, msg=key)
    if "SHORTCUT" not in situation:
        assert [calls.count(block) for block in range(3)] == [1 + (block >= lowest(situation)) for block in range(3)]


def test_where_embeddings_learn_everything_above_them_has_a_backward_pass():
    base = TINY["bert"].build().double()
    model = get_peft_model(base, D2FTConfig(r=4, modules_to_save=["word_embeddings"], **UPPER)).train()
    partition = get_runtime(model).partitions["default"]
    with get_runtime(model).use(compile_plan(partition, np.full(partition.num_scheduled, F))):
        step(model, TINY["bert"].batch())
    embeddings = base.bert.embeddings.word_embeddings.modules_to_save["default"].weight
    ours, _ = embeddings.grad.clone(), model.zero_grad()
    with pytest.warns(UserWarning, match="without a schedule"):
        step(model, TINY["bert"].batch())
    assert embeddings.grad.equal(ours) and ours.abs().sum() > 0


@pytest.mark.parametrize("given", ["by a caller", "by a hook", "by a hook that watches the gradient"])
def test_a_gradient_that_somebody_asked_for_arrives(given):
    """Inputs of the caller's own, an offset that a hook adds, and the output of the embeddings where it is watched."""
    model, plan, batch = build("llama", "LoRA on the upper blocks")
    embeddings = model.get_input_embeddings()
    seen = []

    def watch(output):
        output.requires_grad_().register_hook(seen.append)

    if given == "by a caller":
        wanted = embeddings(batch.pop("input_ids")).detach().requires_grad_()
        batch["inputs_embeds"] = wanted
    elif given == "by a hook":
        wanted = torch.zeros(32, dtype=torch.float64, requires_grad=True)
        embeddings.register_forward_hook(lambda module, args, output: output + wanted)
    else:
        embeddings.register_forward_hook(lambda *given: watch(given[-1]))
    with get_runtime(model).use(plan):
        step(model, batch)
    found = seen[0] if given.endswith("gradient") else wanted.grad
    assert found.abs().sum() > 0


def test_a_block_that_is_unfrozen_between_two_micro_batches_learns():
    model, plan, batch = build("vit", "LoRA on the upper blocks")
    norm = blocks_of(model)[0].layernorm_before.weight
    for learns in (False, True):
        norm.requires_grad = learns
        with get_runtime(model).use(plan):
            step(model, batch)
        assert (norm.grad is not None) == learns


def test_the_graph_is_cut_in_copies_of_the_model_and_nowhere_after_unload():
    model, plan, batch = build("llama", "FORWARD_ONLY below a depth")
    copied = copy.deepcopy(model)
    assert [entry.module for entry in get_runtime(copied).entries] == blocks_of(copied)
    plain = model.unload()
    assert not any("forward" in vars(module) for module in plain.modules())
    assert not plain.get_input_embeddings()._forward_hooks
