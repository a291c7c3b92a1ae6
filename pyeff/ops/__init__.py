"""The operations: functions of tensors, each with several implementations and one meaning.

Eagerly imported so that `pyeff.ops.f` is the function and not the module that defines it; a module of an operation
loads torch and nothing heavier.
"""

from __future__ import annotations

from pyeff.ops._dispatch import Operation
from pyeff.ops.adamw8bit_step import OPERATION as _ADAMW8BIT_STEP
from pyeff.ops.adamw8bit_step import AdamWStates, adamw8bit_step
from pyeff.ops.attention import OPERATION as _ATTENTION
from pyeff.ops.attention import attention
from pyeff.ops.gram_norms import OPERATION as _GRAM_NORMS
from pyeff.ops.gram_norms import gram_is_cheaper, gram_norms
from pyeff.ops.linear_cross_entropy import linear_cross_entropy
from pyeff.ops.linear_cross_entropy_grad import OPERATION as _LINEAR_CROSS_ENTROPY_GRAD
from pyeff.ops.linear_cross_entropy_grad import HeadGrad, linear_cross_entropy_grad
from pyeff.ops.linear_cross_entropy_scores import OPERATION as _LINEAR_CROSS_ENTROPY_SCORES
from pyeff.ops.linear_cross_entropy_scores import TokenScores, linear_cross_entropy_scores
from pyeff.ops.linear_grad import OPERATION as _LINEAR_GRAD
from pyeff.ops.linear_grad import LinearGrad, linear_grad

OPERATIONS: dict[str, Operation] = {
    "adamw8bit_step": _ADAMW8BIT_STEP,
    "attention": _ATTENTION,
    "gram_norms": _GRAM_NORMS,
    "linear_cross_entropy_grad": _LINEAR_CROSS_ENTROPY_GRAD,
    "linear_cross_entropy_scores": _LINEAR_CROSS_ENTROPY_SCORES,
    "linear_grad": _LINEAR_GRAD,
}

__all__ = [
    "OPERATIONS",
    "AdamWStates",
    "HeadGrad",
    "LinearGrad",
    "TokenScores",
    "adamw8bit_step",
    "attention",
    "gram_is_cheaper",
    "gram_norms",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
]
