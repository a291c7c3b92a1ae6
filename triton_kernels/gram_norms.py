"""Squared norms of every sample's weight gradient from its Gram matrices, which never reach memory.

For inputs A [N, D], output gradients G [N, P] and packed samples s:

    norms_sq [S] = || G_s^T A_s ||_F^2 = sum over the tokens t and u of s of (a_t . a_u) (g_t . g_u).

Two launches. `multiply_grams`: a program takes two blocks i <= j of BT tokens of one sample, forms their tiles
[BT, BT] of both Gram matrices in registers, multiplies them and stores the sum, twice if i < j because both matrices
are symmetric. `sum_pairs` adds the sums of a sample in a fixed order, in float64. No atomics: the same bits in every
run.

Cost: T (T + BT) (D + P) FLOPs for a sample of T tokens, half of what the full matrices take. Traffic from memory: A and
G once while a sample's rows fit the L2 cache; 4 bytes for each pair of blocks.

Gram matrices accumulate in float32. In 16 bits the norm of a sample whose tokens' gradients cancel is lost altogether.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import offset_type, on_device_of, sent_to

SUM_BLOCK = 1024
# FLOP/s of tiles of 64 tokens by those of tiles of 128, whose operands each serve twice as many products: an estimate.
NARROW_RATE = 0.75


@dataclass(frozen=True)
class Config:
    """Launch choices of `multiply_grams`."""

    bt: int
    bk: int
    num_warps: int
    num_stages: int


def pick_config(dtype: torch.dtype, capability: tuple[int, int], block_pairs: Callable[[int], int]) -> Config:
    """Tiles by what registers and shared memory hold, as compiled; none of it has been timed on a GPU yet.

    `block_pairs(bt)` is how many pairs of blocks of bt tokens the samples have.
    """
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep operands in registers; four warps spill on sm_80.
        return Config(64, 32, 8, 3)
    if block_pairs(64) * 64**2 < NARROW_RATE * block_pairs(128) * 128**2:
        # Samples that would leave much of the wide tiles empty: 96 registers, three programs to a processor of sm_90.
        return Config(64, 64 if capability[0] in (9, 10) else 32, 4, 4)
    # Two accumulators: 134 to 223 registers on eight warps; four spill 512 bytes and more.
    if capability[0] in (9, 10):
        # Four stages take 128 KB of shared memory, which a lone program has.
        return Config(128, 64, 8, 4)
    # A k of 32 keeps four stages under the 100 KB that sm_86, sm_89 and sm_120 have.
    return Config(128, 32, 8, 4)


@triton.jit
def gram_tile(
    p_x,
    start,
    i_t,
    i_u,
    length,
    K,
    s_n,
    s_k,
    BT: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x_t . x_u of the tokens of two blocks of the sample at `start`: [BT, BT], 0 past the sample's end."""
    o_k = tl.arange(0, BK)
    r_t = tl.arange(0, BT)
    m_t = i_t * BT + r_t < length
    m_u = i_u * BT + r_t < length
    o_t = r_t.to(OFFSET)[:, None] * s_n + o_k.to(OFFSET)[None, :] * s_k  # [BT, BK]
    o_u = r_t.to(OFFSET)[None, :] * s_n + o_k.to(OFFSET)[:, None] * s_k  # [BK, BT]
    p_t = p_x + (start + i_t * BT) * s_n
    p_u = p_x + (start + i_u * BT) * s_n
    b_gram = tl.zeros([BT, BT], tl.float32)
    for k in range(0, tl.cdiv(K, BK)):
        if EVEN_K:
            b_t = tl.load(p_t + o_t, mask=m_t[:, None], other=0.0)
            b_u = tl.load(p_u + o_u, mask=m_u[None, :], other=0.0)
        else:
            m_k = o_k < K - k * BK
            b_t = tl.load(p_t + o_t, mask=m_t[:, None] & m_k[None, :], other=0.0)
            b_u = tl.load(p_u + o_u, mask=m_k[:, None] & m_u[None, :], other=0.0)
        b_gram = tl.dot(b_t, b_u, b_gram, input_precision=PRECISION)
        p_t += tl.full([], BK, tl.int64) * s_k
        p_u += tl.full([], BK, tl.int64) * s_k
    return b_gram


