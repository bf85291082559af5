"""Adapters on models whose subnets are whole blocks: what is said, saved, scored, counted, trained and refused."""

import copy
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer, partition_model
from d2ft_peft.costs import cost_model, flop_counter, inference, probe_model
from d2ft_peft.engine import compile_plan, get_runtime, open_cache
from d2ft_peft.partition import partition_into_blocks
from d2ft_peft.planning.model_costs import ModelCosts
from d2ft_peft.scores import gradient_scores, weight_magnitude
from d2ft_peft.simulate import Workload
from tests.models import TINY
from tests.whole_models import WHOLE, HandWritten


MODES = {"full": {}, "lora": {"r": 4, "init_lora_weights": False}}
each_mode = pytest.mark.parametrize("mode", MODES)


def adapted(name, mode="full", **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA leaves")
        return get_peft_model(WHOLE[name].build(), D2FTConfig(**MODES[mode], subnets="blocks", **kwargs))


def train_briefly(model, name):
    runtime = get_runtime(model)
    partition = runtime.partitions["default"]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with runtime.use(compile_plan(partition, [1, *[2] * (partition.num_scheduled - 1)])):
        model.train()(**WHOLE[name].batch()).loss.backward()
    optimizer.step()


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**WHOLE[name].batch()).logits


@pytest.mark.parametrize("name", ["mamba", "swin", "hand_written"])
def test_a_model_without_heads_to_cut_is_said_to_be_partitioned_into_blocks(name):
    with pytest.warns(UserWarning, match="the subnets are the 3 whole blocks from .* because heads are not cut: .*"):
        model = get_peft_model(WHOLE[name].build(), D2FTConfig())
    partition = get_runtime(model).partitions["default"]
    assert partition.num_scheduled == len(partition.blocks) == 3
    assert partition.why_whole in partition.summary()
    with pytest.raises(ValueError, match="register_architecture|cannot be partitioned into heads"):
        get_peft_model(WHOLE[name].build(), D2FTConfig(subnets="heads"))


def test_blocks_are_found_where_most_parameters_are():
    names = partition_model(WHOLE["swin"].build(), subnets="blocks").blocks
    assert names == tuple(f"swin.encoder.layers.{name}" for name in ("0.blocks.0", "1.blocks.0", "1.blocks.1"))
    assert partition_model(WHOLE["mamba"].build(), subnets=None).blocks[0] == "backbone.layers.0"
    sequential = HandWritten()
    sequential.blocks = nn.Sequential(*sequential.blocks)
    assert partition_into_blocks(sequential).blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert partition_into_blocks(sequential).boundary == ("embed", "norm", "score")


@each_mode
@pytest.mark.parametrize("name", ["hand_written", "deepseek_v3", "swin", "mamba"])
@pytest.mark.quick(3)
def test_adapters_are_saved_loaded_and_merged(name, mode, tmp_path):
    model = adapted(name, mode)
    before = logits(model, name)
    train_briefly(model, name)
    expected = logits(model, name)
    assert not expected.allclose(before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WHOLE[name].build(), tmp_path)
    if mode == "lora":
        assert type(loaded.peft_config["default"]) is LoraConfig
    torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(logits(model.merge_and_unload(), name), expected, rtol=1e-4, atol=1e-5)


def test_full_fine_tuning_trains_all_weights_of_blocks_and_no_others():
    model = adapted("deepseek_v3")
    trained = {n.replace("base_model.model.", "").replace("d2ft_layers.default.", "")
               for n, p in model.named_parameters() if p.requires_grad}  # fmt: skip
    assert trained == {n for n, _ in WHOLE["deepseek_v3"].build().named_parameters() if n.startswith("model.layers.")}


def test_lora_leaves_alone_what_the_model_reads_without_calling_it():
    with pytest.warns(UserWarning, match="LoRA leaves dt_proj, out_proj, x_proj alone: the model's code reads their"):
        model = get_peft_model(WHOLE["mamba"].build(), D2FTConfig(r=4, subnets="blocks"))
    assert {name.rpartition(".")[2] for name in model.peft_config["default"].target_modules} == {"in_proj"}


@each_mode
@pytest.mark.parametrize("name", ["mamba", "hand_written"])
@pytest.mark.quick(1)
def test_the_trainer_trains_them_under_a_budget_alone(name, mode, tmp_path):
    rows = WHOLE[name].batch(24)
    rows.pop("attention_mask")
    data = Dataset.from_dict({key: value.tolist() for key, value in rows.items()}).with_format("torch")
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=1, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-2, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA leaves|the subnets are")
        model = get_peft_model(WHOLE[name].build(), D2FTConfig(**MODES[mode], compute_budget=0.6))
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-1]["flops_ratio"] == pytest.approx(0.6, abs=0.03)
    assert any(not before[n].equal(p) for n, p in model.named_parameters() if n in before)


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", ["plain", "full", "lora"])
def test_blocks_cost_what_a_counter_counts(mode):
    """But for the gradient of the lowest block's input, which is foreseen although nothing below needs it."""
    base, batch = TINY["llama"].build(attn_implementation="eager"), TINY["llama"].batch(1)
    if mode == "plain":
        model, partition = base.train(), partition_model(base, subnets="blocks")
    else:
        model = get_peft_model(base, D2FTConfig(**MODES[mode], subnets="blocks")).train()
        partition = get_runtime(model).partitions["default"]
    costs = cost_model(model, partition, probe_model(model, partition, batch))
    row = [2] * partition.num_scheduled
    plan = nullcontext() if mode == "plain" else get_runtime(model).use(compile_plan(partition, row))
    with flop_counter() as counted, plan:
        model(**batch).loss.backward()
    foreseen = costs.full_flops(np.ones(1))
    assert 1 <= foreseen / counted.get_total_flops() < 1.04


