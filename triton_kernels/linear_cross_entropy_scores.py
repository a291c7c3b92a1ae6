"""Scores of every token at a language-model head: logits live in registers, a tile at a time.

For hidden [N, D], weight [V, D], targets y [N], x = hidden weight^T + bias and z = x or c tanh(x / c), the seven rows
of scores [7, N] are nll, lse, entropy, el2n, margin, p_target and head_grad_norm as pyeff/reference defines them.

Two launches. `reduce_logits`: a program takes BM tokens and a share of the vocabulary, forms tiles z [BM, BN] by a loop
over D, and keeps for each row, the target left out, with d = dz/dx,

    peak = max z,  s1 = sum e^(z - peak),  s2 = sum e^(2 (z - peak)),  zs1 = sum (z - peak) e^(z - peak),
    sd2 = sum (d e^(z - peak))^2, and the target's own z and d:

an online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) with three more sums, each rescaled when the peak
moves. `combine_shares` joins the shares in a fixed order, in float64, and forms the scores. The target stays out of the
sums because that keeps 1 - p_y exact where p_y is near 1. No atomics: the same bits in every run.

Cost: 2 N D V FLOPs. Traffic from memory: weight once for each GROUP token blocks, hidden once while those rows fit the
L2 cache; 28 bytes a token and share in between. A D or a row stride that is no multiple of 16 costs the 16-byte copies,
and with them the pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import INFINITE, LOWEST, capability_of, log1p, offset_type, on_device_of, tanh_and_slope

SCORES, STATES = 7, tl.constexpr(7)
# Token blocks that walk the vocabulary side by side: they share each weight tile, and their hidden rows (16 MB in bf16
# at D = 4096) stay in the L2 cache.
GROUP = tl.constexpr(16)
# Programs wanted, of at least this many tiles each: enough that the last wave on 132 to 160 processors wastes little,
# while a share is long enough to pay for its start.
PROGRAMS, TILES_PER_PROGRAM = 2048, 4
# What a program of `combine_shares` holds of each state: rows times shares.
COMBINE_ROWS, COMBINE_ELEMENTS = 32, 512


@dataclass(frozen=True)
class Config:
    """Launch choices of `reduce_logits`; `shares` is into how many parts the vocabulary is cut."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    shares: int


def pick_config(n: int, v: int, dtype: torch.dtype, softcap: bool, capability: tuple[int, int]) -> Config:
    """Tiles by what registers and shared memory hold, as compiled; none of it has been timed on a GPU yet."""
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers: 202 to 240 of 255.
        bm, bn, bk, num_warps, num_stages = 64, 64, 32, 4, 3
    elif capability[0] in (9, 10):
        # Eight warps: 204 to 254 registers. Four spill 240 bytes, and 256 classes spill 520 on eight: the row sums come
        # on top of the accumulator. Four stages take 128 KB of shared memory, which a lone program has.
        bm, bn, bk, num_warps, num_stages = 128, 128, 64, 8, 4
    else:
        # mma.sync reads its operands from registers as well: 234. A k of 32 keeps four stages under the 100 KB that
        # sm_86, sm_89 and sm_120 have.
        bm, bn, bk, num_warps, num_stages = 128, 128, 32, 8, 4
    if softcap:
        # The slopes are as large as the logits: 128 classes spill 96 to 272 bytes.
        bn = min(bn, 64)
    tiles, blocks = triton.cdiv(v, bn), triton.cdiv(n, bm)
    shares = max(1, min(triton.cdiv(tiles, TILES_PER_PROGRAM), triton.cdiv(PROGRAMS, blocks)))
    return Config(bm, bn, bk, num_warps, num_stages, shares)


