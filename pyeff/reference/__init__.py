"""The operations in plain torch: the oracle, the documentation, and what runs where nothing faster can."""

from __future__ import annotations

from pyeff.reference.attention import attention, attention_backward
from pyeff.reference.embedding_grad import embedding_grad
from pyeff.reference.gram_norms import gram_norms
from pyeff.reference.linear_cross_entropy_grad import linear_cross_entropy_grad
from pyeff.reference.linear_cross_entropy_scores import linear_cross_entropy_scores
from pyeff.reference.linear_grad import linear_grad
from pyeff.reference.norm_layer_grad import norm_layer_grad
from pyeff.reference.optimizer_step import global_norm, optimizer_step
from pyeff.reference.vector_grad import vector_grad

__all__ = [
    "attention",
    "attention_backward",
    "embedding_grad",
    "global_norm",
    "gram_norms",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "norm_layer_grad",
    "optimizer_step",
    "vector_grad",
]
