"""Where the heads of a model are: subnets, features and regions of every architecture, and what is refused."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers as tf
from torch import nn

from d2ft_peft import Architecture, BranchSpec, partition_model, register_architecture
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.partition import FeatureLayout, Projection, architecture
from tests.models import TINY
from tests.reference import reference_forward
from tests.tuners.cases import fresh, plain_model
from tests.tuners.test_equality import assert_same_gradients, d2ft_model, plain_twin, random_rows, step


BASE = {
    "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def on_meta(config: str, model: str, **kwargs) -> nn.Module:
    """A model without memory: a partition needs names and shapes only."""
    config_cls, model_cls = getattr(tf, config), getattr(tf, model)
    with torch.device("meta"):
        return model_cls(config_cls(**{**BASE, **kwargs}))


def vit_small():
    return on_meta(
        "ViTConfig",
        "ViTForImageClassification",
        hidden_size=384,
        num_attention_heads=6,
        intermediate_size=1536,
        num_hidden_layers=12,
    )


class TestViTSmall:
    """The paper's model (arXiv 2504.12471, section 3)."""

    @pytest.mark.parametrize("heads_per_subnet, subnets", [(1, 74), (2, 38), (3, 26)])
    def test_number_of_subnets(self, heads_per_subnet, subnets):
        partition = partition_model(vit_small(), heads_per_subnet)
        assert partition.num_subnets == subnets
        assert partition.num_scheduled == subnets - 2
        assert partition.heads_per_subnet == heads_per_subnet

    def test_every_head_belongs_to_one_subnet(self):
        partition = partition_model(vit_small(), 2)
        owned = [(subnet.block, head) for subnet in partition.subnets for head in subnet.heads]
        assert owned == [(block, head) for block in range(12) for head in range(6)]
        assert [subnet.index for subnet in partition.subnets] == list(range(36))
        np.testing.assert_array_equal(partition.subnet_blocks, np.repeat(range(12), 3))

    def test_a_head_owns_its_share_of_the_ffn(self):
        attention, ffn = partition_model(vit_small()).branches[:2]
        assert attention.row.layout == FeatureLayout(heads=6, width=64)
        assert ffn.row.layout == FeatureLayout(heads=6, width=256)


# Per architecture: attention's region, (kind, layout, transposed, bias) of its column- and row-parallel projections,
# whether the row-parallel projection is inside, and the FFN's region and number of column-parallel projections.
EXPECTED = {
    "vit": ("vit.layers.0.attention", [FeatureLayout(4, 8)] * 3, False, True, True, "vit.layers.0.mlp", 1),
    "bert": (
        "bert.encoder.layer.0.attention.self", [FeatureLayout(4, 8)] * 3, False, True, False,
        "bert.encoder.layer.0.intermediate", 1,
    ),
    "llama": (
        "model.layers.0.self_attn", [FeatureLayout(2, 16), FeatureLayout(2, 8), FeatureLayout(2, 8)], False, False,
        True, "model.layers.0.mlp", 2,
    ),
    "qwen3": (
        "model.layers.0.self_attn", [FeatureLayout(2, 16), FeatureLayout(2, 8), FeatureLayout(2, 8)], False, False,
        True, "model.layers.0.mlp", 2,
    ),
    "gpt2": ("transformer.h.0.attn", [FeatureLayout(4, 8, parts=3)], True, True, True, "transformer.h.0.mlp", 1),
}  # fmt: skip


