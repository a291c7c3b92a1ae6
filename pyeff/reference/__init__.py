"""The operations in plain torch: the oracle, the documentation, and what runs where nothing faster can."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyeff._lazy import import_at_first_use

if TYPE_CHECKING:
    from pyeff.reference.attention import attention, attention_backward
    from pyeff.reference.directional_scores import directional_scores
    from pyeff.reference.embedding_grad import embedding_grad
    from pyeff.reference.gram_norms import gram_norms
    from pyeff.reference.linear_cross_entropy_grad import linear_cross_entropy_grad
    from pyeff.reference.linear_cross_entropy_scores import linear_cross_entropy_scores
    from pyeff.reference.linear_grad import linear_grad
    from pyeff.reference.norm_layer_grad import norm_layer_grad
    from pyeff.reference.optimizer_step import global_norm, optimizer_step
    from pyeff.reference.sketch_grads import adamw_step, sketch_rows
    from pyeff.reference.vector_grad import vector_grad

# Public name -> the module that defines it.
_HOMES = {
    "adamw_step": "pyeff.reference.sketch_grads",
    "attention": "pyeff.reference.attention",
    "attention_backward": "pyeff.reference.attention",
    "directional_scores": "pyeff.reference.directional_scores",
    "embedding_grad": "pyeff.reference.embedding_grad",
    "global_norm": "pyeff.reference.optimizer_step",
    "gram_norms": "pyeff.reference.gram_norms",
    "linear_cross_entropy_grad": "pyeff.reference.linear_cross_entropy_grad",
    "linear_cross_entropy_scores": "pyeff.reference.linear_cross_entropy_scores",
    "linear_grad": "pyeff.reference.linear_grad",
    "norm_layer_grad": "pyeff.reference.norm_layer_grad",
    "optimizer_step": "pyeff.reference.optimizer_step",
    "sketch_rows": "pyeff.reference.sketch_grads",
    "vector_grad": "pyeff.reference.vector_grad",
}

__all__ = [
    "adamw_step",
    "attention",
    "attention_backward",
    "directional_scores",
    "embedding_grad",
    "global_norm",
    "gram_norms",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "norm_layer_grad",
    "optimizer_step",
    "sketch_rows",
    "vector_grad",
]

import_at_first_use(__name__, _HOMES)
