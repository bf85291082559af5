"""Weights averaged along training: evaluated, kept, saved and resumed in the place of the last ones."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import Trainer, TrainerCallback

from d2ft_peft import AveragedWeightsCallback, D2FTTrainer, KillReviveCallback
from d2ft_peft.training.averaged_weights import AVERAGES_FILE
from tests.distributed.launch import run
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_close, assert_equal, doubles, samples, trained


class Path(TrainerCallback):
    """The weights after every optimizer step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(trained(model))


class Evaluating(Trainer):
    """Notes the weights that an evaluation sees."""

    def evaluation_loop(self, *args, **kwargs):
        self.__dict__.setdefault("seen", []).append(trained(self.model))
        return super().evaluation_loop(*args, **kwargs)


class Everything(TrainerCallback):
    """The weights of all that the optimizer was made of, after every step."""

    def __init__(self):
        self.weights = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if id(p) in own})


def lora(dtype=torch.float64):
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], modules_to_save=["classifier"])
    return get_peft_model(TINY["vit"].build().to(dtype), config)


def fit(folder, callback, model=None, cls=Evaluating, **kwargs):
    model, path = model or lora(), Path()
    resume, callbacks = kwargs.pop("resume", None), kwargs.pop("callbacks", [])
    data = samples() if next(model.parameters()).dtype == torch.float32 else doubles(samples())
    if "eval_strategy" in kwargs:
        kwargs["eval_steps"] = 2
    if "save_strategy" in kwargs:
        kwargs["save_steps"] = 2
    args = arguments(folder, max_steps=kwargs.pop("max_steps", 8), gradient_accumulation_steps=1, **kwargs)
    trainer = cls(model=model, args=args, train_dataset=data, eval_dataset=data[:3], callbacks=[path, *callbacks])
    if callback is not None:
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, path.weights


def mean(path):
    return {name: torch.stack([weights[name] for weights in path]).mean(0) for name in path[0]}


def test_the_mean_over_the_last_quarter_of_the_steps_is_what_training_ends_with(tmp_path):
    callback = AveragedWeightsCallback()
    trainer, path = fit(tmp_path, callback)
    assert_close(trained(trainer.model), mean(path[-2:]))
    assert callback.num_averaged == 2
    _, plain = fit(tmp_path, None)
    for ours, theirs in zip(path, plain, strict=True):
        assert_equal(ours, theirs)


def test_an_exponential_moving_average_begins_with_the_first_step(tmp_path):
    trainer, path = fit(tmp_path, AveragedWeightsCallback(decay=0.8))
    average = path[0]
    for weights in path[1:]:
        average = {name: 0.8 * value + 0.2 * weights[name] for name, value in average.items()}
    assert_close(trained(trainer.model), average)


@pytest.mark.parametrize("steps, share, averaged", [(1, 0.25, 1), (7, 0.25, 2), (3, 1.0, 3)])
def test_runs_of_any_length_average_at_least_their_last_step(tmp_path, steps, share, averaged):
    callback = AveragedWeightsCallback(share)
    trainer, path = fit(tmp_path, callback, max_steps=steps)
    assert callback.num_averaged == averaged
    assert_close(trained(trainer.model), mean(path[-averaged:]))


def test_evaluation_sees_the_averages_and_training_goes_on_with_its_own_weights(tmp_path):
    trainer, path = fit(tmp_path, AveragedWeightsCallback(0.5), eval_strategy="steps")
    assert_equal(trainer.seen[1], path[3])  # before there are averages
    assert_close(trainer.seen[2], mean(path[4:6]))
    assert_close(trainer.seen[3], mean(path[4:8]))
    _, plain = fit(tmp_path, None)
    assert_equal(path[-1], plain[-1])


def test_two_evaluation_sets_and_a_prediction_in_the_middle_see_the_averages(tmp_path):
    class Predicts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 7:
                self.trainer.predict(self.trainer.eval_dataset)
                self.trainer.eval_dataset = {name: self.trainer.eval_dataset for name in "ab"}
                control.should_evaluate = True

    class Knowing(Evaluating):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            predicts.trainer = self

    predicts, callback = Predicts(), AveragedWeightsCallback(0.5)
    trainer, path = fit(tmp_path, None, cls=Knowing, callbacks=[callback, predicts])
    assert len(trainer.seen) == 3
    for seen in trainer.seen:
        assert_close(seen, mean(path[4:7]))


