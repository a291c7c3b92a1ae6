"""Attention whose output and log-sum-exp are results of a registered operation, and whose backward takes them."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Literal, overload

import torch
from torch import Tensor

from pyeff.ops._attention_choice import OPERATION, backward_of, forward_of
from pyeff.ops._lse_gradient import Grads
from pyeff.ops._packed import check_borders, samples_of

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_GREATEST_WINDOW = 2**31 - 1

_STAND_IN: ContextVar[Callable[..., tuple[Tensor, Tensor]] | None] = ContextVar("stand_in", default=None)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[False] = ...,
    deterministic: bool = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    cu_seqlens: Tensor | None = ...,
    cu_seqlens_k: Tensor | None = ...,
    window: int | None = ...,
    softcap: float | None = ...,
    return_lse: Literal[True],
    deterministic: bool = ...,
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of heads in groups, over padded or packed samples, exact and differentiable.

        S = scale q k^T,  or softcap tanh(scale q k^T / softcap)
        lse_i = log sum_j e^(S_ij),   out_i = sum_j e^(S_ij - lse_i) v_j       over the keys j that query i sees

    Query i of T stands at position i + U - T among U keys, so the last query meets the last key: one query against a
    cache needs nothing said. If `causal` it sees the keys up to its position; with a `window`, those less than `window`
    away from it (so, causal, the last `window` keys, itself included).

    Shapes: `q` [B, T, H, D], `k` and `v` [B, U, G, D] where G divides H; query head h uses key head h // (H / G). With
    `cu_seqlens` [S+1] (int32 or int64, the samples' borders from 0 to N, never falling) samples are packed: `q`
    [N, H, D], `k` and `v` [M, G, D], whose borders are `cu_seqlens_k`, the same if left out. Any strides: tensors
    [B, H, T, D] go in as `x.transpose(1, 2)`, without a copy. One dtype among float16, bfloat16, float32 and float64;
    under autocast float32 is cast as torch's own attention casts it. `scale` is D^-1/2 if left out.

    Returns `out` like `q`, contiguous; with `return_lse` also `lse`, the natural logarithm, [B, H, T] or packed [H, N],
    float32 (float64 for float64). Both are differentiable, once. A query that sees no key has out 0, lse -inf and
    gradient 0; samples may be empty. NaN or infinity in a sample may spoil all of that sample, and no other.

    Both are outputs of `torch.ops.pyeff.attention_forward`, and `torch.ops.pyeff.attention_backward` takes them: a
    policy of selective checkpointing that keeps the one never runs it again.

    `impl`: "auto" takes the first that can run; `pyeff.explain("attention", ...)` says which, and why not the others.
    On a CPU: "cpu" (torch's flash kernel; a window or unequal lengths in blocks with a mask; no softcap), "reference"
    (plain torch, which forms all of S). On a GPU of compute capability 9: "flash_attn_3", "flash_attn_4", "cudnn",
    "triton", "flash_attn_2", "flash" (torch's), "reference"; on 8: "flash_attn_2", "flash", "triton"; on 10:
    "flash_attn_4", "cudnn", "triton", "flash_attn_2", "flash". That order is an estimate from published speeds, not
    measured yet. An explicit one runs, forward and backward, or raises `RuntimeError` with the reason. torch's and
    flash-attn's GPU kernels carry a gradient of lse in 8 more columns of a head: where these are too many, "auto" takes
    another kernel for the backward, and an explicit one raises there.

    `deterministic`, or `torch.use_deterministic_algorithms(True)`, asks for the same bits in every run on the same
    device. "cpu" and "reference" always give them, "triton" by a backward of 14 D FLOPs instead of 10, the flash-attn
    packages by one of their own; the others are not chosen. Without it, sums of dq may differ in their last bits.

    Raises `TypeError` or `ValueError` for arguments that do not fit together. Borders on a GPU are read back for that
    at their first use, which waits for the stream; borders on the CPU never do.

    Cost: 4 D FLOPs forward and 10 D backward for each query, head and key it sees; beside q, k, v, out and lse nothing
    is kept between the two.

    Dao et al. 2022, "FlashAttention", arXiv:2205.14135; Dao 2023, "FlashAttention-2", arXiv:2307.08691.

    >>> import torch, pyeff
    >>> q, k, v = (torch.randn(2, 5, heads, 32) for heads in (4, 2, 2))
    >>> out, lse = pyeff.attention(q, k, v, return_lse=True)
    >>> out.shape, lse.shape
    (torch.Size([2, 5, 4, 32]), torch.Size([2, 4, 5]))
    """
    _check(q, k, v, cu_seqlens, cu_seqlens_k)
    _check_options(causal, scale, window, softcap, impl, deterministic)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    softcap = None if softcap is None else float(softcap)
    if _in_autocast(q):
        q, k, v = _autocast(q, k, v)
    options = (cu_seqlens, cu_seqlens_k, causal, scale, window, softcap, impl, deterministic)
    out, lse = _Attention.apply(q, k, v, *options)
    return (out, lse) if return_lse else out


