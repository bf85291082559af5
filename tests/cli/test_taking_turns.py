"""Runs take turns, one at a time, and none notices the others."""

import random

import numpy as np
import pytest
import torch

from d2ft_peft.cli.taking_turns import Turns


def test_one_runs_at_a_time_in_turn():
    seen = []

    def run(name, count):
        def go(pause):
            for step in range(count):
                seen.append((name, step))
                pause()
            return name

        return go

    assert Turns().run([run("a", 3), run("b", 1), run("c", 2)]) == ["a", "b", "c"]
    assert seen == [("a", 0), ("b", 0), ("c", 0), ("a", 1), ("c", 1), ("a", 2)]


def test_each_draws_what_it_would_draw_alone():
    def run(seed):
        def go(pause):
            random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
            drawn = []
            for _ in range(3):
                drawn.append((random.random(), np.random.random(), torch.rand(1).item()))
                pause()
            return drawn

        return go

    alone = [run(seed)(lambda: None) for seed in (1, 2)]
    torch.manual_seed(9)
    before = torch.get_rng_state()
    assert Turns().run([run(1), run(2)]) == alone
    assert torch.equal(torch.get_rng_state(), before)


def test_an_error_ends_all_of_them():
    ended = []

    def fails(pause):
        pause()
        raise ValueError("no")

    def other(pause):
        for _ in range(100):
            pause()
        ended.append(True)

    with pytest.raises(ValueError, match="no"):
        Turns().run([other, fails])
    assert ended == []
