"""Learning rates of a step: the head's, and one that follows the samples that run."""

import copy
import tempfile

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerCallback

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer
from tests.distributed.launch import run
from tests.test_trainer import adapt, arguments, assert_close, assert_equal, doubles, samples, trained


class Rates(TrainerCallback):
    """Notes the learning rate of every parameter when the optimizer steps, and the one that is left after it."""

    def __init__(self):
        self.stepped, self.left = [], []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        # Called before the session's own callback: look when the step itself is made.
        if not hasattr(self, "hook"):
            inner = optimizer.optimizer
            self.hook = inner.register_step_pre_hook(lambda *_: self.stepped.append(rates(inner)))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.left.append(rates(optimizer))


def rates(optimizer):
    return {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}


def fit(folder, model, data=None, cls=D2FTTrainer, **kwargs):
    """Train; return the Trainer, and the rates that its optimizer stepped with."""
    given = {key: kwargs.pop(key) for key in ("optimizers", "optimizer_cls_and_kwargs") if key in kwargs}
    resume, seen = kwargs.pop("resume", None), Rates()
    args = arguments(folder, **{"lr_scheduler_type": "constant", **kwargs})
    data = data or samples()
    trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=data[:2], callbacks=[seen], **given)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, seen


HEADS = {
    "boundary": {"train_boundary": True},
    "in place": {"train_boundary": True, "keep_base": False},
    "modules to save": {"modules_to_save": ["classifier"]},
    "lora": {"mode": "lora", "modules_to_save": ["classifier"]},
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("head", HEADS)
def test_the_head_steps_at_its_own_rate_and_all_else_at_the_trainers(tmp_path, head):
    model = adapt(policy="all_full", compute_budget=1.0, head_learning_rate_factor=10, **HEADS[head]).float()
    trainer, seen = fit(tmp_path, model, weight_decay=0.1)
    for at in seen.stepped + seen.left:
        expected = {id(p): 0.1 if "classifier" in n else 0.01 for n, p in model.named_parameters() if p.requires_grad}
        assert at == pytest.approx(expected)
    decays = {id(p): group["weight_decay"] for group in trainer.optimizer.param_groups for p in group["params"]}
    plain = set(trainer.get_decay_parameter_names(model))
    assert decays == {id(p): 0.1 * (n in plain) for n, p in model.named_parameters() if p.requires_grad}
    assert {0.0, 0.1} == set(decays.values())
    assert [e["learning_rate"] for e in trainer.state.log_history if "learning_rate" in e] == [0.01] * 3


@pytest.mark.quick(1)
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_a_factor_of_one_changes_no_bit_and_another_one_only_the_head_of_the_first_step(tmp_path, optim):
    weights = {}
    for factor in (None, 1, 3):
        config = {} if factor is None else {"head_learning_rate_factor": factor}
        model = adapt(policy="all_full", compute_budget=1.0, train_boundary=True, **config)
        before = trained(model)
        fit(tmp_path, model, doubles(samples()), max_steps=1, optim=optim, max_grad_norm=0)
        weights[factor] = {name: value - before[name] for name, value in trained(model).items()}
    assert_equal(weights[1], weights[None])
    for name, moved in weights[3].items():
        torch.testing.assert_close(moved, weights[1][name] * (3 if "classifier" in name else 1), rtol=1e-6, atol=1e-9)


def test_the_schedule_scales_both_rates_and_a_second_call_of_train_divides_nothing_again(tmp_path):
    model = adapt(num_full=2, num_micro_batches=4, train_boundary=True, head_learning_rate_factor=0.5).float()
    seen = Rates()
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples(), callbacks=[seen])
    for _ in range(2):
        trainer.train()
    head = {id(p) for n, p in model.named_parameters() if "classifier" in n}
    assert len(seen.stepped) == 6
    for at, share in zip(seen.stepped, [1, 2 / 3, 1 / 3] * 2, strict=True):
        assert at == pytest.approx({key: (0.005 if key in head else 0.01) * share for key in at})


