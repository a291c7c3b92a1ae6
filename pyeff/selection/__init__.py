"""From scores to a subset of the pool: NumPy and SciPy alone, deterministic, cheap beside any score."""

from pyeff.selection.coverage import Coverage, facility_location
from pyeff.selection.groups import balanced, by_group, kmeans, kmeans_balanced, kmeans_flops, quotas
from pyeff.selection.matrix import ArrayMatrix, ScoreMatrix, Similarities, per_sample
from pyeff.selection.online import BatchChoice, colm, greats, opus
from pyeff.selection.payback import SelectionPayBack
from pyeff.selection.sampling import boltzmann, uniform
from pyeff.selection.subset import SELECTORS, Selection, hardest, select, top_k
from pyeff.selection.targets import bids, round_robin

__all__ = [
    "SELECTORS",
    "ArrayMatrix",
    "BatchChoice",
    "Coverage",
    "ScoreMatrix",
    "Selection",
    "SelectionPayBack",
    "Similarities",
    "balanced",
    "bids",
    "boltzmann",
    "by_group",
    "colm",
    "facility_location",
    "greats",
    "hardest",
    "kmeans",
    "kmeans_balanced",
    "kmeans_flops",
    "opus",
    "per_sample",
    "quotas",
    "round_robin",
    "select",
    "top_k",
    "uniform",
]
