"""Training on chosen samples: who trains is decided before anything is loaded, and by what training showed."""

import numpy as np
import pytest
import torch
from torch.utils.data import IterableDataset

from d2ft_peft import D2FTPlanner, D2FTTrainer
from d2ft_peft.planning.facts import FACTS_KEY
from d2ft_peft.scores import LiveScores, live_score, source
from d2ft_peft.training.step_tasks import StepTasks
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_close, doubles, samples, trained


class Counting(torch.utils.data.Dataset):
    """Notes which items are loaded."""

    def __init__(self, items):
        self.items, self.loaded = items, []

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        self.loaded.append(index)
        return self.items[index]


def collate(items):
    return {key: torch.stack([item[key] for item in items]) for key in items[0]}


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", ["importance", "selective_backprop", "fewer_samples"])
@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_trainer_does_what_a_bare_loop_does(tmp_path, policy, mode, monkeypatch):
    data = doubles(samples(n=24))
    config = {"policy": policy, "compute_budget": 0.5, "mode": mode}
    seen = []

    class Watching(D2FTTrainer):
        def get_batch_samples(self, *args):
            result = super().get_batch_samples(*args)
            seen.append(self.planner.schedule)
            return result

    orders, compose = [], D2FTPlanner.compose

    def watched(self, candidates, size):
        orders.append(candidates.indices)
        return compose(self, candidates, size)

    monkeypatch.setattr(D2FTPlanner, "compose", watched)
    args = arguments(tmp_path, max_steps=6, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0)
    trainer = Watching(model=adapt(**config), args=args, train_dataset=data)
    trainer.train()

    model = adapt(**config).train()
    planner = D2FTPlanner(model, num_micro_batches=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    planner.prepare(collate(data[:1]))
    monkeypatch.undo()
    for indices in orders:
        for i, positions in enumerate(planner.compose(indices, 2)):
            batch = collate([data[index] for index in indices[positions]])
            with planner.micro_batch(i) as micro_batch:
                outputs = model(**batch)
                (outputs.loss * micro_batch.weight).backward()
                planner.observe(indices[positions], outputs.logits, batch["labels"])
        optimizer.step()
        optimizer.zero_grad()
    assert_close(trained(trainer.model), trained(model))
    assert {schedule.compute_ratio for schedule in seen} == {0.5}
    if policy != "fewer_samples":
        ours, theirs = trainer.planner.source.live["loss"], planner.source.live["loss"]
        assert (~np.isnan(ours.values)).any()
        np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5)