@pytest.mark.thorough
@pytest.mark.parametrize("rule", [None, "sqrt"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, rule):
    def train(folder, **kwargs):
        model = adapt(
            policy="fewer_samples", compute_budget=0.6, train_boundary=True, num_micro_batches=4,
            head_learning_rate_factor=10, learning_rate_follows_batch=rule,
        ).float()  # fmt: skip
        fit(folder, model, samples(n=30), gradient_accumulation_steps=1, max_steps=12, save_strategy="steps",
            save_steps=5, **kwargs)  # fmt: skip
        return trained(model)

    whole = train(tmp_path / "whole")
    for stop in (5, 10):  # each within a window, the second of a shorter one
        assert_equal(train(tmp_path / "again", resume=str(tmp_path / f"whole/checkpoint-{stop}")), whole)


@pytest.mark.parametrize("config", [{}, {"mode": "lora"}], ids=["full", "lora"])
def test_without_a_head_that_is_trained_the_factor_is_refused(tmp_path, config):
    model = adapt(compute_budget=0.6, head_learning_rate_factor=10, **config).float()
    with pytest.raises(ValueError, match="head_learning_rate_factor=10 finds no head .* modules_to_save"):
        fit(tmp_path, model)


def test_an_embedding_that_is_the_head_as_well_is_no_head(tmp_path):
    model = adapt("gpt2", compute_budget=0.6, train_boundary=True, head_learning_rate_factor=10).float()
    with pytest.raises(ValueError, match="shares its weight with the embedding"):
        fit(tmp_path, model, samples("gpt2"))


def test_an_optimizer_of_ones_own_is_not_divided_and_says_so(tmp_path):
    model = adapt(compute_budget=0.6, train_boundary=True, head_learning_rate_factor=10).float()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ValueError, match="head_learning_rate_factor=10 does not reach an optimizer that you made"):
        fit(tmp_path, model, optimizers=(optimizer, None))


@pytest.mark.parametrize(
    "config", [{"head_learning_rate_factor": 10, "train_boundary": True}, {"learning_rate_follows_batch": "sqrt"}]
)
def test_optimizers_that_step_within_backward_are_refused(tmp_path, config, monkeypatch):
    trainer = D2FTTrainer(
        model=adapt(compute_budget=0.6, **config).float(), args=arguments(tmp_path), train_dataset=samples()
    )
    monkeypatch.setattr(trainer.args, "optim", "galore_adamw_layerwise")
    monkeypatch.setattr(trainer, "optimizer_cls_and_kwargs", (torch.optim.SGD, {"lr": 0.1}))
    with pytest.raises(ValueError, match="does not reach optim='galore_adamw_layerwise', which steps within"):
        trainer.train()


@pytest.mark.parametrize(
    "field, value", [("head_learning_rate_factor", 0), ("head_learning_rate_factor", "10"),
                     ("learning_rate_follows_batch", True), ("learning_rate_follows_batch", "square")],
)  # fmt: skip
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be"):
        D2FTConfig(**{field: value})


@pytest.mark.quick(2)
@pytest.mark.parametrize("rule, exponent", [("sqrt", 0.5), ("linear", 1.0)])
@pytest.mark.parametrize("policy", ["fewer_samples", "bilevel"])
def test_the_rate_follows_the_samples_that_run_and_is_put_back(tmp_path, rule, exponent, policy):
    """Four micro-batches of two; the last step of an epoch of 29 draws five samples."""
    shares = []

    class Watching(D2FTTrainer):
        def get_batch_samples(self, *args):
            batches = super().get_batch_samples(*args)
            schedule = self.planner.schedule
            shares.append(schedule.weights[~schedule.skipped].sum() / schedule.weights.sum())
            return batches

    model = adapt(policy=policy, num_full=None if policy == "fewer_samples" else 2, learning_rate_follows_batch=rule,
                  compute_budget=0.6 if policy == "fewer_samples" else None)  # fmt: skip
    # A scheduler that leaves the rates alone until it has seen an evaluation: nobody else puts them back.
    alone = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 100}
    trainer, seen = fit(tmp_path, model, doubles(samples(n=29)), cls=Watching, max_steps=5, **alone)
    factors = [next(iter(at.values())) / 0.01 for at in seen.stepped]
    assert factors == pytest.approx([share**exponent for share in shares])
    assert len(set(np.round(shares, 6))) > 1 and max(shares) < 1
    assert all(set(at.values()) == {0.01} for at in seen.left)
    assert not [c for c in trainer.callback_handler.callbacks if type(c).__name__ == "FollowBatch"]


