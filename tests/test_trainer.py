"""D2FTTrainer, D2FTCallback and the bare loop: the same schedule, the same weights."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from d2ft_peft import D2FTCallback, D2FTConfig, D2FTPlanner, D2FTTrainer, partition_model
from d2ft_peft.engine import get_runtime
from tests.models import TINY
from tests.reference import reference_forward


def samples(name="vit", n=24, seed=3):
    batch = TINY[name].batch(n, seed)
    return [{key: value[i] for key, value in batch.items()} for i in range(n)]


def arguments(tmp_path, **kwargs):
    defaults = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4,
        "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "seed": 0,
    }  # fmt: skip
    return TrainingArguments(**{**defaults, **kwargs})


def adapt(name="vit", mode="full", seed=0, **kwargs):
    model = TINY[name].build(seed).double()
    torch.manual_seed(5)
    lora = {"r": 4, "init_lora_weights": False} if mode == "lora" else {}
    return get_peft_model(model, D2FTConfig(**lora, **kwargs))


def doubles(data):
    return [{k: v.double() if v.is_floating_point() else v for k, v in item.items()} for item in data]


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained_as_plain(model):
    """What a full D2FT model trained, by the names of the plain model."""
    prefix, copy_of = "base_model.model.", "d2ft_layers.default."
    return {name.removeprefix(prefix).replace(copy_of, ""): value for name, value in trained(model).items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", ["vit", "llama"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_all_full_is_bit_identical_to_the_plain_trainer(tmp_path, name, mode):
    data, base = samples(name), TINY[name].build()
    projections = partition_model(base).projections
    torch.manual_seed(5)
    if mode == "lora":
        plain = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, target_modules=list(projections)))
    else:
        plain = copy.deepcopy(base)
        for parameter_name, parameter in plain.named_parameters():
            parameter.requires_grad_(parameter_name.rpartition(".")[0] in projections)
    Trainer(model=plain, args=arguments(tmp_path), train_dataset=data).train()
    torch.manual_seed(5)
    config = D2FTConfig(policy="all_full", r=4 if mode == "lora" else None, skip_unread_rows=False)
    model = get_peft_model(copy.deepcopy(base), config)
    D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=data).train()
    assert_equal(trained(model) if mode == "lora" else trained_as_plain(model), trained(plain))


def reference_training(base, data, args, planner_schedules, partition):
    """Gradient descent under recorded schedules, by masks, normalized over the samples that ran."""
    for parameter_name, parameter in base.named_parameters():
        parameter.requires_grad_(parameter_name.rpartition(".")[0] in partition.projections)
    base.train()
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=args.learning_rate)
    position = 0
    for schedule in planner_schedules:
        batches = []
        for size in schedule.weights.astype(int):
            items = data[position : position + size]
            batches.append({key: torch.stack([item[key] for item in items]) for key in items[0]})
            position += size
        ran = schedule.weights[~schedule.skipped].sum()
        for row, size, batch in zip(schedule.operations, schedule.weights, batches, strict=True):
            if not row.any():
                continue
            with reference_forward(base, partition, row):
                loss = base(**batch).loss * size / ran
            if loss.requires_grad:
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_a_model_that_ignores_the_number_of_items_trains_on_the_mean_all_the_same(tmp_path):
    """The Trainer believes that BERT divides its loss by num_items_in_batch, does not divide by the micro-batches, and
    takes a step that is as many times too long; here it is the mean over the samples that ran, as everywhere."""
    data, base = doubles(samples("bert", n=23)), TINY["bert"].build().double()
    model = get_peft_model(copy.deepcopy(base), D2FTConfig(policy="random", compute_budget=0.6))
    args = arguments(tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, learning_rate=1e-3)
    trainer = RecordingTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    partition = partition_model(base)
    reference_training(base, data, args, trainer.schedules, partition)
    assert any(len(set(schedule.weights)) > 1 for schedule in trainer.schedules)
    ours = {
        n.removeprefix("base_model.model.").replace("d2ft_layers.default.", ""): p for n, p in trained(model).items()
    }
    assert_close(ours, trained(base))


class RecordingTrainer(D2FTTrainer):
    """Reads the data in order and keeps the schedules."""

    def _get_train_sampler(self, *args):
        return None

    def get_batch_samples(self, *args):
        result = super().get_batch_samples(*args)
        self.__dict__.setdefault("schedules", []).append(self.planner.schedule)
        return result


@pytest.mark.parametrize("policy", ["random", "bilevel", "depth"])
def test_trained_weights_equal_the_reference(tmp_path, policy):
    """Whole micro-batches skipped, cells partly FULL, and a last micro-batch of another size."""
    data, base = doubles(samples(n=23)), TINY["vit"].build().double()
    model = get_peft_model(copy.deepcopy(base), D2FTConfig(policy=policy, compute_budget=0.6))
    args = arguments(
        tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, gradient_accumulation_steps=4
    )
    trainer = RecordingTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    partition = partition_model(base)
    reference_training(base, data, args, trainer.schedules, partition)
    ours = {
        n.removeprefix("base_model.model.").replace("d2ft_layers.default.", ""): p for n, p in trained(model).items()
    }
    assert_close(ours, trained(base))


def test_trainer_callback_and_bare_loop_end_with_equal_weights(tmp_path):
    data = doubles(samples())
    kwargs = {"policy": "random", "compute_budget": 0.5}
    args = arguments(tmp_path, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return None

    by_trainer = adapt(**kwargs)
    RecordingTrainer(model=by_trainer, args=args, train_dataset=data).train()
    by_callback = adapt(**kwargs)
    InOrder(model=by_callback, args=args, train_dataset=data, callbacks=[D2FTCallback()]).train()
    by_loop = adapt(**kwargs)
    bare_loop(by_loop, data, args)
    assert_equal(trained(by_callback), trained(by_trainer))
    assert_close(trained(by_loop), trained(by_trainer))


def bare_loop(model, data, args):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    loader = torch.utils.data.DataLoader(data, batch_size=args.per_device_train_batch_size)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    planner, batches = D2FTPlanner(model), iter(loader)
    model.train()
    for _ in range(args.max_steps):
        window = [next(batches) for _ in range(args.gradient_accumulation_steps)]
        planner.plan(window)
        for i, batch in enumerate(window):
            with planner.micro_batch(i) as micro_batch:
                if not micro_batch.skipped:
                    accelerator.backward(model(**batch).loss * micro_batch.weight)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.quick(1)
@pytest.mark.parametrize("score", ["fisher", "taylor"])
def test_scores_of_samples_find_their_way_into_the_schedule(tmp_path, score):
    """The samples with the highest scores are the ones that run."""
    data = doubles(samples())
    model = adapt(backward_score=score, compute_budget=0.5)
    trainer = RecordingTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    table = trainer.planner.scores[score]
    assert table.values.shape == (24, trainer.planner.partition.num_scheduled)
    by_micro_batch = table.values[:8].reshape(4, 2, -1).mean(1)
    schedule = trainer.schedules[0]
    for k in range(schedule.num_subnets):
        best = set(np.argsort(-by_micro_batch[:, k], kind="stable")[:2])
        assert set(np.flatnonzero(schedule.operations[:, k] == 2)) == best


def test_scoring_changes_no_random_stream_and_a_fraction_is_enough(tmp_path):
    data = doubles(samples())
    kwargs = {"policy": "bilevel", "num_full": 2, "num_forward_only": 1, "forward_score": "fisher"}
    model = adapt(score_fraction=0.25, **kwargs)
    torch.manual_seed(11)
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=data)
    trainer.train()
    assert len(trainer.planner.scores["fisher"].samples) == 6
    assert set(trainer.planner.scores) == {"fisher"}


def test_logs_hold_what_was_executed(tmp_path):
    model = adapt(num_full=2, num_forward_only=1, tie_break="spread", policy="round_robin")
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=doubles(samples()))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    for entry in logs:
        assert entry["communication_ratio"] == pytest.approx(2.5 / 4)
        assert entry["workload_variance"] == 0
        assert 2 / 4 < entry["compute_ratio"] < 3 / 4
    assert trainer.state.total_flos == pytest.approx(sum(entry["step_flops"] for entry in logs))


def test_a_window_of_steps_stands_in_for_gradient_accumulation(tmp_path):
    """num_micro_batches successive steps are scheduled together, in their order; a skipped one changes nothing."""
    model = adapt(num_micro_batches=3, num_full=2, policy="bilevel")
    args = arguments(tmp_path, gradient_accumulation_steps=1, max_steps=6)
    weights = []

    class Watching(RecordingTrainer):
        def training_step(self, *args, **kwargs):
            weights.append(trained(self.model))
            return super().training_step(*args, **kwargs)

    trainer = Watching(model=model, args=args, train_dataset=doubles(samples()))
    trainer.train()
    assert [list(s.skipped) for s in trainer.schedules[::3]] == [[False, False, True]] * 2
    weights.append(trained(model))
    changed = [any(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [True, True, False] * 2


def test_a_forward_outside_of_the_schedule_is_an_error_while_training(tmp_path):
    class Careless(D2FTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            model.train()
            return model(**inputs).loss

    trainer = Careless(model=adapt(), args=arguments(tmp_path), train_dataset=doubles(samples()))
    with pytest.raises(RuntimeError, match="without a plan"):
        trainer.train()
    assert not get_runtime(trainer.model).driven


def test_a_callback_that_comes_too_late_speaks(tmp_path):
    trainer = Trainer(model=adapt(), args=arguments(tmp_path), train_dataset=doubles(samples()))
    trainer.add_callback(D2FTCallback())
    with pytest.raises(ValueError, match="already exists"):
        trainer.train()


@pytest.mark.parametrize("num_forward_only, needed", [(0, ()), (1, ("fisher",)), (2, ())])
def test_scores_without_a_say_are_not_computed(num_forward_only, needed):
    """Where two FULL and two FORWARD_ONLY fill a step of four, the forward score decides nothing."""
    model = adapt(num_full=2, num_forward_only=num_forward_only, forward_score="fisher")
    assert D2FTPlanner(model, num_micro_batches=4).source.before_training == needed