@pytest.mark.quick(1)
@pytest.mark.parametrize("config", [{"policy": "importance", "rows": "micro_batches"}, {"backward_score": "el2n"}])
@pytest.mark.parametrize("accumulation", [4, 1])
def test_micro_batches_are_chosen_by_what_training_showed_of_their_samples(tmp_path, config, accumulation, monkeypatch):
    data = doubles(samples(n=24))
    config |= {"compute_budget": 0.5, "num_micro_batches": 4}
    seen, schedule = [], StepTasks._schedule

    def watched(self, candidates):
        seen.append([dict(batch) for batch in candidates])
        return schedule(self, candidates)

    monkeypatch.setattr(StepTasks, "_schedule", watched)
    args = arguments(
        tmp_path, max_steps=24 // accumulation, gradient_accumulation_steps=accumulation, optim="sgd",
        lr_scheduler_type="constant", max_grad_norm=0,
    )  # fmt: skip
    trainer = D2FTTrainer(model=adapt(**config), args=args, train_dataset=data)
    trainer.train()
    assert len(seen) == 6

    model = adapt(**config).train()
    planner = D2FTPlanner(model, num_micro_batches=4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    for batches in seen:
        indices = [batch[FACTS_KEY].indices for batch in batches]
        schedule = planner.plan(batches)
        for i in np.flatnonzero(~schedule.skipped):
            with planner.micro_batch(i) as micro_batch:
                outputs = model(**batches[i])
                (outputs.loss * (micro_batch.weight if accumulation > 1 else 1)).backward()
                planner.observe(indices[i], outputs.logits, batches[i]["labels"])
            if accumulation == 1:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(trained(trainer.model), trained(model))
    (ours,), (theirs,) = trainer.planner.source.live.values(), planner.source.live.values()
    assert (~np.isnan(ours.values)).any()
    np.testing.assert_allclose(ours.values, theirs.values, rtol=1e-5)


def test_candidates_are_drawn_by_their_own_scores():
    """A hundred times the loss of the others, and cheap ones at the floor: the costly samples run almost always."""
    planner = D2FTPlanner(adapt(policy="importance", compute_budget=0.25))
    planner.prepare(collate(doubles(samples(n=2))))
    planner.source.update(np.arange(100), {"loss": np.where(np.arange(100) % 4 == 1, 100.0, 0.01)})
    hits = 0
    for start in range(20):
        indices = np.arange(start, start + 8)
        (positions,) = planner.compose(indices, 4)
        hits += int((indices[positions] % 4 == 1).sum())
    assert hits >= 34  # of 40
    assert planner.step == 20


@pytest.mark.parametrize("accumulation", [4, 1])
def test_what_does_not_run_is_not_loaded(tmp_path, accumulation):
    data = Counting(samples(n=24))
    model = adapt(policy="importance", compute_budget=0.5, num_micro_batches=4).float()
    args = arguments(tmp_path, max_steps=12 // accumulation, gradient_accumulation_steps=accumulation)
    trainer = D2FTTrainer(model=model, args=args, train_dataset=data)
    trainer.train()
    # 24 candidates, half of which run; and a batch that shows what the model costs, some of which may run.
    assert 12 <= len(data.loaded) <= 2 + 12
    known = ~np.isnan(trainer.planner.source.live["loss"].values)
    assert set(data.loaded[2:]) <= set(np.flatnonzero(known)) <= set(data.loaded)


def test_workers_load_ahead(tmp_path):
    trainer = D2FTTrainer(
        model=adapt(policy="importance", compute_budget=0.5).float(),
        args=arguments(tmp_path, dataloader_num_workers=1), train_dataset=samples(n=24),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.log_history[0]["compute_ratio"] == 0.5


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_the_mean_of_the_samples_losses_is_the_models_loss(name):
    model, batch = TINY[name].build().eval(), TINY[name].batch()
    outputs = model(**batch)
    losses = live_score("loss", model, outputs.logits, batch["labels"])
    assert losses.shape == (len(batch["labels"]),)
    assert losses.mean() == pytest.approx(outputs.loss.item(), rel=1e-5)
    one = {key: value[:1] for key, value in batch.items()}
    assert losses[0] == pytest.approx(model(**one).loss.item(), rel=1e-4)


def test_el2n_is_the_norm_of_the_gradient_of_the_logits():
    logits, labels = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 2, 1, 1])
    torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    np.testing.assert_allclose(live_score("el2n", torch.nn.Identity(), logits, labels), logits.grad.norm(dim=1), 1e-5)


def test_scores_of_numbers():
    logits, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])
    np.testing.assert_allclose(live_score("loss", torch.nn.Identity(), logits, labels), [1.0, 4.0])
    several = torch.randn(2, 3), torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(*several)
    assert live_score("loss", torch.nn.Identity(), *several).mean() == pytest.approx(loss.item())
    with pytest.raises(ValueError, match="labels that fit the logits"):
        live_score("loss", torch.nn.Identity(), torch.randn(2, 3), torch.ones(2, 2, dtype=torch.long))


def test_a_sample_without_visit_counts_like_the_mean_of_the_others():
    scores = LiveScores("loss")
    assert scores.lookup(np.array([3, 7])).tolist() == [1, 1]
    scores.update(np.array([3, 900]), np.array([2.0, 4.0]))
    assert scores.lookup(np.array([3, 7, 900, 10_000])).tolist() == [2, 3, 4, 3]


def test_of_several_visits_to_a_sample_the_last_counts_whichever_process_saw_it(monkeypatch):
    def with_the_other_process(indices, values):
        """It saw sample 3 before this process did, and sample 4 after it."""
        others = {"step": [1.0, 9.0], "loss": [30.0, 40.0]}
        return np.append(indices, [3, 4]), {name: np.append(values[name], others[name]) for name in values}

    monkeypatch.setattr(source, "world_size", lambda: 2)
    monkeypatch.setattr(source, "gather_samples", with_the_other_process)
    scores = D2FTPlanner(adapt(policy="importance")).source
    for step, value in ((2, 1.0), (5, 2.0)):
        scores.update(np.array([3, 4]), {"loss": np.array([value, value])}, step)
    assert scores.live["loss"].lookup(np.array([3, 4])).tolist() == [2, 2]
    scores.share()
    assert scores.live["loss"].lookup(np.array([3, 4])).tolist() == [2, 40]


def test_data_without_indices_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(samples())

    trainer = D2FTTrainer(model=adapt(policy="importance"), args=arguments(tmp_path), train_dataset=Stream())
    with pytest.raises(ValueError, match="choose policy='bilevel'"):
        trainer.train()


def test_planning_batches_under_a_policy_over_samples_is_refused():
    planner = D2FTPlanner(adapt(policy="importance"))
    with pytest.raises(ValueError, match="call compose"):
        planner.plan([TINY["vit"].batch()])
    with pytest.raises(ValueError, match="call prepare"):
        planner.compose([0, 1, 2], 2)


def test_a_policy_with_many_kinds_of_rows_does_not_fit_the_trainers_steps(tmp_path):
    """The paper's knapsack over samples by Fisher information gives every sample a row of its own."""
    model = adapt(policy="bilevel", rows="samples", backward_score="fisher", num_full=2)
    trainer = D2FTTrainer(model=model, args=arguments(tmp_path), train_dataset=doubles(samples()))
    with pytest.raises(ValueError, match="set rows='micro_batches'"):
        trainer.train()
