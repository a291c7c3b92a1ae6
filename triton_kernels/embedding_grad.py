"""The gradient of an embedding table, with every sample's squared norm, from tokens sorted by index.

Token t of sample s reads row i_t of the table, and G [N, D] are the gradients by what was read. A sample's gradient has
the rows D_s[v] = sum of g_t over its tokens with i_t = v:

    weight_grad [V, D] = sum_s D_s,   norms_sq [S] = || D_s ||_F^2.

Sorted by index, and among equal indices by token, the tokens of one index are a run, and those of one sample within it
stand side by side. `sum_runs`: the program of a run's first token, in some columns, adds the run's rows sample by
sample: a sample's sum is squared while it is in registers, and joins the row of the table. `sum_squares` adds a
sample's squares in the order of its tokens, in float64. No atomics: the same bits in every run.

Cost: G read once and the table written once: the floor; beside them the sort, and 4 bytes a token and BC columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import on_device_of, sent_to

# A program adds BR rows of BC columns at a time: 32 numbers a thread, with sums and total 60 to 80 registers.
BR, BC, WARPS = 16, 256, 4
SUM_BLOCK = 1024


@triton.jit
def sum_runs(
    p_grads,
    p_index,
    p_order,
    p_run_ends,
    p_pair_ends,
    p_table,
    p_squares,
    V,
    D,
    padding,
    s_g,
    blocks,
    BR: tl.constexpr,
    BC: tl.constexpr,
    HAS_TABLE: tl.constexpr,
    HAS_SQUARES: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64)
    index = tl.load(p_index + i)
    is_first = i == 0
    if i > 0:
        is_first = tl.load(p_index + i - 1) != index
    if is_first and index != padding:
        o_c = tl.program_id(1) * BC + tl.arange(0, BC)
        m_c = o_c < D
        in_table = (index >= 0) & (index < V)
        b_total = tl.zeros([BC], tl.float32)
        run_end = tl.load(p_run_ends + i)
        at = i
        while at < run_end:
            pair_end = tl.load(p_pair_ends + at)
            b_sum = tl.zeros([BR, BC], tl.float32)
            for k in range(at, pair_end, BR):
                o_k = k + tl.arange(0, BR)
                m_k = o_k < pair_end
                o_t = tl.load(p_order + o_k, mask=m_k, other=0)
                m = m_k[:, None] & m_c[None, :]
                b_sum += tl.load(p_grads + o_t[:, None] * s_g + o_c[None, :], mask=m, other=0.0).to(tl.float32)
            b_row = tl.sum(b_sum, 0)
            if HAS_SQUARES:
                # At the sample's first token of the run. Nobody waits here to refuse an index: it spoils the norm.
                p_square = p_squares + tl.load(p_order + at) * blocks + tl.program_id(1)
                square = tl.sum(b_row * b_row)
                tl.store(p_square, tl.where(in_table, square, float("nan")))
            b_total += b_row
            at = pair_end
        if HAS_TABLE and in_table:
            tl.store(p_table + index * D + o_c, b_total.to(p_table.dtype.element_ty), mask=m_c)


@triton.jit
def sum_squares(p_squares, p_cu_seqlens, p_norms, blocks, BLOCK: tl.constexpr):
    """norms [S]: the sums of the squares [N, blocks] of each sample's tokens."""
    i_s = tl.program_id(0)
    first = tl.load(p_cu_seqlens + i_s).to(tl.int64) * blocks
    end = tl.load(p_cu_seqlens + i_s + 1).to(tl.int64) * blocks
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for at in range(first, end, BLOCK):
        b_sum += tl.load(p_squares + at + o, mask=at + o < end, other=0.0).to(tl.float64)
    tl.store(p_norms + i_s, tl.sum(b_sum, 0).to(tl.float32))


def embedding_grad(
    index: torch.Tensor,
    order: torch.Tensor,
    grad_outputs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_embeddings: int,
    padding: int,
    *,
    weight_grad: bool = True,
    norms: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight_grad [V, D] in the dtype of `grad_outputs` and norms_sq [S] in float32; [0] where not asked for.

    `index` [N], rising, and `order` [N], the tokens it belongs to, are a stable sort's, int64; `cu_seqlens` [S+1] int32
    or int64; `padding` is -1 for none. An index outside of the table makes its sample's norm NaN.
    """
    g = grad_outputs if grad_outputs.stride(1) == 1 else grad_outputs.contiguous()
    (tokens, d), device, samples = g.shape, g.device, cu_seqlens.numel() - 1
    blocks = triton.cdiv(d, BC)
    borders = sent_to(device, cu_seqlens)
    table = torch.zeros((num_embeddings, d) if weight_grad else 0, dtype=g.dtype, device=device)
    squares = torch.zeros((tokens, blocks) if norms else 0, dtype=torch.float32, device=device)
    norms_sq = torch.empty(samples if norms else 0, dtype=torch.float32, device=device)
    if tokens and d:
        # A pair is a sample's part of a run. Its end, and the run's, from searches in the sorted keys.
        sample = torch.searchsorted(borders.to(torch.int64), order, right=True) - 1
        keys = index * samples + sample
        pair_ends = torch.searchsorted(keys, keys, right=True)
        run_ends = torch.searchsorted(index, index, right=True)
        with on_device_of(g):
            sum_runs[(tokens, blocks)](
                g,
                index,
                order,
                run_ends,
                pair_ends,
                table if weight_grad else None,
                squares if norms else None,
                num_embeddings,
                d,
                padding,
                g.stride(0),
                blocks,
                BR=BR,
                BC=BC,
                HAS_TABLE=weight_grad,
                HAS_SQUARES=norms,
                num_warps=WARPS,
            )
    with on_device_of(g):
        if norms_sq.numel():
            sum_squares[(samples,)](squares, borders, norms_sq, blocks, BLOCK=SUM_BLOCK)
    return table, norms_sq
