"""Training models with several stacks by D2FTTrainer: ragged inputs and targets, images beside text."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf
from peft import get_peft_model

from d2ft_peft import D2FTConfig, D2FTPlanner, D2FTTrainer
from tests.zoo_stacks import ZOO


IGNORED = -100
NAMES = ["t5", pytest.param("bart", marks=pytest.mark.slow), "llava"]


class Samples(torch.utils.data.Dataset):
    """Samples whose inputs and targets have lengths that know nothing of each other."""

    def __init__(self, name: str, n: int = 24):
        rng = np.random.default_rng(0)
        self.items = [self._item(rng, "llava" in name) for _ in range(n)]

    @staticmethod
    def _item(rng, has_image):
        ids = rng.integers(9, 60, rng.integers(6, 13)).tolist()
        if not has_image:
            return {"input_ids": ids, "labels": rng.integers(3, 60, rng.integers(2, 9)).tolist()}
        ids[:4] = [5] * 4
        labels = [IGNORED] * 4 + ids[4:]
        return {"input_ids": ids, "labels": labels, "pixel_values": torch.tensor(rng.normal(size=(3, 16, 16)))}

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return dict(self.items[index])


def collate(items):
    def padded(name, fill):
        width = max(len(item[name]) for item in items)
        return torch.tensor([item[name] + [fill] * (width - len(item[name])) for item in items])

    ids = padded("input_ids", 0)
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": padded("labels", IGNORED)}
    if "pixel_values" in items[0]:
        batch["pixel_values"] = torch.stack([item["pixel_values"] for item in items])
    return batch


@cache
def base(name):
    return ZOO[name].build().double()


def train(name, path, config=None, steps=3, micro_batches=2):
    model = copy.deepcopy(base(name))
    args = tf.TrainingArguments(
        str(path), per_device_train_batch_size=8 // micro_batches, gradient_accumulation_steps=micro_batches,
        max_steps=steps, logging_steps=1, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer_class = tf.Trainer
    if config is not None:
        model, trainer_class = get_peft_model(model, config), D2FTTrainer
    trainer = trainer_class(model=model, args=args, train_dataset=Samples(name), data_collator=collate)
    trainer.train()
    return trainer


def logged(trainer, name):
    return np.array([log[name] for log in trainer.state.log_history if "loss" in log and name in log])


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", NAMES)
def test_all_of_the_compute_trains_what_the_plain_trainer_trains(name, tmp_path):
    """In one batch: over several, T5's and BART's losses are means of each, which the plain Trainer adds up."""
    ours = train(name, tmp_path, D2FTConfig(compute_budget=1.0, train_boundary=True, seed=1))
    plain = train(name, tmp_path, micro_batches=1)
    np.testing.assert_allclose(logged(ours, "loss"), logged(plain, "loss"), rtol=1e-6)
    merged = ours.model.merge_and_unload().state_dict()
    for key, value in plain.model.state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=1e-6, atol=1e-7)


@pytest.mark.quick(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_budget_alone_is_kept_and_counted_against_plain_training(name, tmp_path):
    """Composed by inputs and targets or in the loader's own batches: plain training costs the same."""
    ours = train(name, tmp_path, D2FTConfig(compute_budget=0.6), steps=4)
    assert ours.model.peft_config["default"].policy == "exact_first"
    whole = train(name, tmp_path, D2FTConfig(policy="all_full"), steps=4)
    plain = [logged(trainer, "step_flops") / logged(trainer, "flops_ratio") for trainer in (ours, whole)]
    np.testing.assert_allclose(*plain, rtol=1e-6)
    assert 0.55 < logged(ours, "flops_ratio").mean() < 0.63  # the account saves up until another sample fits


@pytest.mark.quick(1)
@pytest.mark.parametrize("policy", [pytest.param("bilevel", id="heads"), pytest.param("depth", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_a_policy_over_heads_trains(name, policy, tmp_path):
    trainer = train(name, tmp_path, D2FTConfig(policy=policy, r=4, compute_budget=0.6))
    assert np.isfinite(logged(trainer, "loss")).all()
    assert 0.3 < logged(trainer, "flops_ratio").mean() < 0.75
    assert logged(trainer, "compute_ratio").mean() == pytest.approx(0.6, abs=0.1)


def test_a_first_batch_that_does_not_reach_a_tower():
    """Text alone, to a model that sees images as well: what the tower costs is learned from a batch that reaches it."""
    recipe = ZOO["llava, both stacks"]
    config = D2FTConfig(r=4, stacks=recipe.stacks, policy="bilevel", compute_budget=0.5)
    model = get_peft_model(recipe.build(), config).train()
    planner, seen = D2FTPlanner(model), recipe.batch()
    text = {key: value for key, value in seen.items() if key != "pixel_values"}
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == 5, 9)
    for batches, known in (([text, text], False), ([seen, seen], True)):
        planner.plan(batches)
        for index, batch in enumerate(batches):
            with planner.micro_batch(index) as micro_batch:
                if not micro_batch.skipped:
                    (model(**batch).loss * micro_batch.weight).backward()
        assert bool(planner.costs.probe.lengths) == known
    assert 0 < planner.counts.last.compute_ratio < 1
