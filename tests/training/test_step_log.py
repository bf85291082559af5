"""What a run says of itself: what ran, at the lengths that it had, and nothing of what did not."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from d2ft_peft import D2FTTrainer
from d2ft_peft.costs import flop_counter
from d2ft_peft.planning.execution_counts import ExecutionCounts
from d2ft_peft.schedule import Schedule
from tests.test_trainer import adapt, arguments, samples


def texts(lengths):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, 60, (length,), generator=generator) for length in lengths]
    return [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x.clone()} for x in ids]


def pad(items):
    longest = max(len(item["input_ids"]) for item in items)

    def padded(key, fill):
        rows = [torch.nn.functional.pad(item[key], (0, longest - len(item[key])), value=fill) for item in items]
        return torch.stack(rows)

    return {"input_ids": padded("input_ids", 0), "attention_mask": padded("attention_mask", 0),
            "labels": padded("labels", -100)}  # fmt: skip


class InOrder(D2FTTrainer):
    def _get_train_sampler(self, *args):
        return None


def entries(trainer):
    return [entry for entry in trainer.state.log_history if "epoch" in entry and "train_runtime" not in entry]


RATIOS = {"compute_ratio", "communication_ratio", "workload_variance", "flops_ratio", "step_flops"}


@pytest.mark.quick(1)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("policy", ["random", "bilevel", "fewer_samples", "all_full"])
def test_every_entry_has_the_ratios(tmp_path, policy, accumulation):
    budget = 1.0 if policy == "all_full" else 0.6
    model = adapt("vit", policy=policy, compute_budget=budget, skip_unread_rows=False).float()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=9)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=samples(n=44))
    trainer.train()
    assert len(entries(trainer)) == 9
    assert all(entry.keys() >= RATIOS for entry in entries(trainer))
    last = trainer.state.log_history[-1]
    assert last.keys() >= RATIOS
    assert last["step_flops"] == pytest.approx(np.mean([entry["step_flops"] for entry in entries(trainer)]))
    assert last["total_flos"] == pytest.approx(sum(entry["step_flops"] for entry in entries(trainer)))
    if policy == "all_full":  # nothing was saved
        assert {entry["flops_ratio"] for entry in [*entries(trainer), last]} == {1.0}


def test_steps_that_do_not_run_log_no_loss(tmp_path):
    """Three of five steps run; a loss is the mean over the steps that did."""
    losses = []

    class Watching(InOrder):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    def train(logging_steps):
        losses.clear()
        model = adapt("vit", num_full=3).float()
        args = arguments(tmp_path, gradient_accumulation_steps=1, max_steps=5, logging_steps=logging_steps)
        trainer = Watching(model=model, args=args, train_dataset=samples(n=10))
        return trainer, trainer.train()

    trainer, output = train(1)
    logged = [entry.get("loss") for entry in entries(trainer)]
    assert logged[:3] == pytest.approx(losses) and logged[3:] == [None, None]
    assert ["grad_norm" in entry for entry in entries(trainer)] == [True] * 3 + [False] * 2
    assert output.training_loss == pytest.approx(np.mean(losses))
    trainer, output = train(5)
    assert [entry["loss"] for entry in entries(trainer)] == pytest.approx([np.mean(losses)])
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("policy", ["bilevel", "fewer_samples"])
def test_tokens_are_counted_where_they_ran(tmp_path, policy):
    ran = []

    class Watching(D2FTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            ran.append(inputs["input_ids"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = adapt("llama", "lora", policy=policy, compute_budget=0.5).float()
    args = arguments(tmp_path, max_steps=4, include_num_input_tokens_seen="all")
    trainer = Watching(model=model, args=args, train_dataset=texts([3 + i % 5 for i in range(40)]), data_collator=pad)
    trainer.train()
    assert trainer.state.num_input_tokens_seen == sum(ran)


@pytest.mark.quick(1)
@pytest.mark.parametrize("accumulation", [1, 5])
def test_flops_follow_the_lengths_of_every_batch(tmp_path, accumulation):
    """Counted by PyTorch, a first batch that is thirty times shorter than the others notwithstanding."""
    lengths = [4, 4] + [i for i in (120, 60, 90, 30, 110, 70, 80, 50, 100) for _ in range(2)]
    model = adapt("llama", compute_budget=0.6, policy="round_robin", train_boundary=True).float()
    args = arguments(tmp_path, gradient_accumulation_steps=accumulation, max_steps=10 // accumulation, max_grad_norm=0)
    trainer = InOrder(model=model, args=args, train_dataset=texts(lengths), data_collator=pad)
    run, flops = trainer.training_step, []

    def counted(*args, **kwargs):
        with flop_counter() as counter:
            loss = run(*args, **kwargs)
        flops.append(counter.get_total_flops())
        return loss

    trainer.training_step = counted
    trainer.train()
    assert trainer.state.total_flos == pytest.approx(sum(flops), rel=0.03)


def test_scoring_counts_as_training(tmp_path):
    """A pass over all samples, forward and backward, that somebody asked for."""
    flos = {}
    for score in ("fisher", "weight_magnitude"):
        model = adapt("vit", backward_score=score, num_full=4).float()
        trainer = D2FTTrainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=samples(n=40))
        trainer.train()
        flos[score] = trainer.state.total_flos
    assert flos["fisher"] - flos["weight_magnitude"] == trainer.planner.cost_model.full_flops(np.array([40.0]))


def test_counts_do_not_grow_with_the_steps_between_two_logs():
    counts, schedule = ExecutionCounts(), Schedule(np.array([[2, 2], [0, 1]]))
    for _ in range(100):
        counts.begin()
        for index, row in enumerate(schedule.operations):
            counts.note(index, row, lambda: (1.0, 2.0))
        counts.finish(schedule)
    assert len(json.dumps(counts.state())) < 500
    assert not counts._open and not counts._rows
    logs = counts.pop(schedule)
    assert logs["compute_ratio"] == pytest.approx(schedule.compute_ratio)
    assert logs["flops_ratio"] == 0.5 and logs["step_flops"] == 2
    assert counts.pop(schedule)["compute_ratio"] == 0  # nothing ran since


def test_what_is_pushed_during_training_can_be_loaded_as_what_it_is(tmp_path, monkeypatch):
    """The Trainer copies the files that it knows out of a checkpoint."""
    pushed = []
    model = adapt("vit", "lora", compute_budget=0.5).float()
    args = arguments(tmp_path, save_strategy="steps", save_steps=3)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=samples())
    trainer.train()

    def upload(**kwargs):
        pushed.append({path.name for path in tmp_path.iterdir()})
        return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: SimpleNamespace(upload_folder=upload))
    trainer.hub_model_id, trainer.push_in_progress = "me/model", None
    trainer._push_from_checkpoint(str(tmp_path / "checkpoint-3"))
    assert {"adapter_config.json", "adapter_model.safetensors", "d2ft_config.json"} <= pushed[0]
