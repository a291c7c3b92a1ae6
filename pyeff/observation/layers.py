# ruff: noqa: D102 (forward and backward are what torch calls them)
"""Layers that compute what torch computes and, in the backward pass, every sample's squared gradient norm.

Each takes the place of one call of torch. The weight gradient is formed once, by the operation that yields the norms
with it; the gradient of the input is the one of the layer replaced.

Memory beyond the plain layer: [S] per parameter to keep and, only while a layer runs backward, one of: the workspace of
`pyeff.ops.linear_grad`; for a vector of n entries n fp32 numbers a sample and 64 of its rows; for an embedding 28 bytes
a token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff.observation.deferral import HeldProduct, HeldRows
from pyeff.observation.features import Noted
from pyeff.observation.recording import Use
from pyeff.ops import (
    LinearGrad,
    ParameterSketch,
    directional_scores,
    embedding_grad,
    gram_norms,
    linear_grad,
    norm_layer_grad,
    vector_grad,
)
from pyeff.ops._differentiation import differentiable_once
from pyeff.ops.vector_grad import VectorGrad

# Temporary tensors are cut into pieces of at most this size. Half a megabyte of fp32 per thousand rows of 128 columns
# is already past the caches; larger pieces gain nothing.
WORKSPACE_BYTES = 32 << 20

observed_once = differentiable_once("a layer that pyeff.observe measures", "gradients outside of it")


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
    @observed_once
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
                if use is not None and use.open:
                    grad_w = _measured_grad(inputs, outputs, use)
                    grad_w = None if grad_w is None else grad_w.to(ctx.w_dtype)
                else:
                    grad_w = (outputs.t() @ inputs).to(ctx.w_dtype)
            if ctx.needs_input_grad[2]:
                grad_b = laid_out(sum_rows(rows_g, ctx.b_use), rows_g.shape[1:], ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None


def _measured_grad(inputs: Tensor, outputs: Tensor, use: Use) -> Tensor | None:
    """outputs^T inputs, once what is wanted of the samples' shares is noted; None where only these are wanted."""
    observation = use.forward.observation
    use.hold(HeldProduct(use.rows, inputs, outputs))
    reference = sketch = factored = None
    # References and sketches are of the parameter, of which the layer may have been given the transpose.
    a, g = (outputs, inputs) if use.transposed else (inputs, outputs)
    if observation.features is not None:
        reference = observation.features.parameter_reference(use.name)
        sketch = observation.features.parameter_sketch(use.name)
        factored = observation.features.factored_sketch(use.name, a, g, use.rows.borders)
    result = measured(a, g, use.rows.borders, use.rows.pairs, use, reference, sketch)
    use.add_norms_sq(result.norms_sq)
    use.add_product(inputs, outputs)
    use.add_features(Noted(result.sketches, result.dots, factored))
    grad = result.weight_grad
    return grad.t() if grad is not None and use.transposed else grad


def measured(
    inputs: Tensor,
    grad_outputs: Tensor,
    borders: Tensor,
    pairs: int,
    use: Use,
    reference: Tensor | None,
    sketch: ParameterSketch | None,
) -> LinearGrad:
    """What the observation wants of a linear layer, by the operations that take the fewest FLOPs.

    One product, `linear_grad`, where the gradient or a sketch is wanted, or norms and dots together: Gram norms beside
    `directional_scores` take more at every length that was measured (docs/performance_notes.md). `directional_scores`
    for dots alone, and for norms alone what `weight_norms_sq` says.
    """
    observation = use.forward.observation
    gradient, norms = observation.gradient, observation.norms
    if gradient or sketch is not None or (norms and reference is not None):
        return linear_grad(
            inputs, grad_outputs, borders, weight_grad=gradient, norms=norms, reference=reference, sketch=sketch
        )
    norms_sq = weight_norms_sq(inputs, grad_outputs, borders, pairs) if norms else None
    dots = None if reference is None else directional_scores(inputs, grad_outputs, borders, reference[None])[:, 0]
    return LinearGrad(None, norms_sq, dots)


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


def sum_rows(rows: Tensor, use: Use | None, inputs: Tensor | None = None) -> Tensor | None:
    """The sum over all rows [N, n], or over rows * inputs, once each sample's own is noted: [n], fp32 or wider; None
    where it is formed later."""
    if use is None or not use.open:
        return (rows if inputs is None else rows * inputs).sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    shared = use.shared
    grad = vector_grad(rows, use.rows.borders, inputs=inputs, norms=not shared, sample_grads=shared)
    return _noted(grad, use)