@contextlib.contextmanager
def forward_by(stand_in: Callable[..., tuple[Tensor, Tensor]] | None) -> Iterator[None]:
    """Let `stand_in(*arguments of FORWARD)` give out and lse to every `attention` in this thread: a checkpoint returns
    what it kept. Ignored in code that is being compiled."""
    token = _STAND_IN.set(stand_in)
    try:
        yield
    finally:
        _STAND_IN.reset(token)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float | None,
        impl: str,
        deterministic: bool,
    ) -> tuple[Tensor, Tensor]:
        options = (cu_seqlens, cu_seqlens_k, causal, scale, window, softcap, impl, deterministic)
        stand_in = None if torch.compiler.is_compiling() else _STAND_IN.get()
        out, lse = FORWARD(q, k, v, *options) if stand_in is None else stand_in(q, k, v, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cu_seqlens_k)
        ctx.options = options[2:]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens, cu_seqlens_k = ctx.saved_tensors
        if grad_out is None and grad_lse is None:
            return (None,) * 11
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        arguments = (grad_out, q, k, v, out, lse, grad_lse, cu_seqlens, cu_seqlens_k, *ctx.options)
        # Grad mode is on under create_graph alone.
        grads = _Gradients.apply(*arguments) if torch.is_grad_enabled() else BACKWARD(*arguments)
        return (*grads, *(None,) * 8)


