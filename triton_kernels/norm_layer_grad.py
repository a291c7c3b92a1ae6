"""The backward pass of LayerNorm and RMSNorm, with every sample's share of gain and offset, in one pass over tokens.

For inputs X [N, D], output gradients G [N, D] and a gain w [D]:

    r_t = 1 / sqrt(mean((x_t - m_t)^2) + eps),   n_t = (x_t - m_t) r_t,   m_t = mean(x_t), or 0 for RMSNorm
    grad_x_t = r_t (w g_t - n_t mean(w g_t n_t) - mean(w g_t)), the last term for LayerNorm alone
    D_s = sum over the tokens of sample s of g_t n_t (gain), of g_t (offset)

`pull_rows`: a program goes through a chunk of tokens of one sample, some whole rows at a time, writes their gradients
and keeps the chunk's sums in registers; `vector_grad.sum_chunks` adds these by sample. No atomics: the same bits in
every run. Rows of more than FUSED numbers leave no registers for sums: their statistics are written, and
`vector_grad.sum_rows` reads the rows again.

Cost: X and G read once, grad_x written once: the floor. Beside them 4 D bytes for 64 tokens and parameter.
Gray et al. 2024, arXiv:2411.00999, for norms formed in the backward pass of the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import on_device_of
from .vector_grad import ROWS, Chunks, chunk_rows, column_sums, contiguous_rows, finish

# The widest row whose sums stay in registers beside it.
FUSED = 8192


@dataclass(frozen=True)
class Config:
    """Launch choices of `pull_rows`."""

    br: int
    bd: int
    num_warps: int
    fused: bool


def pick_config(d: int) -> Config:
    """Tiles by what registers hold, as compiled; none of it has been timed on a GPU yet."""
    bd = max(16, triton.next_power_of_2(d))
    # Sixteen numbers a thread of each of x, g, w and the sums: 60 to 100 registers.
    if bd <= 4096:
        return Config(min(ROWS.value, 4096 // bd), bd, 8, True)
    # The widest float32 rows of LayerNorm spill 8 bytes on sm_100, with 32 warps too; no other row does.
    return Config(1, bd, 16, bd <= FUSED)


@triton.jit
def pull_rows(
    p_inputs,
    p_grads,
    p_weight,
    p_mean,
    p_rstd,
    p_cu_seqlens,
    p_first_chunks,
    p_input_grad,
    p_weight_sums,
    p_bias_sums,
    p_mean_out,
    p_rstd_out,
    S,
    D,
    s_x,
    s_g,
    eps,
    BR: tl.constexpr,
    BD: tl.constexpr,
    CENTER: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_RSTD: tl.constexpr,
    HAS_INPUT_GRAD: tl.constexpr,
    HAS_WEIGHT_SUMS: tl.constexpr,
    HAS_BIAS_SUMS: tl.constexpr,
    KEEPS_STATISTICS: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    start, end = chunk_rows(i, p_cu_seqlens, p_first_chunks, S)
    o_d = tl.arange(0, BD)
    m_d = o_d < D
    size = D.to(tl.float32)
    b_weight = tl.zeros([BR, BD], tl.float32)
    b_bias = tl.zeros([BR, BD], tl.float32)
    for k in range(0, ROWS, BR):
        o_r = start + k + tl.arange(0, BR)
        m_r = o_r < end
        m = m_r[:, None] & m_d[None, :]
        b_x = tl.load(p_inputs + o_r[:, None] * s_x + o_d[None, :], mask=m, other=0.0).to(tl.float32)  # [BR, BD]
        b_g = tl.load(p_grads + o_r[:, None] * s_g + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        if CENTER:
            if HAS_MEAN:
                b_mean = tl.load(p_mean + o_r, mask=m_r, other=0.0).to(tl.float32)  # [BR]
            else:
                b_mean = tl.sum(b_x, 1) / size
            if KEEPS_STATISTICS:
                tl.store(p_mean_out + o_r, b_mean, mask=m_r)
            b_x = tl.where(m, b_x - b_mean[:, None], 0.0)
        if HAS_RSTD:
            b_rstd = tl.load(p_rstd + o_r, mask=m_r, other=0.0).to(tl.float32)
        else:
            b_rstd = 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) / size + eps)
        if KEEPS_STATISTICS:
            tl.store(p_rstd_out + o_r, b_rstd, mask=m_r)
        # Rows past the end have gradient 0, but 0 times an infinite r (eps = 0) would not be.
        b_rstd = tl.where(m_r, b_rstd, 0.0)
        b_n = b_x * b_rstd[:, None]
        if HAS_WEIGHT_SUMS:
            b_weight += b_g * b_n
        if HAS_BIAS_SUMS:
            b_bias += b_g
        if HAS_INPUT_GRAD:
            if HAS_WEIGHT:
                # Anew for each row, from the cache: kept, it makes rows of 8192 spill.
                b_g = b_g * tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
            b_slope = tl.sum(b_g * b_n, 1) / size
            b_pulled = b_g - b_n * b_slope[:, None]
            if CENTER:
                b_pulled = b_pulled - (tl.sum(b_g, 1) / size)[:, None]
            b_pulled = b_pulled * b_rstd[:, None]
            p_out = p_input_grad + o_r[:, None] * D + o_d[None, :]
            tl.store(p_out, b_pulled.to(p_input_grad.dtype.element_ty), mask=m)
    if HAS_WEIGHT_SUMS:
        tl.store(p_weight_sums + i * D + o_d, tl.sum(b_weight, 0), mask=m_d)
    if HAS_BIAS_SUMS:
        tl.store(p_bias_sums + i * D + o_d, tl.sum(b_bias, 0), mask=m_d)


def norm_layer_grad(
    inputs: torch.Tensor,
    grad_outputs: torch.Tensor,
    chunks: Chunks,
    *,
    weight: torch.Tensor | None,
    center: bool,
    eps: float,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    norms: bool = True,
    sample_grads: bool = False,
) -> tuple[torch.Tensor, ...]:
    """grad_x [N, D] in the dtype of `inputs`; of gain, then of offset, in float32: sum [D], norms_sq [S], sums [S, D].

    What is not asked for is [0]. `inputs` and `grad_outputs` [N, D] in one dtype, D <= 16384. Beside the result: 4 D
    bytes for each chunk and parameter.
    """
    x, g = contiguous_rows(inputs), contiguous_rows(grad_outputs)
    (tokens, d), device = x.shape, x.device
    config = pick_config(d)
    weight, mean, rstd = (None if t is None else t.reshape(-1).contiguous() for t in (weight, mean, rstd))

    def memory(wanted: bool, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape if wanted else 0, dtype=dtype, device=device)

    grad_x = memory(input_grad, tokens, d, dtype=x.dtype)
    sums = {
        name: memory(wanted and config.fused, chunks.count, d)
        for name, wanted in (("weight", weight_grad), ("bias", bias_grad))
    }
    keeps = not config.fused and weight_grad
    mean_out, rstd_out = memory(keeps and center, tokens), memory(keeps, tokens)
    with on_device_of(x):
        if chunks.count and d and (input_grad or config.fused or keeps):
            pull_rows[(chunks.count,)](
                x,
                g,
                weight,
                mean,
                rstd,
                chunks.borders,
                chunks.first_chunks,
                grad_x if input_grad else None,
                sums["weight"],
                sums["bias"],
                mean_out,
                rstd_out,
                chunks.samples,
                d,
                x.stride(0),
                g.stride(0),
                eps,
                BR=config.br,
                BD=config.bd,
                CENTER=center,
                HAS_WEIGHT=weight is not None,
                HAS_MEAN=mean is not None,
                HAS_RSTD=rstd is not None,
                HAS_INPUT_GRAD=input_grad,
                HAS_WEIGHT_SUMS=weight_grad and config.fused,
                HAS_BIAS_SUMS=bias_grad and config.fused,
                KEEPS_STATISTICS=keeps,
                num_warps=config.num_warps,
            )
        if not config.fused and weight_grad:
            sums["weight"] = column_sums(g, chunks, inputs=x, mean=mean_out if center else None, rstd=rstd_out)
        if not config.fused and bias_grad:
            sums["bias"] = column_sums(g, chunks)
        found = [
            finish(sums[name], chunks, norms=norms, sample_grads=sample_grads)
            if wanted
            else tuple(memory(False) for _ in range(3))
            for name, wanted in (("weight", weight_grad), ("bias", bias_grad))
        ]
    return (grad_x, *found[0], *found[1])
