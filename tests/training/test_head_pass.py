"""The Trainer's head starts from a fit to the training samples: when it is new, once, and counted."""

import logging
import tempfile

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, set_seed

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer, fit_head
from d2ft_peft.head_start import HeadFeatures, HeadStartRefused
from d2ft_peft.training import head_pass
from tests.distributed.launch import run
from tests.head_start.test_fit_head import batches, build
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, trained


@pytest.fixture(autouse=True)
def few_classes_are_enough(monkeypatch):
    """The tiny models have three."""
    monkeypatch.setattr(head_pass, "_FEWEST_CLASSES", 2)


def adapt(name="vit", dtype=torch.float32, **config):
    model = build(name, hidden_dropout_prob=0.1) if name == "vit" else build(name)
    torch.manual_seed(5)
    defaults = {"modules_to_save": ["score" if hasattr(model, "score") else "classifier"]}
    return get_peft_model(model.to(dtype), D2FTConfig(**{**defaults, **config}))


def samples(n=41, seed=7, dtype=torch.float32):
    """An odd number of images whose classes can be told apart."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    pixels = torch.randn(n, 3, 16, 16, generator=g).to(dtype) + labels[:, None, None, None] - 1
    return [{"pixel_values": x, "labels": y} for x, y in zip(pixels, labels, strict=True)]


def started(tmp_path, cls=D2FTTrainer, data=None, callbacks=(), model=None, train=True, **config):
    """A Trainer that trained."""
    args = arguments(tmp_path, **config.pop("args", {}))
    model = model or adapt(**config)
    data = samples() if data is None else data
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=list(callbacks))
    if train:
        trainer.train()
    return trainer


def head(model):
    return model.base_model.model.classifier.modules_to_save["default"]


class Watching(D2FTTrainer):
    """Keeps the head as it is when the first micro-batch runs."""

    def training_step(self, *args, **kwargs):
        if not hasattr(self, "first_head"):
            self.first_head = head(self.model).weight.detach().clone()
        return super().training_step(*args, **kwargs)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "config",
    [
        {"policy": "all_full"}, {"policy": "fewer_samples", "r": 4, "head_start": True}, {"policy": "random"},
        {"backward_score": "fisher", "num_full": 2},
    ],
    ids=str,
)  # fmt: skip
def test_the_first_step_begins_with_the_fitted_head(tmp_path, config):
    config |= {"dtype": torch.float64}
    data, model = samples(dtype=torch.float64), adapt(**config)
    fit_head(model, [{k: torch.stack([item[k] for item in data]) for k in data[0]}], progress=False)
    trainer = started(tmp_path, Watching, data, **config)
    start = trainer._d2ft_session.head_start
    torch.testing.assert_close(trainer.first_head, head(model).weight.detach(), rtol=1e-6, atol=1e-8)
    assert start.samples == 41 and start.loss_after < start.loss_before
    entry = trainer.state.log_history[0]
    assert entry["head_start_samples"] == 41 and entry["head_start_flops"] == start.flops and entry["step"] == 0
    losses = [log for log in trainer.state.log_history if "loss" in log]
    assert [log["step"] for log in losses] == [1, 2, 3] and "head_start_samples" not in losses[0]


@pytest.mark.thorough
@pytest.mark.parametrize("config", [{"policy": "fewer_samples"}, {"backward_score": "fisher", "num_full": 2}], ids=str)
def test_what_it_costs_counts_as_training(tmp_path, config):
    with_start, without = (started(tmp_path, head_start=start, **config) for start in ("auto", False))
    start = with_start._d2ft_session.head_start
    assert start.flops == start.flops_here > 0
    difference = with_start.state.total_flos - without.state.total_flos
    assert difference == pytest.approx(start.flops, rel=1e-9)
    forward = with_start.planner.cost_model.forward_flops(41)
    of_fit = start.flops - (0 if "backward_score" in config else forward)
    assert of_fit / (4 * 41 * 32 * 3) == pytest.approx(round(of_fit / (4 * 41 * 32 * 3)), abs=1e-6)


@pytest.mark.thorough
def test_one_pass_scores_and_collects(tmp_path, monkeypatch):
    own = []
    monkeypatch.setattr(HeadFeatures, "run", lambda self, batch: own.append(len(batch["labels"])))
    trainer = started(tmp_path, backward_score="fisher", num_full=2)
    assert not own and trainer._d2ft_session.head_start.samples == 41


@pytest.mark.thorough
def test_of_samples_that_are_not_scored_the_features_alone_are_read(tmp_path):
    trainer = started(tmp_path, backward_score="fisher", num_full=2, score_fraction=0.3)
    assert len(trainer.planner.scores["fisher"].samples) == 12
    assert trainer._d2ft_session.head_start.samples == 41


@pytest.mark.thorough
def test_the_random_state_is_that_of_a_run_without(tmp_path):
    states = []

    class Drawing(D2FTTrainer):
        def training_step(self, *args, **kwargs):
            states.append((torch.random.get_rng_state().tolist(), np.random.get_state()[1].tolist()))
            return super().training_step(*args, **kwargs)

    for start in (False, "auto"):
        set_seed(3)
        started(tmp_path, Drawing, args={"max_steps": 1}, policy="all_full", head_start=start)
    assert len(states) == 8 and states[0] == states[4]


@pytest.mark.thorough
def test_a_callback_does_the_same_as_the_trainer(tmp_path):
    ours = started(tmp_path, policy="fewer_samples")
    theirs = started(tmp_path, Trainer, callbacks=[D2FTCallback()], policy="fewer_samples")
    assert theirs._d2ft_session.head_start is not None
    assert_equal(trained(ours.model), trained(theirs.model))


@pytest.mark.thorough
def test_a_second_call_of_train_and_a_resumed_run_leave_the_head(tmp_path):
    trainer = started(tmp_path, policy="random", args={"save_strategy": "steps", "save_steps": 2})
    trainer.train()
    assert trainer._d2ft_session.head_start is None
    for start in ("auto", True):
        resumed = started(tmp_path, train=False, policy="random", head_start=start)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.state.global_step == 3 and resumed._d2ft_session.head_start is None


@pytest.mark.thorough
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_interrupted(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 2}
    whole = started(tmp_path, policy="importance", args=args)
    resumed = started(tmp_path, train=False, policy="importance", args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal(trained(resumed.model), trained(whole.model))
    assert resumed.state.total_flos == whole.state.total_flos


@pytest.mark.thorough
def test_a_head_that_is_not_new_is_left_alone_unless_asked_for(tmp_path, caplog):
    caplog.set_level(logging.INFO, "d2ft_peft")
    for start, fitted in (("auto", False), (True, True), (False, False)):
        model = adapt(policy="fewer_samples", head_start=start)
        torch.nn.init.ones_(head(model).bias)
        assert (started(tmp_path, model=model)._d2ft_session.head_start is not None) == fitted
    assert caplog.text.count("was trained before; head_start=True fits it all the same") == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(samples())


CANNOT = {
    "frozen": ({"modules_to_save": None}, {}, "no trained nn.Linear makes the logits"),
    "stream": ({"policy": "random"}, {"data": Stream()}, "is read once, so no pass can go before"),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", CANNOT)
def test_where_it_cannot_be_it_is_not_or_says_why(tmp_path, case, caplog):
    config, options, message = CANNOT[case]
    caplog.set_level(logging.INFO, "d2ft_peft")
    trainer = started(tmp_path, **options, **config)
    assert trainer._d2ft_session.head_start is None and caplog.text.count(message) == 1
    with pytest.raises(HeadStartRefused, match=message):
        started(tmp_path, **options, **config, head_start=True)


def test_a_causal_model_is_left_alone(tmp_path):
    model = get_peft_model(TINY["llama"].build(), D2FTConfig(policy="fewer_samples", train_boundary=True))
    batch = TINY["llama"].batch(12)
    data = [{k: v[i] for k, v in batch.items()} for i in range(12)]
    assert started(tmp_path, data=data, model=model)._d2ft_session.head_start is None


@pytest.mark.thorough
def test_texts_of_any_length_are_read_at_their_last_token(tmp_path):
    data = [{k: v[0] for k, v in b.items()} for b in batches("llama", sizes=[1] * 14)]

    def collate(items):
        pad = torch.nn.utils.rnn.pad_sequence
        texts = {k: pad([i[k] for i in items], batch_first=True) for k in ("input_ids", "attention_mask")}
        return {**texts, "labels": torch.stack([i["labels"] for i in items])}

    model = adapt("llama", policy="fewer_samples", r=4, head_start=True)
    args = arguments(tmp_path)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data, data_collator=collate)
    trainer.train()
    twin = adapt("llama", policy="fewer_samples", r=4)
    expected = fit_head(twin, [{k: v[None] for k, v in item.items()} for item in data], progress=False)
    assert trainer._d2ft_session.head_start.loss_after == pytest.approx(expected.loss_after, rel=1e-2)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


@pytest.mark.thorough
def test_a_fraction_and_the_runs_compute_bound_the_pass(tmp_path):
    def count(**config):
        return started(tmp_path, data=samples(400), policy="fewer_samples", **config)._d2ft_session.head_start.samples

    assert count(head_start_fraction=0.1) == 40
    assert count() == 150  # 50 for each class: a quarter of three short steps is less
    afford = count(args={"max_steps": 60}, callbacks=[Stop()])
    assert 150 < afford < 400  # 60 steps of 8 samples at 0.6, of which a forward pass costs about a third
    assert afford == pytest.approx(0.25 * 60 * 8 * 0.6 * 3, rel=0.1)


def two_processes(batch_size):
    model = adapt(dtype=torch.float64, policy="all_full", head_start=True)  # processes of their own know no fixture
    data = samples(dtype=torch.float64)
    with tempfile.TemporaryDirectory() as folder:
        args = {"per_device_train_batch_size": int(batch_size)}
        trainer = started(folder, Watching, data, model=model, args=args)
    start = trainer._d2ft_session.head_start
    facts = torch.tensor([start.samples, start.flops, start.loss_after], dtype=torch.float64)
    return {"head": trainer.first_head, "facts": facts, "flos": torch.tensor(trainer.state.total_flos)}


@pytest.mark.thorough
@pytest.mark.distributed
def test_two_processes_fit_what_one_does(tmp_path):
    whole = two_processes("4")
    first, second = run("tests.training.test_head_pass", "two_processes", tmp_path, "2")
    assert torch.equal(first["head"], second["head"]) and torch.equal(first["facts"], second["facts"])
    torch.testing.assert_close(first["head"], whole["head"], rtol=1e-6, atol=1e-8)
    assert first["facts"][0] == 41 and first["facts"][2] == pytest.approx(whole["facts"][2].item())


@pytest.mark.thorough
def test_a_head_of_few_classes_starts_as_it_is_unless_asked_for(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(head_pass, "_FEWEST_CLASSES", 10)
    with caplog.at_level(logging.INFO):
        assert started(tmp_path)._d2ft_session.head_start is None
    assert "has 3 outputs, and a head start pays from 10 on" in caplog.text
    assert started(tmp_path, head_start=True)._d2ft_session.head_start is not None


@pytest.mark.thorough
def test_under_lora_a_head_starts_as_it_is_unless_asked_for(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        assert started(tmp_path, r=4)._d2ft_session.head_start is None
    assert "costs accuracy under LoRA" in caplog.text
    assert started(tmp_path, r=4, head_start=True)._d2ft_session.head_start is not None
