"""Fused kernels and a compute governor for language-model training short of data, memory or compute.

Operations are functions of tensors, available here and in `pyeff.ops`; optimizers are in `pyeff.optim`; the governor,
which needs no torch, in `pyeff.governor`. Nothing is loaded before it is used.

>>> import pyeff
>>> print(pyeff.info().version)
0.1.0
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyeff._lazy import import_at_first_use

if TYPE_CHECKING:
    from pyeff._info import Explanation, Info, explain, info
    from pyeff.errors import UserError
    from pyeff.governor import Governor
    from pyeff.memory import AttentionRerunError, Checkpoints, UnsupportedMaskError, checkpoint
    from pyeff.observation import (
        GradientObservation,
        NoiseScale,
        NoiseScaleEstimate,
        UnobservableError,
        observe,
        optimizer_directions,
    )
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

__version__ = "0.1.0"

# Public name -> the module that defines it.
_HOMES = {
    "AdamWDirection": "pyeff.ops",
    "AttentionRerunError": "pyeff.memory",
    "Checkpoints": "pyeff.memory",
    "EmbeddingGrad": "pyeff.ops",
    "FactoredSketch": "pyeff.ops",
    "Governor": "pyeff.governor",
    "GradientObservation": "pyeff.observation",
    "HeadGrad": "pyeff.ops",
    "LinearGrad": "pyeff.ops",
    "NoiseScale": "pyeff.observation",
    "NoiseScaleEstimate": "pyeff.observation",
    "NormLayerGrad": "pyeff.ops",
    "OptimizerRule": "pyeff.ops",
    "OptimizerStates": "pyeff.ops",
    "ParameterSketch": "pyeff.ops",
    "Sketch": "pyeff.ops",
    "TokenScores": "pyeff.ops",
    "UnobservableError": "pyeff.observation",
    "VectorGrad": "pyeff.ops",
    "UnsupportedMaskError": "pyeff.memory",
    "attention": "pyeff.ops",
    "checkpoint": "pyeff.memory",
    "directional_scores": "pyeff.ops",
    "embedding_grad": "pyeff.ops",
    "global_norm": "pyeff.ops",
    "gram_is_cheaper": "pyeff.ops",
    "gram_norms": "pyeff.ops",
    "linear_cross_entropy": "pyeff.ops",
    "linear_cross_entropy_grad": "pyeff.ops",
    "linear_cross_entropy_scores": "pyeff.ops",
    "linear_grad": "pyeff.ops",
    "norm_layer_grad": "pyeff.ops",
    "observe": "pyeff.observation",
    "optimizer_directions": "pyeff.observation",
    "sketch_grads": "pyeff.ops",
    "vector_grad": "pyeff.ops",
    "optimizer_step": "pyeff.ops",
    "Explanation": "pyeff._info",
    "Info": "pyeff._info",
    "explain": "pyeff._info",
    "info": "pyeff._info",
    "UserError": "pyeff.errors",
}
_SUBPACKAGES = (
    "data",
    "governor",
    "integrations",
    "memory",
    "observation",
    "ops",
    "optim",
    "reference",
    "scoring",
    "selection",
    "train",
)

__all__ = [
    "AdamWDirection",
    "AttentionRerunError",
    "Checkpoints",
    "EmbeddingGrad",
    "Explanation",
    "FactoredSketch",
    "Governor",
    "GradientObservation",
    "HeadGrad",
    "Info",
    "LinearGrad",
    "NoiseScale",
    "NoiseScaleEstimate",
    "NormLayerGrad",
    "OptimizerRule",
    "OptimizerStates",
    "ParameterSketch",
    "Sketch",
    "TokenScores",
    "UnobservableError",
    "UnsupportedMaskError",
    "UserError",
    "VectorGrad",
    "attention",
    "checkpoint",
    "directional_scores",
    "embedding_grad",
    "explain",
    "global_norm",
    "gram_is_cheaper",
    "gram_norms",
    "info",
    "linear_cross_entropy",
    "linear_cross_entropy_grad",
    "linear_cross_entropy_scores",
    "linear_grad",
    "norm_layer_grad",
    "observe",
    "optimizer_directions",
    "optimizer_step",
    "sketch_grads",
    "vector_grad",
]

import_at_first_use(__name__, _HOMES, _SUBPACKAGES)
