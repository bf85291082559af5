"""How many tokens pass in which step: the budget holds for the run, and every way to train draws the same."""

import tempfile

import numpy as np
import pytest
import torch

from d2ft_peft import D2FTPlanner, D2FTTrainer
from d2ft_peft.planning.token_budget import share_of_step
from tests.distributed.launch import run
from tests.models import TINY
from tests.test_trainer import adapt, arguments, assert_close, assert_equal, samples, trained


TOKENS = {"policy": "fewer_tokens", "compute_budget": 0.9, "token_dense_share": 0.34}


@pytest.mark.parametrize(("dense", "ramp"), [(0.0, 0.0), (0.1, 0.0), (0.1, 0.3), (0.25, 0.3)])
@pytest.mark.parametrize("steps", [7, 10, 400])
def test_the_mean_over_all_steps_is_the_budget(steps, dense, ramp):
    shares = np.array([share_of_step(0.6, step, steps, dense, ramp) for step in range(steps)])
    assert shares.mean() == pytest.approx(0.6)
    last, first = round(dense * steps), round(ramp * steps)
    assert (shares[steps - last :] == 1).all() and (np.diff(shares[: steps - last]) <= 1e-12).all()
    assert first == 0 or shares[0] == 1


def test_a_budget_that_the_dense_steps_take_up_is_refused():
    with pytest.raises(ValueError, match=r"compute_budget=0.2 is taken up by the steps on more tokens"):
        share_of_step(0.2, 0, 10, 0.3, 0.0)


def test_a_budget_below_what_lies_around_the_middle_blocks_is_refused():
    planner = D2FTPlanner(adapt("vit", policy="fewer_tokens", compute_budget=0.3, token_dense_share=0.0).train())
    batch = {"pixel_values": TINY["vit"].batch()["pixel_values"].double()}
    planner.plan([dict(batch)])
    with (
        pytest.raises(ValueError, match="of which what lies around its middle blocks takes 0.8"),
        planner.micro_batch(0),
    ):
        planner.model(**batch)


def test_a_bare_loop_says_how_many_steps_there_are():
    batch = TINY["llama"].batch()
    with pytest.raises(ValueError, match=r"give D2FTPlanner\(model, steps=...\), or set both to 0"):
        D2FTPlanner(adapt("llama", **TOKENS).train()).plan([batch])


@pytest.mark.parametrize("accumulation", [2, 1])
def test_the_trainer_draws_what_a_bare_loop_draws(tmp_path, accumulation):
    data = samples("llama", n=12)
    args = arguments(
        tmp_path, max_steps=6, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
        gradient_accumulation_steps=accumulation, logging_steps=2,
    )  # fmt: skip

    class Watching(D2FTTrainer):
        seen: list = []

        def training_step(self, model, inputs, *rest):
            self.seen.append({key: value.clone() for key, value in inputs.items()})
            loss = super().training_step(model, inputs, *rest)
            self.kept = [*getattr(self, "kept", []), self.planner.runtime.passes[0][2]]
            return loss

    trainer = Watching(model=adapt("llama", **TOKENS), args=args, train_dataset=data)
    trainer.train()

    model = adapt("llama", **TOKENS).train()
    planner = D2FTPlanner(model, steps=6)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    for start in range(0, 6 * accumulation, accumulation):
        batches = trainer.seen[start : start + accumulation]
        planner.plan([dict(batch) for batch in batches])
        for i, batch in enumerate(batches):
            with planner.micro_batch(i) as micro_batch:
                (model(**batch).loss * micro_batch.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    Watching.seen.clear()
    assert_close(trained(trainer.model), trained(model))
    assert set(trainer.kept[4 * accumulation :]) == {7} and max(trainer.kept[: 4 * accumulation]) < 7


def test_logs_say_what_was_executed(tmp_path):
    args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, logging_steps=2)
    trainer = D2FTTrainer(model=adapt("llama", **TOKENS), args=args, train_dataset=samples("llama", n=12))
    trainer.train()
    first, second, last, run = [entry for entry in trainer.state.log_history if "compute_ratio" in entry]
    assert first["flops_ratio"] == second["flops_ratio"] < 0.9 and first["compute_ratio"] < 1
    assert last["flops_ratio"] == last["compute_ratio"] == 1.0
    assert run["flops_ratio"] == pytest.approx((2 * first["flops_ratio"] + 1) / 3) and run["flops_ratio"] <= 0.9


def one_process():
    """The weights that a process ends with, and the tokens that its second block ran on in the last micro-batch."""
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, max_steps=2, gradient_accumulation_steps=2, ddp_timeout=60)
        config = {**TOKENS, "token_dense_share": 0.0}

        class Watching(D2FTTrainer):
            def compute_loss(self, *args, **kwargs):
                result = super().compute_loss(*args, **kwargs)
                self.drawn = self.planner.runtime.token_pass.selections[None].index
                return result

        trainer = Watching(model=adapt("llama", "lora", **config).float(), args=args, train_dataset=samples("llama"))
        trainer.train()
    return trained(trainer.model), trainer.drawn


@pytest.mark.thorough
@pytest.mark.distributed
def test_each_process_draws_tokens_of_its_own_and_all_end_with_the_same_weights(tmp_path):
    (weights, drawn), (others, drawn_there) = run(__name__, "one_process", tmp_path)
    assert_equal(weights, others)
    assert not drawn.equal(drawn_there)
