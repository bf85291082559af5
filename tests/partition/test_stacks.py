"""Which stacks of a model are scheduled, how their blocks are numbered, and what is refused where there are several."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model

from d2ft_peft import Architecture, BranchSpec, D2FTConfig, partition_model, register_architecture
from d2ft_peft.engine import get_runtime
from d2ft_peft.engine.open_cache import open_cache
from d2ft_peft.partition import FeatureLayout, Gauge, Stack, architecture
from d2ft_peft.simulate.of_model import workload_of_model
from tests.zoo_stacks import ZOO


def on_meta(name):
    with torch.device("meta"):
        return ZOO[name].model(ZOO[name].config(**ZOO[name].kwargs))


class TestEncoderDecoders:
    def test_blocks_are_numbered_through_encoder_first(self):
        partition = partition_model(on_meta("bart"))
        assert partition.stacks == (
            Stack("model.encoder.layers", 0, 2), Stack("model.decoder.layers", 2, 3, "states"),
        )  # fmt: skip
        assert partition.blocks[1:3] == ("model.encoder.layers.1", "model.decoder.layers.0")
        assert [branch.block for branch in partition.branches] == [0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
        assert partition.gauges == (Gauge(0, 0), Gauge(4, 1), Gauge(5, 1, other=True))

    def test_heads_may_differ_between_stacks(self):
        partition = partition_model(on_meta("bart"))
        assert partition.subnet_blocks.tolist() == [0] * 4 + [1] * 4 + [2] * 2 + [3] * 2 + [4] * 2
        assert [line.split()[1:5] for line in partition.summary().splitlines()[1:6]] == [
            ["4", "1", "8", "12"], ["4", "1", "8", "12"], *[["2", "1", "16", "32"]] * 3,
        ]  # fmt: skip

    def test_a_head_owns_the_same_head_of_cross_attention(self):
        attention, cross, ffn = partition_model(on_meta("t5")).branches[4:7]
        assert [branch.name for branch in (attention, cross, ffn)] == ["attention", "cross_attention", "ffn"]
        assert cross.region == "decoder.block.0.layer.1.EncDecAttention"
        assert cross.row.layout == attention.row.layout == FeatureLayout(4, 8)
        query, key, value = cross.columns
        assert cross.other_input == (key.name, value.name)
        assert cross.siblings(query) == (query,) and cross.siblings(key) == (key, value)

    def test_the_parts_of_such_a_model_alone(self):
        kwargs = ZOO["t5"].kwargs
        with torch.device("meta"):
            encoder = tf.T5EncoderModel(tf.T5Config(**kwargs))
            decoder = tf.BartForCausalLM(tf.BartConfig(**ZOO["bart"].kwargs))
        assert partition_model(encoder).blocks == ("encoder.block.0", "encoder.block.1")
        assert [stack.reads for stack in partition_model(decoder).stacks] == ["states"]

    @pytest.mark.parametrize("stacks, blocks", [("decoder", 3), ("encoder", 2), (["encoder", "decoder"], 5)])
    def test_one_of_the_stacks(self, stacks, blocks):
        partition = partition_model(on_meta("bart"), stacks=stacks)
        assert len(partition.blocks) == blocks


class TestVisionLanguage:
    @pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3", "qwen2_5_vl", "qwen3_vl"])
    def test_the_language_model_is_scheduled_and_the_tower_always_runs(self, name):
        partition = partition_model(on_meta(name))
        (stack,) = partition.stacks
        assert stack.name in ("model.language_model.layers", "model.text_model.layers")
        assert not partition.several
        assert {"model.vision_tower", "model.vision_model", "model.visual"} & set(partition.boundary)

    def test_towers_run_before_the_language_model_wherever_they_stand(self):
        partition = partition_model(on_meta("llava"), stacks=["language_model", "vision_tower"])
        assert partition.stacks == (
            Stack("model.vision_tower.encoder.layers", 0, 2), Stack("model.language_model.layers", 2, 3, "before"),
        )  # fmt: skip

    def test_towers_side_by_side_are_both_scheduled(self):
        partition = partition_model(on_meta("clip"))
        assert [(stack.name.split(".")[0], stack.reads) for stack in partition.stacks] == [
            ("vision_model", "inputs"), ("text_model", "inputs"),
        ]  # fmt: skip


class TestRefusals:
    def test_a_name_that_is_no_stack_lists_those_that_there_are(self):
        message = (
            r"stacks=\['vision'\] names 'vision', which is no stack of LlavaForConditionalGeneration .* its stacks are "
            r"model.vision_tower.encoder.layers, model.language_model.layers"
        )
        with pytest.raises(ValueError, match=message):
            get_peft_model(on_meta("llava"), D2FTConfig(stacks="vision"))

    def test_a_stack_that_cannot_be_cut_says_why(self, monkeypatch):
        monkeypatch.setitem(architecture._REFUSED, "clip_vision_model", "it is a test")
        with pytest.raises(
            ValueError, match=r"names 'vision_tower'.*vision_tower: .*cannot be partitioned.* it is a test"
        ):
            partition_model(on_meta("llava"), stacks="vision_tower")

    def test_a_language_model_that_cannot_be_cut_names_the_others(self, monkeypatch):
        monkeypatch.setitem(architecture._REFUSED, "llama", "it is a test")
        monkeypatch.setattr(tf.LlamaConfig, "base_model_tp_plan", None)
        message = "language model of Llava.* cannot be cut .* it is a test.* name it in `stacks`: model.vision_tower"
        with pytest.raises(ValueError, match=message):
            partition_model(on_meta("llava"))

    @pytest.mark.parametrize(
        "config, reason",
        [
            ({"head_parallel": True, "num_devices": 2}, r"head_parallel=True shares out the heads of one stack"),
            ({"layers_to_transform": [0]}, r"layers_to_transform=\[0\] numbers the blocks of one stack"),
            ({"policy": "fewer_tokens", "rows": "tokens"}, "its blocks do not see the same tokens: it has several"),
        ],
    )
    def test_what_knows_one_stack_only(self, config, reason):
        with pytest.raises(ValueError, match=reason):
            get_peft_model(ZOO["bart"].build(), D2FTConfig(**config))

    def test_a_cache_of_frozen_blocks(self, tmp_path):
        model = get_peft_model(ZOO["t5"].build(), D2FTConfig(target_modules=["wo"]))
        with pytest.raises(ValueError, match="cache_frozen keeps what the lower blocks of one stack return"):
            open_cache(model, str(tmp_path))

    def test_the_simulator(self):
        with pytest.raises(ValueError, match="several stacks of blocks, or cross attention; the simulator"):
            workload_of_model(on_meta("bart"), {})

    def test_adapters_that_schedule_different_stacks(self):
        model = get_peft_model(ZOO["bart"].build(), D2FTConfig())
        with pytest.raises(
            ValueError, match="adapter 'other' cannot stand beside 'default': stacks='decoder' and None"
        ):
            model.add_adapter("other", D2FTConfig(stacks="decoder"))
        assert list(get_runtime(model).partitions) == ["default"]


def test_stacks_that_a_user_describes(monkeypatch):
    monkeypatch.setattr(architecture, "_ARCHITECTURES", dict(architecture._ARCHITECTURES))
    attention = BranchSpec("self_attn", tuple(f"self_attn.{n}_proj" for n in "qkv"), "self_attn.out_proj")
    mine = tuple(Architecture(f"{name}.layers", attention, None) for name in ("encoder", "decoder"))
    del architecture._ARCHITECTURES["bart"]
    register_architecture("bart", mine)
    partition = partition_model(on_meta("bart"))
    assert [stack.size for stack in partition.stacks] == [2, 3]
    assert {branch.name for branch in partition.branches} == {"attention"}
