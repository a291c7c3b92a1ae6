"""The operations in plain torch: the oracle, the documentation, and what runs where nothing faster can."""

from __future__ import annotations

from pyeff.reference.adamw8bit_step import adamw8bit_step
from pyeff.reference.attention import attention, attention_backward
from pyeff.reference.gram_norms import gram_norms
from pyeff.reference.linear_cross_entropy_grad import linear_cross_entropy_grad
from pyeff.reference.linear_cross_entropy_scores import linear_cross_entropy_scores
from pyeff.reference.linear_grad import linear_grad

__all__ = [
    "adamw8bit_step",
    "attention",
    "attention_backward",
    "gram_norms",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
]
