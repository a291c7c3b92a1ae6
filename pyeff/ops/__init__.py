"""The operations: functions of tensors, each with several implementations and one meaning.

Eagerly imported so that `pyeff.ops.f` is the function and not the module that defines it; a module of an operation
loads torch and nothing heavier.
"""

from __future__ import annotations

from pyeff.ops._dispatch import Operation
from pyeff.ops.attention import OPERATION as _ATTENTION
from pyeff.ops.attention import attention
from pyeff.ops.embedding_grad import OPERATION as _EMBEDDING_GRAD
from pyeff.ops.embedding_grad import EmbeddingGrad, embedding_grad
from pyeff.ops.global_norm import OPERATION as _GLOBAL_NORM
from pyeff.ops.global_norm import global_norm
from pyeff.ops.gram_norms import OPERATION as _GRAM_NORMS
from pyeff.ops.gram_norms import gram_is_cheaper, gram_norms
from pyeff.ops.linear_cross_entropy import linear_cross_entropy
from pyeff.ops.linear_cross_entropy_grad import OPERATION as _LINEAR_CROSS_ENTROPY_GRAD
from pyeff.ops.linear_cross_entropy_grad import HeadGrad, linear_cross_entropy_grad
from pyeff.ops.linear_cross_entropy_scores import OPERATION as _LINEAR_CROSS_ENTROPY_SCORES
from pyeff.ops.linear_cross_entropy_scores import TokenScores, linear_cross_entropy_scores
from pyeff.ops.linear_grad import OPERATION as _LINEAR_GRAD
from pyeff.ops.linear_grad import LinearGrad, linear_grad
from pyeff.ops.norm_layer_grad import OPERATION as _NORM_LAYER_GRAD
from pyeff.ops.norm_layer_grad import NormLayerGrad, norm_layer_grad
from pyeff.ops.optimizer_step import OPERATION as _OPTIMIZER_STEP
from pyeff.ops.optimizer_step import OptimizerRule, OptimizerStates, optimizer_step
from pyeff.ops.vector_grad import OPERATION as _VECTOR_GRAD
from pyeff.ops.vector_grad import VectorGrad, vector_grad

OPERATIONS: dict[str, Operation] = {
    "attention": _ATTENTION,
    "embedding_grad": _EMBEDDING_GRAD,
    "global_norm": _GLOBAL_NORM,
    "gram_norms": _GRAM_NORMS,
    "linear_cross_entropy_grad": _LINEAR_CROSS_ENTROPY_GRAD,
    "linear_cross_entropy_scores": _LINEAR_CROSS_ENTROPY_SCORES,
    "linear_grad": _LINEAR_GRAD,
    "optimizer_step": _OPTIMIZER_STEP,
    "norm_layer_grad": _NORM_LAYER_GRAD,
    "vector_grad": _VECTOR_GRAD,
}

__all__ = [
    "OPERATIONS",
    "EmbeddingGrad",
    "HeadGrad",
    "LinearGrad",
    "NormLayerGrad",
    "OptimizerRule",
    "OptimizerStates",
    "TokenScores",
    "VectorGrad",
    "attention",
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
    "vector_grad",
]
