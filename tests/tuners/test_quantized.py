"""QLoRA: LoRA on quantized weights under D2FT is PEFT's own on the samples, and the blocks, that run."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from peft.utils.integrations import dequantize_module_weight
from transformers import Trainer, TrainingArguments

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.engine import compile_plan, get_runtime
from d2ft_peft.scores import weight_magnitude
from tests.quantized_models import KINDS, batch, quantized
from tests.whole_models import reference_blocks


pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_kwargs)?` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the adapter's base model is the local path"),
    pytest.mark.filterwarnings("ignore:Merge lora module to .-bit linear may get different"),  # by PEFT
]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = {"r": 4, "lora_alpha": 8}
each_kind = pytest.mark.parametrize("kind", KINDS)
some_kinds = pytest.mark.quick(2)


def prepared(kind):
    return prepare_model_for_kbit_training(
        quantized(kind), gradient_checkpointing_kwargs={"use_reentrant": False}
    ).train()


def adapted(kind, **kwargs):
    model = prepared(kind)
    torch.manual_seed(3)
    return get_peft_model(model, D2FTConfig(**LORA, **kwargs)).train()


def plain(kind):
    model = prepared(kind)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**LORA, target_modules=TARGETS)).train()


def factors(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def same_bits(first, second):
    assert first.keys() == second.keys()
    assert all(first[name].equal(second[name]) for name in first)


def data(n=14):
    """Samples of different lengths."""
    rows = [batch(1, seed)["input_ids"][0, : 3 + seed % 5].tolist() for seed in range(n)]
    return Dataset.from_list([{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)} for ids in rows])


def collate(rows):
    length = max(len(row["input_ids"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    return {key: torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])
            for key, value in fill.items()}  # fmt: skip


def run(cls, model, folder):
    args = TrainingArguments(
        folder, per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, learning_rate=1e-2,
        report_to=[], save_strategy="no", logging_steps=1, seed=5, disable_tqdm=True, gradient_checkpointing=True,
        use_cpu=True, dataloader_pin_memory=False,
        gradient_checkpointing_kwargs={"use_reentrant": False}, remove_unused_columns=False,
    )  # fmt: skip
    trainer = cls(model=model, args=args, train_dataset=data(), data_collator=collate)
    trainer.train()
    return trainer


@each_kind
@some_kinds
def test_where_everything_runs_it_is_peft_qlora_to_the_bit(kind, tmp_path):
    ours = adapted(kind, policy="all_full", padding="keep", skip_unread_rows=False)
    assert get_runtime(ours).partitions["default"].cuts_heads
    expected = plain(kind)
    before = {name: p.detach().clone() for name, p in factors(expected).items()}
    run(D2FTTrainer, ours, tmp_path)
    run(Trainer, expected, tmp_path)
    same_bits(factors(ours), factors(expected))
    assert any(not before[name].equal(p) for name, p in factors(expected).items())


@each_kind
@some_kinds
def test_under_a_budget_it_is_peft_qlora_on_the_samples_that_run(kind):
    ours, expected = adapted(kind, compute_budget=0.6, skip_unread_rows=False), plain(kind)
    planner, rows = D2FTPlanner(ours), data()
    planner.prepare(collate(rows.select(range(2)).to_list()))
    lengths = np.array([len(row["input_ids"]) for row in rows])
    micro_batches, ran = planner.compose(np.arange(len(rows)), 4, lengths), 0
    for index, positions in enumerate(micro_batches):
        one = collate([rows[int(position)] for position in positions])
        with planner.micro_batch(index) as micro_batch:
            (ours(**one).loss * micro_batch.weight).backward()
        (expected(**one).loss * micro_batch.weight).backward()
        ran += len(positions)
    assert 0 < ran < len(rows)
    same_bits(*({name: p.grad for name, p in factors(model).items()} for model in (ours, expected)))


@each_kind
@some_kinds
def test_the_trainer_trains_under_a_budget_alone(kind, tmp_path):
    model = adapted(kind, compute_budget=0.6)
    before = {name: p.detach().clone() for name, p in factors(model).items()}
    trainer = run(D2FTTrainer, model, tmp_path)
    logged = trainer.state.log_history
    assert all(np.isfinite(log.get("loss", 0.0)) for log in logged)
    assert logged[-1]["flops_ratio"] == pytest.approx(0.6, abs=0.05)  # of the whole run
    assert any(not before[name].equal(p) for name, p in factors(model).items())


@each_kind
@some_kinds
def test_blocks_of_quantized_weights_run_as_plain_code_has_it(kind):
    with pytest.warns(
        UserWarning, match="the subnets are the 3 whole blocks .*; subnets='heads' cuts it as 'depth' does"
    ):
        ours = adapted(kind, policy="depth")
    expected, runtime = plain(kind), get_runtime(ours)
    blocks = list(expected.base_model.model.model.layers)
    for row in ([1, 2, 2], [0, 2, 1], [2, 0, 2]):
        ours.zero_grad(), expected.zero_grad()
        with reference_blocks(blocks, row):
            loss = expected(**batch()).loss
            loss.backward()
        with runtime.use(compile_plan(runtime.partitions["default"], row)):
            outputs = ours(**batch())
            outputs.loss.backward()
        torch.testing.assert_close(outputs.loss, loss)
        for name, p in factors(expected).items():
            ours_grad = factors(ours)[name].grad
            torch.testing.assert_close(torch.zeros_like(p) if ours_grad is None else ours_grad,
                                       torch.zeros_like(p) if p.grad is None else p.grad)  # fmt: skip


@each_kind
@some_kinds
def test_what_cannot_be_trained_or_cut_is_refused(kind):
    with pytest.raises(ValueError, match=r"which cannot be fine-tuned; set r \(LoRA\), or load the model without"):
        get_peft_model(quantized(kind), D2FTConfig())
    with pytest.raises(ValueError, match="as policy='bilevel' does; choose policy=.*, or subnets='blocks'"):
        get_peft_model(quantized(kind), D2FTConfig(r=4, policy="bilevel", subnets="heads", head_parallel=True))


@each_kind
@some_kinds
def test_the_adapter_loads_in_peft_alone_and_merges_as_peft_does(kind, tmp_path):
    ours = adapted(kind, compute_budget=0.6)
    for p in factors(ours).values():
        p.data.add_(0.05)
    ours.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized(kind), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    with torch.no_grad():
        expected = loaded.train()(**batch()).logits
        assert ours(**batch()).logits.equal(expected)
        merged, theirs = ours.merge_and_unload(), loaded.merge_and_unload()
        assert merged.train()(**batch()).logits.equal(theirs.train()(**batch()).logits)


@each_kind
@some_kinds
def test_the_magnitude_of_weights_is_that_of_what_they_stand_for(kind):
    model = quantized(kind)
    with pytest.warns(UserWarning, match="whole blocks"):
        ours = get_peft_model(model, D2FTConfig(r=4, policy="bilevel"))
    partition = get_runtime(ours).partitions["default"]
    plain_model = quantized(kind)
    expected = []
    for block in plain_model.model.layers:
        linears = [module for module in block.modules() if hasattr(module, "in_features")]
        norms = [p for name, p in block.named_parameters() if "norm" in name]
        weights = [dequantize_module_weight(module) for module in linears]
        biases = [module.bias for module in linears if module.bias is not None]
        expected.append(sum(float(w.detach().abs().double().sum()) for w in [*weights, *biases, *norms]))
    np.testing.assert_allclose(weight_magnitude(ours, partition), expected, rtol=1e-5)
