"""Contribution scores of subnets."""

from .contribution import GRADIENT_SCORES, gradient_scores, weight_magnitude
from .dataset import CANDIDATES_KEY, CandidateCollator, CandidateDataset, IndexedCollator, IndexedDataset, load_items
from .live import LiveScores, live_score
from .score_table import INDEX_KEY, ScoreTable, preserved_rng, score_samples
from .source import ScoreSource


__all__ = [
    "CANDIDATES_KEY",
    "GRADIENT_SCORES",
    "INDEX_KEY",
    "CandidateCollator",
    "CandidateDataset",
    "IndexedCollator",
    "IndexedDataset",
    "LiveScores",
    "ScoreSource",
    "ScoreTable",
    "gradient_scores",
    "live_score",
    "load_items",
    "preserved_rng",
    "score_samples",
    "weight_magnitude",
]
