"""The benchmark of SparseLoRA's rules on a tiny Llama: its cut layers beside masks, and what a run costs."""

import copy
from types import SimpleNamespace

import pytest
import sparse_lora
import torch
from peft import LoraConfig, get_peft_model
from sparse_frozen import ROLES, Control, intercept

from tests.models import TINY


def pairs(count):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (5 + i % 4,), generator=generator).tolist() for i in range(count)]
    return [{"input_ids": row, "labels": [-100] * 3 + row[3:]} for row in ids]


def build():
    return TINY["llama"].build(tie_word_embeddings=True)


@pytest.fixture
def model():
    config = LoraConfig(r=2, target_modules=list(ROLES), init_lora_weights=False)
    return get_peft_model(build(), config).double()


def mask(model, control):
    """The obvious twin: frozen products on everything, then times zero where they are left out."""
    for index in control.blocks:
        block = model.get_base_model().model.layers[index]
        for parent in (block.self_attn, block.mlp):
            for name, layer in parent.named_children():
                if name not in ROLES:
                    continue
                frozen = layer.base_layer
                takes_kept = name in ("o_proj", "down_proj")
                size = frozen.in_features if takes_kept else frozen.out_features
                keep = torch.ones(len(control.cut) + len(control.whole), size, dtype=torch.float64)
                keep[control.cut] = 0
                keep[control.cut[:, None], control.kept[index][ROLES[name]]] = 1
                if takes_kept:
                    frozen.register_forward_pre_hook(lambda m, args, keep=keep: (args[0] * keep.view_as(args[0]),))
                else:
                    frozen.register_forward_hook(lambda m, args, out, keep=keep: out * keep.view_as(out))


@pytest.mark.parametrize("row", ["columns:skip=0.5", "channels:skip=0.25", "columns:skip=0.5,tokens=all"])
def test_cut_layers_equal_masked_ones(model, row):
    kind, options = sparse_lora.parse(row)
    twin = copy.deepcopy(model)
    control = Control(kind, options["skip"], blocks=frozenset([0, 2]))
    intercept(model, control)
    # Equally long: padding is left out by the fast way, and nothing reads it.
    batch = sparse_lora.collate([pair for pair in pairs(12) if len(pair["input_ids"]) == 6])
    control.set_rows(sparse_lora.cut_tokens(batch, options), batch["real"])
    loss = sparse_lora.loss_of(model, batch)
    loss.backward()
    mask(twin, control)
    expected = sparse_lora.loss_of(twin, batch)
    expected.backward()
    assert len(control.cut) > 0 and loss.item() == pytest.approx(expected.item(), abs=1e-12)
    ours = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-12, rtol=1e-9)


def test_padding_changes_nothing(model):
    control = Control("columns", 0.5, blocks=frozenset([1]))
    intercept(model, control)
    short, long = pairs(4)[0], pairs(4)[3]
    alone, padded = sparse_lora.collate([short]), sparse_lora.collate([short, long])
    control.set_rows(sparse_lora.cut_tokens(alone, {"tokens": "all"}), alone["real"])
    first = sparse_lora.loss_of(model, alone)
    kept = control.kept[1]
    control.set_rows(sparse_lora.cut_tokens(padded, {"tokens": "all"}), padded["real"])
    padded["labels"][1] = -100
    assert len(control.cut) == len(short["input_ids"]) + len(long["input_ids"])
    model.get_base_model().model.layers[1]._forward_pre_hooks.clear()
    control.kept[1] = kept
    assert sparse_lora.loss_of(model, padded).item() == pytest.approx(first.item(), abs=1e-12)


@pytest.mark.thorough
def test_rows_cost_what_they_leave():
    args = SimpleNamespace(steps=2, batch=4, lr=1e-2)
    names = ["dense:share=0.5", "columns:skip=0.5,blocks=all,start=0", "columns:skip=0.5,start=0.5,lora=cut"]
    rows = [sparse_lora.run(name, 0, build, pairs(16), pairs(6), args) for name in names]
    half, everywhere, ruled = rows
    assert half["flops"] == half["frozen"] == 0.5
    assert (
        0.6 < everywhere["flops"] < ruled["flops"] < 1 and len(everywhere["blocks"]) == 3 and len(ruled["blocks"]) == 1
    )
    tokens = sum(len(pair["input_ids"]) for pair in pairs(16))
    uncounted = 0.5 * 16 * 3 / tokens  # of a pair, the first two tokens and the last have no loss
    assert everywhere["frozen"] == pytest.approx(1 - uncounted)
    assert ruled["frozen"] == pytest.approx(1 - uncounted / 3 / 2)
    assert names[2] in sparse_lora.table(rows)


def test_a_rule_that_is_off_shows(model):
    batch = sparse_lora.collate(pairs(4))
    losses = {}
    for cut_lora in (False, True):
        control = Control("columns", 0.75, cut_lora=cut_lora, blocks=frozenset([0, 1, 2]))
        other = copy.deepcopy(model)
        intercept(other, control)
        control.set_rows(sparse_lora.cut_tokens(batch, {"tokens": "prompt"}), batch["real"])
        losses[cut_lora] = sparse_lora.loss_of(other, batch).item()
        control.set_rows(sparse_lora.cut_tokens(batch, None), batch["real"])
        assert sparse_lora.loss_of(other, batch).item() == pytest.approx(sparse_lora.loss_of(model, batch).item())
    assert losses[False] != pytest.approx(losses[True], rel=1e-6)
