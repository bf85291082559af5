"""Two gloo processes under DistributedDataParallel, without looking for unused parameters, equal one process."""

import tempfile

import numpy as np
import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from d2ft_peft import D2FTTrainer, Operation, Schedule, register_policy
from d2ft_peft.schedule.policies import registry
from tests.distributed.launch import run
from tests.test_trainer import adapt, arguments, doubles, samples


pytestmark = pytest.mark.distributed


def random_block(problem):
    """One block FULL in a step, FORWARD_ONLY elsewhere: most projections have no gradient of their own."""
    block = problem.rng.integers(problem.blocks.max() + 1)
    row = np.where(problem.blocks == block, Operation.FULL, Operation.FORWARD_ONLY)
    return Schedule([row] * problem.num_micro_batches, problem.weights, blocks=problem.blocks)


CONFIGS = {
    "one block": {"policy": "test_random_block", "seed": 3},
    "random": {"policy": "random", "compute_budget": 0.5},
    "fisher": {"backward_score": "fisher", "num_full": 2},
    "forward only": {"policy": "round_robin", "num_full": 1, "num_forward_only": 3},
}


class InOrder(D2FTTrainer):
    """Reads the data in order: micro-batch i of two processes is micro-batch i of one, split in two."""

    def _get_train_sampler(self, *args):
        return None

    def training_step(self, model, *args, **kwargs):
        if isinstance(model, DistributedDataParallel):
            assert not model.find_unused_parameters
        return super().training_step(model, *args, **kwargs)


def train(mode: str, config: str, batch_size: str) -> dict[str, torch.Tensor]:
    """Train on this process's share and return what was trained, the logs and the digest of the last schedule."""
    model = adapt(mode=mode, **CONFIGS[config])
    with tempfile.TemporaryDirectory() as folder:
        # Plain SGD without clipping: an optimizer that normalizes would hide a factor on the loss.
        args = arguments(
            folder, per_device_train_batch_size=int(batch_size), max_grad_norm=0, optim="sgd", learning_rate=0.5
        )
        trainer = InOrder(model=model, args=args, train_dataset=doubles(samples(n=32)))
        trainer.train()
    ratios = [entry["compute_ratio"] for entry in trainer.state.log_history if "compute_ratio" in entry]
    assert ratios and all(ratio < 1 for ratio in ratios)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**weights, "operations": torch.tensor(trainer.planner.schedule.operations)}


def train_on_chosen_samples() -> dict[str, torch.Tensor]:
    """Train on samples that each process draws among its own; return weights, last losses and what ran here."""
    model = adapt(policy="importance", compute_budget=0.5, interval=3)
    ran = []

    class Watching(InOrder):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            if not self._d2ft_session.idle:
                ran.extend(self._d2ft_session.current.facts.indices.tolist())
            return result

    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, max_steps=4)
        trainer = Watching(model=model, args=args, train_dataset=doubles(samples(n=32)))
        trainer.train()

    def losses():
        values = trainer.planner.source.live["loss"].values[:32]
        return torch.from_numpy(np.pad(values, (0, 32 - len(values)), constant_values=np.nan))

    own = losses()
    trainer.planner.share()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = torch.tensor(trainer.planner.schedule.weights)
    return {**weights, "losses": losses(), "ran": torch.tensor(ran), "sizes": sizes, "own": own}


@pytest.mark.thorough
def test_processes_share_what_they_saw_of_samples(tmp_path):
    first, second = run(__name__, "train_on_chosen_samples", tmp_path)
    for name in first.keys() - {"ran", "sizes", "own"}:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True, msg=name)

    def known(losses):
        return set(torch.nonzero(~losses.isnan())[:, 0].tolist())

    ran = [rank["ran"].tolist() for rank in (first, second)]
    assert known(first["losses"]) == {*ran[0], *ran[1]}
    # Until then the first knew of the other's three steps before they last met, and not of the one since.
    assert known(first["own"]) == {*ran[0], *ran[1][:12]} != known(first["losses"])
    assert first["sizes"].tolist() == [4, 4, 8]


