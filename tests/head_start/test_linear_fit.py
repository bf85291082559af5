"""The linear fit against scikit-learn and closed forms, and on data as it comes."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.preprocessing import StandardScaler

from d2ft_peft.head_start import HeadStartRefused, linear_fit
from d2ft_peft.head_start.linear_fit import fit_linear


CLASSES, SEVERAL, NUMBERS = "single_label_classification", "multi_label_classification", "regression"


def data(n=90, d=6, classes=3, seed=0):
    """Features of very different scales, and classes that they tell apart in part."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g, dtype=torch.float64)
    y = (x @ torch.randn(d, classes, generator=g, dtype=torch.float64) + torch.randn(n, classes, generator=g)).argmax(1)
    return x * torch.logspace(-3, 2, d).double() + 5, y


def new(classes, d, bias=True):
    return torch.zeros(classes, d).double(), torch.zeros(classes).double() if bias else None


def fit(x, y, problem=CLASSES, outputs=3, bias=True, blocks=(50, 30, 10), **kwargs):
    return fit_linear(list(x.clone().split(list(blocks))), y, problem, *new(outputs, x.shape[1], bias), **kwargs)


@pytest.fixture
def to_the_end(monkeypatch):
    monkeypatch.setattr(linear_fit, "ITERATIONS", 500)


def test_classes_are_fitted_as_by_scikit_learn_on_standardised_features(to_the_end):
    x, y = data()
    ours = fit(x, y, l2=0.01)
    scaler = StandardScaler().fit(x)
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000).fit(scaler.transform(x), y)
    logits = x @ ours.weight.mT + ours.bias
    expected = torch.tensor(theirs.decision_function(scaler.transform(x)))
    torch.testing.assert_close(logits.log_softmax(1), expected.log_softmax(1), rtol=1e-4, atol=1e-4)
    assert ours.accuracy == pytest.approx(theirs.score(scaler.transform(x), y))
    assert ours.loss == pytest.approx(torch.nn.functional.cross_entropy(logits, y).item())
    assert ours.loss_before == pytest.approx(np.log(3))


def test_without_a_bias_features_are_scaled_and_not_centred(to_the_end):
    x, y = data()
    ours = fit(x, y, bias=False, l2=0.01)
    scale = x.square().mean(0).sqrt()
    theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000, fit_intercept=False).fit(x / scale, y)
    expected = torch.tensor(theirs.decision_function(x / scale)).log_softmax(1)
    torch.testing.assert_close((x @ ours.weight.mT).log_softmax(1), expected, rtol=1e-4, atol=1e-4)
    assert ours.bias is None


def test_numbers_are_fitted_by_ridge_regression(to_the_end):
    x, _ = data()
    y = torch.stack([x[:, 0] * 300, x[:, 5] / 7 + 3], 1)
    ours = fit(x, y, NUMBERS, 2, l2=0.02)
    scaled = StandardScaler().fit_transform(x)
    expected = Ridge(alpha=0.01 * len(x)).fit(scaled, y).predict(scaled)
    torch.testing.assert_close(x @ ours.weight.mT + ours.bias, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert ours.accuracy is None


def test_several_labels_are_as_many_fits_of_one(to_the_end):
    x, _ = data()
    y = torch.stack([x[:, 0] > x[:, 0].mean(), x[:, 1] + x[:, 2] > 10], 1).double()
    ours = fit(x, y, SEVERAL, 2, l2=0.01)
    scaled = StandardScaler().fit_transform(x)
    for label in range(2):
        theirs = LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-10, max_iter=5000).fit(scaled, y[:, label])
        expected = torch.tensor(theirs.decision_function(scaled))
        found = x @ ours.weight[label] + ours.bias[label]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert 0.9 < ours.accuracy <= 1


def test_blocks_and_chunks_of_any_size_give_the_same(monkeypatch):
    x, y = data()
    whole = fit(x, y, blocks=(90,))
    monkeypatch.setattr(linear_fit, "_LOGITS", 7 * 3)
    parts = fit(x, y, blocks=(41, 48, 1))
    torch.testing.assert_close(whole.weight, parts.weight, rtol=1e-5, atol=1e-8)


def test_thousands_of_classes_of_which_most_have_no_sample_keep_their_rows():
    x, y = data(classes=3)
    weight, bias = torch.randn(5000, 6).double(), torch.zeros(5000).double()
    ours = fit_linear([x.clone()], y * 1700, CLASSES, weight, bias)
    others = torch.ones(5000, dtype=torch.bool).index_fill(0, torch.tensor([0, 1700, 3400]), False)
    assert torch.equal(ours.weight[others], weight[others]) and not ours.bias[others].any()
    few = fit(x, y)
    torch.testing.assert_close(ours.weight[[0, 1700, 3400]], few.weight)
    assert ours.accuracy == few.accuracy


@pytest.mark.parametrize("bias", [True, False])
def test_a_constant_feature_does_no_harm(bias):
    x, y = data()
    for value in (0.0, 0.1):
        wider = torch.cat([x, torch.full((len(x), 1), value)], 1).float()
        ours = fit(wider, y, bias=bias, l2=0.1)
        assert ours.weight.isfinite().all()
        if bias:
            assert not ours.weight[:, -1].any()
            torch.testing.assert_close(ours.weight[:, :-1], fit(x.float(), y, l2=0.1).weight, rtol=1e-2, atol=1e-3)


def test_features_that_are_no_numbers_are_named():
    x, y = data()
    x[3, 2] = float("inf")
    with pytest.raises(ValueError, match="features of the head are infinite or undefined"):
        fit(x, y)


def test_labels_that_cannot_be_are_named():
    x, y = data()
    with pytest.raises(ValueError, match=r"labels=\[3\] must lie in \[0, 3\)"):
        fit(x, y.index_fill(0, torch.tensor([4]), 3))
    with pytest.raises(HeadStartRefused, match="all samples have the same class"):
        fit(x, torch.zeros_like(y))
    with pytest.raises(ValueError, match="labels are infinite or undefined"):
        fit(x, torch.full((90, 1), float("nan")), NUMBERS, 1)
