"""Gradients of vectors that act on every token, with every sample's squared norm, in one pass over the tokens.

For output gradients G [N, D], inputs X [N, D] and packed samples s:

    D_s = sum_t g_t,  or sum_t g_t * x_t;   grad [D] = sum_s D_s,  norms_sq [S] = ||D_s||^2,  sample_grads [S, D] = D_s.

Two launches and torch's sums over S rows. `sum_rows`: a program adds the rows of a chunk of at most ROWS tokens of one
sample, in some columns; `sum_chunks` adds a sample's chunks in their order. No atomics: the same bits in every run.

Cost: one read of G and X, which is the floor; the chunks' sums are 4 D bytes for ROWS tokens, written once and read
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import on_device_of, sent_to

# Tokens of a chunk: 16384 of them make 256 programs of the norm layers' kernel, two for each processor of an H100.
ROWS = tl.constexpr(64)
# Columns and rows that a program of the sums has in registers at a time: 32 numbers of each operand a thread.
COLUMNS, TILE, WARPS = 256, 4096, 4


@dataclass(frozen=True)
class Chunks:
    """Where samples begin and which chunks of rows are theirs, on the device."""

    borders: torch.Tensor  # [S+1], int64
    first_chunks: torch.Tensor  # [S+1], int64
    count: int

    @property
    def samples(self) -> int:
        """How many samples there are."""
        return self.borders.numel() - 1


def chunks_of(cu_seqlens: torch.Tensor, device: torch.device) -> Chunks:
    """The chunks of the samples between `cu_seqlens` [S+1], int64 on the CPU."""
    chunks = (cu_seqlens.diff() + ROWS.value - 1) // ROWS.value
    first_chunks = torch.nn.functional.pad(chunks.cumsum(0), (1, 0))  # [S+1]
    # One copy for both lists.
    return Chunks(*sent_to(device, torch.stack([cu_seqlens, first_chunks])), int(first_chunks[-1]))


@triton.jit
def chunk_rows(i, p_cu_seqlens, p_first_chunks, S):
    """The first row of chunk i, and the row after its last."""
    # Its sample is the last whose first chunk is not beyond it.
    i_s = 0
    above = S
    while above - i_s > 1:
        middle = (i_s + above) // 2
        is_low = tl.load(p_first_chunks + middle) <= i
        i_s = tl.where(is_low, middle, i_s)
        above = tl.where(is_low, above, middle)
    start = tl.load(p_cu_seqlens + i_s) + (i - tl.load(p_first_chunks + i_s)) * ROWS
    return start, tl.minimum(start + ROWS, tl.load(p_cu_seqlens + i_s + 1))


@triton.jit
def sum_rows(
    p_grads,
    p_inputs,
    p_mean,
    p_rstd,
    p_cu_seqlens,
    p_first_chunks,
    p_sums,
    S,
    D,
    s_g,
    s_x,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_INPUTS: tl.constexpr,
    HAS_MEAN: tl.constexpr,
    HAS_RSTD: tl.constexpr,
):
    """sums [chunks, D]: of g, or of g * (x - mean) * rstd."""
    i = tl.program_id(0).to(tl.int64)
    start, end = chunk_rows(i, p_cu_seqlens, p_first_chunks, S)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < D
    b_sum = tl.zeros([BR, BC], tl.float32)
    for k in range(0, ROWS, BR):
        o_r = start + k + tl.arange(0, BR)
        m_r = o_r < end
        m = m_r[:, None] & m_c[None, :]
        b_g = tl.load(p_grads + o_r[:, None] * s_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)  # [BR, BC]
        if HAS_INPUTS:
            b_x = tl.load(p_inputs + o_r[:, None] * s_x + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            if HAS_MEAN:
                b_x = b_x - tl.load(p_mean + o_r, mask=m_r, other=0.0)[:, None]
            if HAS_RSTD:
                b_x = b_x * tl.load(p_rstd + o_r, mask=m_r, other=0.0)[:, None]
            b_g = b_g * b_x
        b_sum += b_g
    tl.store(p_sums + i * D + o_c, tl.sum(b_sum, 0), mask=m_c)


@triton.jit
def sum_chunks(p_sums, p_first_chunks, p_grads, D, BR: tl.constexpr, BC: tl.constexpr):
    """grads [S, D]: the sums [chunks, D] of each sample's chunks."""
    i_s = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_c = o_c < D
    first = tl.load(p_first_chunks + i_s)
    end = tl.load(p_first_chunks + i_s + 1)
    b_sum = tl.zeros([BR, BC], tl.float32)
    for at in range(first, end, BR):
        o_r = at + tl.arange(0, BR)
        m = (o_r < end)[:, None] & m_c[None, :]
        b_sum += tl.load(p_sums + o_r[:, None] * D + o_c[None, :], mask=m, other=0.0)  # [BR, BC]
    tl.store(p_grads + i_s * D + o_c, tl.sum(b_sum, 0), mask=m_c)


