"""Norms of every sample's gradient of a linear layer's weight, without that gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from pyeff import reference
from pyeff.ops._dispatch import Operation
from pyeff.ops._packed import Samples, samples_of
from pyeff.ops.linear_grad import check_inputs, float32_limits, kept_memory, reduce_panel

# On the CPU, tiles of the two Gram matrices hold at most so many rows and take this much memory together, which the
# cache keeps until they are multiplied. Small tiles spare the half below the diagonal: two cores of a Zen 5 server,
# d = 576, p = 1536, T = 512: 28 ms at 128 rows, 31 at 256, 41 at 512; four times the memory changes nothing.
_TILE_ROWS, _TILES_BYTES = 128, 4 << 20
# Columns of 16-bit rows that are copied to float32 at a time, and most of the copies.
_COPY_COLUMNS, _COPY_BYTES = 2048, 16 << 20


def gram_norms(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, *, impl: str = "auto") -> Tensor:
    """Squared norms [S] of every sample's gradient of a linear layer's weight, from the Gram matrices of its tokens.

        norms_sq = || sum_t g_t a_t^T ||_F^2 = sum_{t, u} (a_t . a_u) (g_t . g_u)     over the tokens of each sample

    For scoring passes, which need no weight gradient. Neither the gradient nor a Gram matrix is stored: beside inputs
    and outputs at most 32 MiB of memory are used on the CPU, and on a GPU T^2 / 8192 bytes for a sample of T tokens, or
    T^2 / 2048 where samples are short.

    Shapes and dtypes: `inputs` [N, d] and `grad_outputs` [N, p] of one dtype among float16, bfloat16, float32 and
    float64, of any strides; `cu_seqlens` [S+1], int32 or int64 on any device, the samples' borders in the token axis,
    from 0 to N, never falling. The result is float32 (float64 inputs: float64, by the reference alone), and so is every
    sum on the way. An empty sample has norm 0. NaN or infinity in a sample makes that sample's norm alone
    NaN or infinite: mostly NaN, because sums of products of both signs meet, where `linear_grad` has infinity.

    Where a sample's token gradients cancel, its small norm is a difference of large sums, with the relative error of a
    float32 rounding times how much larger they are (and not below 0): `linear_grad` has no such loss.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (torch's matmul and one pass in C++) and
    "reference" (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits
    in every run on the same device. Not differentiable. Under `torch.compile` one operator of the graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together.
    Borders on a GPU are read back for that
    at their first use, which waits for the stream; borders on the CPU never do.

    Cost: T^2 (d + p) FLOPs for a sample of T tokens; `linear_grad` takes 2 T d p. See `gram_is_cheaper`.

    Goodfellow 2015, arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679.

    >>> import torch, pyeff
    >>> inputs, grad_outputs = torch.ones(3, 2), torch.tensor([[1.0], [2.0], [5.0]])
    >>> pyeff.gram_norms(inputs, grad_outputs, torch.tensor([0, 2, 3]))
    tensor([18., 50.])
    """
    check_inputs(inputs, grad_outputs, cu_seqlens)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        return _OP(inputs, grad_outputs, cu_seqlens, impl)


def gram_is_cheaper(tokens: int, d: int, p: int) -> bool:
    """Whether `gram_norms` takes fewer FLOPs than `linear_grad` for samples of `tokens` tokens of a layer d -> p.

        T^2 (d + p) < 2 T d p,  that is  T < 2 d p / (d + p):  T < d where the layer is square

    The rule for norms alone: where the weight gradient is needed too, `linear_grad` gives both for its FLOPs.

    >>> gram_is_cheaper(512, 4096, 4096), gram_is_cheaper(512, 4096, 64)
    (True, False)
    """
    return tokens * (d + p) < 2 * d * p


OPERATION = Operation("gram_norms", ("triton", "cpu", "reference"), float32_limits)


def _run(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    samples = samples_of(cu_seqlens, inputs.shape[0])
    chosen = OPERATION.explain(inputs, grad_outputs, cu_seqlens, impl=impl).impl
    if chosen == "triton":
        return norms_by_kernels(inputs, grad_outputs, samples)
    run = _on_cpu if chosen == "cpu" else reference.gram_norms
    return run(inputs, grad_outputs, samples.borders)


def norms_by_kernels(inputs: Tensor, grad_outputs: Tensor, samples: Samples) -> Tensor:
    """The squared norms by the Triton kernels, whose table of blocks is kept with the samples."""
    from pyeff.triton_kernels import gram_norms as kernels
    from pyeff.triton_kernels.common import capability_of

    capability = capability_of(inputs)
    # A table made on one stream may not be there yet for another.
    stream = torch.cuda.current_stream(inputs.device) if inputs.is_cuda else None

    def plan() -> object:
        config = kernels.pick_config(inputs.dtype, capability, samples.block_pairs)
        return kernels.plan_of(samples.borders, config, inputs.device)

    return kernels.gram_norms(inputs, grad_outputs, samples.made(("Gram", inputs.dtype, inputs.device, stream), plan))


def _on_cpu(inputs: Tensor, grad_outputs: Tensor, borders: Tensor) -> Tensor:
    norms_sq = torch.zeros(borders.numel() - 1, dtype=torch.float64)
    cuts = borders.tolist()
    longest = min(_TILE_ROWS, int(borders.diff().max()) if norms_sq.numel() else 0)
    tiles = kept_memory(2 * max(longest**2, _TILES_BYTES // 8)).view(2, -1)
    s = 0
    while s < norms_sq.numel():
        length = cuts[s + 1] - cuts[s]
        end = s + 1
        if length:
            # Neighbours of one length share a matmul.
            most = _together(tiles.shape[1], min(length, _TILE_ROWS), inputs, grad_outputs)
            while end < norms_sq.numel() and end - s < most and cuts[end + 1] - cuts[end] == length:
                end += 1
        rows = slice(cuts[s], cuts[end])
        a, g = (x[rows].unflatten(0, (end - s, length)) for x in (inputs, grad_outputs))  # [S, T, d], [S, T, p]
        for i in range(0, length, _TILE_ROWS):
            for j in range(0, i + 1, _TILE_ROWS):
                at, to = slice(i, i + _TILE_ROWS), slice(j, j + _TILE_ROWS)
                aa, gg = (_gram(x[:, at], x[:, to], tile) for x, tile in zip((a, g), tiles, strict=True))
                products = norms_sq.new_zeros(end - s)
                reduce_panel(aa, reference=gg, dots=products)
                norms_sq[s:end] += products if i == j else 2 * products  # both matrices are symmetric
        s = end
    return norms_sq.clamp_(min=0).to(torch.float32)  # keeps NaN


def _together(elements: int, rows: int, *operands: Tensor) -> int:
    """How many samples of one length share a matmul: their tiles fit, and so do copies of 16-bit rows."""
    columns = max(1, *(min(_COPY_COLUMNS, x.shape[1]) for x in operands))
    copied = operands[0].dtype != torch.float32
    return max(1, min(elements // rows**2, _COPY_BYTES // (8 * columns * rows) if copied else elements))


def _gram(x: Tensor, y: Tensor, buffer: Tensor) -> Tensor:
    """x y^T of [S, T, K] and [S, U, K] in float32: [S, T, U] within `buffer`."""
    samples, t, u = x.shape[0], x.shape[1], y.shape[1]
    gram = buffer[: samples * t * u].view(samples, t, u)
    if x.dtype == torch.float32:
        return torch.bmm(x, y.transpose(1, 2), out=gram)
    gram.zero_()
    for k in range(0, x.shape[2], _COPY_COLUMNS):
        columns = slice(k, k + _COPY_COLUMNS)
        gram.baddbmm_(x[:, :, columns].to(torch.float32), y[:, :, columns].to(torch.float32).transpose(1, 2))
    return gram


def _fake(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, impl: str) -> Tensor:
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    return inputs.new_empty(cu_seqlens.shape[0] - 1, dtype=dtype)


torch.library.define("pyeff::gram_norms", "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, str impl) -> Tensor")
torch.library.impl("pyeff::gram_norms", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::gram_norms", _fake)
_OP = torch.ops.pyeff.gram_norms.default