def test_half_precision_is_averaged_in_single_and_comes_back_to_the_bit(tmp_path):
    averages = {}

    class Last(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            averages.update(callback._averages)

    def half():
        model = lora(torch.float32)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.bfloat16()
        return model

    callback = AveragedWeightsCallback(0.5)
    trainer, path = fit(tmp_path, callback, half(), eval_strategy="steps", callbacks=[Last()], bf16=True)
    for name, value in mean([{name: value.float() for name, value in weights.items()} for weights in path[4:]]).items():
        torch.testing.assert_close(averages[name], value, rtol=1e-6, atol=1e-7)
    assert_equal(trained(trainer.model), {name: value.bfloat16() for name, value in averages.items()})
    _, plain = fit(tmp_path, None, half(), bf16=True)
    assert_equal(path[-1], plain[-1])


@pytest.mark.quick(1)
@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("stop", [2, 6])
def test_a_resumed_run_ends_with_the_same_averages(tmp_path, stop, decay):
    whole, path = fit(tmp_path / "whole", AveragedWeightsCallback(0.5, decay), save_strategy="steps")
    checkpoint = tmp_path / f"whole/checkpoint-{stop}"
    assert (checkpoint / AVERAGES_FILE).is_file() == (stop == 6)
    resumed, rest = fit(tmp_path / "again", AveragedWeightsCallback(0.5, decay), resume=str(checkpoint))
    assert_equal(rest[-1], path[-1])
    assert_equal(trained(resumed.model), trained(whole.model))


def test_a_checkpoint_without_averages_says_so(tmp_path):
    fit(tmp_path, None, save_strategy="steps")
    with pytest.warns(
        UserWarning, match="the checkpoint has no averaged_weights.safetensors: the weights of steps up to 6"
    ):
        fit(tmp_path, AveragedWeightsCallback(0.5), resume=str(tmp_path / "checkpoint-6"))


def test_averages_of_another_model_are_refused(tmp_path):
    fit(tmp_path, AveragedWeightsCallback(0.5), save_strategy="steps")
    path = tmp_path / "checkpoint-6" / AVERAGES_FILE
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    tensors.pop(min(tensors))
    save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="averaged_weights.safetensors' holds averages of other parameters"):
        fit(tmp_path, AveragedWeightsCallback(0.5), resume=str(tmp_path / "checkpoint-6"))


@pytest.mark.parametrize("best", [2, 6])
def test_the_best_checkpoint_gives_what_was_evaluated_there(tmp_path, best):
    """Before averages began the weights themselves, later their averages."""

    class Judged(Evaluating):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return {**metrics, "eval_good": float(self.state.global_step == best)}

    trainer, path = fit(
        tmp_path, AveragedWeightsCallback(0.5), cls=Judged, eval_strategy="steps", save_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="good", greater_is_better=True,
    )  # fmt: skip
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert_equal(trained(trainer.model), trainer.seen[best // 2 - 1])


@pytest.mark.quick(1)
@pytest.mark.parametrize("config", [{"train_boundary": True}, {"mode": "lora"}, {"keep_base": False}])
def test_under_d2ft_steps_that_do_not_run_are_none(tmp_path, config):
    """Two of four steps run; a step that does not run leaves the weights alone, and is not averaged again."""
    model = adapt(policy="bilevel", compute_budget=0.5, num_micro_batches=4, **config)
    callback = AveragedWeightsCallback(1.0)
    trainer, path = fit(tmp_path, callback, model, cls=D2FTTrainer)
    assert callback.num_averaged == 4
    assert_close(trained(model), mean([path[i] for i in (0, 1, 4, 5)]))


def test_what_kill_and_revive_has_frozen_for_now_is_averaged_as_well(tmp_path):
    kill_revive = KillReviveCallback(active=2, interval=2)
    trainer, path = fit(tmp_path, None, callbacks=[kill_revive, everything := Everything()], model=lora())
    ours, _ = fit(
        tmp_path, AveragedWeightsCallback(1.0), callbacks=[KillReviveCallback(active=2, interval=2)], model=lora()
    )
    assert len(kill_revive.kill_revive.names) > 2
    assert_close(
        {n: p.detach() for n, p in ours.model.named_parameters() if n in everything.weights[0]},
        mean(everything.weights),
    )


def test_after_training_evaluation_is_the_trainers_own_also_after_a_run_that_broke_off(tmp_path):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 7 and self.due:
                raise KeyboardInterrupt

    breaks, callback = Breaks(), AveragedWeightsCallback()
    breaks.due = True
    model = lora()
    args = arguments(tmp_path, gradient_accumulation_steps=1, max_steps=8)
    trainer = Evaluating(
        model=model, args=args, train_dataset=doubles(samples()), eval_dataset=doubles(samples(n=2)),
        callbacks=[callback, breaks],
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    breaks.due = False
    trainer.train()
    final = trained(model)
    trainer.evaluate()
    assert "evaluation_loop" not in vars(trainer)
    assert_equal(trainer.seen[-1], final)


def test_a_run_that_stops_before_the_first_average_says_so(tmp_path):
    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    with pytest.warns(UserWarning, match="averaged nothing: training ended at step 3, before the last 25% of 8 steps"):
        trainer, path = fit(tmp_path, AveragedWeightsCallback(), callbacks=[Stops()])
    assert_equal(trained(trainer.model), path[-1])


@pytest.mark.parametrize("field, value", [("share", 0), ("share", 1.5), ("decay", 1.0), ("decay", -0.1)])
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}={value!r} must be a number in"):
        AveragedWeightsCallback(**{field: value})


def test_heads_that_are_shared_out_are_refused(tmp_path):
    callback = AveragedWeightsCallback()
    model = adapt(head_parallel=True, compute_budget=0.5)
    trainer = Trainer(model=model, args=arguments(tmp_path), train_dataset=doubles(samples()), callbacks=[callback])
    with pytest.raises(ValueError, match="which head_parallel=True shares out"):
        trainer.train()


def train_on_two_processes(folder: str) -> dict[str, torch.Tensor]:
    trainer, _ = fit(
        folder, AveragedWeightsCallback(0.5), adapt(policy="fewer_samples", compute_budget=0.5), cls=D2FTTrainer,
        eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True, max_steps=4,
    )  # fmt: skip
    return trained(trainer.model)


@pytest.mark.thorough
@pytest.mark.distributed
def test_processes_end_with_the_same_averages(tmp_path):
    first, second = run(__name__, "train_on_two_processes", tmp_path, str(tmp_path))
    assert_equal(first, second)