class _Gradients(torch.autograd.Function):
    """A node in the graph of the gradients: without one, second derivatives by way of attention would be left out."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Grads:
        grads: Grads = BACKWARD(*arguments)
        return grads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        raise RuntimeError(
            "pyeff.attention has no second derivatives: take pyeff.reference.attention, which is plain torch, where "
            "they are needed"
        )


def _run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    impl: str,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    options = _options(cu_seqlens, cu_seqlens_k, causal, scale, window, softcap)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    chosen = _chosen(q, k, v, options, impl, deterministic)
    if q.numel() == 0 or k.numel() == 0:
        out, lse = _fake_forward(q, k, v, cu_seqlens, cu_seqlens_k, causal, scale, window, softcap, impl)
        return out.zero_(), lse.fill_(-math.inf)
    with torch.autocast(q.device.type, enabled=False):
        return forward_of(chosen)(q, k, v, **options)


def _run_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_lse: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    impl: str,
    deterministic: bool = False,
) -> Grads:
    options = _options(cu_seqlens, cu_seqlens_k, causal, scale, window, softcap)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    chosen = _chosen(q, k, v, options, impl, deterministic, lse_gradient=grad_lse is not None)
    if q.numel() == 0 or k.numel() == 0:
        dq, dk, dv = (t.new_zeros(t.shape) for t in (q, k, v))
        return dq, dk, dv
    with torch.autocast(q.device.type, enabled=False):
        return backward_of(chosen, deterministic)(grad_out, q, k, v, out, lse, grad_lse=grad_lse, **options)


def _options(
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> dict[str, Any]:
    return {
        "causal": causal,
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "cu_seqlens_k": cu_seqlens_k,
        "window": window,
        "softcap": softcap,
    }


def _chosen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: dict[str, Any],
    impl: str,
    deterministic: bool,
    *,
    lse_gradient: bool = False,
) -> str:
    """The implementation that runs, once the borders are known to fit: both are for eager code, never traced."""
    if options["cu_seqlens"] is not None:
        samples_of(options["cu_seqlens"], q.shape[0])
        if options["cu_seqlens_k"] is not None:
            samples_of(options["cu_seqlens_k"], k.shape[0], "cu_seqlens_k")
    how: dict[str, Any] = {"deterministic": deterministic, "lse_gradient": lse_gradient, "impl": impl}
    return OPERATION.explain(q, k, v, **options, **how).impl


def _fake_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
    impl: str,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    *batch, tokens, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((*batch, heads, tokens), dtype=lse_dtype)


def _fake_backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *args: object) -> Grads:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


_SCHEMA = (
    "Tensor? cu_seqlens, Tensor? cu_seqlens_k, bool causal, float scale, int? window, float? softcap, str impl, "
    "bool deterministic=False"
)
torch.library.define("pyeff::attention_forward", f"(Tensor q, Tensor k, Tensor v, {_SCHEMA}) -> (Tensor, Tensor)")
torch.library.define(
    "pyeff::attention_backward",
    "(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? grad_lse, "
    f"{_SCHEMA}) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::attention_forward", ("cpu", "cuda"), _run_forward)
torch.library.impl("pyeff::attention_backward", ("cpu", "cuda"), _run_backward)
torch.library.register_fake("pyeff::attention_forward", _fake_forward)
torch.library.register_fake("pyeff::attention_backward", _fake_backward)
FORWARD = torch.ops.pyeff.attention_forward.default
BACKWARD = torch.ops.pyeff.attention_backward.default


def _in_autocast(q: Tensor) -> bool:
    return q.device.type in ("cpu", "cuda") and torch.is_autocast_enabled(q.device.type)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type
    narrow = torch.get_autocast_dtype(device)
    return [t.to(narrow) if t.dtype == torch.float32 else t for t in tensors]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None) -> None:
    packed = cu_seqlens is not None
    layout = "[tokens, heads, head size] where cu_seqlens is given" if packed else "[batch, tokens, heads, head size]"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != (3 if packed else 4):
            raise ValueError(f"{name} must be {layout}, got shape {tuple(tensor.shape)}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}")
        if tensor.dtype not in _FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, and is on {tensor.device}")
    if not _in_autocast(q) and not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them")
    if k.shape != v.shape:
        raise ValueError(
            f"v must be of the shape of k, {tuple(k.shape)}, got {tuple(v.shape)}; a smaller head size can be padded "
            "with zeros and cut from the result"
        )
    if q.shape[-1] != k.shape[-1] or q.shape[-1] < 1:
        raise ValueError(f"q and k must have one head size of at least 1, got {q.shape[-1]} and {k.shape[-1]}")
    if k.shape[-2] < 1 or q.shape[-2] % k.shape[-2]:
        raise ValueError(
            f"q must have a multiple of the heads of k, got {q.shape[-2]} and {k.shape[-2]}; repeat heads of k and v "
            "or choose a number of key heads that divides"
        )
    if not packed and q.shape[0] != k.shape[0]:
        raise ValueError(f"q and k must have one batch size, got {q.shape[0]} and {k.shape[0]}")
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens_k says how keys are packed and needs cu_seqlens for the queries")
        return
    check_borders(cu_seqlens)
    if cu_seqlens_k is None:
        if q.shape[0] != k.shape[0]:
            raise ValueError(
                f"q and k must have the same tokens where cu_seqlens is of both, got {q.shape[0]} and {k.shape[0]}; "
                "give cu_seqlens_k"
            )
        return
    check_borders(cu_seqlens_k, "cu_seqlens_k")
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k must cut the keys into the {cu_seqlens.numel() - 1} samples of cu_seqlens, got "
            f"{cu_seqlens_k.numel() - 1}"
        )


def _check_options(
    causal: bool, scale: float | None, window: int | None, softcap: float | None, impl: str, deterministic: bool
) -> None:
    for name, flag in (("causal", causal), ("deterministic", deterministic)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}")
    for name, value in (("scale", scale), ("softcap", softcap)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{name} must be a number or None, got {type(value).__name__}")
        if value is not None and not 0 < value <= sys.float_info.max:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int)):
        raise TypeError(f"window must be a whole number of keys or None, got {type(window).__name__}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, the query's own key, or None for all, got {window}")
    if window is not None and window > _GREATEST_WINDOW:
        raise ValueError(f"window must be at most 2^31 - 1, or None for all keys, got {window}")
    if impl != "auto" and impl not in OPERATION.implementations:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(OPERATION.implementations)}, got {impl!r}")
