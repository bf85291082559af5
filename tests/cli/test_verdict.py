"""The verdict says "worth it" only where time is saved and the loss is shown to be no worse."""

import numpy as np
import pytest

from d2ft_peft.cli.verdict import Interval, judge


FASTER, SAME, UNSURE = Interval(0.6, 0.55, 0.65), Interval(1.05, 1.01, 1.1), Interval(0.9, 0.7, 1.2)
EQUAL, WORSE, BETTER = Interval(0.0, -0.01, 0.01), Interval(0.05, 0.03, 0.07), Interval(-0.05, -0.07, -0.03)
WIDE, UNKNOWN = Interval(0.0, -0.2, 0.2), Interval(0.0, -np.inf, np.inf)


@pytest.mark.parametrize(
    ("accuracy", "answer"),
    [
        (None, "worth it"),
        (Interval(0.0, -0.01, 0.01), "worth it"),
        (Interval(-0.05, -0.08, -0.02), "not worth it"),
        (Interval(-0.05, -0.3, 0.2), "not decided"),
    ],
)
def test_an_accuracy_must_be_no_worse_either(accuracy, answer):
    verdict = judge(FASTER, EQUAL, EQUAL, 0.02, accuracy)
    assert verdict.answer == answer and ("accuracy" in verdict.because) == (answer != "worth it")


@pytest.mark.parametrize(
    ("time", "loss", "beside_fewer", "answer"),
    [
        (FASTER, EQUAL, EQUAL, "worth it"),
        (FASTER, BETTER, BETTER, "worth it"),
        (FASTER, EQUAL, None, "worth it"),
        (FASTER, WORSE, BETTER, "not worth it"),
        (FASTER, EQUAL, WORSE, "not worth it"),
        (SAME, BETTER, BETTER, "not worth it"),
        (UNSURE, EQUAL, EQUAL, "not decided"),
        (FASTER, WIDE, EQUAL, "not decided"),
        (FASTER, UNKNOWN, UNKNOWN, "not decided"),
        (UNKNOWN, EQUAL, EQUAL, "not decided"),
    ],
)
def test_the_answer_follows_from_the_intervals(time, loss, beside_fewer, answer):
    verdict = judge(time, loss, beside_fewer, tolerance=0.02)
    assert verdict.answer == answer and str(verdict).startswith(f"{answer} here, because ")
    assert verdict.because.rstrip().endswith(".")


def test_it_is_never_worth_it_where_the_loss_is_worse_or_no_time_is_saved():
    rng, worth = np.random.default_rng(0), 0
    for _ in range(2000):
        means, halves = rng.normal((0.8, 0, 0), (0.3, 0.05, 0.05)), rng.random(3) / (3, 30, 30)
        time, loss, beside = (Interval(m, m - h, m + h) for m, h in zip(means, halves, strict=True))
        if judge(time, loss, beside, 0.02).answer == "worth it":
            worth += 1
            assert time.high < 1 and loss.low <= 0 and beside.low <= 0 and loss.high <= 0.02
    assert worth > 10


def test_intervals_are_those_of_student():
    one = Interval.of([1.0, 2.0, 3.0])
    assert one.mean == 2 and one.high - one.mean == pytest.approx(4.303 / np.sqrt(3))
    assert Interval.of([1.0]).high == np.inf
    ratio = Interval.of_ratios([0.5, 2.0])
    assert ratio.mean == pytest.approx(1.0) and ratio.low == pytest.approx(1 / ratio.high)