@triton.jit
def multiply_grams(
    p_inputs,
    p_grads,
    p_cu_seqlens,
    p_first_pairs,
    p_partials,
    S,
    D,
    P,
    s_an,
    s_ad,
    s_gn,
    s_gp,
    BT: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_P: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # The sample this pair belongs to: the last whose first pair is not beyond it.
    i = tl.program_id(0)
    i_s = 0
    above = S
    while above - i_s > 1:
        middle = (i_s + above) // 2
        is_low = tl.load(p_first_pairs + middle) <= i
        i_s = tl.where(is_low, middle, i_s)
        above = tl.where(is_low, above, middle)
    # Pairs in the order (0, 0), (0, 1), (1, 1), (0, 2), ...: pair n is in column u with u (u + 1) / 2 <= n. The root is
    # rounded, and put right by a step.
    n = (i - tl.load(p_first_pairs + i_s)).to(tl.int32)
    i_u = ((tl.sqrt(8.0 * n.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    i_u = tl.where(i_u * (i_u + 1) // 2 > n, i_u - 1, i_u)
    i_u = tl.where((i_u + 1) * (i_u + 2) // 2 <= n, i_u + 1, i_u)
    i_t = n - i_u * (i_u + 1) // 2

    start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
    length = (tl.load(p_cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
    b_aa = gram_tile(p_inputs, start, i_t, i_u, length, D, s_an, s_ad, BT, BK, OFFSET, EVEN_D, PRECISION)
    b_gg = gram_tile(p_grads, start, i_t, i_u, length, P, s_gn, s_gp, BT, BK, OFFSET, EVEN_P, PRECISION)
    product = tl.sum(b_aa * b_gg)
    tl.store(p_partials + i, tl.where(i_t == i_u, product, 2.0 * product))


@triton.jit
def sum_pairs(p_partials, p_first_pairs, p_norms, BLOCK: tl.constexpr):
    i_s = tl.program_id(0)
    first = tl.load(p_first_pairs + i_s)
    end = tl.load(p_first_pairs + i_s + 1)
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for at in range(first, end, BLOCK):
        b_sum += tl.load(p_partials + at + o, mask=at + o < end, other=0.0).to(tl.float64)
    whole = tl.sum(b_sum, 0)
    # A square cannot be negative, but its rounding can; NaN stays.
    tl.store(p_norms + i_s, tl.where(whole < 0, 0.0, whole).to(tl.float32))


@dataclass(frozen=True)
class Plan:
    """Launch choices for some samples, where these begin and which pairs of blocks are theirs, on the device."""

    config: Config
    borders: torch.Tensor  # [S+1], int64
    first_pairs: torch.Tensor  # [S+1], int64
    pairs: int


def plan_of(cu_seqlens: torch.Tensor, config: Config, device: torch.device) -> Plan:
    """The plan for the samples between `cu_seqlens` [S+1], int64 on the CPU."""
    blocks = (cu_seqlens.diff() + config.bt - 1) // config.bt
    first_pairs = torch.nn.functional.pad((blocks * (blocks + 1) // 2).cumsum(0), (1, 0))  # [S+1]
    # One copy for both lists.
    return Plan(config, *sent_to(device, torch.stack([cu_seqlens, first_pairs])), int(first_pairs[-1]))


def gram_norms(inputs: torch.Tensor, grad_outputs: torch.Tensor, plan: Plan) -> torch.Tensor:
    """norms_sq [S] in float32 of `inputs` [N, D] and `grad_outputs` [N, P] in one dtype.

    float32 products are exact unless torch.backends.cuda.matmul.allow_tf32. Beside the result: 4 bytes for each pair of
    blocks, T^2 / 8192 bytes for a sample of T tokens, or four times that in tiles of 64 tokens.
    """
    config = plan.config
    samples, device = plan.borders.numel() - 1, inputs.device
    norms_sq = torch.empty(samples, dtype=torch.float32, device=device)
    partials = torch.empty(plan.pairs, dtype=torch.float32, device=device)
    with on_device_of(inputs):
        if plan.pairs:
            multiply_grams[(plan.pairs,)](
                inputs,
                grad_outputs,
                plan.borders,
                plan.first_pairs,
                partials,
                samples,
                inputs.shape[1],
                grad_outputs.shape[1],
                *inputs.stride(),
                *grad_outputs.stride(),
                BT=config.bt,
                BK=config.bk,
                OFFSET=offset_type(*((t, (config.bt, config.bk)) for t in (inputs, grad_outputs))),
                EVEN_D=inputs.shape[1] % config.bk == 0,
                EVEN_P=grad_outputs.shape[1] % config.bk == 0,
                PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
        if samples:
            sum_pairs[(samples,)](partials, plan.first_pairs, norms_sq, BLOCK=SUM_BLOCK)
    return norms_sq
