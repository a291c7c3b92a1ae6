"""The operations: functions of tensors, each with several implementations and one meaning.

Eagerly imported so that `pyeff.ops.f` is the function and not the module that defines it; a module of an operation
loads torch and nothing heavier.
"""

from __future__ import annotations

from pyeff.ops._dispatch import Operation
from pyeff.ops.adamw8bit_step import OPERATION as _ADAMW8BIT_STEP
from pyeff.ops.adamw8bit_step import AdamWStates, adamw8bit_step
from pyeff.ops.linear_cross_entropy_scores import OPERATION as _LINEAR_CROSS_ENTROPY_SCORES
from pyeff.ops.linear_cross_entropy_scores import TokenScores, linear_cross_entropy_scores

OPERATIONS: dict[str, Operation] = {
    "adamw8bit_step": _ADAMW8BIT_STEP,
    "linear_cross_entropy_scores": _LINEAR_CROSS_ENTROPY_SCORES,
}

__all__ = ["OPERATIONS", "AdamWStates", "TokenScores", "adamw8bit_step", "linear_cross_entropy_scores"]
