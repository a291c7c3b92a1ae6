"""The gradient of attention from its output and log-sum-exp: logits are formed again, a tile at a time.

With P_ij = e^(S_ij - lse_i) for the keys j that query i sees, gradients dO of out and dl of lse, S and shapes as in
`attention`:

    delta_i = dO_i . out_i - dl_i,   dS = P * (dO V^T - delta) [* (1 - (S / c)^2)]
    dQ = scale dS K,   dK = scale dS^T Q,   dV = P^T dO,    the last two summed over the heads that share a key head.

`row_terms` forms delta and leaves it, with lse, in rows where every sample begins at a tile. Then one of two forms:

* deterministic: `query_gradients` walks keys and `key_gradients` walks queries, each a product of its own for S and for
  dO V^T: 14 D FLOPs and two exponentials for each query, head and key it sees, the same bits in every run;
* else: `key_gradients` alone, which adds to float32 sums of dQ by atomics: 10 D FLOPs and one exponential.

Traffic from memory: q, dO, k and v once a kernel while those of a head stay in the L2 cache, out and dO once more for
delta, dQ, dK, dV once; the sums of dQ are written, read and cleared, 12 bytes a number beside the atomics. Dao 2023,
arXiv:2307.08691, for the walks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .attention_key_gradients import key_gradients
from .attention_query_gradients import query_gradients
from .attention_tiles import (
    LOG2_E,
    NEVER,
    WIDEST_WINDOW,
    borders,
    common_flags,
    dense,
    extent,
    find_tile,
    load_rows,
    padded_head_size,
    scales,
    strides,
    tiles_of,
    token_at,
)
from .common import INFINITE, capability_of, offset_type, on_device_of

# Queries of a tile of rows: a multiple of every kernel's tile.
ROWS = 128


@dataclass(frozen=True)
class Config:
    """Launch choices of one of the kernels: queries and keys of a tile."""

    bm: int
    bn: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Configs:
    """Launch choices of a backward: of `query_gradients`, or None for the form with atomics, and of `key_gradients`."""

    queries: Config | None
    keys: Config


# What `benchmarks/tune_attention.py` printed, for 16-bit inputs without window or softcap: the fastest choices by
# compute capability, padded head size and whether the form is deterministic. Empty: nothing timed on a GPU yet.
MEASURED: dict[tuple[tuple[int, int], int, bool], Configs] = {}


def pick_configs(
    head_size: int, dtype: torch.dtype, window: bool, softcap: bool, capability: tuple[int, int], deterministic: bool
) -> Configs:
    """As measured, else by what registers and shared memory hold, as compiled."""
    wide = padded_head_size(head_size)
    if dtype != torch.float32 and not window and not softcap and (capability, wide, deterministic) in MEASURED:
        return MEASURED[capability, wide, deterministic]
    keys = _pick_for_keys(wide, dtype, softcap, capability, deterministic)
    return Configs(_pick_for_queries(wide, dtype, window, capability) if deterministic else None, keys)


def _pick_for_queries(wide: int, dtype: torch.dtype, window: bool, capability: tuple[int, int]) -> Config:
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers.
        return Config(32, 32, 8, 3) if wide <= 64 else Config(16, 16, 8, 3)
    if wide <= 64:
        return Config(128, 64, 8, 3)
    if capability[0] in (9, 10):
        # A window with 64 keys spills 48 bytes.
        return Config(128, 32 if window else 64, 8, 3) if wide == 128 else Config(64, 32, 8, 3)
    if wide == 128:
        return Config(64, 64, 8, 3) if capability == (8, 0) else Config(128, 32, 8, 3)
    return Config(32, 32, 8, 3)


def _pick_for_keys(
    wide: int, dtype: torch.dtype, softcap: bool, capability: tuple[int, int], deterministic: bool
) -> Config:
    if dtype == torch.float32:
        return Config(32, 32, 8, 3) if wide <= 64 else Config(16, 16, 8, 3)
    if wide <= 64:
        # With 128 keys and dq as well, mma.sync spills 8 bytes.
        return Config(64, 128 if deterministic or capability >= (9, 0) else 64, 8, 3)
    if wide == 128:
        if capability[0] in (9, 10):
            # Two accumulators of 128 keys take half of all registers: with 64 queries 26 numbers a thread spill. The
            # softcap's slope takes as many registers as the logits.
            return Config(32, 64 if softcap or capability[0] == 10 else 128, 8, 3)
        # The second keeps to the 100 KB of shared memory that sm_86, sm_89 and sm_120 have.
        return Config(64, 64, 8, 3) if capability == (8, 0) else Config(32, 64, 8, 3)
    # Two accumulators of 64 keys do not fit, and 32 are too few for wgmma. With dq, three stages take 129 KB.
    return Config(32, 32, 8, 3 if deterministic or capability == (8, 0) or capability[0] in (9, 10) else 2)


@triton.jit
def row_terms(
    p_out,
    p_grad,
    p_lse,
    p_grad_lse,
    p_rows,
    p_cu_q,
    S,
    steps,
    tiles,
    T,
    H,
    D,
    s_g,
    BLOCK: tl.constexpr,
    BD: tl.constexpr,
    OFFSET: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_GRAD_LSE: tl.constexpr,
    EVEN_D: tl.constexpr,
):
    i = tl.program_id(0)
    i_b, i_h, _, start, length, first = find_tile(i, p_cu_q, S, steps, tiles, T, H, BLOCK, PACKED)
    r_m = tl.arange(0, BLOCK)
    r_d = tl.arange(0, BD)
    o_g = r_m.to(OFFSET)[:, None] * s_g[1] + r_d[None, :]  # [BLOCK, BD]
    b_64, h_64 = tl.full([], i_b, tl.int64), tl.full([], i_h, tl.int64)
    token = start + first
    # out: [B, T, H, D] or [N, H, D]; lse, its gradient and delta: [B, H, T] or [H, N]
    o_out = ((b_64 * T + token) * H + h_64) * D + (r_m.to(tl.int64) * H * D)[:, None] + r_d[None, :]
    o_lse = (b_64 * H + h_64) * T + token + r_m
    b_g = load_rows(token_at(p_grad, s_g, i_b, token, i_h), o_g, r_m, length - first, r_d, D, True, EVEN_D)
    b_out = load_rows(p_out, o_out, r_m, length - first, r_d, D, True, EVEN_D)
    b_delta = tl.sum(b_g.to(tl.float32) * b_out.to(tl.float32), 1)
    m_m = first + r_m < length
    if HAS_GRAD_LSE:
        b_delta -= tl.load(p_grad_lse + o_lse, mask=m_m, other=0.0)
    # Infinite where there is no query or it sees nothing, so that P is 0; in units of log 2.
    b_lse = tl.load(p_lse + o_lse, mask=m_m, other=INFINITE)
    b_lse = tl.where(b_lse == NEVER, INFINITE, b_lse * LOG2_E)
    # rows: [2, B, H, tiles * BLOCK] or [2, H, tiles * BLOCK]
    p_row = p_rows + tl.full([], i, tl.int64) * BLOCK + r_m
    tl.store(p_row, b_lse)
    tl.store(p_row + tl.full([], tl.num_programs(0), tl.int64) * BLOCK, b_delta)


def attention_backward(
    grad_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    grad_lse: torch.Tensor | None = None,
    causal: bool = True,
    scale: float,
    cu_seqlens: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
    configs: Configs | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv, contiguous, in the dtypes of q, k and v, from what `attention` returned.

    Beside the results: lse and delta, 8 bytes for each query and head, more where samples are short; unless
    `deterministic`, dq in float32 too. `configs` override that choice. float32 products are exact unless
    torch.backends.cuda.matmul.allow_tf32.
    """
    grad_out, q, k, v = (dense(t) for t in (grad_out, q, k, v))
    out, lse = out.contiguous(), lse.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    packed = cu_seqlens is not None
    heads, head_size = q.shape[-2:]
    key_heads, batch = k.shape[-2], 1 if packed else q.shape[0]
    capability = capability_of(q)
    configs = configs or pick_configs(
        head_size, q.dtype, window is not None, softcap is not None, capability, deterministic
    )
    cu_q, cu_k = borders(q.device, cu_seqlens, cu_seqlens_k)
    samples = cu_seqlens.numel() - 1 if cu_seqlens is not None else 0
    row_tiles, row_steps = tiles_of(q, cu_seqlens, ROWS)
    rows = torch.empty(2, batch * heads * row_tiles * ROWS, dtype=torch.float32, device=q.device)
    dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (k, v))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    flags = common_flags(head_size, causal=causal, window=window, softcap=softcap, packed=packed)
    numbers = (*scales(scale, softcap), scale, 0 if window is None else min(window, WIDEST_WINDOW), samples)
    every_stride = [strides(t, cu_seqlens) for t in (q, k, v, grad_out)]

    def common(config: Config) -> dict[str, Any]:
        offset = offset_type(*(extent(t, max(config.bm, config.bn)) for t in (q, k, v, grad_out)))
        launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        return flags | launch | {"BM": config.bm, "BN": config.bn, "BLOCK": ROWS, "OFFSET": offset}

    with on_device_of(q):
        row_terms[(row_tiles * heads * batch,)](
            out,
            grad_out,
            lse,
            grad_lse,
            rows,
            cu_q,
            samples,
            row_steps,
            row_tiles,
            q.shape[-3],
            heads,
            head_size,
            every_stride[3],
            BLOCK=ROWS,
            OFFSET=offset_type(extent(grad_out, ROWS)),
            HAS_GRAD_LSE=grad_lse is not None,
            # With 8 warps, 64 columns spill 8 bytes on sm_100; with 4, 256 columns spill 328.
            num_warps=4 if padded_head_size(head_size) <= 64 else 8,
            **{name: flags[name] for name in ("BD", "PACKED", "EVEN_D")},
        )
        if configs.queries is not None:
            tiles, steps = tiles_of(q, cu_seqlens, configs.queries.bm)
            query_gradients[(tiles * heads * batch,)](
                q,
                k,
                v,
                grad_out,
                rows,
                dq,
                cu_q,
                cu_k,
                *numbers,
                steps,
                tiles,
                row_tiles,
                q.shape[-3],
                k.shape[-3],
                heads,
                head_size,
                heads // key_heads,
                *every_stride,
                **common(configs.queries),
            )
        sums = None
        if configs.queries is None:
            by_head = (*q.shape[:-3], heads, q.shape[-3], padded_head_size(head_size))
            sums = torch.zeros(by_head, dtype=torch.float32, device=q.device)
        tiles, steps = tiles_of(k, cu_seqlens, configs.keys.bn)
        key_gradients[(tiles * key_heads * batch,)](
            q,
            k,
            v,
            grad_out,
            rows,
            dk,
            dv,
            sums,
            cu_q,
            cu_k,
            *numbers,
            steps,
            tiles,
            row_tiles,
            q.shape[-3],
            k.shape[-3],
            key_heads,
            head_size,
            heads // key_heads,
            *every_stride,
            EDGE=min(configs.keys.bm, 32),
            ADDS_DQ=sums is not None,
            # Only wgmma takes its first operand from shared memory.
            FROM_SHARED=capability >= (9, 0) and q.dtype != torch.float32 and head_size <= 128,
            **common(configs.keys),
        )
        if sums is not None:
            torch.mul(sums.transpose(-3, -2)[..., :head_size], scale, out=dq)
    return dq, dk, dv
