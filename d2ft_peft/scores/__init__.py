"""Contribution scores of subnets."""

from .contribution import GRADIENT_SCORES, gradient_scores, weight_magnitude
from .dataset import CANDIDATES_KEY, CandidateCollator, CandidateDataset, IndexedCollator, IndexedDataset, load_items
from .gather import gather_tables
from .live import LiveScores
from .outputs import IGNORED, live_score, score_outputs, shifts_labels
from .score_table import INDEX_KEY, ScoreTable, preserved_rng, score_samples
from .source import ScoreSource


__all__ = [
    "CANDIDATES_KEY",
    "GRADIENT_SCORES",
    "IGNORED",
    "INDEX_KEY",
    "CandidateCollator",
    "CandidateDataset",
    "IndexedCollator",
    "IndexedDataset",
    "LiveScores",
    "ScoreSource",
    "ScoreTable",
    "gather_tables",
    "gradient_scores",
    "live_score",
    "load_items",
    "preserved_rng",
    "score_outputs",
    "score_samples",
    "shifts_labels",
    "weight_magnitude",
]