def resume_within_a_window(folder: str) -> list[dict[str, torch.Tensor]]:
    """Weights after six steps, without and with a stop after the second of a window of four."""
    found = []
    for steps in (6, 2, 6):
        model = adapt(policy="importance", compute_budget=0.5, num_micro_batches=4, interval=1)
        args = arguments(
            f"{folder}/{'whole' if not found else 'stopped'}", max_steps=steps, save_strategy="steps", save_steps=2,
            gradient_accumulation_steps=1, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = D2FTTrainer(model=model, args=args, train_dataset=doubles(samples(n=32)))
        trainer.train(resume_from_checkpoint=len(found) == 2)
        found.append({name: p.detach() for name, p in model.named_parameters() if p.requires_grad})
    return found


@pytest.mark.thorough
def test_every_process_resumes_its_own_samples(tmp_path):
    for whole, stopped, resumed in run(__name__, "resume_within_a_window", tmp_path, str(tmp_path)):
        assert not all(whole[name].equal(stopped[name]) for name in whole)
        for name, value in whole.items():
            torch.testing.assert_close(resumed[name], value, rtol=0, atol=0, msg=name)


def train_on_chosen_micro_batches() -> dict[str, torch.Tensor]:
    """Train on micro-batches by the last losses of their samples; return schedules' sum, and the losses known here."""
    model = adapt(policy="importance", rows="micro_batches", compute_budget=0.5, interval=3)
    ran = []

    class Watching(InOrder):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            if not self._d2ft_session.idle:
                ran.extend(self._d2ft_session.current.facts.indices.tolist())
            return result

    with tempfile.TemporaryDirectory() as folder:
        trainer = Watching(model=model, args=arguments(folder, max_steps=4), train_dataset=doubles(samples(n=32)))
        trainer.train()
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    known = np.flatnonzero(~np.isnan(trainer.planner.source.live["loss"].values))
    return {**weights, "ran": torch.tensor(ran), "known": torch.from_numpy(known)}


@pytest.mark.thorough
def test_micro_batches_are_chosen_alike_and_what_was_seen_is_shared(tmp_path):
    first, second = run(__name__, "train_on_chosen_micro_batches", tmp_path)
    for name in first.keys() - {"ran", "known"}:
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, msg=name)
    ran = [rank["ran"].tolist() for rank in (first, second)]
    assert len(ran[0]) == len(ran[1]) == 16 and not {*ran[0]} & {*ran[1]}
    # They met before the fourth step, and each knows of its own samples since.
    assert first["known"].tolist() == sorted({*ran[0], *ran[1][:12]})
    assert second["known"].tolist() == sorted({*ran[1], *ran[0][:12]})


RUNS = [("full", "random"), ("full", "one block"), ("full", "fisher"), ("lora", "forward only")]


def on_two_ranks(*args: str) -> dict[str, torch.Tensor]:
    register_policy("test_random_block")(random_block)
    return train(*args)


@pytest.mark.quick(1)
@pytest.mark.parametrize(("mode", "config"), RUNS)
def test_two_processes_equal_one(tmp_path, monkeypatch, mode, config):
    monkeypatch.setattr(registry, "_POLICIES", dict(registry._POLICIES))
    monkeypatch.setattr(registry, "_FACTS", dict(registry._FACTS))
    register_policy("test_random_block")(random_block)
    single = train(mode, config, "4")
    for rank in run(__name__, "on_two_ranks", tmp_path, mode, config, "2"):
        assert rank.keys() == single.keys()
        for name, value in single.items():
            torch.testing.assert_close(rank[name], value, rtol=1e-7, atol=1e-9, msg=name)
    # Equality is not for want of a difference: another schedule gives other weights.
    other = train(mode, "random" if config == "fisher" else "fisher", "4")
    assert any(not torch.allclose(other[name], value) for name, value in single.items() if "layers.1" in name)
