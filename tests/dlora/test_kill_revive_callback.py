"""Kill-and-Revive in Trainers: logs, checkpoints, second calls, and Trainers of others."""

import sys

import peft
import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from peft import get_peft_model
from transformers import Trainer

import d2ft_peft
from d2ft_peft import D2FTConfig, D2FTTrainer, KillReviveCallback
from d2ft_peft.dlora import KillRevive
from tests.dlora.kill_revive_methods import adapt, lora
from tests.models import TINY
from tests.test_trainer import arguments, assert_equal, samples
from tests.training.trl_cases import KINDS, tokenizer


VIT = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"], "init_lora_weights": "gaussian"}


def ragged(n=11, seed=3):
    """Samples whose last batch and last accumulation are short."""
    return samples("vit", n, seed)


def trainer(folder, callback=None, model=None, data=None, cls=Trainer, **kwargs):
    model = adapt(lora(**VIT), "vit") if model is None else model
    settings = {"gradient_accumulation_steps": 2, "max_steps": 9, "learning_rate": 0.05, **kwargs}
    callbacks = [callback] if callback is not None else None
    return cls(
        model=model, args=arguments(folder, **settings), train_dataset=ragged() if data is None else data,
        callbacks=callbacks,
    )  # fmt: skip


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name or "to_save" in name}


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_line_is_logged_for_every_decision(tmp_path):
    callback = KillReviveCallback(active=2, interval=3, choose="redrawn")
    run = trainer(tmp_path, callback)
    run.train()
    lines = [entry for entry in run.state.log_history if "kr_active" in entry]
    assert [line["step"] for line in lines] == [3, 6, 9]
    assert all(line["kr_active"] == 2 and line["kr_killed"] == line["kr_revived"] for line in lines)
    assert sum(line["kr_killed"] for line in lines) > 0 and lines[0]["kr_share"] == pytest.approx(1 / 3)
    assert callback.kill_revive.steps == 9


def test_it_equals_a_bare_loop(tmp_path):
    """Batches in order, plain SGD: the callback is a thin layer."""

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return None

    rule = {"active": 2, "interval": 2}
    settings = {"optim": "sgd", "max_grad_norm": 0, "lr_scheduler_type": "constant", "gradient_accumulation_steps": 1}
    run = trainer(tmp_path, KillReviveCallback(**rule), cls=InOrder, per_device_train_batch_size=4, **settings)
    run.train()
    model = adapt(lora(**VIT), "vit")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    kill_revive, data = KillRevive(model, optimizer, **rule), ragged()
    batches = [data[:4], data[4:8], data[8:]] * 3
    for batch in batches:
        model(**{key: torch.stack([item[key] for item in batch]) for key in batch[0]}).loss.backward()
        optimizer.step()
        kill_revive.step()
        optimizer.zero_grad()
    assert_equal(weights(run.model), weights(model))


def test_all_modules_at_once_are_plain_training_to_the_bit(tmp_path):
    found = []
    for callback in (None, KillReviveCallback(active=6, interval=2)):
        run = trainer(tmp_path, callback)
        if callback is None:
            run.train()
        else:
            with pytest.warns(UserWarning, match="all of them train"):
                run.train()
        found.append(weights(run.model))
    assert_equal(*found)


@pytest.mark.quick(1)
@pytest.mark.parametrize(
    "rule",
    [{"interval": 3}, {"interval": 2, "warmup": 2, "idle": "last"}, {"interval": 0.4, "unit": "epochs"}],
    ids=str,
)
@pytest.mark.parametrize("stop", [4, 6])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path, rule, stop):
    whole = trainer(tmp_path / "whole", KillReviveCallback(active=2, **rule))
    whole.train()
    stopped = trainer(
        tmp_path / "cut", KillReviveCallback(active=2, **rule), save_strategy="steps", save_steps=stop,
    )  # fmt: skip
    stopped.train()
    callback = KillReviveCallback(active=2, **rule)
    resumed = trainer(tmp_path / "cut", callback)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{stop}"))
    assert_equal(weights(resumed.model), weights(whole.model))
    assert callback.kill_revive.steps == 9


