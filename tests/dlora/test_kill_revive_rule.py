"""Kill-and-Revive as numbers: what is expected of small examples, and what holds for all."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2ft_peft.dlora.kill_revive import KillReviveRule, KillReviveState, Observations, decide, first_state
from d2ft_peft.dlora.kill_revive.rule import check_decision, is_due


deterministic = settings(derandomize=True, max_examples=150)
norms = st.one_of(st.none(), st.sampled_from([0.0, math.nan, math.inf]), st.floats(0, 1e9))


@st.composite
def cases(draw, choose=("responsive", "fixed", "redrawn", "top")):
    """A rule, a state after a few decisions, and observations of its modules."""
    rule = KillReviveRule(
        active=draw(st.integers(1, 6)), choose=draw(st.sampled_from(choose)), seed=draw(st.integers(0, 5)),
        idle=draw(st.sampled_from(["probe", "last", "random"])), margin=draw(st.floats(0, 1)),
        max_swaps=draw(st.one_of(st.none(), st.integers(1, 3))), decay=draw(st.floats(0.1, 1)),
        warmup=draw(st.integers(0, 1)),
    )  # fmt: skip
    size = draw(st.integers(1, 9))
    seen = [
        Observations(*(draw(st.lists(norms, min_size=size, max_size=size)) for _ in range(2)))
        for _ in range(draw(st.integers(1, 4)))
    ]
    return rule, size, seen


def run(rule, size, seen):
    """The states of a run, and what was killed and revived between them."""
    states, moves = [first_state(rule, size)], []
    for observations in seen:
        state, *move = decide(rule, states[-1], observations)
        states.append(state)
        moves.append(move)
    return states, moves


@pytest.mark.thorough
@deterministic
@given(cases())
def test_as_many_modules_as_asked_for_are_active_after_every_decision(case):
    rule, size, seen = case
    states, _ = run(rule, size, seen)
    assert {len(state.active) for state in states[1:]} == {min(rule.active, size)}
    all_first = rule.choose == "top" or (rule.choose == "responsive" and rule.warmup)
    assert len(states[0].active) == (size if all_first else min(rule.active, size))


@pytest.mark.thorough
@deterministic
@given(cases())
def test_what_is_killed_was_active_and_what_is_revived_was_idle(case):
    states, moves = run(*case)
    for before, after, (killed, revived) in zip(states, states[1:], moves, strict=False):
        assert set(killed) <= set(before.active) and not set(revived) & set(before.active)
        assert set(before.active) - set(killed) | set(revived) == set(after.active)
        assert after.decisions == before.decisions + 1
        check_decision(before, after, killed, revived)


@pytest.mark.thorough
@deterministic
@given(cases())
def test_the_same_numbers_give_the_same_decision_also_after_a_trip_as_json(case):
    rule, size, seen = case
    states, moves = run(rule, size, seen)
    assert run(rule, size, seen) == (states, moves)
    for state, observations, move in zip(states, seen, moves, strict=False):
        travelled = KillReviveState.from_json(state.to_json())
        assert travelled == state and decide(rule, travelled, observations)[1:] == tuple(move)
        json.loads(state.to_json(), parse_constant=pytest.fail)  # neither NaN nor Infinity, which are not JSON


@deterministic
@given(cases(choose=("responsive",)))
def test_no_more_than_the_most_swaps_and_none_within_the_margin(case):
    rule, size, seen = case
    states, moves = run(rule, size, seen)
    for after, (killed, revived) in list(zip(states[1:], moves, strict=False))[bool(rule.warmup) :]:
        assert len(killed) == len(revived) <= (rule.max_swaps or size)
        if rule.idle == "probe" and killed:
            worst = min(after.known[j] for j in revived)
            assert worst > min(after.known[i] or 0.0 for i in killed) * (1 + rule.margin)


@deterministic
@given(cases(choose=("responsive",)))
def test_norms_that_are_not_finite_are_passed_over(case):
    states, _ = run(*case)
    assert all(value is None or math.isfinite(value) for state in states for value in state.known + state.rates)


def state(active, known):
    return KillReviveState(tuple(active), tuple(known))


NOTHING = [None] * 4


def test_the_least_responsive_make_room_for_idle_ones_that_would_change_more():
    """Active modules change by twice their gradient norm, so the idle ones would change by 2 x 3 and 2 x 1."""
    rule = KillReviveRule(active=2)
    seen = Observations([2.0, 8.0, None, None], [1.0, 4.0, 3.0, 1.0])
    after, killed, revived = decide(rule, state([0, 1], NOTHING), seen)
    assert (killed, revived) == ((0,), (2,))
    assert after == KillReviveState((1, 2), (2.0, 8.0, 6.0, 2.0), 1, (2.0, 2.0, None, None))


def test_a_margin_keeps_what_is_nearly_as_responsive():
    seen = Observations([1.0, 9.0, None, None], [1.0, 9.0, 1.05, 0.0])
    assert decide(KillReviveRule(active=2, margin=0.1), state([0, 1], NOTHING), seen)[1] == ()
    assert decide(KillReviveRule(active=2, margin=0.0), state([0, 1], NOTHING), seen)[1] == (0,)


def test_pairs_are_compared_worst_with_best():
    rule = KillReviveRule(active=2, margin=0)
    seen = Observations([1.0, 2.0, None, None], [1.0, 2.0, 5.0, 1.5])
    assert decide(rule, state([0, 1], NOTHING), seen)[1:] == ((0,), (2,))  # 1.5 beats 1, whose place is taken


def test_the_most_swaps_are_those_of_the_worst_with_the_best():
    rule = KillReviveRule(active=2, max_swaps=1)
    seen = Observations([1.0, 2.0, None, None], [1.0, 2.0, 5.0, 9.0])
    assert decide(rule, state([0, 1], NOTHING), seen)[1:] == ((0,), (3,))


def test_responsiveness_is_divided_by_the_scale():
    rule = KillReviveRule(active=1)
    seen = Observations([4.0, None], [1.0, 1.0])
    assert decide(rule, state([0], [None, None]), seen)[0].known == (4.0, 4.0)
    seen = Observations([4.0, None], [1.0, 1.0], scale=[8.0, 2.0])
    after, killed, revived = decide(rule, state([0], [None, None]), seen)
    assert after.known == (0.5, 2.0) and (killed, revived) == ((0,), (1,))


def test_last_expects_idle_modules_to_have_slowed_like_the_active_ones():
    rule = KillReviveRule(active=2, idle="last", margin=0)
    seen = Observations([2.0, 1.0, None, None])  # by a half and by a quarter
    after, *move = decide(rule, state([0, 1], [4.0, 4.0, 3.0, 2.0]), seen)
    assert after.known == (2.0, 1.0, 3.0 * 0.375, 2.0 * 0.375) and move == [(1,), (2,)]
    after, *_ = decide(KillReviveRule(active=2, idle="last", decay=0.5), state([0, 1], [4.0, 4.0, 3.0, 2.0]), seen)
    assert after.known[2:] == (3.0 * 0.1875, 2.0 * 0.1875)


def test_last_gives_those_that_never_were_active_a_turn():
    rule = KillReviveRule(active=1, idle="last")
    assert decide(rule, state([0], [None, 6.0, None]), Observations([100.0, None, None]))[1:] == ((0,), (2,))


def test_a_probe_knows_what_a_modules_own_gradient_did_when_it_was_active():
    """The third changed five times as much for its gradient as the first two, which have slowed by a half since."""
    rule = KillReviveRule(active=2)
    before = KillReviveState((0, 1), (4.0, 4.0, 1.0), 1, (2.0, 2.0, 10.0))
    after, *_ = decide(rule, before, Observations([1.0, 1.0, None], [1.0, 1.0, 3.0]))
    assert after.rates == (1.0, 1.0, 5.0) and after.known == (1.0, 1.0, 15.0)


def test_after_a_warm_up_of_all_those_that_changed_most_stay():
    rule = KillReviveRule(active=2, warmup=5, interval=20)
    assert first_state(rule, 4).active == (0, 1, 2, 3)
    after, *move = decide(rule, first_state(rule, 4), Observations([1.0, 4.0, 2.0, 3.0]))
    assert after.active == (1, 3) and move == [(0, 2), ()]
    for choose in ("fixed", "redrawn"):
        assert len(first_state(KillReviveRule(active=2, warmup=5, choose=choose), 4).active) == 2


def test_random_gives_idle_modules_the_places_of_the_least_responsive():
    rule = KillReviveRule(active=2, idle="random", max_swaps=1)
    seen = Observations([1.0, 5.0, None, None])
    found = {decide(KillReviveRule(**{**vars(rule), "seed": s}), state([0, 1], NOTHING), seen)[1:] for s in range(20)}
    assert found == {((0,), (2,)), ((0,), (3,))}


def test_what_cannot_be_observed_keeps_its_last_known_value():
    rule = KillReviveRule(active=2)
    seen = Observations([math.nan, math.inf, None, None], [1.0, 1.0, 1.0, 1.0])
    after, killed, _ = decide(rule, state([0, 1], [3.0, None, 2.0, 4.0]), seen)
    assert after.known == (3.0, None, 2.0, 4.0) and killed == (1,)


def test_top_trains_all_first_and_keeps_those_that_changed_most():
    rule = KillReviveRule(active=2, choose="top")
    first = first_state(rule, 4)
    assert first.active == (0, 1, 2, 3)
    after, killed, revived = decide(rule, first, Observations([1.0, 4.0, 2.0, 3.0]))
    assert after.active == (1, 3) and killed == (0, 2) and revived == ()
    assert decide(rule, after, Observations([None, 0.0, None, 0.0]))[0].active == (1, 3)


def test_fixed_keeps_its_draw_and_redrawn_draws_anew():
    for choose, equal in (("fixed", True), ("redrawn", False)):
        rule = KillReviveRule(active=3, choose=choose)
        first = first_state(rule, 40)
        assert (decide(rule, first, Observations([None] * 40))[0].active == first.active) is equal
    draws = {first_state(KillReviveRule(active=3, seed=seed), 40).active for seed in range(5)}
    assert len(draws) == 5


def test_decisions_follow_warm_up_and_intervals():
    assert [step for step in range(1, 20) if is_due(step, 4, 5)] == [4, 9, 14, 19]
    assert [step for step in range(1, 12) if is_due(step, 0, 2.5)] == [3, 5, 8, 10]
    thirds = [step for step in range(1, 31) if is_due(step, 0, 0.1 * 30)]
    assert thirds == list(range(3, 31, 3))  # 0.1 x 30 is a little more than 3
    assert [step for step in range(1, 5) if is_due(step, 0, 0.3)] == [1, 2, 3, 4]
    assert KillReviveRule(interval=0.5, unit="epochs", warmup=1).in_steps(7) == (7.0, 3.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"active": 0}, "active=0 must be a whole number, at least 1"),
        ({"active": 1.5}, "active=1.5 must be a whole number"),
        ({"active": True}, "active=True must be a whole number"),
        ({"interval": 0}, "interval=0 must be a whole number, at least 1"),
        ({"interval": 0.5}, "interval=0.5 must be a whole number, at least 1; use unit='epochs'"),
        ({"interval": 0, "unit": "epochs"}, "interval=0 must be positive"),
        ({"interval": math.nan, "unit": "epochs"}, "interval=nan must be a finite number"),
        ({"warmup": -1}, "warmup=-1 must be"),
        ({"unit": "days"}, "unit='days' must be one of 'steps', 'epochs'"),
        ({"idle": "guess"}, "idle='guess' must be one of 'probe', 'last', 'random'"),
        ({"choose": "best"}, "choose='best' must be one of 'responsive', 'fixed', 'redrawn', 'top'"),
        ({"norm": "l1"}, "norm='l1' must be one of"),
        ({"margin": -0.1}, "margin=-0.1 must be"),
        ({"max_swaps": 0}, "max_swaps=0 must be a whole number, at least 1; choose='fixed' never swaps"),
        ({"decay": 0}, r"decay=0 must lie within \(0, 1\]"),
        ({"decay": 2}, r"decay=2 must lie within \(0, 1\]"),
        ({"seed": -1}, "seed=-1 must be"),
    ],
)
def test_bad_rules_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        KillReviveRule(**fields)


def test_bad_numbers_are_refused():
    rule, first = KillReviveRule(active=1), state([0], [None, None])
    with pytest.raises(ValueError, match="change has 3 entries, it must have one for each of 2 modules"):
        decide(rule, first, Observations([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match="gradient holds -1.0; entries must be norms, not negative"):
        decide(rule, first, Observations([1.0, None], [1.0, -1.0]))
    with pytest.raises(ValueError, match="change holds '1'; entries must be norms"):
        decide(rule, first, Observations(["1", None]))
    with pytest.raises(ValueError, match="scale=.* must be positive"):
        decide(rule, first, Observations([1.0, None], None, [0.0, 1.0]))
    with pytest.raises(ValueError, match="num_modules=0 must be at least 1"):
        first_state(rule, 0)
    with pytest.raises(ValueError, match="unit='epochs' needs the number of steps in an epoch; give steps_per_epoch"):
        KillReviveRule(unit="epochs").in_steps(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"active": [2], "known": [1, 2], "rates": [], "decisions": 0}',
            r"active=\(2,\) must be indices of 2",
        ),
        ('{"active": [1, 0], "known": [1, 2], "rates": [], "decisions": 0}', "must be ascending"),
        ('{"active": [], "known": [1, 2], "rates": [], "decisions": 0}', "not empty"),
        ('{"active": [0], "known": [-1, 2], "rates": [], "decisions": 0}', "known holds -1"),
        ('{"active": [0], "known": [1, 2], "rates": [], "decisions": -1}', "decisions=-1 must be"),
        (
            '{"active": "0", "known": [1, 2], "rates": [], "decisions": 0}',
            "active, known and rates must be lists",
        ),
        ('{"active": [0]}', "has the fields"),
        ("[]", "has the fields"),
    ],
)
def test_damaged_states_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        KillReviveState.from_json(text)


def test_a_decision_that_does_not_fit_is_refused():
    before = state([0], [None, None])
    with pytest.raises(ValueError, match=r"killed=\(0,\) and revived=\(\) do not lead from active=\(0,\) to \(1,\)"):
        check_decision(before, state([1], [None, None]), (0,), ())


def test_the_rule_is_numbers_alone():
    """A server that decides needs no torch: the module is loaded by its path."""
    program = (
        "import importlib.util as u, sys; path = 'd2ft_peft/dlora/kill_revive/rule.py';"
        "spec = u.spec_from_file_location('rule', path);"
        "sys.modules['rule'] = module = u.module_from_spec(spec); spec.loader.exec_module(module);"
        "module.first_state(module.KillReviveRule(), 9); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_draws_do_not_touch_numpys_global_stream():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    decide(KillReviveRule(choose="redrawn"), first_state(KillReviveRule(), 40), Observations([None] * 40))
    assert (np.random.get_state()[1] == before).all()
