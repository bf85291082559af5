"""What is found in a model's modules, and what the trial of a block lets pass."""

import copy

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers.models.roberta import modeling_roberta

from d2ft_peft import Architecture, BranchSpec, D2FTConfig, Operation, partition_model, register_architecture
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.head_parallel.requirements import check_branches
from d2ft_peft.partition import architecture
from d2ft_peft.partition.find_architecture import find_architecture
from d2ft_peft.partition.structure import read_structure
from tests.models import TINY
from tests.partition.test_zoo import batch_of, build, step
from tests.reference import reference_forward
from tests.tuners.test_equality import assert_same_gradients, d2ft_model, plain_twin, random_rows
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def table(monkeypatch):
    """The table of architectures, which may be changed. Whisper's encoder is looked at as if nobody had written down
    where its two stacks are."""
    table = {name: known for name, known in architecture._ARCHITECTURES.items() if name != "whisper"}
    monkeypatch.setattr(architecture, "_ARCHITECTURES", table)


class TestFound:
    def test_a_block_that_keeps_its_activation_to_itself(self):
        found = find_architecture(build("whisper"))
        assert found.blocks == "encoder.layers"
        assert (found.ffn.region, found.ffn.columns, found.ffn.row) == ("fc1", ("fc1",), "fc2")
        assert found.ffn.joined and not found.attention.joined

    def test_integers_that_count_heads(self):
        assert find_architecture(build("distilbert")).attention.scaled_attributes == ()
        assert find_architecture(build("dinov3_vit")).attention.scaled_attributes == ("num_heads",)
        assert find_architecture(build("videomae")).attention.scaled_attributes == ("all_head_size",)

    def test_a_bias_of_every_head(self):
        assert find_architecture(build("mpnet")).attention.per_head == (("position_bias", 1),)
        assert find_architecture(build("beit")).attention.per_head == (("attention_mask", 1),)

    def test_projections_of_relative_positions(self):
        apart = find_architecture(build("deberta-v2")).attention.apart
        assert apart == ("attention.self.pos_key_proj", "attention.self.pos_query_proj")
        assert find_architecture(build("deberta-v3")).attention.apart == ()

    @pytest.mark.parametrize("name", ["whisper", "distilbert"])
    def test_a_model_without_weights_and_one_with_adapters_are_cut_alike(self, name):
        with torch.device("meta"):
            on_meta = ZOO[name].model(ZOO[name].config(**ZOO[name].kwargs))
        partition = partition_model(build(name))
        assert partition_model(on_meta) == partition
        assert partition_model(get_peft_model(build(name), D2FTConfig(r=2)).get_base_model()) == partition
        assert partition_model(get_peft_model(build(name), D2FTConfig()).get_base_model()) == partition

    def test_a_model_that_is_looked_at_stays_as_it_was(self):
        model = build("mobilebert").train()
        before, keys = copy.deepcopy(model.state_dict()), [set(vars(module)) for module in model.modules()]
        state = torch.get_rng_state()
        partition_model(model)
        assert torch.equal(torch.get_rng_state(), state)
        assert keys == [set(vars(module)) for module in model.modules()]
        assert all(module.training for module in model.modules())
        for name, value in model.state_dict().items():
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)

    def test_modules_in_a_list_are_of_the_boundary_one_by_one(self):
        """Whoever owns the list iterates over it: a copy of the list could not stand in for it."""
        partition = partition_model(build("mobilebert"))
        assert {f"mobilebert.encoder.layer.0.ffn.{i}" for i in range(3)} <= set(partition.boundary)
        ours, batch = d2ft_model(build("mobilebert"), "full", True).train(), batch_of("mobilebert", build("mobilebert"))
        with get_runtime(ours).use(compile_plan(partition, np.full(partition.num_scheduled, Operation.FULL))):
            step(ours, batch)


class TestRefused:
    def test_what_mixes_features_between_the_projections_of_an_ffn(self):
        model = build("whisper")
        for layer in model.encoder.layers:
            layer.activation_fn = nn.Softmax(-1)
        with pytest.raises(ValueError, match=r"layers.0 was tried .* does not return what the whole block makes"):
            partition_model(model)

    def test_what_mixes_heads(self, monkeypatch):
        own = modeling_roberta.RobertaSelfAttention.forward

        def talking(self, *args, **kwargs):
            out, weights = own(self, *args, **kwargs)
            return out + out.flip(-1), weights

        model = build("roberta")
        monkeypatch.setattr(modeling_roberta.RobertaSelfAttention, "forward", talking)
        with pytest.raises(ValueError, match="does not return what the whole block makes of them"):
            partition_model(model)

    def test_an_attention_that_goes_past_its_projections(self):
        with pytest.raises(ValueError, match="cannot be cut into heads: its parameter 'gru_rel_pos_const'"):
            read_structure(build("wavlm"))

    def test_several_stacks_and_none(self):
        model = build("whisper")
        model.other = copy.deepcopy(model.encoder)
        with pytest.raises(ValueError, match=r"2 lists of blocks \(encoder.layers, other.layers\) .* one is needed"):
            partition_model(model)

    @pytest.mark.parametrize(("name", "reason"), [("whisper", "applies the activation"), ("mpnet", "position_bias")])
    def test_heads_that_need_more_than_rows_by_head_parallel_execution(self, name, reason):
        with pytest.raises(ValueError, match=f"head_parallel=True cannot share out .* {reason}.*use data parallelism"):
            check_branches(partition_model(build(name)))
        check_branches(partition_model(build("distilbert")))


