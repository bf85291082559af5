"""A session belongs to a model, a data set and a set of arguments; each is followed, or its change refused."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTTrainer, D2FTTrainerMixin, partition_model
from d2ft_peft.engine import get_runtime
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_equal, samples, trained


BOTH = pytest.mark.parametrize("accumulation", [1, 4], ids=["window", "accumulated"])


def pair(name="llama"):
    """A plain PEFT LoRA model with its Trainer class, and one of D2FT that runs everything."""
    base = TINY[name].build()
    torch.manual_seed(5)
    plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=list(partition_model(base).projections)))
    torch.manual_seed(5)
    ours = get_peft_model(copy.deepcopy(base), D2FTConfig(r=4, policy="all_full"))
    return (Trainer, plain), (D2FTTrainer, ours)


def ratios(trainer):
    return [entry["compute_ratio"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.quick(1)
@BOTH
def test_two_calls_of_train_equal_two_of_a_plain_trainer(tmp_path, accumulation):
    weights = []
    for cls, model in pair():
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation)
        trainer = cls(model=model, args=args, train_dataset=samples("llama"))
        trainer.train()
        trainer.train()
        weights.append(trained(model))
    assert_equal(*weights)


@pytest.mark.thorough
@BOTH
def test_a_batch_size_that_does_not_fit_is_tried_again_from_the_start(tmp_path, accumulation):
    class Full(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.train_batch_size >= 8:
                raise RuntimeError("CUDA out of memory.")

    found = []
    for cls, model in pair():
        args = arguments(
            tmp_path, gradient_accumulation_steps=accumulation, auto_find_batch_size=True,
            per_device_train_batch_size=8,
        )  # fmt: skip
        trainer = cls(model=model, args=args, train_dataset=samples("llama", 48), callbacks=[Full()])
        trainer.train()
        found.append((trained(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    assert_equal(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] and len(found[0][1]) == 3


@pytest.mark.thorough
@BOTH
def test_an_epoch_that_is_stopped_drops_its_window(tmp_path, accumulation):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_epoch_stop = state.global_step % 3 == 0

    weights = []
    for cls, model in pair():
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=-1, num_train_epochs=3)
        trainer = cls(model=model, args=args, train_dataset=samples("llama", 60), callbacks=[Stop()])
        trainer.train()
        weights.append(trained(model))
    assert_equal(*weights)


@pytest.mark.thorough
@BOTH
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_leaves_nothing_behind(tmp_path, accumulation, error):
    """The next call trains like the first one of a new Trainer on the same weights."""
    calls = []

    class Interrupted(D2FTTrainer):
        def compute_loss(self, *args, **kwargs):
            calls.append(None)
            if len(calls) == 3:
                raise error
            return super().compute_loss(*args, **kwargs)

    model = adapt("llama", "lora", policy="random", compute_budget=0.5).float()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=5, optim="sgd")  # keeps no state
    trainer = Interrupted(model=model, args=args, train_dataset=samples("llama", 40))
    with pytest.raises(error):
        trainer.train()
    runtime = get_runtime(model)
    assert (runtime.driven, runtime.plan, runtime.run) == (False, None, None)
    assert "compute_loss" not in vars(trainer)
    fresh = copy.deepcopy(model)
    trainer.train()
    D2FTTrainer(model=fresh, args=args, train_dataset=samples("llama", 40)).train()
    assert_equal(trained(model), trained(fresh))


def test_a_model_that_is_made_by_the_trainer_is_the_one_that_is_scheduled(tmp_path):
    trainer = D2FTTrainer(
        model_init=lambda: adapt("llama", "lora", compute_budget=0.5).float(), args=arguments(tmp_path),
        train_dataset=samples("llama"),
    )  # fmt: skip
    for _ in range(2):
        trainer.train()
        assert trainer.planner.model is trainer.model
        assert ratios(trainer) == [0.5] * 3


@pytest.mark.thorough
def test_hyperparameters_are_searched(tmp_path):
    """Each trial is a session of its own: another model, another number of micro-batches."""
    seen = []

    class Searching(D2FTTrainer):
        def get_batch_samples(self, *args):
            result = super().get_batch_samples(*args)
            seen.append((id(self.planner.model), self.planner.num_micro_batches))
            return result

    trainer = Searching(
        model_init=lambda: adapt("vit", compute_budget=0.5).float(), args=arguments(tmp_path),
        train_dataset=samples(), eval_dataset=samples(n=4),
    )  # fmt: skip
    for accumulation in (4, 2):
        trainer.args.gradient_accumulation_steps = accumulation
        trainer.train()
    assert [n for _, n in seen] == [4] * 3 + [2] * 3
    assert len({model for model, _ in seen}) == 2


@pytest.mark.thorough
def test_one_callback_serves_several_trainers(tmp_path):
    callback = D2FTCallback()
    for _ in range(2):
        trainer = Trainer(
            model=adapt("vit", policy="bilevel", compute_budget=0.5).float(), args=arguments(tmp_path),
            train_dataset=samples(), callbacks=[callback],
        )  # fmt: skip
        trainer.train()
        assert isinstance(trainer, D2FTTrainerMixin) and ratios(trainer) == [0.5] * 3


@pytest.mark.thorough
def test_another_data_set_is_scored_anew(tmp_path):
    model = adapt("vit", backward_score="fisher", compute_budget=0.5).float()
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples(n=24))
    trainer.train()
    trainer.train_dataset = samples(n=40, seed=9)
    trainer.train()
    assert len(trainer.planner.scores["fisher"].samples) == 40


class Changes(TrainerCallback):
    """Changes something after the first step."""

    def __init__(self, change):
        self.change = change

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 1:
            self.change(args, model)


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda args, model: setattr(args, "gradient_accumulation_steps", 2), "gradient_accumulation_steps"),
        (lambda args, model: model.set_adapter("other"), "the active adapter"),
    ],
    ids=["accumulation", "adapter"],
)
def test_a_change_in_the_middle_is_refused(tmp_path, change, named):
    model = adapt("vit", "lora", compute_budget=0.5).float()
    model.add_adapter("other", D2FTConfig(r=4, compute_budget=0.5))
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples(), callbacks=[Changes(change)])
    with pytest.raises(ValueError, match=f"{named} changed in the middle of training"):
        trainer.train()


@pytest.mark.thorough
def test_an_adapter_that_was_switched_between_two_calls_is_followed(tmp_path):
    model = adapt("vit", "lora", policy="bilevel", compute_budget=0.5).float()
    model.add_adapter("other", D2FTConfig(r=4, policy="bilevel", compute_budget=0.25))
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=samples())
    trainer.train()
    assert ratios(trainer) == [0.5] * 3
    model.set_adapter("other")
    trainer.train()
    assert ratios(trainer) == [0.25] * 3


@pytest.mark.quick(1)
@BOTH
def test_evaluation_in_the_middle_changes_nothing(tmp_path, accumulation):
    weights = []
    for strategy in ("no", "steps"):
        model = adapt("vit", policy="random", compute_budget=0.5).float()
        args = arguments(
            tmp_path, gradient_accumulation_steps=accumulation, max_steps=6, eval_strategy=strategy, eval_steps=1
        )
        D2FTTrainer(model=model, args=args, train_dataset=samples(n=48), eval_dataset=samples(n=3)).train()
        weights.append(trained(model))
    assert_equal(*weights)


@pytest.mark.thorough
@BOTH
def test_an_optimizer_with_a_mode_of_its_own(tmp_path, accumulation):
    """Schedule-free optimizers step in train mode only, and evaluation puts them into the other."""
    modes = []

    class Moded(torch.optim.SGD):
        mode = "eval"

        def train(self):
            self.mode = "train"

        def eval(self):
            self.mode = "eval"

        def step(self, closure=None):
            modes.append(self.mode)
            return super().step(closure)

    model = adapt("vit", policy="random", num_full=2, num_micro_batches=4).float()
    args = arguments(
        tmp_path, gradient_accumulation_steps=accumulation, max_steps=8, eval_strategy="steps", eval_steps=1
    )
    optimizer = Moded([p for p in model.parameters() if p.requires_grad], lr=0.1)
    D2FTTrainer(
        model=model, args=args, train_dataset=samples(n=64), eval_dataset=samples(n=2), optimizers=(optimizer, None)
    ).train()
    assert modes and set(modes) == {"train"}


@pytest.mark.thorough
def test_a_gradient_scaler_passes_steps_that_do_not_run(tmp_path):
    """It asserts that somebody looked for infinities, which nobody did where nothing ran."""

    class Scaled(D2FTTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True

    weights = []
    for cls in (Scaled, D2FTTrainer):
        model = adapt("vit", num_full=2, num_micro_batches=4).float()
        args = arguments(
            tmp_path, gradient_accumulation_steps=1, max_steps=8, max_grad_norm=1.0, optim="sgd", learning_rate=0.1
        )
        cls(model=model, args=args, train_dataset=samples(n=16)).train()
        weights.append(trained(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(
            value, weights[1][name], rtol=1e-2, atol=1e-5
        )  # forward passes are in half precision


def test_a_trainer_that_lost_a_method_is_refused_when_its_class_is_made():
    """A method that was renamed upstream would be overridden by nobody, in silence."""

    class Renamed:
        _inner_training_loop = Trainer._inner_training_loop

    class Bare(Trainer):
        pass

    without = {name: value for name, value in vars(Trainer).items() if name != "_save_rng_state"}
    lost = type("Trainer", (object,), without)
    assert issubclass(Bare, Trainer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("d2ft_peft.training.trainer.Trainer", lost)
        with pytest.raises(TypeError, match="no Trainer._save_rng_state"):
            type("Ours", (D2FTTrainerMixin, lost), {})