def test_resuming_with_other_settings_is_refused_by_name(tmp_path):
    trainer(tmp_path, KillReviveCallback(active=2, interval=3), save_strategy="steps", save_steps=4).train()
    run = trainer(tmp_path, KillReviveCallback(active=3, interval=3))
    with pytest.raises(ValueError, match="active was 2 in the run that is resumed, and is 3 now"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.thorough
def test_resuming_a_run_that_had_none_says_so(tmp_path):
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    run = trainer(tmp_path, KillReviveCallback(active=2, interval=3))
    with pytest.warns(UserWarning, match="left no state of Kill-and-Revive: modules are drawn anew"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_second_call_starts_afresh_and_leaves_all_trainable(tmp_path):
    callback = KillReviveCallback(active=2, interval=2, choose="redrawn")
    run = trainer(tmp_path, callback)
    before = trainable(run.model)
    drawn = []
    for _ in range(2):
        run.train()
        drawn.append(callback.kill_revive.activity[0])
        assert trainable(run.model) == before
    assert (drawn[0] == drawn[1]).all() and callback.kill_revive.steps == 9


def test_a_run_that_broke_off_is_followed_by_a_whole_one(tmp_path):
    """The optimizer of the next Trainer must hold all modules, also those that were killed when the first one broke."""

    class Broken(Trainer):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 3:
                raise KeyboardInterrupt
            return super().training_step(*args, **kwargs)

    model = adapt(lora(**VIT), "vit")
    before = trainable(model)
    run = trainer(tmp_path, KillReviveCallback(active=2, interval=2), model, cls=Broken)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert trainable(model) < before
    callback = KillReviveCallback(active=2, interval=2)
    trainer(tmp_path, callback, model).train()
    assert len(callback.kill_revive.names) == 6 and trainable(model) == before


@pytest.mark.thorough
def test_a_smaller_batch_that_fits_is_found(tmp_path):
    class Small(Trainer):
        def training_step(self, model, inputs, *args):
            if len(inputs["labels"]) > 2 and self.state.global_step > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args)

    callback = KillReviveCallback(active=2, interval=2)
    run = trainer(tmp_path, callback, cls=Small, auto_find_batch_size=True, per_device_train_batch_size=4)
    run.train()
    assert run.state.global_step == 9 == callback.kill_revive.steps and len(callback.kill_revive.names) == 6


def test_model_init_gives_every_call_a_model_of_its_own(tmp_path):
    callback = KillReviveCallback(active=2, interval=2)
    run = Trainer(
        model_init=lambda: adapt(lora(**VIT), "vit"), args=arguments(tmp_path), train_dataset=ragged(),
        callbacks=[callback],
    )  # fmt: skip
    found = []
    for _ in range(2):
        run.train()
        found.append(weights(run.model))
    assert_equal(*found)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("interval", "expected"), [(1, [3, 6, 9]), (0.5, [2, 3, 5, 6, 8, 9]), (1.5, [5, 9])])
def test_epochs_are_counted_in_steps_also_ragged_ones(tmp_path, interval, expected):
    """Eleven samples, two a batch, two batches a step: three steps an epoch, the last of one batch."""
    callback = KillReviveCallback(active=2, interval=interval, unit="epochs")
    trainer(tmp_path, callback, max_steps=-1, num_train_epochs=3).train()
    assert callback.kill_revive.activity[1].tolist() == [0, *expected]


def test_epochs_of_unknown_length_are_refused(tmp_path):
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from ragged()

    run = trainer(tmp_path, KillReviveCallback(active=2, unit="epochs"), data=Endless())
    with pytest.raises(ValueError, match="unit='epochs' needs the number of steps in an epoch"):
        run.train()
    trainer(tmp_path, KillReviveCallback(active=2, interval=2), data=Endless(), max_steps=3).train()


def test_bad_fields_are_refused_at_once():
    with pytest.raises(ValueError, match="active=0 must be a whole number, at least 1"):
        KillReviveCallback(active=0)
    with pytest.raises(TypeError, match="activ"):
        KillReviveCallback(activ=2)


def test_a_model_that_cannot_be_killed_in_parts_is_refused_when_training_begins(tmp_path):
    plain = TINY["vit"].build()
    with pytest.raises(ValueError, match="model has no adapter"):
        trainer(tmp_path, KillReviveCallback(active=2), plain).train()


def test_killed_modules_stay_as_they_are_between_evaluations_and_the_best_is_loaded(tmp_path):
    callback = KillReviveCallback(active=2, interval=2)
    model = adapt(lora(**VIT), "vit")
    before = trainable(model)
    run = Trainer(
        model=model, train_dataset=ragged(), eval_dataset=ragged(5, 7), callbacks=[callback],
        args=arguments(tmp_path, max_steps=8, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
                       load_best_model_at_end=True),
    )  # fmt: skip
    run.train()
    assert len([entry for entry in run.state.log_history if "eval_loss" in entry]) == 4 and trainable(model) == before


def test_a_picture_is_drawn_at_the_end(tmp_path):
    trainer(tmp_path, KillReviveCallback(active=2, interval=1, plot=True)).train()
    pixels = imread(tmp_path / "kill_revive.png")
    assert min(pixels.shape[:2]) > 100 and pixels[..., :3].std() > 0.01


