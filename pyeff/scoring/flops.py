"""FLOPs of one batch of any module, by torch's counter, which is told what the operations here multiply."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import pyeff.ops  # noqa: F401  (registers the operations below)


def _linear_grad(inputs: Tensor, grad_outputs: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * inputs.shape[0] * inputs.shape[1] * grad_outputs.shape[1]


def _gram_norms(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> int:
    pairs = sum((end - begin) ** 2 for begin, end in pairwise(cu_seqlens.tolist()))
    return pairs * (inputs.shape[1] + grad_outputs.shape[1])


def weight_norms_flops(lengths: Sequence[int], d: int, p: int) -> int:
    """FLOPs of the norms of a d -> p layer's gradients for samples of these many tokens, by the cheaper operation."""
    return min(sum(length**2 for length in lengths) * (d + p), 2 * sum(lengths) * d * p)


def _head_grad(hidden: Tensor, weight: Tensor, targets: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> int:
    hidden_grad, weight_grad, norms = args[6:9]
    product = _scores(hidden, weight)
    total = product * (1 + hidden_grad + weight_grad)  # the first of them forms the softmax again
    if norms and not weight_grad:
        total += weight_norms_flops(cu_seqlens.diff().tolist(), weight.shape[1], weight.shape[0])
    return total


def _scores(hidden: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> int:
    return 2 * hidden.shape[0] * weight.numel()


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    batch, heads, rows, width = query.shape
    return 2 * batch * heads * rows * key.shape[2] * (width + value.shape[3])


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> int:
    # Four products for two; what is multiplied once more to save memory is not counted, as in pyeff.governor.
    return 2 * _attention(query, key, value)


def flop_counter() -> Any:
    """A `torch.utils.flop_counter.FlopCounterMode` that knows pyeff's operations and torch's attention on the CPU."""
    from torch.utils.flop_counter import FlopCounterMode

    formulas = {
        torch.ops.pyeff.linear_grad: _linear_grad,
        torch.ops.pyeff.linear_grad_sketches: _linear_grad,
        torch.ops.pyeff.gram_norms: _gram_norms,
        torch.ops.pyeff.linear_cross_entropy_grad: _head_grad,
        torch.ops.pyeff.linear_cross_entropy_scores: _scores,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    for formula in formulas.values():
        formula._get_raw = True  # type: ignore[attr-defined]  # tensors instead of their shapes
    return FlopCounterMode(display=False, custom_mapping=formulas)
