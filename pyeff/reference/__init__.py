"""The operations in plain torch: the oracle, the documentation, and what runs where nothing faster can."""

from __future__ import annotations

from pyeff.reference.linear_cross_entropy_scores import linear_cross_entropy_scores

__all__ = ["linear_cross_entropy_scores"]
