"""How torch's and flash-attn's GPU kernels of attention are called: (q, k, v, call) to (out, lse), and back."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._lse_gradient import Grads

_ATEN = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """What GPU kernels are told beside the tensors; a window of -1 is none."""

    causal: bool
    scale: float
    softcap: float
    left: int
    right: int
    cu_q: Tensor | None
    cu_k: Tensor | None
    longest_q: int
    longest_k: int
    deterministic: bool = False


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    borders = (call.cu_q, call.cu_k, call.longest_q, call.longest_k)
    window = {"window_size_left": call.left, "window_size_right": call.right}
    out, lse, *_ = _ATEN._flash_attention_forward(
        q, k, v, *borders, 0.0, call.causal, False, scale=call.scale, **window
    )
    return out, lse


def _flash_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> Grads:
    borders = (call.cu_q, call.cu_k, call.longest_q, call.longest_k)
    window = {"window_size_left": call.left, "window_size_right": call.right}
    # What a dropout would have drawn from.
    state = (torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device))
    return _ATEN._flash_attention_backward(
        grad_out, q, k, v, out, lse, *borders, 0.0, call.causal, *state, scale=call.scale, **window
    )


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    out, lse, *_ = _ATEN._scaled_dot_product_cudnn_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), None, True, 0.0, call.causal, False, scale=call.scale
    )
    return out.transpose(1, 2), lse.view(out.shape[:3])


def _cudnn_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call) -> Grads:
    tensors = (t.transpose(1, 2) for t in (grad_out, q, k, v, out))
    state = [torch.zeros((), dtype=torch.int64, device=q.device) for _ in range(2)]
    borders = (None, None, call.longest_q, call.longest_k)
    dq, dk, dv = _ATEN._scaled_dot_product_cudnn_attention_backward(
        *tensors, lse[..., None], *state, None, *borders, 0.0, call.causal, scale=call.scale
    )
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


# Where flash-attn keeps what its public functions call; those return no lse that can be differentiated.
MODULES = {
    "flash_attn_2": "flash_attn.flash_attn_interface",
    "flash_attn_3": "flash_attn_interface",
    "flash_attn_4": "flash_attn.cute.interface",
}


def _module(impl: str) -> Any:
    return importlib.import_module(MODULES[impl])


def _flash_attn_2_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    module, options = _module("flash_attn_2"), _flash_attn_2_options(call)
    run = module._flash_attn_forward if call.cu_q is None else module._flash_attn_varlen_forward
    out, lse, *_ = run(q, k, v, **options, return_softmax=False)
    return out, lse


def _flash_attn_2_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    module, options = _module("flash_attn_2"), _flash_attn_2_options(call)
    run = module._flash_attn_backward if call.cu_q is None else module._flash_attn_varlen_backward
    dq, dk, dv = _empty_like(q, k, v)
    run(grad_out, q, k, v, out, lse, dq, dk, dv, **options, deterministic=call.deterministic)
    return dq, dk, dv


def _flash_attn_2_options(call: Call) -> dict[str, Any]:
    options: dict[str, Any] = {
        "dropout_p": 0.0,
        "softmax_scale": call.scale,
        "causal": call.causal,
        "window_size_left": call.left,
        "window_size_right": call.right,
        "softcap": call.softcap,
        "alibi_slopes": None,
    }
    return options | _borders(call)


def _flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal, "softcap": call.softcap}
    options |= {"window_size_left": call.left, "window_size_right": call.right}
    out, lse, *_ = _module("flash_attn_3")._flash_attn_forward(q, k, v, **options, **_borders(call))
    return out, lse


def _flash_attn_3_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    dq, dk, dv = _empty_like(q, k, v)
    options: dict[str, Any] = {"softmax_scale": call.scale, "is_causal": call.causal, "softcap": call.softcap}
    options |= {"window_size_left": call.left, "window_size_right": call.right, "deterministic": call.deterministic}
    _module("flash_attn_3")._flash_attn_backward(
        grad_out, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, **options, **_borders(call)
    )
    return dq, dk, dv


def _flash_attn_4_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    return _module("flash_attn_4")._flash_attn_fwd(q, k, v, **_flash_attn_4_options(call), return_lse=True)[:2]


def _flash_attn_4_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> Grads:
    options = _flash_attn_4_options(call) | {"deterministic": call.deterministic}
    return _module("flash_attn_4")._flash_attn_bwd(q, k, v, out, grad_out, lse, **options)[:3]


def _flash_attn_4_options(call: Call) -> dict[str, Any]:
    windowed = call.left >= 0
    return {
        "softmax_scale": call.scale,
        "causal": call.causal and not windowed,
        "softcap": call.softcap,
        "window_size_left": call.left if windowed else None,
        "window_size_right": call.right if windowed else None,
        **_borders(call),
    }


def _borders(call: Call) -> dict[str, Any]:
    if call.cu_q is None:
        return {}
    return {
        "cu_seqlens_q": call.cu_q,
        "cu_seqlens_k": call.cu_k,
        "max_seqlen_q": call.longest_q,
        "max_seqlen_k": call.longest_k,
    }


def _empty_like(*tensors: Tensor) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in tensors]


FORWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Call], tuple[Tensor, Tensor]]] = {
    "flash": _flash_forward,
    "cudnn": _cudnn_forward,
    "flash_attn_2": _flash_attn_2_forward,
    "flash_attn_3": _flash_attn_3_forward,
    "flash_attn_4": _flash_attn_4_forward,
}
BACKWARD: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Call], Grads]] = {
    "flash": _flash_backward,
    "cudnn": _cudnn_backward,
    "flash_attn_2": _flash_attn_2_backward,
    "flash_attn_3": _flash_attn_3_backward,
    "flash_attn_4": _flash_attn_4_backward,
}