def test_a_picture_without_matplotlib_is_refused_before_training(monkeypatch):
    monkeypatch.delitem(sys.modules, "d2ft_peft.report.activity", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    KillReviveCallback(active=2)
    with pytest.raises(ImportError, match="plot_activity is drawn by matplotlib, which is not installed"):
        KillReviveCallback(active=2, plot=True)


def test_changes_and_decisions_are_passed_on(tmp_path):
    told, asked = [], []

    def decide(rule, state, observations):
        asked.append(state.decisions)
        return d2ft_peft.dlora.kill_revive.decide(rule, state, observations)

    callback = KillReviveCallback(
        active=2, interval=3, choose="redrawn", decide=decide, on_change=lambda *names: told.append(names)
    )
    trainer(tmp_path, callback).train()
    assert asked == [0, 1, 2] and len(told[0][0]) == 4 and told[0][1] == []


@pytest.mark.parametrize("engine", ["deepspeed", "fsdp"])
def test_engines_with_flat_parameters_are_refused_by_name(tmp_path, engine, monkeypatch):
    run = trainer(tmp_path, KillReviveCallback(active=2))
    callback = next(c for c in run.callback_handler.callbacks if isinstance(c, KillReviveCallback))
    monkeypatch.setattr(run, f"is_{engine}_enabled", True)

    def begin(self):
        callback.on_train_begin(run.args, run.state, run.control, train_dataloader=None)

    monkeypatch.setattr(type(run), "begin", begin, raising=False)
    with pytest.raises(ValueError, match=f"cannot freeze modules one by one under {engine}"):
        run.begin()


@pytest.mark.quick(1)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.filterwarnings("ignore")
def test_trainers_of_trl_kill_and_revive(tmp_path, kind, checkpointing):
    cls, config, data, own = KINDS[kind]
    model = adapt(lora(init_lora_weights="gaussian"))
    args = config(
        str(tmp_path), use_cpu=True, bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", max_steps=4,
        per_device_train_batch_size=2, gradient_checkpointing=checkpointing, learning_rate=0.05, **own,
    )  # fmt: skip
    moved, last = [], {}

    class Watching(KillReviveCallback):
        def on_step_begin(self, *args, **kwargs):
            last.update(weights(model))
            self.now = set(self.kill_revive.active)

        def on_step_end(self, *args, **kwargs):
            changed = {name for name, value in weights(model).items() if not value.equal(last[name])}
            moved.append({active for active in self.now if any(f".{active}." in name for name in changed)} == self.now
                         and all(any(f".{active}." in name for active in self.now) for name in changed))  # fmt: skip
            super().on_step_end(*args, **kwargs)

    callback = Watching(active=2, interval=2)
    run = cls(
        model=model, args=args, train_dataset=Dataset.from_list(data), processing_class=tokenizer(),
        callbacks=[callback],
    )  # fmt: skip
    run.train()
    assert moved == [True] * 4 and callback.kill_revive.state.decisions == 2


@pytest.mark.quick(1)
@pytest.mark.parametrize("mode", [{}, {"r": 4, "init_lora_weights": "gaussian"}], ids=["full", "lora"])
def test_it_goes_with_d2ft(tmp_path, mode):
    """Both choose at once: which heads run in a micro-batch, and which modules train."""
    model = get_peft_model(TINY["vit"].build(), D2FTConfig(compute_budget=0.6, modules_to_save=["classifier"], **mode))
    callback = KillReviveCallback(active=4, interval=2, choose="redrawn")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = trainer(tmp_path, callback, model, ragged(24), cls=D2FTTrainer, max_steps=3, gradient_accumulation_steps=4)
    run.train()
    lines = [entry for entry in run.state.log_history if "kr_active" in entry]
    assert len(lines) == 1 and any(entry.get("compute_ratio", 1) < 1 for entry in run.state.log_history)
    activity = callback.kill_revive.activity[0].any(axis=0)
    for name, ever in zip(callback.kill_revive.names, activity, strict=True):
        own = [n for n in before if f".{name}.d2ft_layers" in n or f".{name}.lora_" in n]
        changed = any(not model.get_parameter(n).equal(before[n]) for n in own)
        assert own and (ever or not changed), name
    assert 0 < activity.sum() < len(activity)


def test_the_saved_adapter_is_an_ordinary_one(tmp_path):
    run = trainer(tmp_path, KillReviveCallback(active=2, interval=2))
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(TINY["vit"].build(), tmp_path / "adapter")
    for name, value in weights(run.model).items():
        assert loaded.get_parameter(name).equal(value), name
