"""Which rows a loss reads is found from the model, used by the Trainer, and never where somebody else may look."""

import logging

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from torch.overrides import TorchFunctionMode

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from d2ft_peft.engine import get_runtime
from tests.engine.test_unread_rows import HAS_HEAD, MODELS, RULE_OF, assert_same, batch_of, build, step, traces
from tests.models import TINY, Tiny
from tests.test_trainer import arguments, assert_close, trained


LOGGER = "d2ft_peft.planning.unread_rule"


def search(model, batch, allowed=True):
    planner = D2FTPlanner(model)
    planner.unread.labels = planner.unread.head = allowed
    planner.prepare(batch)
    return planner.unread


@pytest.mark.quick(3)
@pytest.mark.parametrize("labels", ["masked prompts", "every label counts"])
@pytest.mark.parametrize("name", MODELS)
def test_the_rule_is_found_from_the_model(name, labels, caplog):
    model, batch = build(name), batch_of(name, labels)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        unread = search(model, batch)
        unread.find(batch)
    assert (unread.found.rule.name, unread.found.head) == (RULE_OF[name], name in HAS_HEAD)
    (message,) = (record.getMessage() for record in caplog.records if record.name == LOGGER)
    assert f"rule '{RULE_OF[name]}'" in message
    unread.close()
    assert get_runtime(model).unread is None


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["vit", "bert", "llama classifier", "llama"])
def test_one_sample_and_half_precision_are_enough(name):
    for dtype in (torch.float32, torch.bfloat16):
        model = build(name).to(dtype)
        batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_of(name).items()}
        assert search(model, {key: value[:1] for key, value in batch.items()}).found.rule.name == RULE_OF[name]