def test_whole_blocks_and_cut_ones_cost_the_same():
    base, batch = TINY["llama"].build().train(), TINY["llama"].batch(1)
    totals = []
    for subnets in ("heads", "blocks"):
        partition = partition_model(base, subnets=subnets)
        costs = cost_model(base, partition, probe_model(base, partition, batch))
        totals.append(costs.full_flops(np.ones(1)))
    assert totals[0] == pytest.approx(totals[1], rel=0.02)


def test_scores_are_sums_over_the_weights_of_a_block():
    model = get_peft_model(TINY["llama"].build().double(), D2FTConfig(subnets="blocks")).eval()
    partition, batch = get_runtime(model).partitions["default"], TINY["llama"].batch(3)
    blocks = [[p for n, p in model.named_parameters() if f"layers.{i}." in n and p.requires_grad] for i in range(3)]
    magnitude = [sum(float(p.detach().abs().sum()) for p in block) for block in blocks]
    np.testing.assert_allclose(weight_magnitude(model, partition), magnitude)
    fisher = gradient_scores(model, partition, batch, "fisher")
    taylor = gradient_scores(model, partition, batch, "taylor", per_sample=False)
    for i in range(3):
        model.zero_grad()
        model(**{key: value[i : i + 1] for key, value in batch.items()}).loss.backward()
        np.testing.assert_allclose(fisher[i], [sum(float(p.grad.square().sum()) for p in b) for b in blocks])
    model.zero_grad()
    model(**batch).loss.backward()
    np.testing.assert_allclose(taylor[0], [sum(float((p.detach() * p.grad).abs().sum()) for p in b) for b in blocks])


@pytest.mark.parametrize("policy", ["random", "bilevel", "joint", "depth"])
@pytest.mark.quick(1)
def test_policies_schedule_blocks(policy):
    model = adapted("mamba", "lora", policy=policy, compute_budget=0.6).train()
    planner, batches = D2FTPlanner(model), [WHOLE["mamba"].batch(2, seed) for seed in range(5)]
    schedule = planner.plan(batches)
    assert schedule.operations.shape == (5, 3)
    for index, batch in enumerate(batches):
        with planner.micro_batch(index) as micro_batch:
            if not micro_batch.skipped:
                (model(**batch).loss * micro_batch.weight).backward()
    assert 0.3 < planner.counts.last.compute_ratio <= 0.6 + 1e-9


def test_several_adapters_have_the_same_kind_of_subnets():
    model = adapted("mamba", "lora")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LoRA leaves")
        model.add_adapter("other", D2FTConfig(r=2))
    assert get_runtime(model).partitions["other"].num_scheduled == 3
    heads = get_peft_model(TINY["llama"].build(), D2FTConfig(r=4))
    with pytest.raises(ValueError, match="subnets='blocks' makes blocks the subnets, which are heads for the adapters"):
        heads.add_adapter("other", D2FTConfig(r=4, subnets="blocks"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"shortcut": "mean"},
            "shortcut='mean' stands in for heads that are skipped; use 'zero' .whole blocks are",
        ),
        ({"shortcut": "rescale"}, "shortcut='rescale' stands in for heads that are skipped; use 'zero'"),
        ({"head_parallel": True}, "head_parallel=True shares out heads; leave it out"),
        ({"policy": "fewer_tokens"}, "rows='tokens' runs heads on some tokens; choose a policy over samples"),
        ({"heads_per_subnet": 2}, "model_type='mamba' cannot be partitioned into heads"),
    ],
)
def test_what_needs_heads_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(WHOLE["mamba"].build(), D2FTConfig(**kwargs))


def test_outputs_of_whole_blocks_are_not_cached(tmp_path):
    model = adapted("mamba", "lora", layers_to_transform=[2])
    with pytest.raises(ValueError, match="what whole blocks do with padding is not known .they are not cut into heads"):
        open_cache(model, str(tmp_path))


@pytest.mark.parametrize("name", ["mamba", "hand_written"])
def test_blocks_are_trained_in_place(name, tmp_path):
    model = adapted(name, keep_base=False)
    train_briefly(model, name)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(WHOLE[name].build(), tmp_path)
    torch.testing.assert_close(logits(loaded, name), logits(model, name), rtol=1e-4, atol=1e-6)


