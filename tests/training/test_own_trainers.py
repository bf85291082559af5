"""Trainers of one's own: batches, losses and steps that they make differently, and models that they compile."""

import numpy as np
import pytest
import torch

from d2ft_peft import D2FTTrainer
from tests.test_trainer import adapt, arguments, samples, trained
from tests.training.test_session import ratios


def test_batches_that_the_model_does_not_take(tmp_path):
    """A loss of one's own may run the model on something else than the batch: on pairs, as preference losses do."""

    class Pairs(D2FTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = torch.cat([inputs["chosen"], inputs["rejected"]])
            chosen, rejected = model(input_ids=ids).logits.mean((1, 2)).chunk(2)
            return torch.nn.functional.softplus(rejected - chosen).mean()

    data = [{"chosen": x["input_ids"], "rejected": x["input_ids"].flip(0)} for x in samples("llama")]
    model = adapt("llama", "lora", compute_budget=0.5).float()
    trainer = Pairs(model=model, args=arguments(tmp_path, remove_unused_columns=False), train_dataset=data)
    trainer.train()
    assert ratios(trainer) == [0.5] * 3
    entry = trainer.state.log_history[0]
    # Embedding and head, which no look at a batch could show, are counted once a pair has been through them.
    assert entry["flops_ratio"] == pytest.approx(0.5)
    assert trainer.planner.costs.probe.above
    assert entry["step_flops"] == trainer.planner.cost_model.full_flops(np.array([8.0]))


def test_batches_that_are_made_within_a_step_are_refused(tmp_path):
    class Generates(D2FTTrainer):
        def _prepare_inputs(self, inputs):
            return super()._prepare_inputs(dict(inputs[0]))

    trainer = Generates(
        model=adapt("vit").float(), args=arguments(tmp_path), train_dataset=samples(), data_collator=list
    )
    with pytest.raises(ValueError, match="a batch is a list"):
        trainer.train()


def test_a_data_loader_of_ones_own(tmp_path):
    """Batches as they come can be scheduled; samples cannot be chosen from what is collated already."""

    class OwnLoader(D2FTTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, batch_size=2, collate_fn=self.data_collator)

    trainer = OwnLoader(
        model=adapt("vit", policy="bilevel", compute_budget=0.5).float(), args=arguments(tmp_path),
        train_dataset=samples(),
    )  # fmt: skip
    trainer.train()
    assert ratios(trainer) == [0.5] * 3
    trainer = OwnLoader(
        model=adapt("vit", policy="importance").float(), args=arguments(tmp_path), train_dataset=samples()
    )
    with pytest.raises(ValueError, match="OwnLoader.get_train_dataloader gives batches that are already collated"):
        trainer.train()


def test_a_trainer_that_leaves_batches_out_runs_the_others_under_their_own_rows(tmp_path):
    """The usual way to pass over a batch that is too long, or broken."""
    ran = []

    class LeavesOut(D2FTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if int(inputs["input_ids"][0, 0]) % 2:
                return torch.zeros(())
            loss = super().training_step(model, inputs, num_items_in_batch)
            task = self._d2ft_session.current
            ran.append((task.batch["input_ids"].tolist(), inputs["input_ids"].tolist()))
            return loss

    trainer = LeavesOut(
        model=adapt("llama", "lora", policy="all_full", compute_budget=1.0).float(), args=arguments(tmp_path),
        train_dataset=samples("llama", 40),
    )  # fmt: skip
    trainer.train()
    assert 0 < len(ran) < 12 and all(planned == given for planned, given in ran)
    assert all("loss" in entry for entry in trainer.state.log_history[:3])


@pytest.mark.thorough
def test_a_step_that_runs_a_batch_twice(tmp_path):
    """As sharpness-aware minimization does: both passes are of the same row, and both are counted."""

    class Twice(D2FTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            super().training_step(model, dict(inputs), num_items_in_batch)
            return super().training_step(model, inputs, num_items_in_batch)

    found = []
    for cls in (D2FTTrainer, Twice):
        model = adapt("vit", compute_budget=0.5).float()
        args = arguments(tmp_path, optim="sgd", learning_rate=1e-3 if cls is Twice else 2e-3, max_grad_norm=0)
        cls(model=model, args=args, train_dataset=samples()).train()
        found.append(trained(model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-7, msg=name)


def test_batches_that_nobody_scheduled_are_refused(tmp_path):
    class Exchanges(D2FTTrainer):
        def get_batch_samples(self, epoch_iterator, num_batches, device):
            return [next(epoch_iterator) for _ in range(num_batches)], None

    trainer = Exchanges(model=adapt("vit").float(), args=arguments(tmp_path), train_dataset=samples())
    with pytest.raises(ValueError, match="a batch that get_batch_samples did not give out"):
        trainer.train()


def test_a_compute_loss_that_knows_fewer_arguments(tmp_path):
    class Short(D2FTTrainer):
        def compute_loss(self, model, inputs, num_items_in_batch=None):
            return model(**inputs).loss

    model = adapt("vit", policy="bilevel", compute_budget=0.5).float()
    trainer = Short(model=model, args=arguments(tmp_path), train_dataset=samples())
    trainer.train()
    assert ratios(trainer) == [0.5] * 3


def test_a_trainer_that_has_trained_is_a_plain_one_again(tmp_path):
    """Its data loader gives plain batches, and a step that somebody takes by hand is a plain step."""
    trainer = D2FTTrainer(
        model=adapt("vit", policy="importance", compute_budget=0.5).float(), args=arguments(tmp_path),
        train_dataset=samples(),
    )  # fmt: skip
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch.keys() == {"pixel_values", "labels"}
    with pytest.warns(UserWarning, match="training forward without a schedule"):
        assert trainer.training_step(trainer.model, batch).isfinite()


def test_what_a_user_logs_is_left_alone(tmp_path):
    class Logs(D2FTTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.log({"loss": 7.0})
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = adapt("vit", num_full=2, num_micro_batches=4).float()
    trainer = Logs(
        model=model, args=arguments(tmp_path, gradient_accumulation_steps=1, max_steps=4), train_dataset=samples()
    )
    trainer.train()
    mine = [entry for entry in trainer.state.log_history if entry.get("loss") == 7.0]
    assert len(mine) == 2 and not any("compute_ratio" in entry for entry in mine)
    assert ["loss" in entry for entry in trainer.state.log_history if "learning_rate" in entry] == [
        True,
        True,
        False,
        False,
    ]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own look at it
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_compiled_model_is_normalized_as_well(tmp_path, accumulation):
    """Dynamo cannot look into the number that watches who divides by it."""
    weights = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = adapt("llama", "lora", policy="all_full", compute_budget=1.0).float()
        args = arguments(tmp_path, gradient_accumulation_steps=accumulation, optim="sgd", **compiled)
        D2FTTrainer(model=model, args=args, train_dataset=samples("llama", 40)).train()
        weights.append(trained(model))
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-6, msg=name)