def test_looking_leaves_the_model_as_it_was():
    model, batch = build("llama", "lora", lora_dropout=0.5), batch_of("llama")
    model.base_model.model.model.norm.eval()
    flags = [module.training for module in model.modules()]
    with torch.no_grad():
        before, rng = {n: v.clone() for n, v in model.state_dict().items()}, torch.get_rng_state()
        given = {name: value.clone() for name, value in batch.items()}
        unread = search(model, batch)
    assert unread.found is not None and torch.equal(torch.get_rng_state(), rng)
    assert [module.training for module in model.modules()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(value.equal(given[name]) for name, value in batch.items())


class MeanPooled(tf.ViTForImageClassification):
    def forward(self, pixel_values, labels=None, **kwargs):
        logits = self.classifier(self.vit(pixel_values).last_hidden_state.mean(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return tf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


class ALittleOfAll(tf.ViTForImageClassification):
    """Reads the first row, and all others by what no gradient shows."""

    def forward(self, pixel_values, labels=None, **kwargs):
        hidden = self.vit(pixel_values).last_hidden_state
        logits = self.classifier(hidden[:, 0] + 0.01 * hidden[:, 1:].mean(1).detach())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return tf.modeling_outputs.ImageClassifierOutput(loss=loss, logits=logits)


@pytest.mark.parametrize("kind", [MeanPooled, ALittleOfAll])
def test_a_model_that_reads_all_rows_gets_no_rule(kind, caplog):
    model = get_peft_model(Tiny(tf.ViTConfig, kind, TINY["vit"].kwargs, "image").build(), D2FTConfig()).train()
    before = traces(model)
    with caplog.at_level(logging.INFO, logger=LOGGER):
        assert search(model, TINY["vit"].batch()).found is None
    assert "no rule says which" in caplog.text and traces(model) == before


def test_experts_run_whole_and_where_a_loss_balances_them_so_does_the_rest():
    kwargs = {
        **TINY["llama"].kwargs,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "experts_implementation": "eager",
    }
    tiny = Tiny(tf.MixtralConfig, tf.MixtralForCausalLM, kwargs)
    for balances in (False, True):
        model = tiny.build(output_router_logits=balances).double()
        model = get_peft_model(model, D2FTConfig(policy="all_full")).train()
        batch = batch_of("llama")
        expected = step(model, batch)
        found = search(model, batch).found
        assert (found is None) == balances
        assert_same(step(model, batch), expected)
    assert get_runtime(model).readings == [None]


def test_batches_that_the_model_does_not_take_and_a_mean_over_rows_get_none(caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        batch = batch_of("bert")
        assert search(build("bert"), batch | {"labels": torch.tensor([1, 4, 99])}).found is None
        assert "failed" in caplog.text
        assert search(build("bert", shortcut="mean"), batch).found is None
        assert "shortcut='mean'" in caplog.text
        assert search(build("bert", skip_unread_rows=False), batch).found is None
        assert len([record for record in caplog.records if record.name == LOGGER]) == 2


def test_a_bare_loop_leaves_out_rows_of_classifiers_only():
    """Whoever writes the loop may look at any logits."""
    assert search(build("llama"), batch_of("llama"), allowed=False).found is None
    model, batch = build("bert", policy="all_full"), batch_of("bert")
    expected = step(model, batch)
    planner = D2FTPlanner(model)
    model.zero_grad()
    planner.plan([batch, batch])
    for index in range(2):
        with planner.micro_batch(index):
            loss = model(**batch).loss
            loss.backward()
    assert_same({"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, expected)
    assert planner.pop_logs()["flops_ratio"] < 0.95


def rows_of(name):
    batches = [batch_of(name, labels) for labels in ("masked prompts", "none in one sample", "masked prompts")]
    return [{key: value[i] for key, value in batch.items()} for batch in batches for i in range(3)]


def run(tmp_path, name, trainer=D2FTTrainer, calls=1, config=(), settings=(), **more):
    """(weights, entries of the log, trainer) after training on 9 samples, the last micro-batch of an epoch one."""
    model = build(name, **{"policy": "all_full", **dict(config)})
    before = traces(model)
    args = arguments(tmp_path, max_steps=3, learning_rate=1e-3, optim="sgd", **dict(settings))
    trainer = trainer(model=model, args=args, train_dataset=rows_of(name), eval_dataset=rows_of(name), **more)
    for _ in range(calls):
        trainer.train()
    assert traces(model) == before and get_runtime(model).unread is None
    return trained(model), trainer.state.log_history, trainer


def flops_ratio(history):
    return history[-1]["flops_ratio"]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name, mode, accumulation",
    [
        ("vit", "full", 1),
        ("bert", "lora", 4),
        ("llama classifier", "full", 4),
        ("llama", "lora", 1),
        ("gpt2", "full", 4),
    ],
)
def test_the_trainer_ends_with_the_same_weights(tmp_path, name, mode, accumulation):
    settings = {"gradient_accumulation_steps": accumulation, "eval_strategy": "steps", "eval_steps": 2}
    runs = {
        skips: run(tmp_path, name, calls=2, settings=settings, config={"mode": mode, "skip_unread_rows": skips})
        for skips in (True, False)
    }
    assert_close(runs[True][0], runs[False][0])
    for ours, theirs in zip(runs[True][1], runs[False][1], strict=True):
        for key in ("loss", "eval_loss", "grad_norm"):
            assert ours.get(key, 0.0) == pytest.approx(theirs.get(key, 0.0), rel=1e-5)
    assert flops_ratio(runs[True][1]) < 0.9 < flops_ratio(runs[False][1]) == 1.0


@pytest.mark.thorough
@pytest.mark.parametrize("policy", ["bilevel", "importance", "fewer_samples"])
def test_policies_end_with_the_same_weights(tmp_path, policy):
    def go(skips):
        return run(tmp_path, "llama", config={"policy": policy, "compute_budget": 0.6, "skip_unread_rows": skips})

    ours, theirs = go(True), go(False)
    assert_close(ours[0], theirs[0])
    assert flops_ratio(ours[1]) < flops_ratio(theirs[1])


class Asking(TorchFunctionMode):
    """Counts calls whose result is as long as the data says: for them a device is waited for."""

    calls = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls += func is torch.Tensor.nonzero
        return func(*args, **(kwargs or {}))


@pytest.mark.quick(1)
@pytest.mark.parametrize("change, calls", [(False, 0), (True, 1)])
def test_rows_are_counted_on_the_host_unless_labels_changed_since(tmp_path, change, calls):
    seen = []

    class Watched(D2FTTrainer):
        def _prepare_inputs(self, inputs):
            inputs = super()._prepare_inputs(inputs)
            if change:
                inputs["labels"][0, -2:] = -100
            return inputs

        def training_step(self, *args, **kwargs):
            with Asking() as asking:
                result = super().training_step(*args, **kwargs)
            seen.append((asking.calls, *get_runtime(self.model).readings))
            return result

    run(tmp_path, "llama", Watched)
    assert len(seen) == 4 + 1 + 4
    for asked, reading in seen:
        labels = reading.inputs["labels"]
        assert reading.ran[1] == int((labels[:, 1:] != -100).sum()) and asked == calls


class OwnLoss(D2FTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        assert len(outputs.logits) == len(inputs["input_ids"])
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def own_loss(outputs, labels, num_items_in_batch=None):
    return nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "more", [{"trainer": OwnLoss}, {"compute_loss_func": own_loss}, {"settings": {"label_smoothing_factor": 0.1}}]
)
def test_where_somebody_else_reads_the_logits_they_are_whole(tmp_path, more):
    assert flops_ratio(run(tmp_path, "llama", **more)[1]) == 1.0


@pytest.mark.thorough
def test_a_loss_of_ones_own_on_a_classifier_sees_the_logits_that_it_needs(tmp_path):
    runs = [run(tmp_path, "bert", OwnLoss, config={"skip_unread_rows": skips}) for skips in (True, False)]
    assert_close(runs[0][0], runs[1][0])
    assert flops_ratio(runs[0][1]) < 0.95


def test_an_exception_leaves_nothing_on_the_model(tmp_path):
    class Breaks(D2FTTrainer):
        def training_step(self, *args, **kwargs):
            super().training_step(*args, **kwargs)
            assert get_runtime(self.model).unread is not None
            raise KeyboardInterrupt

    model = build("llama", policy="all_full")
    before = traces(model)
    with pytest.raises(KeyboardInterrupt):
        Breaks(model=model, args=arguments(tmp_path), train_dataset=rows_of("llama")).train()
    assert traces(model) == before