class TestTinyArchitectures:
    @pytest.mark.parametrize("name", EXPECTED)
    def test_attention(self, name):
        region, columns, transposed, has_bias, row_inside, _, _ = EXPECTED[name]
        attention = partition_model(plain_model(name)).branches[0]
        assert (attention.name, attention.region, attention.row_inside) == ("attention", region, row_inside)
        assert [p.layout for p in attention.columns] == columns
        assert [p.kind for p in attention.projections] == ["column"] * len(columns) + ["row"]
        assert {p.transposed for p in attention.projections} == {transposed}
        assert {p.has_bias for p in attention.projections} == {has_bias}
        assert attention.row.layout == FeatureLayout(columns[0].heads, 32 // columns[0].heads)
        assert attention.query_width == 32 // columns[0].heads

    @pytest.mark.parametrize("name", EXPECTED)
    def test_ffn(self, name):
        _, columns, transposed, has_bias, row_inside, region, num_columns = EXPECTED[name]
        ffn = partition_model(plain_model(name)).branches[1]
        assert (ffn.name, ffn.region, ffn.row_inside) == ("ffn", region, row_inside)
        assert len(ffn.columns) == num_columns
        assert {p.layout for p in ffn.projections} == {FeatureLayout(columns[0].heads, 48 // columns[0].heads)}
        assert {p.transposed for p in ffn.projections} == {transposed}

    @pytest.mark.parametrize("name", TINY)
    def test_layouts_fit_the_weights(self, name):
        model = plain_model(name)
        for path, projection in partition_model(model).projections.items():
            weight = model.get_submodule(path).weight
            assert weight.shape[projection.head_axis] == projection.layout.size
            shape = (projection.in_features, projection.out_features)
            assert tuple(weight.shape) == (shape if projection.transposed else shape[::-1])

    @pytest.mark.parametrize("name", TINY)
    def test_boundary_and_projections_are_the_whole_model(self, name):
        model = plain_model(name)
        partition = partition_model(model)
        owners = [*partition.projections, *partition.boundary]
        for parameter, _ in model.named_parameters(remove_duplicate=False):
            assert sum(parameter.startswith(f"{owner}.") for owner in owners) == 1, parameter

    def test_bert_s_output_projections_follow_outside_of_the_regions(self):
        attention, ffn = partition_model(plain_model("bert")).branches[:2]
        assert attention.row.name == "bert.encoder.layer.0.attention.output.dense"
        assert ffn.row.name == "bert.encoder.layer.0.output.dense"

    def test_gpt2_scales_what_it_splits_by(self):
        attention, ffn = partition_model(plain_model("gpt2")).branches[:2]
        assert (attention.scaled_attributes, ffn.scaled_attributes) == (("split_size",), ())


KEY_VALUE = {"num_key_value_heads": 2}


class TestTensorParallelPlan:
    """Architectures that nobody described: transformers' own plan names the projections."""

    @pytest.mark.parametrize(
        "family, heads, kwargs",
        [
            ("Qwen2", 2, KEY_VALUE),
            ("Mistral", 2, {**KEY_VALUE, "head_dim": 8}),
            ("Gemma", 1, {"num_key_value_heads": 1, "head_dim": 8}),
            ("Phi", 4, {}),
            ("Cohere", 2, KEY_VALUE),
        ],
    )
    def test_both_branches(self, family, heads, kwargs):
        partition = partition_model(on_meta(f"{family}Config", f"{family}ForCausalLM", **kwargs))
        assert [branch.name for branch in partition.branches] == ["attention", "ffn"] * 2
        assert {branch.heads for branch in partition.branches} == {heads}
        assert partition.num_subnets == 2 * heads + 2

    def test_experts_are_left_alone(self):
        partition = partition_model(on_meta("MixtralConfig", "MixtralForCausalLM", **KEY_VALUE, num_local_experts=2))
        assert [branch.name for branch in partition.branches] == ["attention"] * 2
        assert "model.layers.0.mlp" in partition.boundary
        assert " - " in partition.summary()


REFUSED = {
    "swin": (
        lambda: tf.SwinForImageClassification(
            tf.SwinConfig(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4)
        ),
        "relative position bias per head",
    ),
    "mamba": (lambda: on_meta("MambaConfig", "MambaForCausalLM"), "mamba.* it has no attention"),
    "cpmant": (
        lambda: on_meta(
            "CpmAntConfig", "CpmAntModel", hidden_size=32, num_attention_heads=4, num_hidden_layers=2, dim_ff=48,
            dim_head=8,
        ),
        "model_type='cpmant' is not known to D2FT .*register_architecture",
    ),
}  # fmt: skip


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    def test_the_reason_is_given(self, name):
        build, reason = REFUSED[name]
        with torch.device("meta"):
            model = build()
        with pytest.raises(ValueError, match=reason):
            partition_model(model)

    def test_a_model_that_transformers_does_not_know(self):
        with pytest.raises(ValueError, match="model_type=None is not known to D2FT"):
            partition_model(nn.Linear(2, 2))

    def test_an_ffn_that_heads_cannot_share(self):
        model = on_meta("LlamaConfig", "LlamaForCausalLM", intermediate_size=50)
        message = "mlp.gate_proj cannot be shared among heads: its 50 features do not divide by 4 heads"
        with pytest.raises(ValueError, match=message):
            partition_model(model)

    @pytest.mark.parametrize("heads_per_subnet", [0, 3, 1.0, "all"])
    def test_heads_that_do_not_group(self, heads_per_subnet):
        message = rf"heads_per_subnet={heads_per_subnet!r} does not divide the 4 heads .* choose one of \[1, 2, 4\]"
        with pytest.raises(ValueError, match=message):
            partition_model(plain_model("vit"), heads_per_subnet)

    def test_grouped_queries_count_key_value_heads(self):
        with pytest.raises(ValueError, match=r"does not divide the 2 heads \(key/value heads\)"):
            partition_model(plain_model("llama"), 4)

    def test_projections_that_are_no_linear_layers(self):
        model = fresh("llama")
        model.model.layers[1].mlp.up_proj = nn.Identity()
        with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj is a Identity without in_features and out_feat"):
            partition_model(model)

    def test_parameters_of_certain_heads(self):
        model = fresh("llama")
        model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))
        with pytest.raises(ValueError, match=r"its parameter 'sinks' of shape \[4\] is not shared by all heads"):
            partition_model(model)

    def test_two_stacks_of_blocks(self):
        model = fresh("llama")
        model.draft = fresh("llama").model
        with pytest.raises(ValueError, match=r"found 2 \(model.layers, draft.layers\)"):
            partition_model(model)


class TestRegisterArchitecture:
    ROBERTA = Architecture(
        blocks="encoder.layer",
        attention=BranchSpec(
            "attention.self",
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            "attention.output.dense",
        ),
        ffn=BranchSpec("intermediate", ("intermediate.dense",), "output.dense"),
    )

    @pytest.fixture(autouse=True)
    def leave_the_table_alone(self, monkeypatch):
        monkeypatch.setattr(architecture, "_ARCHITECTURES", dict(architecture._ARCHITECTURES))

    def test_what_is_described_goes_before_what_is_found_and_equals_the_reference(self):
        config = tf.RobertaConfig(
            **BASE, num_labels=5, max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        torch.manual_seed(0)
        model = tf.RobertaForSequenceClassification(config).double()
        assert {branch.name for branch in partition_model(model).branches} == {"attention", "ffn"}
        register_architecture("roberta", dataclasses.replace(self.ROBERTA, ffn=None))
        partition = partition_model(model)
        assert {branch.name for branch in partition.branches} == {"attention"}
        twin = plain_twin(model, "full", False).train()
        ours = d2ft_model(model, "full").train()
        for row in random_rows(partition, seed=0, n=2):
            with reference_forward(twin, partition, row):
                expected = step(twin, TINY["bert"].batch())
            with get_runtime(ours).use(compile_plan(partition, row)):
                outputs = step(ours, TINY["bert"].batch())
            torch.testing.assert_close(outputs.logits, expected.logits)
            assert_same_gradients(ours, twin, "full")

    def test_registering_the_same_again_is_harmless(self):
        register_architecture("roberta", self.ROBERTA)
        register_architecture("roberta", self.ROBERTA)

    def test_a_known_name_keeps_its_meaning(self):
        with pytest.raises(ValueError, match="model_type='vit' is already registered as"):
            register_architecture("vit", self.ROBERTA)

    def test_a_path_that_is_not_there(self):
        wrong = Architecture("encoder.layer", BranchSpec("attn", ("attn.q",), "attention.output.dense"), None)
        register_architecture("roberta", wrong)
        with pytest.raises(ValueError, match="encoder.layer.0 has no module 'attn'"):
            partition_model(on_meta("RobertaConfig", "RobertaForSequenceClassification"))


class TestSummary:
    @pytest.mark.parametrize("name", TINY)
    def test_parameters_sum_to_those_of_the_projections(self, name):
        model = plain_model(name)
        partition = partition_model(model)
        rows = [line.split() for line in partition.summary().splitlines()[1:-1]]
        total = sum(int(row[1]) * int(row[-2].replace(",", "")) for row in rows)
        owned = [owned_parameters(model, projection) for projection in partition.projections.values()]
        assert total == sum(owned)

    def test_it_reads_as_a_table(self):
        header, first, *_, last = partition_model(vit_small(), 2).summary().splitlines()
        assert header.split() == ["block", "subnets", "heads", "each", "attention", "ffn", "parameters", "FLOPs/token"]
        assert len(header) == len(first)
        # 2 heads own 128 of 384 features of q, k, v, o (and biases of q, k, v), and 512 of 1536 of fc1 and fc2.
        weights, biases = 4 * 384 * 128 + 2 * 384 * 512, 3 * 128 + 512
        flops = 2 * weights + 4 * 128  # the products of attention with one token
        assert first.split() == ["0", "3", "2", "128", "512", f"{weights + biases:,}", f"{flops:,}"]
        assert last.startswith("38 subnets: 36 scheduled")

    def test_attention_products_count_with_the_sequence(self):
        partition = partition_model(vit_small())
        flops = [int(partition.summary(n).splitlines()[1].split()[-1].replace(",", "")) for n in (1, 198)]
        # Queries with keys, and weights with values: 2 multiply-adds per pair of tokens and feature.
        assert flops[1] - flops[0] == 4 * 64 * 197


def owned_parameters(model: nn.Module, projection: Projection) -> int:
    module = model.get_submodule(projection.name)
    biases = module.bias.numel() if projection.has_bias and projection.kind == "column" else 0
    return module.weight.numel() + biases
