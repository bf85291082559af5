"""A model without blocks that can be told apart is one subnet: policies over samples work, and others say so."""

import numpy as np
import pytest
import torch
import transformers as tf
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer, partition_model
from d2ft_peft.costs import cost_model, flop_counter, probe_model
from d2ft_peft.engine import compile_plan, get_runtime
from tests.models import Tiny
from tests.tuners.test_equality import plain_name as without_layers
from tests.whole_models import HandWritten
from tests.zoo import ZOO


class Flat(nn.Module):
    """No list of anything."""

    def __init__(self, config=None):
        super().__init__()
        self.embed, self.think, self.score = nn.Embedding(64, 16), nn.Linear(16, 32), nn.Linear(32, 5)

    def forward(self, input_ids, labels=None, attention_mask=None):
        logits = self.score(self.think(self.embed(input_ids)).relu().mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def shared(config=None):
    model = HandWritten()
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    return model


MODELS = {
    "albert": Tiny(
        tf.AlbertConfig, tf.AlbertForSequenceClassification, {**ZOO["albert"].kwargs, "classifier_dropout_prob": 0.0}
    ),
    "xlm": Tiny(
        tf.XLMConfig, tf.XLMForSequenceClassification,
        {"vocab_size": 64, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "num_labels": 5, "dropout": 0.0,
         "attention_dropout": 0.0, "summary_first_dropout": 0.0},
    ),
    "flat": Tiny(dict, Flat, {}),
    "shared": Tiny(dict, shared, {}),
}  # fmt: skip
SUBNET = {
    "albert": "albert.encoder",
    "albert, groups": "albert.encoder",
    "xlm": "transformer",
    "flat": "",
    "shared": "",
}
HEAD = {"xlm": "sequence_summary", "flat": "score", "shared": "score"}
MODES = {"full": {}, "lora": {"r": 4, "init_lora_weights": False}}
each = pytest.mark.parametrize(
    ("name", "mode"), [(n, m) for n in MODELS for m in MODES if (n, m) != ("shared", "full")]
)
pytestmark = pytest.mark.filterwarnings("ignore:LoRA leaves")


def head_of(name):
    return HEAD.get(name, "classifier")


def adapted(name, mode, base=None, **kwargs):
    torch.manual_seed(7)
    config = D2FTConfig(**MODES[mode], **kwargs, subnets="blocks", modules_to_save=[head_of(name)], head_start=False)
    return get_peft_model(MODELS[name].build() if base is None else base, config).train()


def plain_twin(name, mode, model):
    """The model as anybody would train it: stock PEFT, or the weights that the adapter copied."""
    twin = MODELS[name].build().double()
    if mode == "lora":
        torch.manual_seed(7)
        names = {"target_modules": model.peft_config["default"].target_modules, "modules_to_save": [head_of(name)]}
        return get_peft_model(twin, LoraConfig(**MODES["lora"], **names)).train()
    trained = {plain_name(key) for key, p in model.named_parameters() if p.requires_grad}
    for key, parameter in twin.named_parameters():
        parameter.requires_grad_(key in trained)
    return twin.train()


def plain_name(key):
    return without_layers(key).replace("modules_to_save.default.", "")


def gradients(model):
    return {plain_name(key): p.grad for key, p in model.named_parameters() if p.grad is not None}


@pytest.mark.quick(3)
@each
def test_the_samples_that_run_train_as_ever(name, mode):
    model = adapted(name, mode, policy="fewer_samples", compute_budget=0.5, base=MODELS[name].build().double())
    twin, planner = plain_twin(name, mode, model), D2FTPlanner(model, num_micro_batches=2)
    data = MODELS[name].batch(8)
    planner.prepare(data)
    chosen = planner.compose(np.arange(8), 4)
    assert sum(map(len, chosen)) == 4
    for index, positions in enumerate(chosen):
        batch = {key: value[positions] for key, value in data.items()}
        with planner.micro_batch(index) as micro_batch:
            outputs = model(**batch)
            (outputs.loss * micro_batch.weight).backward()
        expected = twin(**batch)
        (expected.loss * micro_batch.weight).backward()
        torch.testing.assert_close(outputs.logits, expected.logits)
    ours, theirs = gradients(model), gradients(twin)
    assert ours.keys() == theirs.keys() and len(ours) > 2
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, msg=lambda text, key=key: f"{key}: {text}")
    assert planner.counts.last.compute_ratio == pytest.approx(0.5)


