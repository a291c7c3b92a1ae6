"""The operations: functions of tensors, each with several implementations and one meaning.

A name here is the function or class, never the module of the same name that defines it. That module is loaded when the
name is first used, because registering operators with torch takes milliseconds.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pyeff._lazy import import_at_first_use
from pyeff.ops._dispatch import Operation

if TYPE_CHECKING:
    from pyeff.ops.attention import attention
    from pyeff.ops.directional_scores import directional_scores
    from pyeff.ops.embedding_grad import EmbeddingGrad, embedding_grad
    from pyeff.ops.factored_sketch import FactoredSketch
    from pyeff.ops.global_norm import global_norm
    from pyeff.ops.gram_norms import gram_is_cheaper, gram_norms
    from pyeff.ops.linear_cross_entropy import linear_cross_entropy
    from pyeff.ops.linear_cross_entropy_grad import HeadGrad, linear_cross_entropy_grad
    from pyeff.ops.linear_cross_entropy_scores import TokenScores, linear_cross_entropy_scores
    from pyeff.ops.linear_grad import LinearGrad, linear_grad
    from pyeff.ops.norm_layer_grad import NormLayerGrad, norm_layer_grad
    from pyeff.ops.optimizer_step import OptimizerRule, OptimizerStates, optimizer_step
    from pyeff.ops.sketch_grads import AdamWDirection, ParameterSketch, Sketch, sketch_grads
    from pyeff.ops.vector_grad import VectorGrad, vector_grad


class _Operations(Mapping[str, Operation]):
    """Every operation by name, loaded when it is looked up."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def __getitem__(self, name: str) -> Operation:
        if name not in self._names:
            raise KeyError(name)
        operation: Operation = importlib.import_module(f"pyeff.ops.{name}").OPERATION
        return operation

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


OPERATIONS: Mapping[str, Operation] = _Operations(
    "attention",
    "directional_scores",
    "embedding_grad",
    "global_norm",
    "gram_norms",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "norm_layer_grad",
    "optimizer_step",
    "sketch_grads",
    "vector_grad",
)

# Public name -> the module that defines it.
_HOMES = {
    "AdamWDirection": "pyeff.ops.sketch_grads",
    "EmbeddingGrad": "pyeff.ops.embedding_grad",
    "FactoredSketch": "pyeff.ops.factored_sketch",
    "HeadGrad": "pyeff.ops.linear_cross_entropy_grad",
    "LinearGrad": "pyeff.ops.linear_grad",
    "NormLayerGrad": "pyeff.ops.norm_layer_grad",
    "OptimizerRule": "pyeff.ops.optimizer_step",
    "OptimizerStates": "pyeff.ops.optimizer_step",
    "ParameterSketch": "pyeff.ops.sketch_grads",
    "Sketch": "pyeff.ops.sketch_grads",
    "TokenScores": "pyeff.ops.linear_cross_entropy_scores",
    "VectorGrad": "pyeff.ops.vector_grad",
    "attention": "pyeff.ops.attention",
    "directional_scores": "pyeff.ops.directional_scores",
    "embedding_grad": "pyeff.ops.embedding_grad",
    "global_norm": "pyeff.ops.global_norm",
    "gram_is_cheaper": "pyeff.ops.gram_norms",
    "gram_norms": "pyeff.ops.gram_norms",
    "linear_cross_entropy": "pyeff.ops.linear_cross_entropy",
    "linear_cross_entropy_grad": "pyeff.ops.linear_cross_entropy_grad",
    "linear_cross_entropy_scores": "pyeff.ops.linear_cross_entropy_scores",
    "linear_grad": "pyeff.ops.linear_grad",
    "norm_layer_grad": "pyeff.ops.norm_layer_grad",
    "optimizer_step": "pyeff.ops.optimizer_step",
    "sketch_grads": "pyeff.ops.sketch_grads",
    "vector_grad": "pyeff.ops.vector_grad",
}

__all__ = [
    "OPERATIONS",
    "AdamWDirection",
    "EmbeddingGrad",
    "FactoredSketch",
    "HeadGrad",
    "LinearGrad",
    "NormLayerGrad",
    "OptimizerRule",
    "OptimizerStates",
    "ParameterSketch",
    "Sketch",
    "TokenScores",
    "VectorGrad",
    "attention",
    "directional_scores",
    "embedding_grad",
    "global_norm",
    "gram_is_cheaper",
    "gram_norms",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "norm_layer_grad",
    "optimizer_step",
    "sketch_grads",
    "vector_grad",
]

import_at_first_use(__name__, _HOMES)
