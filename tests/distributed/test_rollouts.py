"""Two gloo processes that generate their own completions take the step of the trainer alone on those that run."""

import pytest
import torch

from d2ft_peft.training.rollout_rows import join_rows
from tests.distributed.launch import run
from tests.training.test_trl_rollouts import assert_gradient_on, plain_twin, rows_that_ran, step_of
from tests.training.trl_cases import GENERATING


pytestmark = [pytest.mark.distributed, pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]


def step(kind, policy, folder):
    trainer, found = step_of(kind, folder, policy=policy, beta=0.1)
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    lengths = [inputs["completion_ids"].shape[1] for inputs in trainer.seen]
    return rows_that_ran(trainer), len(trainer.made[0]["advantages"]), lengths, found, weights


class Was:
    """A trainer of another process: what is left of it."""

    def __init__(self, weights):
        self.model = torch.nn.Module()
        self.model.named_parameters = lambda: iter(weights.items())


@pytest.mark.parametrize("policy", ["exact_first", "fewer_samples", "bilevel"])
@pytest.mark.parametrize("kind", GENERATING)
def test_two_processes_take_the_mean_over_what_ran_in_both(tmp_path, kind, policy):
    """Equally many completions in each, whose padding is cut off."""
    (one, made, *_), (other, _, lengths, found, weights) = results = run(
        __name__, "step", tmp_path, kind, policy, str(tmp_path)
    )
    assert len(one["advantages"]) == len(other["advantages"]) == made // 2
    assert not torch.equal(one["completion_ids"].sum(), other["completion_ids"].sum())
    for name, gradient in results[0][3].items():
        assert torch.equal(gradient, found[name])
    weights = {name: torch.nn.Parameter(value, "lora" in name) for name, value in weights.items()}
    both = {name: value for name, value in join_rows([one, other]).items()}
    assert_gradient_on(plain_twin(kind, tmp_path, Was(weights), beta=0.1), both, found)
