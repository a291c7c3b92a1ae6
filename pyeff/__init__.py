"""Fused kernels and a compute governor for language-model training short of data, memory or compute.

Operations are functions of tensors, available here and in `pyeff.ops`; optimizers are in `pyeff.optim`; the governor,
which needs no torch, in `pyeff.governor`. Nothing is loaded before it is used.

>>> import pyeff
>>> print(pyeff.info().version)
0.1.0
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeff._info import Explanation, Info, explain, info
    from pyeff.errors import UserError
    from pyeff.observation import (
        GradientObservation,
        NoiseScale,
        NoiseScaleEstimate,
        UnobservableError,
        observe,
    )
    from pyeff.ops.adamw8bit_step import AdamWStates, adamw8bit_step
    from pyeff.ops.attention import attention
    from pyeff.ops.gram_norms import gram_is_cheaper, gram_norms
    from pyeff.ops.linear_cross_entropy import linear_cross_entropy
    from pyeff.ops.linear_cross_entropy_grad import HeadGrad, linear_cross_entropy_grad
    from pyeff.ops.linear_cross_entropy_scores import TokenScores, linear_cross_entropy_scores
    from pyeff.ops.linear_grad import LinearGrad, linear_grad

__version__ = "0.1.0"

# Public name -> the module that defines it. Importing pyeff must cost nothing, so each is imported at first use.
_HOME = {
    "AdamWStates": "pyeff.ops",
    "GradientObservation": "pyeff.observation",
    "HeadGrad": "pyeff.ops",
    "LinearGrad": "pyeff.ops",
    "NoiseScale": "pyeff.observation",
    "NoiseScaleEstimate": "pyeff.observation",
    "TokenScores": "pyeff.ops",
    "UnobservableError": "pyeff.observation",
    "adamw8bit_step": "pyeff.ops",
    "attention": "pyeff.ops",
    "gram_is_cheaper": "pyeff.ops",
    "gram_norms": "pyeff.ops",
    "linear_cross_entropy": "pyeff.ops",
    "linear_cross_entropy_grad": "pyeff.ops",
    "linear_cross_entropy_scores": "pyeff.ops",
    "linear_grad": "pyeff.ops",
    "observe": "pyeff.observation",
    "Explanation": "pyeff._info",
    "Info": "pyeff._info",
    "explain": "pyeff._info",
    "info": "pyeff._info",
    "UserError": "pyeff.errors",
}
_SUBPACKAGES = ("data", "governor", "observation", "ops", "optim", "reference", "scoring", "selection", "train")

__all__ = [
    "AdamWStates",
    "Explanation",
    "GradientObservation",
    "HeadGrad",
    "Info",
    "LinearGrad",
    "NoiseScale",
    "NoiseScaleEstimate",
    "TokenScores",
    "UnobservableError",
    "UserError",
    "adamw8bit_step",
    "attention",
    "explain",
    "gram_is_cheaper",
    "gram_norms",
    "info",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "observe",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBPACKAGES:
        return importlib.import_module(f"pyeff.{name}")
    raise AttributeError(f"module 'pyeff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBPACKAGES})
