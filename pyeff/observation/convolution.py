# ruff: noqa: D102 (forward and backward are what torch calls them)
"""Convolutions over one or two dimensions: linear layers of unfolded patches, one for each group of channels.

Memory beyond the plain layer: the unfolded patches of as many samples as fit into WORKSPACE_BYTES, at least of one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyeff.observation.deferral import HeldCall, Kept
from pyeff.observation.features import Noted
from pyeff.observation.layers import (
    PARAMETER_INPUTS,
    WORKSPACE_BYTES,
    cast_for_autocast,
    laid_out,
    no_autocast,
    observed_once,
    sum_rows,
    weight_norms_sq,
)
from pyeff.observation.recording import Use
from pyeff.ops import linear_grad


class Geometry(NamedTuple):
    """How a convolution walks over its input; one number for each dimension, groups apart."""

    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int


class ObservedConvolution(torch.autograd.Function):
    """y = conv(x, w) + b, for x [B, C, ...] with one or two dimensions after the channels."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        b: Tensor | None,
        convolve: Callable[..., Tensor],
        geometry: Geometry,
        w_use: Use | None,
        b_use: Use | None,
    ) -> Tensor:
        ctx.geometry, ctx.w_use, ctx.b_use = geometry, w_use, b_use
        ctx.x_dtype, ctx.w_dtype, ctx.b_dtype = x.dtype, w.dtype, None if b is None else b.dtype
        x_cast, w_cast = cast_for_autocast(x, x), cast_for_autocast(w, x)
        b_cast = None if b is None else cast_for_autocast(b, x)
        ctx.save_for_backward(x_cast, w_cast)
        with no_autocast(x):
            return convolve(x_cast, w_cast, b_cast, *geometry)

    @staticmethod
    @observed_once
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        stride, padding, dilation, groups = geometry = ctx.geometry
        grad_x = grad_w = grad_b = None
        with no_autocast(g):
            measured = ctx.w_use is not None and ctx.w_use.open and ctx.needs_input_grad[1]
            mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[1] and not measured, False]
            if any(mask):
                grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
                    g, x, w, None, stride, padding, dilation, False, [0] * len(stride), groups, mask
                )
                grad_x = grad_x.to(ctx.x_dtype) if mask[0] else None
                grad_w = grad_w.to(ctx.w_dtype) if mask[1] else None
            if measured:
                ctx.w_use.hold(
                    HeldCall(ctx.w_use.rows, (x, g), functools.partial(_plain_grad, x, g, w.shape, geometry))
                )
                grad_w = _weight_grad(x, g, w.shape, geometry, ctx.w_use)
                grad_w = None if grad_w is None else grad_w.to(ctx.w_dtype)
            if ctx.needs_input_grad[2]:
                sums = g.flatten(2).sum(2, dtype=torch.promote_types(g.dtype, torch.float32))
                grad_b = laid_out(sum_rows(sums, ctx.b_use), sums.shape[1:], ctx.b_dtype)
        return grad_x, grad_w, grad_b, None, None, None, None


PARAMETER_INPUTS[ObservedConvolution] = (1, 2)


def _plain_grad(x: Tensor, g: Tensor, shape: torch.Size, geometry: Geometry, kept: Kept) -> Tensor:
    """The gradient of the weight from some images alone."""
    stride, padding, dilation, groups = geometry
    weight = x.new_empty(1).expand(shape)  # of which the shape is asked, and nothing else
    _, grad, _ = torch.ops.aten.convolution_backward(
        kept.scaled(g),
        kept.rows(x),
        weight,
        None,
        stride,
        padding,
        dilation,
        False,
        [0] * len(stride),
        groups,
        [False, True, False],
    )
    return grad


def _weight_grad(x: Tensor, g: Tensor, shape: torch.Size, geometry: Geometry, use: Use) -> Tensor | None:
    """The gradient of the weight, once its samples' norms are noted; None where only these are wanted."""
    stride, padding, dilation, groups = geometry
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.ndim == 3:  # one dimension is two, of which the first has length 1
        x, g, shape = x.unsqueeze(2), g.unsqueeze(2), torch.Size((*shape[:2], 1, shape[2]))
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    positions = g.shape[2] * g.shape[3]
    outputs, patch = shape[0] // groups, shape[1] * shape[2] * shape[3]
    cuts = [0, *(span.stop for span in use.rows.spans())]  # images by sample
    grad = torch.zeros(groups, outputs, patch, dtype=dtype, device=x.device)
    norms_sq = torch.zeros(use.rows.samples, dtype=dtype, device=x.device)
    most = WORKSPACE_BYTES // max(1, positions * patch * groups * dtype.itemsize)  # images
    observation = use.forward.observation
    features = observation.features
    if features is None and not observation.norms:
        use.add_norms_sq(None)
        return None
    parts: list[Noted] = []
    begin = 0
    while begin < use.rows.samples:
        end = begin + 1
        while end < use.rows.samples and cuts[end + 1] - cuts[begin] <= most:
            end += 1
        images = slice(cuts[begin], cuts[end])
        unfolded = F.unfold(x[images].to(dtype), tuple(shape[2:]), tuple(dilation), tuple(padding), tuple(stride))
        sample_grads = []
        borders = (torch.tensor(cuts[begin : end + 1]) - cuts[begin]) * positions
        for group in range(groups):
            inputs = unfolded[:, group * patch : (group + 1) * patch].transpose(1, 2).reshape(-1, patch)
            of_group = g[images, group * outputs : (group + 1) * outputs].to(dtype)
            grads = of_group.flatten(2).transpose(1, 2).reshape(-1, outputs)
            if features is not None:
                # The cells of a sketch are not the groups of a convolution: form the samples' gradients.
                spans = itertools.pairwise(borders.tolist())
                of_samples = torch.stack([grads[i:j].T @ inputs[i:j] for i, j in spans])
                sample_grads.append(of_samples)
                if observation.gradient:
                    grad[group] += of_samples.sum(0)
                norms_sq[begin:end] += of_samples.square().sum((1, 2))
                continue
            if not observation.gradient:
                pairs = int(borders.diff().square().sum())
                norms_sq[begin:end] += weight_norms_sq(inputs, grads, borders, pairs)
                continue
            result = linear_grad(inputs, grads, borders)
            assert result.weight_grad is not None
            assert result.norms_sq is not None
            grad[group] += result.weight_grad
            norms_sq[begin:end] += result.norms_sq
        if features is not None:
            parts.append(features.of_sample_grads(use.name, torch.stack(sample_grads, 1)))
        begin = end
    use.add_norms_sq(norms_sq if observation.norms else None)
    kinds = zip(*parts, strict=True) if parts else ((), (), ())
    use.add_features(Noted(*(torch.cat(kind) if kind and kind[0] is not None else None for kind in kinds)))
    if not observation.gradient:
        return None
    return grad.view(shape).squeeze(2) if len(geometry.stride) == 1 else grad.view(shape)


def geometry_of(w: Tensor, stride: Any, padding: Any, dilation: Any, groups: int) -> Geometry | None:
    """The numbers for each dimension; None where the padding is not the same on both sides."""
    spatial = w.ndim - 2

    def each(value: int | Sequence[int]) -> list[int]:
        values = [value] if isinstance(value, int) else list(value)
        return values * spatial if len(values) == 1 else values

    stride, dilation = each(stride), each(dilation)
    if padding == "valid":
        padding = 0
    elif padding == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, w.shape[2:], strict=True)]
        if any(total % 2 for total in totals):
            return None
        padding = [total // 2 for total in totals]
    return Geometry(stride, each(padding), dilation, groups)