@triton.jit
def reduce_logits(
    p_hidden,
    p_weight,
    p_bias,
    p_targets,
    p_states,
    softcap,
    ignore_index,
    N,
    D,
    V,
    s_hn,
    s_hd,
    s_wv,
    s_wd,
    tiles_per_share,
    SHARES: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Within a group the token block runs fastest, then the share.
    blocks = tl.cdiv(N, BM)
    i = tl.program_id(0)
    i_group = i // (GROUP * SHARES)
    group_size = tl.minimum(blocks - i_group * GROUP, GROUP)
    i_m = i_group * GROUP + (i % (GROUP * SHARES)) % group_size
    i_share = (i % (GROUP * SHARES)) // group_size

    o_m = i_m * BM + tl.arange(0, BM)
    o_k = tl.arange(0, BK)
    r_k = o_k.to(OFFSET)
    m_m = o_m < N
    # A tile is addressed by a 64-bit base and offsets within it, which OFFSET makes as wide as the strides need. Rows
    # and classes past the end repeat the last one, which spares the loads their masks.
    r_m = tl.minimum(tl.arange(0, BM), N - 1 - i_m * BM).to(OFFSET)
    o_h = r_m[:, None] * s_hn + r_k[None, :] * s_hd  # [BM, BK]
    p_h_first = p_hidden + (i_m * BM).to(tl.int64) * s_hn
    b_y = tl.load(p_targets + i_m * BM + r_m)

    b_peak = tl.full([BM], LOWEST, tl.float32)
    b_s1 = tl.zeros([BM], tl.float32)
    b_s2 = tl.zeros([BM], tl.float32)
    b_zs1 = tl.zeros([BM], tl.float32)
    b_sd2 = tl.zeros([BM], tl.float32)
    b_z_y = tl.zeros([BM], tl.float32)
    b_d_y = tl.zeros([BM], tl.float32)

    first = i_share * tiles_per_share
    last = tl.minimum(first + tiles_per_share, tl.cdiv(V, BN))
    # A block of ignored tokens, a prompt say, has nothing to do.
    last = tl.where(tl.max((m_m & (b_y != ignore_index)).to(tl.int32), 0) > 0, last, first)
    p_w_first = p_weight + first.to(tl.int64) * BN * s_wv
    for i_v in range(first, last):
        o_v = i_v * BN + tl.arange(0, BN)
        r_v = tl.minimum(tl.arange(0, BN), V - 1 - i_v * BN).to(OFFSET)
        o_w = r_v[None, :] * s_wv + r_k[:, None] * s_wd  # [BK, BN]
        p_h = p_h_first
        p_w = p_w_first
        b_z = tl.zeros([BM, BN], tl.float32)
        for k in range(0, tl.cdiv(D, BK)):
            if EVEN_K:
                b_h = tl.load(p_h + o_h)  # [BM, BK]
                b_w = tl.load(p_w + o_w)  # [BK, BN]
            else:
                m_k = k * BK + o_k < D
                b_h = tl.load(p_h + o_h, mask=m_k[None, :], other=0.0)
                b_w = tl.load(p_w + o_w, mask=m_k[:, None], other=0.0)
            b_z = tl.dot(b_h, b_w, b_z, input_precision=PRECISION)
            p_h += tl.full([], BK, tl.int64) * s_hd
            p_w += tl.full([], BK, tl.int64) * s_wd
        if HAS_BIAS:
            b_z += tl.load(p_bias + i_v * BN + r_v)[None, :]
        is_target = o_v[None, :] == b_y[:, None]  # [BM, BN]
        if HAS_SOFTCAP:
            b_t, b_d = tanh_and_slope(b_z * (1.0 / softcap))
            b_z = softcap * b_t
            b_d_y += tl.sum(tl.where(is_target, b_d, 0.0), 1)
        b_z_y += tl.sum(tl.where(is_target, b_z, 0.0), 1)
        b_z = tl.where(is_target | (o_v[None, :] >= V), -INFINITE, b_z)

        b_top = tl.maximum(b_peak, tl.max(b_z, 1))
        # A NaN logit is passed over by the maximum but not by the sums, and undoes its row there.
        b_t = b_z - b_top[:, None]
        b_e = tl.exp(b_t)
        b_shift = b_peak - b_top
        b_scale = tl.exp(b_shift)
        # Before the first class is met the shift is as large as a float32, and the sums are 0.
        b_moved = tl.where(b_s1 > 0, b_shift * b_s1, 0.0)
        b_zs1 = b_scale * (b_zs1 + b_moved) + tl.sum(tl.where(b_e > 0, b_t * b_e, 0.0), 1)
        b_s1 = b_scale * b_s1 + tl.sum(b_e, 1)
        b_s2 = b_scale * b_scale * b_s2 + tl.sum(b_e * b_e, 1)
        if HAS_SOFTCAP:
            b_sd2 = b_scale * b_scale * b_sd2 + tl.sum((b_d * b_e) * (b_d * b_e), 1)
        b_peak = b_top
        p_w_first += tl.full([], BN, tl.int64) * s_wv

    # states: [SHARES, STATES, N]
    p_s = p_states + i_share.to(tl.int64) * STATES * N + o_m
    tl.store(p_s, b_peak, mask=m_m)
    p_s += N
    tl.store(p_s, b_s1, mask=m_m)
    p_s += N
    tl.store(p_s, b_s2, mask=m_m)
    p_s += N
    tl.store(p_s, b_zs1, mask=m_m)
    p_s += N
    tl.store(p_s, b_sd2 if HAS_SOFTCAP else b_s2, mask=m_m)
    p_s += N
    tl.store(p_s, b_z_y, mask=m_m)
    p_s += N
    tl.store(p_s, b_d_y if HAS_SOFTCAP else b_d_y + 1.0, mask=m_m)


@triton.jit
def combine_shares(
    p_states,
    p_hidden,
    p_targets,
    p_scores,
    ignore_index,
    N,
    D,
    V,
    s_hn,
    s_hd,
    SHARES: tl.constexpr,
    BS: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    ONE_CLASS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    o_m = tl.program_id(0) * BM + tl.arange(0, BM)
    o_s = tl.arange(0, BS)
    m_m = o_m < N
    m_s = (o_s < SHARES)[:, None] & m_m[None, :]
    r_m = o_m.to(tl.int64)

    # states: [SHARES, STATES, N]
    p_s = p_states + o_s.to(tl.int64)[:, None] * STATES * N + o_m[None, :]  # [BS, BM]
    b_peaks = tl.load(p_s, mask=m_s, other=LOWEST).to(tl.float64)
    p_s += N
    b_s1s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float64)
    p_s += N
    b_s2s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float64)
    p_s += N
    b_zs1s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float64)
    p_s += N
    b_sd2s = tl.load(p_s, mask=m_s, other=0.0).to(tl.float64)
    p_s += N
    b_z_y = tl.sum(tl.load(p_s, mask=m_s, other=0.0), 0).to(tl.float64)
    p_s += N
    b_d_y = tl.sum(tl.load(p_s, mask=m_s, other=0.0), 0).to(tl.float64)

    b_peak = tl.max(b_peaks, 0)
    b_shift = b_peaks - b_peak[None, :]
    b_scale = tl.exp(b_shift)
    b_s1 = tl.sum(b_scale * b_s1s, 0)
    b_s2 = tl.sum(b_scale * b_scale * b_s2s, 0)
    b_zs1 = tl.sum(b_scale * (b_zs1s + b_shift * b_s1s), 0)
    b_sd2 = tl.sum(b_scale * b_scale * b_sd2s, 0)

    b_squares = tl.zeros([BM], tl.float32)
    for i_d in range(0, tl.cdiv(D, BD)):
        o_d = i_d * BD + tl.arange(0, BD)
        p_h = p_hidden + r_m[:, None] * s_hn + o_d.to(tl.int64)[None, :] * s_hd
        b_h = tl.load(p_h, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(tl.float32)  # [BM, BD]
        b_squares += tl.sum(b_h * b_h, 1)
    b_norm = tl.sqrt(b_squares.to(tl.float64))

    undefined = float("nan")
    # Weights and sums relative to e^top.
    b_top = tl.maximum(b_z_y, b_peak)
    b_w_y = tl.exp(b_z_y - b_top)
    b_w = tl.exp(b_peak - b_top)
    b_rest = b_w * b_s1
    b_total = b_w_y + b_rest
    b_p_rest = b_rest / b_total
    b_w = b_w / b_total
    b_log_total = tl.where(b_z_y >= b_peak, log1p(b_rest), tl.log(b_total))
    b_surprise = tl.where(b_w_y > 0, b_w_y * (b_top - b_z_y), 0.0) / b_total + b_w * ((b_top - b_peak) * b_s1 - b_zs1)
    b_el2n = tl.sqrt(b_p_rest * b_p_rest + b_w * b_w * b_s2)
    b_pulled = b_p_rest * b_d_y if HAS_SOFTCAP else b_p_rest
    b_pull = tl.sqrt(b_pulled * b_pulled + b_w * b_w * b_sd2)
    # An untouched peak means that every other logit is -inf, or that there is none.
    b_alone = b_peak <= LOWEST
    if ONE_CLASS:
        b_margin = tl.full([BM], undefined, tl.float64)
    else:
        b_margin = tl.where(b_alone, INFINITE, b_z_y - b_peak)

    b_y = tl.load(p_targets + r_m, mask=m_m, other=0)
    b_defined = (b_y >= 0) & (b_y < V) & (b_y != ignore_index)
    b_defined &= (b_total < INFINITE) & ~(b_alone & (b_z_y == -INFINITE))
    # scores: [SCORES, N]
    p_o = p_scores + r_m
    tl.store(p_o, tl.where(b_defined, b_log_total + (b_top - b_z_y), undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_top + b_log_total, undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_log_total + b_surprise, undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_el2n, undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_margin, undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_w_y / b_total, undefined).to(tl.float32), mask=m_m)
    p_o += N
    tl.store(p_o, tl.where(b_defined, b_norm * b_pull, undefined).to(tl.float32), mask=m_m)


def linear_cross_entropy_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    config: Config | None = None,
) -> torch.Tensor:
    """Scores [7, N] in float32 of `hidden` [N, D] and `weight` [V, D] in one dtype, `targets` [N] int32 or int64.

    float32 products are exact unless torch.backends.cuda.matmul.allow_tf32. Beside the result: 28 bytes a token and
    share, at most 9 MB.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    scores = torch.empty((SCORES, n), dtype=torch.float32, device=hidden.device)
    if n == 0:
        return scores
    config = config or pick_config(n, v, hidden.dtype, softcap is not None, capability_of(hidden))
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    states = torch.empty((config.shares, STATES, n), dtype=torch.float32, device=hidden.device)
    with on_device_of(hidden):
        reduce_logits[(triton.cdiv(n, config.bm) * config.shares,)](
            hidden,
            weight,
            bias,
            targets.contiguous(),
            states,
            softcap or 0.0,
            ignore_index,
            n,
            d,
            v,
            *hidden.stride(),
            *weight.stride(),
            triton.cdiv(triton.cdiv(v, config.bn), config.shares),
            SHARES=config.shares,
            BM=config.bm,
            BN=config.bn,
            BK=config.bk,
            OFFSET=offset_type((hidden, (config.bm, config.bk)), (weight, (config.bn, config.bk))),
            EVEN_K=d % config.bk == 0,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        share_block = triton.next_power_of_2(config.shares)
        row_block = max(1, min(COMBINE_ROWS, COMBINE_ELEMENTS // share_block))
        combine_shares[(triton.cdiv(n, row_block),)](
            states,
            hidden,
            targets.contiguous(),
            scores,
            ignore_index,
            n,
            d,
            v,
            *hidden.stride(),
            SHARES=config.shares,
            BS=share_block,
            BM=row_block,
            BD=128,
            ONE_CLASS=v == 1,
            HAS_SOFTCAP=softcap is not None,
        )
    return scores
