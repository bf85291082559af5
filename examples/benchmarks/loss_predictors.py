"""Guesses of a sample's loss from features and label, learnt while a model trains on some of the samples.

Shape suffixes: N samples.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


FORGET = 0.95
"""What a step's samples weigh in the predictions, relative to those of the next step."""


class Ridge:
    """Regression of the loss on features and label, older steps forgotten."""

    def __init__(self, width: int, classes: int, strength: float = 1.0):
        self.classes, self.floor = classes, strength * torch.eye(width + classes)
        self.gram, self.moment = self.floor.clone(), torch.zeros(width + classes)

    def _inputs(self, features: Tensor, labels: Tensor) -> Tensor:
        # The label's column is the constant of its class.
        return torch.cat([features, F.one_hot(labels, self.classes).float()], 1)

    def predict(self, features: Tensor, labels: Tensor) -> Tensor:
        return self._inputs(features, labels) @ torch.linalg.solve(self.gram, self.moment)

    def learn(self, features: Tensor, labels: Tensor, losses: Tensor) -> None:
        x = self._inputs(features, labels)
        self.gram = FORGET * self.gram + (1 - FORGET) * self.floor + x.T @ x
        self.moment = FORGET * self.moment + x.T @ losses


class Probe:
    """Logistic regression from features to labels; the prediction is its own loss."""

    def __init__(self, width: int, classes: int, strength: float = 1e-2):
        self.linear, self.strength = nn.Linear(width, classes), strength
        nn.init.zeros_(self.linear.weight)
        self.features, self.labels, self.weights = torch.empty(0, width), torch.empty(0).long(), torch.empty(0)

    @torch.no_grad()
    def predict(self, features: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.linear(features), labels, reduction="none")

    def learn(self, features: Tensor, labels: Tensor, losses: Tensor) -> None:
        self.features, self.labels = torch.cat([self.features, features]), torch.cat([self.labels, labels])
        self.weights = torch.cat([FORGET * self.weights, torch.ones(len(labels))])
        optimizer = torch.optim.LBFGS(self.linear.parameters(), max_iter=10, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            each = F.cross_entropy(self.linear(self.features), self.labels, reduction="none")
            value = (each * self.weights).sum() / self.weights.sum() + self.strength * self.linear.weight.square().sum()
            value.backward()
            return value

        optimizer.step(loss)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, without ties."""
    ranks = torch.stack([a.argsort().argsort(), b.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])