@each_mode
def test_some_blocks_are_trained(mode):
    model = adapted("deepseek_v3", mode, layers_to_transform=[2])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".layers.2." in name for name in trained)
    with pytest.raises(ValueError, match="not possible where the blocks are in several lists .swin.encoder.layers.0"):
        adapted("swin", mode, layers_to_transform=[2])


def test_heads_are_not_simulated_where_there_are_none():
    with pytest.raises(ValueError, match="has whole blocks as subnets"):
        Workload(partition_model(TINY["llama"].build(), subnets="blocks"), tokens=8)


def test_a_linear_layer_whose_kernel_no_counter_knows_costs_what_others_do():
    class Quantized(nn.Linear):
        def forward(self, x):
            return (x[..., None, :] * self.weight).sum(-1) + self.bias

    plain, quantized = HandWritten(), HandWritten()
    for block in quantized.blocks:
        block.up, block.down = Quantized(16, 32), Quantized(32, 16)
    costs = [ModelCosts(model, partition_into_blocks(model)) for model in (plain, quantized)]
    for one in costs:
        one.learn(WHOLE["hand_written"].batch(), lambda values: values)
    np.testing.assert_allclose(costs[0].at(7).forward, costs[1].at(7).forward)


def test_looks_at_a_model_run_quantized_layers_as_in_training():
    """bitsandbytes packs 4 bit weights for good where a layer meets them in eval mode."""
    model = HandWritten().eval()
    model.blocks[1].up.weight = nn.Parameter(torch.zeros(32, 16, dtype=torch.int8), requires_grad=False)
    with inference(model):
        assert [module for module in model.modules() if module.training] == [model.blocks[1].up]
    assert not any(module.training for module in model.modules())


def test_the_head_leaves_out_rows_that_no_loss_reads():
    model = get_peft_model(TINY["llama"].build().double(), D2FTConfig(r=4, subnets="blocks")).train()
    planner, batch = D2FTPlanner(model), TINY["llama"].batch()
    batch["labels"][:, :5] = -100
    planner.unread.labels = planner.unread.head = True
    planner.prepare(batch)
    assert planner.unread.found.head
    outputs, gradients = [], []
    for unread in (True, False):
        if not unread:
            planner.unread.close()
        model.zero_grad()
        with get_runtime(model).use(compile_plan(planner.partition, [2, 2, 2])):
            outputs.append(model(**batch))
            outputs[-1].loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert outputs[0].logits.numel() < outputs[1].logits.numel() and len(gradients[0]) == len(gradients[1]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


class TestBlocksThatMustRun:
    """What a block returns besides its hidden states cannot be made up."""

    @pytest.mark.thorough
    def test_more_than_hidden_states(self):
        config = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
        model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=64, **config))
        model = get_peft_model(model, D2FTConfig(r=4, subnets="blocks")).train()
        runtime, batch = get_runtime(model), TINY["llama"].batch()
        assert len(runtime.blocks) == 4  # of both stacks
        for operation in (0, 1):
            row = [operation, 2, 2, 2]
            with (
                pytest.raises(ValueError, match="block encoder.block.0 returns more than its hidden states .Tensor at"),
                runtime.use(compile_plan(runtime.partitions["default"], row)),
            ):
                model(**batch)
        with runtime.use(compile_plan(runtime.partitions["default"], [2, 1, 2, 0])):  # these hand on what is given
            model(**batch).loss.backward()

    def test_returned_attentions(self):
        model = get_peft_model(
            TINY["bert"].build(attn_implementation="eager"), D2FTConfig(r=4, subnets="blocks")
        ).train()
        runtime = get_runtime(model)
        with runtime.use(compile_plan(runtime.partitions["default"], [0, 2, 2])):
            model(**TINY["bert"].batch(), output_attentions=False).loss.backward()

    def test_other_shapes(self):
        model = HandWritten(blocks=2)
        model.blocks[1].down = nn.Linear(32, 16)
        model.blocks[0].register_forward_hook(lambda module, args, output: (output[0][:, :4], output[1]))
        model = get_peft_model(model, D2FTConfig(subnets="blocks", policy="depth")).train()
        planner = D2FTPlanner(model)
        with pytest.raises(ValueError, match="policy='depth' leaves out blocks, .* blocks.0 does not return hidden"):
            planner.prepare(WHOLE["hand_written"].batch())
        samples = D2FTPlanner(get_peft_model(copy.deepcopy(model.unload()), D2FTConfig(subnets="blocks")).train())
        samples.prepare(WHOLE["hand_written"].batch())

    def test_blocks_in_another_order(self):
        model = HandWritten()

        def backwards(input_ids, labels=None):
            x = model.embed(input_ids)
            for block in reversed(model.blocks):
                x, _ = block(x)
            return tf.modeling_outputs.SequenceClassifierOutput(loss=x.mean(), logits=x)

        model.forward = backwards
        model = get_peft_model(model, D2FTConfig(subnets="blocks", policy="lisa")).train()
        with pytest.raises(ValueError, match=r"they run in the order \[2, 1, 0\], and not each once"):
            D2FTPlanner(model).prepare(WHOLE["hand_written"].batch())
