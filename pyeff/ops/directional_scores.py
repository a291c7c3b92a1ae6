"""How far every sample's weight gradient points along given directions, without that gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff.ops._dispatch import Operation, check_layout
from pyeff.ops._packed import Samples, samples_of
from pyeff.ops.linear_grad import check_inputs, float32_limits, kept_memory, reduce_panel

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# On the CPU, products of some tokens in float32, which the cache holds until they are met with the other rows.
_PANEL_BYTES = 4 << 20
# Most of a float32 copy of 16-bit rows, and tokens a product needs to be efficient.
_COPY_BYTES, _LEAST_TOKENS = 16 << 20, 128


def directional_scores(
    inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, directions: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Inner products [S, Q] of every sample's gradient of a linear layer's weight with Q directions.

        scores[s, q] = <sum_t g_t a_t^T, Q_q> = sum_t g_t . (Q_q a_t)           over the tokens t of sample s

    For first-order influence (TracIn, GREATS, OPUS): with the gradient of a target as the direction, how much a step
    along a sample's gradient lowers the target's loss. No gradient of a sample is formed, and on a GPU the products
    Q_q a_t never reach memory: they are met with g_t in registers.

    Shapes and dtypes: `inputs` [N, d] and `grad_outputs` [N, p] of one dtype among float16, bfloat16, float32 and
    float64, of any strides; `cu_seqlens` [S+1], int32 or int64 on any device, the samples' borders in the token axis,
    from 0 to N, never falling; `directions` [Q, p, d] of any of these dtypes and any strides. The result is float32
    (float64 inputs: float64, by the reference alone), and so is every sum on the way. "triton" multiplies directions in
    the dtype of `inputs`, to which they are rounded once (for float16 after a scaling by a power of two, so that none
    is too small or too large). An empty sample has scores 0. NaN or infinity in a sample stays with that sample, in a
    direction with that direction.

    AdamW's diagonal P = 1 / (sqrt(v^) + eps) folds into the direction, as <P g, Q> = <g, P Q>: hand over
    `AdamWDirection(m, v, t, frozen=True)(Q)` for scores in the optimizer's space.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (torch's product of some tokens at a time and
    one pass in C++) and "reference" (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each
    gives the same bits in every run on the same device. Not differentiable. Under `torch.compile` one operator of the
    graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together.

    Cost: 2 N d p FLOPs a direction, those of the layer's forward pass, and 2 N min(d, p) of vector arithmetic.
    `linear_grad(..., reference=Q)` takes as many FLOPs for one direction and 3 S d p of vector arithmetic, and yields
    gradient and norms too: take that where either is needed anyway. Memory beside the result: 4 MiB on the CPU (and one
    direction and 16 MiB for 16-bit inputs), 32 MiB on a GPU.

    Pruthi et al. 2020, "TracIn", arXiv:2002.08484; Wang et al. 2024, "GREATS", NeurIPS.

    >>> import torch, pyeff
    >>> inputs, grad_outputs = torch.ones(3, 2), torch.tensor([[1.0], [2.0], [5.0]])
    >>> directions = torch.tensor([[[1.0, 1.0]], [[1.0, -1.0]]])
    >>> pyeff.directional_scores(inputs, grad_outputs, torch.tensor([0, 2, 3]), directions)
    tensor([[ 6.,  0.],
            [10.,  0.]])
    """
    check_inputs(inputs, grad_outputs, cu_seqlens)
    if not isinstance(directions, Tensor):
        raise TypeError(f"directions must be a tensor, got {type(directions).__name__}")
    check_layout("directions", directions)
    if directions.dtype not in _FLOATS:
        raise TypeError(f"directions must be float16, bfloat16, float32 or float64, got {directions.dtype}")
    shape = (grad_outputs.shape[1], inputs.shape[1])
    if directions.ndim != 3 or directions.shape[1:] != shape:
        raise ValueError(f"directions must be [Q, {shape[0]}, {shape[1]}], got shape {tuple(directions.shape)}")
    if directions.device != inputs.device:
        raise ValueError(f"directions must be on the device of inputs, {inputs.device}, and is on {directions.device}")
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        return _OP(inputs, grad_outputs, cu_seqlens, directions, impl)


OPERATION = Operation("directional_scores", ("triton", "cpu", "reference"), float32_limits)


def _run(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, directions: Tensor, impl: str) -> Tensor:
    samples = samples_of(cu_seqlens, inputs.shape[0])
    chosen = OPERATION.explain(inputs, grad_outputs, cu_seqlens, directions, impl=impl).impl
    if chosen == "reference":
        return _reference.directional_scores(inputs, grad_outputs, samples.borders, directions)
    # The products are of the narrower rows.
    x, y, w = inputs, grad_outputs, directions
    if grad_outputs.shape[1] > inputs.shape[1]:
        x, y, w = grad_outputs, inputs, directions.mT
    if chosen == "cpu":
        return _on_cpu(x, y, samples, w)
    from pyeff.triton_kernels.directional_scores import directional_scores as kernels

    # The kernel reads the borders, so those already on its device are better.
    borders = cu_seqlens if x.device == cu_seqlens.device else samples.borders
    if w.dtype == x.dtype:
        return kernels(x, y, borders, w)
    if x.dtype != torch.float16 or w.numel() == 0:
        return kernels(x, y, borders, w.to(x.dtype))
    _, exponent = torch.frexp(w.abs().amax((1, 2)).float())
    scaled = torch.ldexp(w.float(), -exponent[:, None, None])  # the largest is below 1, exactly scaled
    return torch.ldexp(kernels(x, y, borders, scaled.to(x.dtype)), exponent)


def _on_cpu(x: Tensor, y: Tensor, samples: Samples, directions: Tensor) -> Tensor:
    (tokens, k), c, count = x.shape, y.shape[1], directions.shape[0]
    of_tokens = torch.zeros((count, tokens), dtype=torch.float64)
    step = max(_LEAST_TOKENS, _PANEL_BYTES // (4 * max(1, c)))
    if x.dtype != torch.float32:
        step = min(step, max(_LEAST_TOKENS, _COPY_BYTES // (4 * max(1, c + k))))
    panel = kept_memory(min(step, tokens) * c)
    for of_direction, direction in zip(of_tokens, directions, strict=True):
        w = direction.to(torch.float32).mT
        for first in range(0, tokens if c else 0, step):
            some = slice(first, first + step)
            rows = x[some].to(torch.float32)
            products = panel[: rows.shape[0] * c].view(-1, c)
            torch.mm(rows, w, out=products)
            reduce_panel(products, reference=y[some].to(torch.float32).contiguous(), dots=of_direction[some])
    if of_tokens.numel() == 0:
        return torch.zeros((len(samples.cuts) - 1, count), dtype=torch.float32)
    sums = torch.segment_reduce(of_tokens.T.contiguous(), "sum", lengths=samples.borders.diff())
    return sums.to(torch.float32)


def _fake(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, directions: Tensor, impl: str) -> Tensor:
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return inputs.new_empty((cu_seqlens.shape[0] - 1, directions.shape[0]), dtype=dtype)


torch.library.define(
    "pyeff::directional_scores",
    "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, Tensor directions, str impl) -> Tensor",
)
torch.library.impl("pyeff::directional_scores", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::directional_scores", _fake)
_OP = torch.ops.pyeff.directional_scores.default
