"""The gradient of a token's loss by some of its logits, which live in registers only.

For hidden [N, D], weight [V, D] of a slice of the classes, x = hidden weight^T + bias, z = x or c tanh(x / c), and of
each token its target y, lse = log sum exp z over all classes, missing = 1 - p_y and scale = dL / dnll:

    grads [N, V] = scale (e^(z - lse) - onehot(y)) dz/dx,   with -missing in place of p_y - 1.

A program forms a tile [BM, BN] of logits by a loop over D and turns it into the gradient before it is stored, once, in
the dtype of `hidden`. The logits themselves are never rounded and never leave the registers; the softmax needs no sums
because lse is known.

Cost: 2 N D V FLOPs. Traffic from memory: grads once, weight once for each GROUP token blocks, hidden once while those
rows fit the L2 cache. A product by cuBLAS into float32 logits and a pass over them would move 10 bytes an entry in
place of 2: at D = 4096 a quarter of the product's time on an H100, more than what a plain Triton loop loses to cuBLAS.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .common import capability_of, offset_type, on_device_of, tanh_and_slope

# Token blocks that share each weight tile run side by side; their hidden rows stay in the L2 cache.
GROUP = tl.constexpr(16)


@dataclass(frozen=True)
class Config:
    """Launch choices of `store_logit_grads`."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int


def pick_config(dtype: torch.dtype, capability: tuple[int, int]) -> Config:
    """Tiles by what registers and shared memory hold, as compiled; none of it has been timed on a GPU yet."""
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers.
        return Config(64, 64, 32, 4, 3)
    if capability[0] in (9, 10):
        # 128 registers and 96 KB of shared memory: two programs on a processor, so that the exponentials of one run
        # beside the products of the other; with a softcap 176 to 243, and one. 256 classes spill 40 bytes on sm_90.
        return Config(128, 128, 64, 8, 3)
    # A k of 32 keeps four stages under the 100 KB that sm_86, sm_89 and sm_120 have.
    return Config(128, 128, 32, 8, 4)


@triton.jit
def store_logit_grads(
    p_hidden,
    p_weight,
    p_bias,
    p_targets,
    p_lse,
    p_missing,
    p_scale,
    p_grads,
    softcap,
    first_class,
    N,
    D,
    V,
    s_hn,
    s_hd,
    s_wv,
    s_wd,
    s_gn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Within a group the token block runs fastest, then the block of classes.
    i = tl.program_id(0)
    i_group = i // (GROUP * tl.cdiv(V, BN))
    group_size = tl.minimum(tl.cdiv(N, BM) - i_group * GROUP, GROUP)
    i_m = i_group * GROUP + (i % (GROUP * tl.cdiv(V, BN))) % group_size
    i_v = (i % (GROUP * tl.cdiv(V, BN))) // group_size

    o_m = i_m * BM + tl.arange(0, BM)
    o_v = i_v * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    # A tile is addressed by a 64-bit base and offsets within it, which OFFSET makes as wide as the strides need. Rows
    # and classes past the end repeat the last one, which spares the loads their masks.
    r_m = tl.minimum(tl.arange(0, BM), N - 1 - i_m * BM).to(OFFSET)
    r_v = tl.minimum(tl.arange(0, BN), V - 1 - i_v * BN).to(OFFSET)
    r_k = o_k.to(OFFSET)
    o_h = r_m[:, None] * s_hn + r_k[None, :] * s_hd  # [BM, BK]
    o_w = r_v[None, :] * s_wv + r_k[:, None] * s_wd  # [BK, BN]
    p_h = p_hidden + (i_m * BM).to(tl.int64) * s_hn
    p_w = p_weight + (i_v * BN).to(tl.int64) * s_wv
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

    b_y = tl.load(p_targets + i_m * BM + r_m)
    b_lse = tl.load(p_lse + i_m * BM + r_m)
    b_missing = tl.load(p_missing + i_m * BM + r_m)
    b_scale = tl.load(p_scale + i_m * BM + r_m)
    if HAS_BIAS:
        b_z += tl.load(p_bias + i_v * BN + r_v)[None, :]
    if HAS_SOFTCAP:
        b_t, b_slope = tanh_and_slope(b_z * (1.0 / softcap))
        b_z = softcap * b_t
    is_target = (first_class + o_v)[None, :] == b_y[:, None]  # [BM, BN]
    b_g = b_scale[:, None] * tl.where(is_target, -b_missing[:, None], tl.exp(b_z - b_lse[:, None]))
    if HAS_SOFTCAP:
        b_g *= b_slope
    # grads: [N, V], rows s_gn apart
    p_g = p_grads + o_m.to(tl.int64)[:, None] * s_gn + o_v[None, :]
    tl.store(p_g, b_g.to(p_grads.dtype.element_ty), mask=(o_m < N)[:, None] & (o_v < V)[None, :])


def logit_grads(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    lse: torch.Tensor,
    missing: torch.Tensor,
    scale: torch.Tensor,
    grads: torch.Tensor,
    *,
    first_class: int,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    config: Config | None = None,
) -> None:
    """Fills `grads` [N, V], rows of any stride, for the V classes of `weight` [V, D] from `first_class` on.

    `hidden` [N, D], `weight` and `grads` in one dtype; `targets` [N] int32 or int64, lse, missing, scale [N] and `bias`
    [V] in float32, contiguous. float32 products are exact unless torch.backends.cuda.matmul.allow_tf32.
    """
    (n, d), v = hidden.shape, weight.shape[0]
    if n == 0:
        return
    config = config or pick_config(hidden.dtype, capability_of(hidden))
    with on_device_of(hidden):
        store_logit_grads[(triton.cdiv(n, config.bm) * triton.cdiv(v, config.bn),)](
            hidden,
            weight,
            bias,
            targets,
            lse,
            missing,
            scale,
            grads,
            softcap or 0.0,
            first_class,
            n,
            d,
            v,
            *hidden.stride(),
            *weight.stride(),
            grads.stride(0),
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
