"""A head that is fitted before the first step: linear probing, then fine-tuning (arXiv 2202.10054)."""

from .fit import HeadStart, fit_features, fit_head
from .head_features import HeadFeatures
from .linear_fit import L2
from .linear_head import HeadStartRefused, LinearHead, find_head, looks_new


__all__ = [
    "L2",
    "HeadFeatures",
    "HeadStart",
    "HeadStartRefused",
    "LinearHead",
    "find_head",
    "fit_features",
    "fit_head",
    "looks_new",
]
