"""Which features, and which entries of other tensors, belong to a head."""

import pytest
import torch
import transformers as tf
from torch import nn

from d2ft_peft import Architecture, BranchSpec, partition_model
from d2ft_peft.engine.plan import Heads
from d2ft_peft.engine.region_view import take_heads
from d2ft_peft.engine.subset_linear import select
from d2ft_peft.head_parallel.requirements import check_branches
from d2ft_peft.partition import FeatureLayout, PerHead, architecture
from d2ft_peft.partition.head_layouts import head_layouts
from tests.zoo_decoders import DECODERS


# By family: layouts of attention's column-parallel projections and of the row-parallel one.
EXPECTED = {
    "gpt_neox": ([FeatureLayout(4, 24)], FeatureLayout(4, 8)),
    "falcon": ([FeatureLayout(2, 32)], FeatureLayout(2, 16)),  # two queries, a key and a value each
    "falcon, multi-query": ([FeatureLayout(1, 48)], FeatureLayout(1, 32)),
    "mpt": ([FeatureLayout(4, 8, parts=3)], FeatureLayout(4, 8)),
    "phi3": ([FeatureLayout(2, 8, parts=(2, 1, 1))], FeatureLayout(2, 16)),
    "codegen": ([FeatureLayout(2, 4, parts=12)], FeatureLayout(2, 4, parts=4)),
    "qwen3_next": ([FeatureLayout(2, 32), FeatureLayout(2, 8), FeatureLayout(2, 8)], FeatureLayout(2, 16)),
    "olmo2": ([FeatureLayout(2, 8)], FeatureLayout(2, 16)),
    "deepseek_v3": ([FeatureLayout(4, 10), FeatureLayout(4, 14)], FeatureLayout(4, 8)),
}


def attention_of(name):
    with torch.device("meta"):
        model = DECODERS[name].model(DECODERS[name].config(**DECODERS[name].kwargs))
    return next(branch for branch in partition_model(model).branches if branch.name == "attention")


@pytest.mark.parametrize("name", EXPECTED)
def test_features_of_attention_belong_to_heads(name):
    attention, (columns, row) = attention_of(name), EXPECTED[name]
    assert [projection.layout for projection in attention.columns] == columns
    assert attention.row.layout == row


def test_parts_of_unequal_width_are_taken_one_by_one():
    """Two heads of width 2: queries q0 q0 q1 q1 (two each), then keys k0 k1, then values."""
    layout = FeatureLayout(2, 2, parts=(2, 1, 1))
    assert layout.part_widths == (4, 2, 2) and layout.head_size == 8 and layout.size == 16
    features = torch.arange(16)
    assert select(layout, Heads((1,))).take(features, 0).tolist() == [4, 5, 6, 7, 10, 11, 14, 15]
    assert select(layout, Heads((0, 1))).runs == ((0, 16),)


def test_equal_parts_read_the_same_either_way():
    equal, named = FeatureLayout(3, 4, parts=2), FeatureLayout(3, 4, parts=(1, 1))
    assert select(equal, Heads((0, 2))).runs == select(named, Heads((0, 2))).runs == ((0, 4), (8, 8), (20, 4))


@pytest.mark.parametrize(
    "columns, row, spec, message",
    [
        ([96], 32, {}, "takes 32 features, but the queries have 96; of a fused projection say how its parts lie"),
        ([32, 32], 32, {"parts": 3}, "`parts` and `interleaved` describe one fused projection, and it has 2"),
        ([100], 32, {"parts": 3}, r"its projections return \[100\] features, .* multiples of head_dim=8"),
        ([32, 12, 12], 32, {}, r"return \[32, 12, 12\] features"),
    ],
)
def test_sizes_that_fit_no_heads_are_refused(columns, row, spec, message):
    with pytest.raises(ValueError, match=message):
        head_layouts("attn", BranchSpec("attn", ("qkv",), "out", **spec), 8, columns, row)


def test_heads_are_taken_of_every_sample_s_share_of_an_axis():
    """ALiBi may come as [B * heads, 1, T]."""
    entry = PerHead("alibi", "argument", 0, 1)
    alibi = torch.arange(6).view(6, 1, 1)
    assert take_heads(alibi, entry, Heads((0, 2)), 3).flatten().tolist() == [0, 2, 3, 5]
    grouped = PerHead("bias", "argument", 1, 2)  # two query heads share a key/value head
    bias = torch.arange(4).view(1, 4, 1)
    assert take_heads(bias, grouped, Heads((1,)), 2).flatten().tolist() == [2, 3]


def test_an_axis_that_does_not_divide_by_the_heads_names_itself():
    with pytest.raises(ValueError, match=r"alibi of shape \[5, 1\] has 5 entries on axis 0, .* 2 heads .*wrong axis"):
        take_heads(torch.zeros(5, 1), PerHead("alibi", "argument", 0, 1), Heads((0,)), 2)


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(architecture, "_ARCHITECTURES", dict(architecture._ARCHITECTURES))
    return architecture._ARCHITECTURES


def llama_with(table, **spec):
    attention = BranchSpec("self_attn", tuple(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.o_proj", **spec)
    table["llama"] = Architecture("layers", attention, None)
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=32, num_attention_heads=4, num_hidden_layers=1, intermediate_size=48, vocab_size=64,
            pad_token_id=0,
        )
    )  # fmt: skip


def test_what_per_head_names_must_be_there(table):
    with pytest.raises(ValueError, match="per_head names 'alibi', which is no argument of .*self_attn's forward"):
        partition_model(llama_with(table, per_head=(("alibi", 1),)))
    model = llama_with(table, per_head=(("sinks", 0),))
    model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(6))
    with pytest.raises(ValueError, match="self_attn.sinks has 6 entries on axis 0, which do not divide by its 4 heads"):
        partition_model(model)


def test_a_list_that_may_hold_a_module_per_head_is_not_passed_over(table):
    model = llama_with(table)
    model.model.layers[0].self_attn.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
    with pytest.raises(ValueError, match="its list 'norms' may hold a module for each head; name it in `per_head`"):
        partition_model(model)
    table.clear()
    model = llama_with(table, per_head=(("norms", 0),))
    model.model.layers[0].self_attn.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
    assert partition_model(model).branches[0].per_head == (PerHead("norms", "modules", 0, 1),)


@pytest.mark.parametrize(
    "name, reason",
    [
        ("gpt_oss", "reads sinks, of which every rank"),
        ("deepseek_v3", r"the heads of .* have .*kv_a_proj_with_mqa in common"),
        ("mpt", "adds 'residual' to its output itself|reads position_bias"),
    ],
)
def test_heads_on_several_processes_need_branches_of_projections_alone(name, reason):
    with pytest.raises(ValueError, match=f"cannot share out the heads of model_type='{name}': its .*{reason}|{reason}"):
        check_branches(partition_model(DECODERS[name].build()))
    check_branches(partition_model(DECODERS["phi3"].build()))


def test_a_block_without_attention_runs_whole():
    partition = partition_model(DECODERS["qwen3_next"].build())
    assert [(branch.name, branch.block) for branch in partition.branches] == [
        ("ffn", 0), ("attention", 3), ("ffn", 3),
    ]  # fmt: skip
    assert partition.subnet_blocks.tolist() == [0, 0, 3, 3]
    assert [line.split()[:2] for line in partition.summary().splitlines()[1:5]] == [
        ["0", "2"], ["1", "0"], ["2", "0"], ["3", "2"],
    ]  # fmt: skip
