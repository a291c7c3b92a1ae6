"""How far every sample's weight gradient points along given directions: the definition.

For inputs A [N, d] and output gradients G [N, p] of packed samples, the gradient of sample s is D_s = sum_t g_t a_t^T,
and for directions Q_q [p, d]

    scores[s, q] = <D_s, Q_q> = sum over its tokens t of g_t . (Q_q a_t)
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def directional_scores(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, directions: Tensor) -> Tensor:
    """scores [S, Q], in float64 if `inputs` is, else in float32; [T, p] numbers of one sample in memory at a time."""
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    borders = cu_seqlens.tolist()
    scores = inputs.new_zeros(len(borders) - 1, directions.shape[0], dtype=dtype)
    for q, direction in enumerate(directions):
        for s, (start, end) in enumerate(pairwise(borders)):
            a, g = inputs[start:end].to(dtype), grad_outputs[start:end].to(dtype)
            scores[s, q] = (g * (a @ direction.to(dtype).T)).sum()
    return scores
