"""Which implementation of attention runs: the order in which they are tried, what each refuses, and what it is."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff.ops import _cpu_attention, _gpu_attention
from pyeff.ops._dispatch import Operation, environment_problem
from pyeff.ops._lse_gradient import Grads

_GREATEST_HEAD_SIZE = 256

# What `auto` tries, by the major compute capability of the GPU: an estimate from published speeds until this project
# has measured them.
_ORDER = {
    8: ("flash_attn_2", "flash", "triton", "reference"),
    9: ("flash_attn_3", "flash_attn_4", "cudnn", "triton", "flash_attn_2", "flash", "reference"),
    10: ("flash_attn_4", "cudnn", "triton", "flash_attn_2", "flash", "reference"),
}
_ORDER_ELSEWHERE = ("flash_attn_2", "flash", "cudnn", "triton", "reference")


def forward_of(impl: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """What computes out and lse."""
    if impl == "triton":
        from pyeff.triton_kernels.attention import attention as kernel

        return kernel
    if impl in _gpu_attention.IMPLEMENTATIONS:
        return functools.partial(_gpu_attention.forward, impl)
    return _cpu_attention.forward if impl == "cpu" else _reference.attention


def backward_of(impl: str, deterministic: bool) -> Callable[..., Grads]:
    """What computes the gradients."""
    if impl == "triton":
        from pyeff.triton_kernels.attention_backward import attention_backward as kernel

        return functools.partial(kernel, deterministic=deterministic)
    if impl in _gpu_attention.IMPLEMENTATIONS:
        return functools.partial(_gpu_attention.backward, impl, deterministic=deterministic)
    return _cpu_attention.backward if impl == "cpu" else _reference.attention_backward


def _environment(impl: str, device: str) -> str | None:
    if impl in _gpu_attention.IMPLEMENTATIONS:
        problem = None if device == "cuda" else f"it runs on CUDA tensors, and these are on {device}"
        return problem or _gpu_attention.problem(impl)
    if impl == "cpu":
        # torch's own kernel: the extension need not have been built.
        return None if device == "cpu" else f"it runs on CPU tensors, and these are on {device}"
    return environment_problem(impl, device)


def _limits(
    impl: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    cu_seqlens: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    lse_gradient: bool = False,
    **others: object,
) -> str | None:
    if impl == "reference":
        return None
    if q.dtype == torch.float64:
        return "it computes in float32, and q is float64"
    if impl == "cpu":
        return None if softcap is None else "torch's CPU kernel has no softcap"
    if impl in _gpu_attention.IMPLEMENTATIONS:
        packed = cu_seqlens is not None
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        return _gpu_attention.limits(
            impl,
            q,
            k,
            causal=causal,
            packed=packed,
            window=window,
            softcap=softcap,
            deterministic=deterministic,
            lse_gradient=lse_gradient,
        )
    if q.shape[-1] > _GREATEST_HEAD_SIZE:
        return f"it takes head sizes up to {_GREATEST_HEAD_SIZE}, and q has {q.shape[-1]}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if q.dtype == torch.bfloat16 and not q.is_cuda:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


def _order(q: Tensor, *args: object, **kwargs: object) -> tuple[str, ...]:
    if not q.is_cuda:
        return ("cpu", "reference")
    return _ORDER.get(torch.cuda.get_device_capability(q.device)[0], _ORDER_ELSEWHERE)


OPERATION = Operation("attention", (*_ORDER[9][:-1], "cpu", "reference"), _limits, _environment, _order)
