"""Contribution scores of subnets."""

from .contribution import GRADIENT_SCORES, gradient_scores, weight_magnitude
from .dataset import IndexedCollator, IndexedDataset
from .table import INDEX_KEY, ScoreTable, preserved_rng, score_samples


__all__ = [
    "GRADIENT_SCORES",
    "INDEX_KEY",
    "IndexedCollator",
    "IndexedDataset",
    "ScoreTable",
    "gradient_scores",
    "preserved_rng",
    "score_samples",
    "weight_magnitude",
]