def laid_out(grad: Tensor | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """A gradient in the shape and dtype of its tensor, if there is one."""
    return None if grad is None else grad.view(shape).to(dtype)


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
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        use: Use = ctx.use
        rows = g.reshape(-1, g.shape[-1])
        # Once the context is left, nothing keeps `.grad` as it was.
        wanted = use.forward.observation.gradient or not use.forward.observation.is_open
        norms = use.open and use.forward.observation.norms
        padding_idx = None if ctx.padding_idx < 0 else ctx.padding_idx
        ids, height = ids.reshape(-1), ctx.w_shape[0]
        use.hold(HeldRows(use.rows, ids, rows, height, padding_idx))
        grad_w = norms_sq = None
        if wanted or norms:
            grad = embedding_grad(
                ids, rows, use.rows.borders, height, padding_idx=padding_idx, weight_grad=wanted, norms=norms
            )
            grad_w, norms_sq = laid_out(grad.weight_grad, ctx.w_shape, ctx.w_dtype), grad.norms_sq
        if use.open:
            use.add_norms_sq(norms_sq)
            use.add_cross_term(rows, ctx.padding_idx)
            _add_row_features(use, ids, rows, ctx.padding_idx)
        return grad_w, None, None, None, None


def _add_row_features(use: Use, ids: Tensor, rows: Tensor, padding_idx: int) -> None:
    features = use.forward.observation.features
    if features is None:
        return
    if padding_idx >= 0:
        rows = rows.masked_fill((ids == padding_idx).unsqueeze(1), 0.0)
    use.add_features(features.of_rows(use.name, ids, rows, use.rows))


def _of_one_dtype(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the wider of their types, which are two where one of them was promoted."""
    dtype = torch.promote_types(x.dtype, g.dtype)
    return x.to(dtype), g.to(dtype)


class ObservedScale(torch.autograd.Function):
    """y = x * w, where w has the shape of x's last dimensions or of one entry of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, use: Use) -> Tensor:
        ctx.use = use
        ctx.x_dtype = x.dtype
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        grad_x = (g * w).to(ctx.x_dtype) if ctx.needs_input_grad[0] else None
        x, g = _of_one_dtype(x, g)
        grad_w = sum_rows(g.reshape(-1, w.numel()), ctx.use, x.reshape(-1, w.numel()))
        return grad_x, laid_out(grad_w, w.shape, w.dtype), None


class ObservedShift(torch.autograd.Function):
    """y = x + w, where w has the shape of x's last dimensions or of one entry of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, use: Use) -> Tensor:
        ctx.use, ctx.x_dtype, ctx.w_shape, ctx.w_dtype = use, x.dtype, w.shape, w.dtype
        return x + w

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        grad_w = laid_out(sum_rows(g.reshape(-1, ctx.w_shape.numel()), ctx.use), ctx.w_shape, ctx.w_dtype)
        return g.to(ctx.x_dtype) if ctx.needs_input_grad[0] else None, grad_w, None


class ObservedBroadcast(torch.autograd.Function):
    """w [1, ...] repeated for each of S samples, and perhaps within them: [S, ...]."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, shape: Sequence[int], use: Use) -> Tensor:
        ctx.use, ctx.w_shape, ctx.w_dtype = use, w.shape, w.dtype
        return w.expand(shape)

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        within = [dim for dim in range(1, g.ndim) if ctx.w_shape[dim] != g.shape[dim]]
        if within:
            g = g.sum(within, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32))
        grad_w = laid_out(sum_rows(g.reshape(g.shape[0], -1), ctx.use), ctx.w_shape, ctx.w_dtype)
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
        # torch's own default is the rounding unit of what it computes in, also for 16-bit rows.
        ctx.eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else eps
        ctx.b_dtype = None if b is None else b.dtype
        ctx.save_for_backward(x, w)
        if center:
            return F.layer_norm(x, shape, w, b, ctx.eps)
        return F.rms_norm(x, shape, w, eps)

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        uses = [use for use in (ctx.w_use, ctx.b_use) if use is not None]
        measured = [use for use in uses if use.open]
        rows_x, rows_g = _of_one_dtype(x.reshape(-1, math.prod(ctx.shape)), g.reshape(-1, math.prod(ctx.shape)))
        grad = norm_layer_grad(
            rows_x,
            rows_g,
            uses[0].rows.borders,
            eps=ctx.eps,
            weight=w,
            center=ctx.center,
            input_grad=ctx.needs_input_grad[0],
            weight_grad=ctx.needs_input_grad[1],
            bias_grad=ctx.needs_input_grad[2],
            norms=any(not use.shared for use in measured),
            sample_grads=any(use.shared for use in measured),
        )
        grad_x = None if grad.input_grad is None else grad.input_grad.view(x.shape).to(x.dtype)
        grad_w = None if grad.weight is None else laid_out(_noted(grad.weight, ctx.w_use), w.shape, w.dtype)
        grad_b = None if grad.bias is None else laid_out(_noted(grad.bias, ctx.b_use), ctx.shape, ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None, None, None


def _noted(grad: VectorGrad, use: Use | None) -> Tensor | None:
    """The gradient of a vector, once each sample's own is noted; None where it is formed later, of these."""
    if use is not None and use.open:
        use.add_vector(grad)
    return None if use is not None and use.deferred else grad.grad


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