@pytest.mark.quick(2)
@each
def test_it_costs_what_a_counter_counts(name, mode):
    """Blocks that run several times are counted each time. Where all weights train nothing is foreseen in vain; else
    the gradient of what enters the lowest layer is, although nothing below needs it."""
    model, batch = adapted(name, mode), MODELS[name].batch(1)
    partition = get_runtime(model).partitions["default"]
    probe = probe_model(model, partition, batch)
    costs = cost_model(model, partition, probe)
    with flop_counter() as counted, get_runtime(model).use(compile_plan(partition, [2])):
        model(**batch).loss.backward()
    assert get_runtime(model).passes == [(1, probe.sequence_length)] == [(1, 7)]
    foreseen = costs.full_flops(np.ones(1)) / counted.get_total_flops()
    assert foreseen == pytest.approx(1, abs=1e-2) if mode == "full" else 1 <= foreseen < 1.6


@pytest.mark.quick(3)
@pytest.mark.parametrize("policy", ["exact_first", "fewer_samples", "importance", "selective_backprop"])
@each
def test_the_trainer_trains_it_under_policies_over_samples(name, mode, policy, tmp_path):
    rows = MODELS[name].batch(24)
    rows.pop("attention_mask")
    data = Dataset.from_dict({key: value.tolist() for key, value in rows.items()}).with_format("torch")
    args = TrainingArguments(
        tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, num_train_epochs=2, report_to=[],
        save_strategy="no", logging_steps=1, disable_tqdm=True, learning_rate=1e-2, use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    model = adapted(name, mode, policy=policy, compute_budget=0.6)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[-1]["flops_ratio"] == pytest.approx(0.6, abs=0.15)
    expected = logits(model, name)
    if name != "shared":  # PEFT itself saves what stands in several places once, and misses it in the others
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(MODELS[name].build(), tmp_path)
        torch.testing.assert_close(logits(loaded, name), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload(), name), expected, rtol=1e-4, atol=1e-5)


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**MODELS[name].batch()).logits


@pytest.mark.parametrize("name", MODELS)
def test_it_is_said_which_module_is_the_subnet(name):
    where = SUBNET.get(name) or "the model"
    with pytest.warns(UserWarning, match=f"{where} is the only subnet, because heads cannot be cut: .* others have no"):
        model = get_peft_model(MODELS[name].build(), D2FTConfig(r=4))
    partition = get_runtime(model).partitions["default"]
    assert partition.blocks == (SUBNET.get(name, ""),) and partition.is_one_subnet
    assert partition.summary().startswith(f"{where} is the only subnet")
    with pytest.raises(
        ValueError, match="cannot be partitioned into heads|register_architecture|no module of attention"
    ):
        partition_model(MODELS[name].build())


@pytest.mark.parametrize("policy", ["bilevel", "depth"])
@pytest.mark.parametrize("name", ["albert", "flat"])
def test_policies_that_leave_out_subnets_are_refused(name, policy):
    model = adapted(name, "lora", policy=policy, compute_budget=0.6)
    with pytest.raises(ValueError, match=f"policy='{policy}' leaves out blocks, .* the model is one subnet"):
        D2FTPlanner(model).prepare(MODELS[name].batch())
    runtime = get_runtime(model)
    with (
        pytest.raises(ValueError, match="its input cannot stand in for its output; choose a policy over samples"),
        runtime.use(compile_plan(runtime.partitions["default"], [0])),
    ):
        model(**MODELS[name].batch())


def test_a_module_in_several_places_is_not_copied():
    """The copy would stand in one of them, and the others would go on as before."""
    with pytest.raises(ValueError, match="blocks.0 is one module in 3 places of the model, .* train LoRA"):
        adapted("shared", "full")