def tile_of(d: int) -> tuple[int, int]:
    """Rows and columns of the tiles of rows of d numbers."""
    columns = min(COLUMNS, max(16, triton.next_power_of_2(d)))
    return min(ROWS.value, TILE // columns), columns


def contiguous_rows(rows: torch.Tensor) -> torch.Tensor:
    """`rows` [N, D] with each row contiguous."""
    return rows if rows.stride(1) == 1 else rows.contiguous()


def column_sums(
    grads: torch.Tensor,
    chunks: Chunks,
    *,
    inputs: torch.Tensor | None = None,
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
) -> torch.Tensor:
    """The chunks' sums [chunks, D] of contiguous rows g, or of g * (x - mean) * rstd."""
    d = grads.shape[1]
    sums = torch.empty((chunks.count, d), dtype=torch.float32, device=grads.device)
    br, bc = tile_of(d)
    if sums.numel():
        sum_rows[(chunks.count, triton.cdiv(d, bc))](
            grads,
            inputs,
            mean,
            rstd,
            chunks.borders,
            chunks.first_chunks,
            sums,
            chunks.samples,
            d,
            grads.stride(0),
            0 if inputs is None else inputs.stride(0),
            BR=br,
            BC=bc,
            HAS_INPUTS=inputs is not None,
            HAS_MEAN=mean is not None,
            HAS_RSTD=rstd is not None,
            num_warps=WARPS,
        )
    return sums


def finish(
    sums: torch.Tensor, chunks: Chunks, *, norms: bool, sample_grads: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [D], norms_sq [S] and sample_grads [S, D] from the chunks' sums [chunks, D]; [0] where not asked for."""
    d = sums.shape[1]
    grads = torch.empty((chunks.samples, d), dtype=torch.float32, device=sums.device)
    br, bc = tile_of(d)
    if grads.numel():
        sum_chunks[(chunks.samples, triton.cdiv(d, bc))](
            sums, chunks.first_chunks, grads, d, BR=min(br, 16), BC=bc, num_warps=WARPS
        )
    norms_sq = grads.square().sum(1) if norms else grads.new_empty(0)
    return grads.sum(0), norms_sq, grads if sample_grads else grads.new_empty(0)


def vector_grad(
    grad_outputs: torch.Tensor,
    chunks: Chunks,
    *,
    inputs: torch.Tensor | None = None,
    norms: bool = True,
    sample_grads: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad [D], norms_sq [S] and sample_grads [S, D] in float32; [0] where not asked for.

    `grad_outputs` and `inputs` [N, D] in one dtype. Beside the result: 4 D bytes for each chunk.
    """
    grads = contiguous_rows(grad_outputs)
    inputs = None if inputs is None else contiguous_rows(inputs)
    with on_device_of(grads):
        sums = column_sums(grads, chunks, inputs=inputs)
        return finish(sums, chunks, norms=norms, sample_grads=sample_grads)