def test_without_accumulation_a_step_is_compared_with_the_batch_that_it_stands_for(tmp_path):
    """Every step runs two samples of its own batch of three."""
    model = adapt(
        policy="fewer_samples", compute_budget=7 / 12, num_micro_batches=4, learning_rate_follows_batch="linear"
    )
    _, seen = fit(
        tmp_path,
        model,
        doubles(samples(n=12)),
        gradient_accumulation_steps=1,
        per_device_train_batch_size=3,
        max_steps=4,
    )
    assert [next(iter(at.values())) / 0.01 for at in seen.stepped] == pytest.approx([2 / 3] * 4)
    assert len(seen.left) == 4


def test_a_batch_that_runs_as_it_was_drawn_steps_at_the_scheduled_rate(tmp_path):
    weights = []
    for rule in (None, "linear"):
        model = adapt(num_full=2, num_micro_batches=4, learning_rate_follows_batch=rule)
        fit(tmp_path, model, doubles(samples(n=15)), gradient_accumulation_steps=1, max_steps=8, optim="sgd")
        weights.append(trained(model))
    assert_equal(*weights)


def test_the_linear_rule_is_gradient_descent_on_the_sum(tmp_path):
    """Mean over the samples that ran times their share: the sum of their gradients over all that were drawn."""
    start = adapt(policy="fewer_samples", compute_budget=0.5, learning_rate_follows_batch="linear")
    ours, theirs = copy.deepcopy(start), copy.deepcopy(start)
    data, ran = doubles(samples(n=8)), []

    class Watching(D2FTTrainer):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            if not self._d2ft_session.idle:
                ran.extend(self._d2ft_session.current.facts.indices.tolist())
            return result

    fit(tmp_path, ours, data, cls=Watching, max_steps=1, optim="sgd", max_grad_norm=0, learning_rate=0.5)
    theirs.train()
    with pytest.warns(UserWarning, match="without a schedule"):
        loss = theirs(**{key: torch.stack([data[i][key] for i in ran]) for key in data[0]}).loss
    (loss * len(ran) / len(data)).backward()
    for parameter in theirs.parameters():
        if parameter.grad is not None:
            parameter.data -= 0.5 * parameter.grad
    assert len(ran) == 4
    assert_close(trained(ours), trained(theirs))


def test_the_callback_gives_a_plain_trainer_both(tmp_path):
    model = adapt(
        policy="fewer_samples", compute_budget=0.5, train_boundary=True, head_learning_rate_factor=10,
        learning_rate_follows_batch="sqrt",
    ).float()  # fmt: skip
    seen = Rates()
    args = arguments(tmp_path, lr_scheduler_type="constant")
    Trainer(model=model, args=args, train_dataset=samples(), callbacks=[seen, D2FTCallback()]).train()
    assert {round(rate / 0.5**0.5, 9) for at in seen.stepped for rate in at.values()} == {0.01, 0.1}


def train_on_two_processes() -> dict[str, torch.Tensor]:
    """Processes whose last batch differs: the shares are those of both together."""
    model = adapt(
        policy="fewer_samples", compute_budget=0.6, train_boundary=True, head_learning_rate_factor=4,
        learning_rate_follows_batch="sqrt",
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer, seen = fit(folder, model, doubles(samples(n=29)), max_steps=4)
    schedule = trainer.planner.schedule
    last = schedule.weights[~schedule.skipped].sum() / schedule.weights.sum()
    factors = [min(at.values()) / 0.01 for at in seen.stepped]
    return {**trained(model), "factors": torch.tensor(factors), "last": torch.tensor(last)}


@pytest.mark.thorough
@pytest.mark.distributed
def test_processes_step_at_the_same_rates(tmp_path):
    first, second = run(__name__, "train_on_two_processes", tmp_path)
    for name, value in first.items():
        assert torch.equal(second[name], value), name
    assert first["factors"][-1].item() == pytest.approx(first["last"].item() ** 0.5) and first["last"] < 1
