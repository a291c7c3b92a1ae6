# ruff: noqa: D102 (forward and backward are what torch calls them)
"""Layers that compute what torch computes and, in the backward pass, every sample's squared gradient norm.

Each takes the place of one call of torch. The weight gradient is formed once, by the operation that yields the norms
with it; the gradient of the input is the one of the layer replaced.

Memory beyond the plain layer: [S] per parameter to keep and, only while a layer runs backward, one of: the workspace of
`pyeff.ops.linear_grad`; a row [S, n] for each vector of n entries; up to five fp32 copies of the input of a norm layer;
for an embedding, WORKSPACE_BYTES of its sorted gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from pyeff.observation.recording import Use
from pyeff.ops import gram_norms, linear_grad

# Temporary tensors are cut into pieces of at most this size. Half a megabyte of fp32 per thousand rows of 128 columns
# is already past the caches; larger pieces gain nothing.
WORKSPACE_BYTES = 32 << 20


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
    # What autocast does to the arguments of a matrix product.
    if t is None or dtype is None or not t.is_floating_point() or t.dtype == torch.float64:
        return t
    return t.to(dtype)


def cast_for_autocast(t: Tensor, x: Tensor) -> Tensor:
    """What autocast makes of `t` where `x` is computed with."""
    cast = _cast(t, _autocast_dtype(x))
    assert cast is not None
    return cast


class ObservedLinear(torch.autograd.Function):
    """y = x W^T + b, or x W + b with `transposed`."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, transposed: bool, w_use: Use | None, b_use: Use | None
    ) -> Tensor:
        dtype = _autocast_dtype(x)
        x_cast, w_cast, b_cast = _cast(x, dtype), _cast(w, dtype), _cast(b, dtype)
        assert x_cast is not None
        assert w_cast is not None
        ctx.transposed, ctx.w_use, ctx.b_use = transposed, w_use, b_use
        ctx.x_dtype, ctx.b_dtype = x.dtype, None if b is None else b.dtype
        # The cast weight is made anew in the backward pass: keeping it would cost a copy of every weight.
        ctx.save_for_backward(x_cast if ctx.needs_input_grad[1] else None, w if ctx.needs_input_grad[0] else None)
        ctx.w_dtype, ctx.compute_dtype = w.dtype, w_cast.dtype
        with no_autocast(x):
            return F.linear(x_cast, w_cast.t() if transposed else w_cast, b_cast)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad_x = grad_w = grad_b = None
        with no_autocast(g):
            rows_g = g.reshape(-1, g.shape[-1])
            if ctx.needs_input_grad[0]:
                w = w.to(ctx.compute_dtype)
                grad_x = (g @ (w.t() if ctx.transposed else w)).to(ctx.x_dtype)
            if ctx.needs_input_grad[1]:
                rows_x = x.reshape(-1, x.shape[-1])
                inputs, outputs = (rows_g, rows_x) if ctx.transposed else (rows_x, rows_g)
                use = ctx.w_use
                if use is not None and use.open and not use.forward.observation.gradient:
                    use.add_norms_sq(weight_norms_sq(inputs, outputs, use.rows.borders, use.rows.pairs))
                    use.add_product(inputs, outputs)
                elif use is not None and use.open:
                    result = linear_grad(inputs, outputs, use.rows.borders)
                    assert result.norms_sq is not None
                    assert result.weight_grad is not None
                    use.add_norms_sq(result.norms_sq)
                    use.add_product(inputs, outputs)
                    grad_w = result.weight_grad.to(ctx.w_dtype)
                else:
                    grad_w = (outputs.t() @ inputs).to(ctx.w_dtype)
            if ctx.needs_input_grad[2]:
                grad_b = _sum_rows(rows_g, ctx.b_use).to(ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None


def weight_norms_sq(inputs: Tensor, grad_outputs: Tensor, borders: Tensor, pairs: int) -> Tensor:
    """Squared norms [S] of the samples' weight gradients alone, by whichever operation takes fewer FLOPs.

    `pairs` is the sum of the samples' squared token counts: `gram_norms` takes pairs (d + p), `linear_grad` 2 N d p.
    """
    (tokens, d), p = inputs.shape, grad_outputs.shape[1]
    if pairs * (d + p) < 2 * tokens * d * p:
        return gram_norms(inputs, grad_outputs, borders)
    norms_sq = linear_grad(inputs, grad_outputs, borders, weight_grad=False).norms_sq
    assert norms_sq is not None
    return norms_sq


def _sum_rows(rows: Tensor, use: Use | None) -> Tensor:
    """The sum over all rows, once each sample's own is noted."""
    if use is None or not use.open:
        return rows.sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    by_sample = use.rows.sum_by_sample(rows)
    use.add_vectors(by_sample)
    return by_sample.sum(0)


class ObservedEmbedding(torch.autograd.Function):
    """Rows of a table by index; with `samples`, one row of indices is read by that many samples."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, ids: Tensor, padding_idx: int, samples: int | None, use: Use) -> Tensor:
        ctx.use, ctx.padding_idx, ctx.w_shape, ctx.w_dtype = use, padding_idx, w.shape, w.dtype
        y = torch.embedding(w, ids, padding_idx)
        if samples is not None:
            ids = ids.reshape(1, -1).expand(samples, -1)
            y = y.reshape(1, *ids.shape[1:], -1).expand(samples, -1, -1)
        ctx.save_for_backward(ids)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        use: Use = ctx.use
        if use.open:
            rows = g.reshape(-1, g.shape[-1])
            use.add_norms_sq(_embedding_norms_sq(rows, ids.reshape(-1), use, ctx.w_shape[0], ctx.padding_idx))
            use.add_cross_term(rows, ctx.padding_idx)
        grad = torch.ops.aten.embedding_dense_backward(g.contiguous(), ids, ctx.w_shape[0], ctx.padding_idx, False)
        return grad.to(ctx.w_dtype), None, None, None, None


def _embedding_norms_sq(g: Tensor, ids: Tensor, use: Use, entries: int, padding_idx: int) -> Tensor:
    """sum over table rows v of |sum of g_t over the tokens t of the sample with id_t = v|^2, for each sample."""
    tokens, width = g.shape
    dtype = torch.promote_types(g.dtype, torch.float32)
    norms_sq = torch.zeros(use.rows.samples, dtype=dtype, device=g.device)
    if tokens == 0:
        return norms_sq
    sample = use.rows.sample_of_row()
    # Equal (sample, id) pairs become neighbours; the pairs are numbered in place of a count, which a GPU would have to
    # hand back first.
    keys, order = torch.sort(sample * entries + ids)
    pair = torch.zeros_like(keys)
    pair[1:] = (keys.diff() != 0).cumsum(0)
    sample_of_pair = torch.zeros_like(keys).scatter_(0, pair, sample[order])
    dropped = (ids[order] == padding_idx).unsqueeze(1) if padding_idx >= 0 else None
    columns = max(1, WORKSPACE_BYTES // (2 * tokens * dtype.itemsize))
    pair_norms_sq = torch.zeros(tokens, dtype=dtype, device=g.device)
    for begin in range(0, width, columns):
        piece = g[:, begin : begin + columns][order].to(dtype)
        if dropped is not None:
            piece.masked_fill_(dropped, 0.0)
        sums = torch.zeros_like(piece).index_add_(0, pair, piece)
        pair_norms_sq += sums.square().sum(1)
    return norms_sq.index_add_(0, sample_of_pair, pair_norms_sq)


class ObservedScale(torch.autograd.Function):
    """y = x * w, where w has the shape of x's last dimensions or of one entry of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, use: Use) -> Tensor:
        ctx.use = use
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad_x = (g * w).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        grad_w = _sum_rows((g * x).reshape(-1, w.numel()), ctx.use).view(w.shape).to(w.dtype)
        return grad_x, grad_w, None


class ObservedShift(torch.autograd.Function):
    """y = x + w, where w has the shape of x's last dimensions or of one entry of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, use: Use) -> Tensor:
        ctx.use, ctx.x_dtype, ctx.w_shape, ctx.w_dtype = use, x.dtype, w.shape, w.dtype
        return x + w

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grad_w = _sum_rows(g.reshape(-1, ctx.w_shape.numel()), ctx.use).view(ctx.w_shape).to(ctx.w_dtype)
        return g.to(ctx.x_dtype) if ctx.needs_input_grad[0] else None, grad_w, None


class ObservedBroadcast(torch.autograd.Function):
    """w [1, ...] repeated for each of S samples, and perhaps within them: [S, ...]."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, shape: Sequence[int], use: Use) -> Tensor:
        ctx.use, ctx.w_shape, ctx.w_dtype = use, w.shape, w.dtype
        return w.expand(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        within = [dim for dim in range(1, g.ndim) if ctx.w_shape[dim] != g.shape[dim]]
        if within:
            g = g.sum(within, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
        grad_w = _sum_rows(g.reshape(g.shape[0], -1), ctx.use).view(ctx.w_shape).to(ctx.w_dtype)
        return grad_w, None, None


class ObservedNorm(torch.autograd.Function):
    """LayerNorm (`center`) or RMSNorm over the last dimensions, with gain and offset."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor | None,
        b: Tensor | None,
        shape: tuple[int, ...],
        eps: float | None,
        center: bool,
        w_use: Use | None,
        b_use: Use | None,
    ) -> Tensor:
        ctx.shape, ctx.center, ctx.w_use, ctx.b_use = shape, center, w_use, b_use
        ctx.eps = torch.finfo(x.dtype).eps if eps is None else eps
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, w)
        if center:
            return F.layer_norm(x, shape, w, b, ctx.eps)
        return F.rms_norm(x, shape, w, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        size = 1
        for length in ctx.shape:
            size *= length
        dtype = torch.promote_types(torch.promote_types(x.dtype, g.dtype), torch.float32)
        rows_x, rows_g = x.reshape(-1, size).to(dtype), g.reshape(-1, size).to(dtype)
        with no_autocast(x):
            if ctx.center:
                centred = rows_x - rows_x.mean(1, keepdim=True)
            else:
                centred = rows_x
            inverse = (centred.square().mean(1, keepdim=True) + ctx.eps).rsqrt()
            normed = centred * inverse
            grad_x = grad_w = grad_b = None
            if ctx.needs_input_grad[0]:
                inner = rows_g if w is None else rows_g * w.reshape(1, -1)
                grad = inner - normed * (inner * normed).mean(1, keepdim=True)
                if ctx.center:
                    grad -= inner.mean(1, keepdim=True)
                grad_x = (grad * inverse).view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                grad_w = _sum_rows(normed.mul_(rows_g), ctx.w_use).view(w.shape).to(w.dtype)
            if ctx.needs_input_grad[2]:
                grad_b = _sum_rows(rows_g, ctx.b_use).view(ctx.shape).to(ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None, None, None


class no_autocast:
    """Autocast off for the device of a tensor; free where it is off already."""

    def __init__(self, t: Tensor) -> None:
        device = t.device.type
        self._context = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else None

    def __enter__(self) -> None:
        if self._context is not None:
            self._context.__enter__()

    def __exit__(self, *exception: Any) -> None:
        if self._context is not None:
            self._context.__exit__(*exception)


# Which of the tensors a layer is given may be watched parameters; what reaches it as another input is not observed.
PARAMETER_INPUTS: dict[Any, tuple[int, ...]] = {
    ObservedLinear: (1, 2),
    ObservedEmbedding: (0,),
    ObservedScale: (1,),
    ObservedShift: (1,),
    ObservedBroadcast: (0,),
    ObservedNorm: (1, 2),
}