def test_a_region_that_returns_a_list_is_an_error_and_not_wrong():
    """Of the two passes' lists one would follow the other, and the caller read the first alone."""
    attention = BranchSpec(
        "attn", ("attn.c_attn",), "attn.c_proj", parts=3, scaled_attributes=("split_size", "n_head"), returns=1
    )
    register_architecture("openai-gpt", Architecture("h", attention, BranchSpec("mlp", ("mlp.c_fc",), "mlp.c_proj")))
    ours = d2ft_model(build("openai-gpt"), "full").train()
    partition = get_runtime(ours).partitions["default"]
    with (
        get_runtime(ours).use(compile_plan(partition, np.resize([2, 1], partition.num_scheduled))),
        pytest.raises(ValueError, match="region h.0.attn returns a list"),
    ):
        ours(**batch_of("openai-gpt", ours))


@pytest.mark.parametrize("name", ["muse_glimmer_vision", "gpt2"])
def test_a_region_may_begin_with_no_head(name):
    """Whether it returns a tensor or a tuple shows when a head runs, and none did; looking leaves no trace."""
    if name == "gpt2":
        model, batch = TINY[name].build(attn_pdrop=0.5), TINY[name].batch()
    else:
        model = build(name)
        batch = batch_of(name, model)
    partition, ours = partition_model(model), d2ft_model(model, "full", shortcut="mean").train()
    runtime, state = get_runtime(ours), torch.get_rng_state()
    with runtime.use(compile_plan(partition, np.full(partition.num_scheduled, Operation.SHORTCUT))):
        ours(**batch)
        assert not any(mean._seen for mean in runtime.means.values())
    assert torch.equal(torch.get_rng_state(), state)


class TestActivationOfTheBlock:
    def test_one_that_works_in_place_equals_the_reference(self):
        """The row-parallel projection then meets the very tensor that the region returned, and not its values."""
        model = build("whisper")
        for layer in model.encoder.layers:
            layer.activation_fn = nn.ReLU(inplace=True)
        assert find_architecture(model).ffn.joined
        batch = batch_of("whisper", model)
        twin, ours = plain_twin(model, "full", False).train(), d2ft_model(model, "full").train()
        partition = partition_model(twin)
        for row in random_rows(partition, seed=0, n=1):
            with reference_forward(twin, partition, row):
                expected = step(twin, batch)
            with get_runtime(ours).use(compile_plan(partition, row)):
                outputs = step(ours, batch)
            torch.testing.assert_close(outputs, expected, rtol=1e-6, atol=1e-6)
            assert_same_gradients(ours, twin, "full", rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize("inplace", [False, True])
    @pytest.mark.parametrize("operation", [Operation.FORWARD_ONLY, Operation.FULL])
    def test_a_naive_description_is_an_error_and_not_wrong(self, table, operation, inplace):
        model = build("whisper")
        for layer in model.encoder.layers:
            layer.activation_fn = nn.ReLU(inplace=inplace)
        naive = Architecture(
            "encoder.layers",
            BranchSpec(
                "self_attn",
                tuple(f"self_attn.{name}_proj" for name in "qkv"),
                "self_attn.out_proj",
                scaled_attributes=("num_heads",),
            ),
            BranchSpec("fc1", ("fc1",), "fc2"),
        )
        register_architecture("whisper", naive)
        ours, batch = d2ft_model(model, "full").train(), batch_of("whisper", model)
        partition = get_runtime(ours).partitions["default"]
        row = np.resize([operation, Operation.SHORTCUT], partition.num_scheduled)
        with (
            get_runtime(ours).use(compile_plan(partition, row)),
            pytest.raises(ValueError, match="layers.0.fc2 takes is not what the region .* returned.*joined=True"),
        ):
            step(ours, batch)

    @pytest.mark.parametrize("shortcut", ["mean", "rescale"])
    def test_stand_ins_for_skipped_heads_equal_the_reference(self, shortcut):
        model = build("whisper")
        batch = batch_of("whisper", model)
        twin, ours = plain_twin(model, "full", False).train(), d2ft_model(model, "full", shortcut=shortcut).train()
        partition, runtime = partition_model(twin), get_runtime(ours)
        with runtime.use(compile_plan(partition, np.full(partition.num_scheduled, Operation.FULL))):
            step(ours, batch)
        for row in random_rows(partition, seed=1, n=2):
            with runtime.use(compile_plan(partition, row)):
                means = {branch: mean.value.flatten().clone() for branch, mean in runtime.means.items()}
                outputs = step(ours, batch)
            with reference_forward(twin, partition, row, shortcut, means):
                expected = step(twin, batch)
            torch.testing.assert_close(outputs, expected, rtol=1e-5, atol=1e-6)
            assert_same_gradients(ours, twin, "full", rtol=1e-4, atol=1e-6)
