"""Whatever is drawn for a configuration, a problem or a schedule: it is taken, or a ValueError names the field."""

import copy
import dataclasses
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from d2ft_peft import D2FTConfig, Schedule
from d2ft_peft.schedule import Budget, Problem, policy_names
from d2ft_peft.tuners.config_checks import SCORES
from tests.models import TINY


OWN = {f.name for f in dataclasses.fields(D2FTConfig)} - {f.name for f in dataclasses.fields(LoraConfig)} | {"r"}
PLACES = {"exclude_modules", "layers_to_transform", "layers_pattern"}
LORA = {"lora_alpha", "lora_dropout", "bias", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern",
        "fan_in_fan_out", "lora_bias"}  # fmt: skip
FIELDS = sorted(OWN | PLACES | LORA)
NUMBERS = st.one_of(
    st.integers(-3, 8), st.sampled_from([10**30, -(10**30), math.nan, math.inf, -math.inf]), st.floats(-2, 2)
)
WORDS = st.sampled_from([
    "", "auto", "samples", "micro_batches", "tokens", "spread", "mean", "compose", "sqrt", "q_proj", "gaussian", "junk",
    *policy_names(), *SCORES,
])  # fmt: skip
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.binary(max_size=2))
ANYTHING = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=3), st.tuples(PLAIN, PLAIN), st.dictionaries(WORDS, PLAIN, max_size=2),
    st.just(object()), st.just(int), st.sets(st.integers(0, 3), max_size=2),
)  # fmt: skip
CONFIGS = st.dictionaries(st.sampled_from(FIELDS), ANYTHING, min_size=1, max_size=5)


def outcome(make, names):
    """What is made, or None where a ValueError names one of the fields; anything else fails the test."""
    try:
        return make()
    except ValueError as error:
        assert any(name in str(error) for name in names), f"names none of {sorted(names)}: {error}"
        return None


@settings(max_examples=300)
@given(CONFIGS)
@example({"compute_budget": [0.5]})
@example({"rows": [], "policy": "fewer_samples"})
@example({"num_full": True, "num_forward_only": None})
def test_a_configuration_is_taken_or_a_field_is_named(fields):
    outcome(lambda: D2FTConfig(**fields), {*fields, "policy", "rows"})


@pytest.fixture(scope="module")
def model():
    return TINY["vit"].build()


GOOD = {
    "r": st.sampled_from([None, 2]), "policy": st.one_of(st.none(), st.sampled_from(policy_names())),
    "heads_per_subnet": st.integers(1, 5), "num_devices": st.one_of(st.none(), st.integers(1, 30)),
    "layers_to_transform": st.one_of(st.none(), st.integers(0, 4), st.lists(st.integers(0, 4), max_size=3)),
    "layers_pattern": st.sampled_from([None, "layers", ["layers"], "junk"]),
    "init_lora_weights": st.sampled_from([True, False, "gaussian", "junk", "eva"]),
    "exclude_modules": st.sampled_from([None, "classifier", ["q_proj"], ".*fc1", []]),
    "bias": st.sampled_from(["none", "all", "lora_only"]), "use_rslora": st.booleans(),
    "rank_pattern": st.sampled_from([{}, {"q_proj": 1}, {"junk": 3}]), "lora_alpha": st.floats(0.5, 3),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # PEFT's advice: an initialization wants another call after this one
@settings(max_examples=40)
@given(st.data())
def test_an_adapted_model_is_made_or_a_field_is_named(model, data):
    names = data.draw(st.sets(st.sampled_from(sorted(GOOD)), max_size=5))
    fields = {name: data.draw(GOOD[name]) for name in names}
    fields |= {name: data.draw(ANYTHING) for name in data.draw(st.sets(st.sampled_from(FIELDS), max_size=1))}
    config = outcome(lambda: D2FTConfig(**fields), {*fields, "policy", "rows"})
    if config is None:
        return
    outcome(lambda: get_peft_model(copy.deepcopy(model), config), {*fields, "target_modules"})


ARRAYS = st.one_of(
    PLAIN, st.lists(PLAIN, max_size=3), st.lists(st.lists(NUMBERS, max_size=3), max_size=3), st.just({}), st.just(int)
)
TABLES = st.lists(st.lists(st.integers(-1, 3), min_size=2, max_size=2), min_size=1, max_size=3)


@settings(max_examples=200)
@given(
    st.one_of(TABLES, ARRAYS),
    st.dictionaries(st.sampled_from(["weights", "devices", "costs", "capacities", "blocks"]), ARRAYS, max_size=2),
)
@example([[2, 1], [0]], {})
@example([[2, 1]], {"devices": [10**30, 0]})
def test_a_schedule_is_made_or_a_field_is_named(operations, fields):
    schedule = outcome(lambda: Schedule(operations, **fields), {"operations", *fields})
    if schedule is not None:
        assert Schedule.from_dict(schedule.to_dict()) == schedule
        assert 0 <= schedule.compute_ratio <= 1 + 1e-9


PROBLEM = ("forward_scores", "backward_scores", "weights", "devices", "blocks", "costs", "tie_break", "rng", "seed",
           "step", "interval", "budget")  # fmt: skip


@settings(max_examples=200)
@given(
    st.sampled_from(["compute", "communication", "num_full"]), ANYTHING,
    st.dictionaries(st.sampled_from(PROBLEM), ARRAYS, max_size=2),
)  # fmt: skip
def test_a_problem_is_made_or_a_field_is_named(limit, amount, fields):
    names = {limit, "compute_budget", "device_capacities", "communication_budget", "num_full"}
    budget = outcome(lambda: Budget(**{limit: amount}), names)
    if budget is None:
        return
    scores = {"forward_scores": np.ones((3, 2)), "backward_scores": np.ones((3, 2)), "budget": budget}
    problem = outcome(lambda: Problem(**{**scores, **fields}), {*names, *fields})
    assert problem is None or problem.limits.shape == (problem.num_devices,)
