"""From scores to a subset of the pool: plain NumPy, deterministic, cheap beside any score."""

from pyeff.selection.subset import SELECTORS, Selection, hardest, round_robin, select, top_k

__all__ = ["SELECTORS", "Selection", "hardest", "round_robin", "select", "top_k"]
