"""Weight gradient of a linear layer with every sample's squared norm, in one pass over the tokens.

For inputs A [N, D], output gradients G [N, P] and packed samples s, whose gradients are D_s = G_s^T A_s:

    weight_grad [P, D] = sum_s D_s,   norms_sq [S] = || D_s ||_F^2,   dots [S] = <D_s, R> for a reference R [P, D].

Two launches. `accumulate_samples`: a program owns a tile [BM, BN] of the gradient, loops over the samples and, within
one, over its tokens. At a sample's end its tile is complete in registers: `meet_sample` takes from it what is asked,
and it joins the running total. A gradient of one sample never reaches memory; a number for each (tile, sample) does.
`sum_tiles` adds those in a fixed order, in float64. No atomics: the same bits in every run.

The loops are nested because a flat loop over all tokens with a test for the sample's end is not pipelined.

`reduce_panel` is the other way, for gradients of samples that stand in a panel [S, n] in the L2 cache, as a library's
product left them there: one pass takes the squares and the dots of each and adds them to the total.

Cost: 2 N D P FLOPs as for the gradient alone, and about 3 S D P of vector arithmetic. Traffic from memory: as for the
gradient, R once a sample from the L2 cache, and 8 bytes a (tile, sample). Gray et al. 2024, arXiv:2411.00999, for norms
formed beside the gradient at no more FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import capability_of, describable, offset_type, on_device_of, sent_to
from .sketch_grads import adamw_step, add_tile, cell_shape, split_key

# Tiles that share their columns of G run side by side in groups of this many rows, so that the tokens a wave of
# programs reads are near a square and stay in the L2 cache.
GROUP = tl.constexpr(8)
# Bytes for the numbers of (tile, sample); where they do not suffice the tiles go in several launches, of no fewer than
# would fill a GPU once.
WORKSPACE, LEAST_TILES = 32 << 20, 160
SUM_BLOCK = 1024
# Bytes of the sketches that programs own, one [samples, dim] each, and are summed at the end; and the most programs:
# two for each processor of an H100.
SKETCH_BYTES, SKETCH_PROGRAMS = 64 << 20, 264
# Elements of a panel that a program of `reduce_panel` takes, 32 a thread: the numbers it leaves are few.
PANEL_BLOCK, PANEL_WARPS = 8192, 8


@dataclass(frozen=True)
class Config:
    """Launch choices of `accumulate_samples`; `described`: whole blocks of tokens come by tensor descriptors."""

    bm: int
    bn: int
    bk: int
    num_warps: int
    num_stages: int
    described: bool = False


class Sketch(Protocol):
    """What a sketch of the gradients takes: its keys, its places in all, and AdamW's moments or none."""

    keys: Sequence[int]
    dim: int
    first_row: int
    exp_avg: torch.Tensor | None
    exp_avg_sq: torch.Tensor | None
    coefficients: Sequence[float]


# What `benchmarks/tune_linear_grad.py` printed, for 16-bit inputs: by compute capability and whether there are dots, a
# ladder of (elements d p of the weight at least, the fastest choice). Empty: nothing has been timed on a GPU yet.
MEASURED: dict[tuple[tuple[int, int], bool], tuple[tuple[int, Config], ...]] = {}


def pick_config(dtype: torch.dtype, dots: bool, capability: tuple[int, int], elements: int) -> Config:
    """Tiles for a weight of d p `elements`: as measured, else by what registers and shared memory hold, as compiled."""
    if dtype == torch.float32:
        # Exact float32 products run on the plain cores and keep both operands in registers: a reference as large as the
        # accumulators spills 8 to 328 bytes.
        return Config(64, 32 if dots else 64, 32, 8 if dots else 4, 3)
    for least, config in MEASURED.get((capability, dots), ()):
        if elements >= least:
            return config
    # Two accumulators, of the sample and of all: 198 to 234 registers on eight warps. Four warps, or 256 columns, spill
    # 190 to 560 bytes, and 128 columns of a reference beside them 16 to 40.
    bn = 64 if dots else 128
    if capability[0] in (9, 10):
        # Four stages take 128 KB of shared memory, which a lone program has.
        return Config(128, bn, 64, 8, 4)
    # A k of 32 keeps four stages under the 100 KB that sm_86, sm_89 and sm_120 have, and mma.sync its registers.
    return Config(128, bn, 32, 8, 4)


@triton.jit
def meet_sample(b_grad, b_reference, p_partials, s_dots, HAS_NORMS: tl.constexpr, HAS_DOTS: tl.constexpr):
    """The numbers that are taken from one sample's finished tile [BM, BN] while it is in registers."""
    if HAS_NORMS:
        tl.store(p_partials, tl.sum(b_grad * b_grad))
    if HAS_DOTS:
        tl.store(p_partials + s_dots, tl.sum(b_grad * b_reference))


@triton.jit
def halves(b, BM: tl.constexpr, BN: tl.constexpr):
    """The left and the right half [BM, BN / 2] of a tile's columns, which lie in different registers of a thread."""
    return tl.split(tl.permute(tl.reshape(b, [BM, 2, BN // 2]), (0, 2, 1)))


@triton.jit
def sketch_columns(
    b_grad,
    p_sums,
    p_keys,
    p_exp_avg,
    p_exp_avg_sq,
    keep_first,
    take_first,
    keep_second,
    take_second,
    eps,
    first_row,
    i_row,
    i_column,
    P,
    D,
    dim,
    COPIES: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds some columns [BM, BN] of a sample's tile, perhaps mapped by AdamW's moments, to its sketch."""
    o_m = i_row + tl.arange(0, BM)
    o_n = i_column + tl.arange(0, BN)
    m = (o_m < P)[:, None] & (o_n < D)[None, :]
    if HAS_MAP:
        o = o_m.to(tl.int64)[:, None] * D + o_n[None, :]
        b_v = tl.load(p_exp_avg_sq + o, mask=m, other=1.0)
        b_m = tl.zeros_like(b_v)
        if HAS_MOMENTUM:
            b_m = tl.load(p_exp_avg + o, mask=m, other=0.0)
        b_grad = adamw_step(b_grad, b_m, b_v, keep_first, take_first, keep_second, take_second, eps)
    for i in tl.static_range(COPIES):
        low, high = tl.load(p_keys + 2 * i), tl.load(p_keys + 2 * i + 1)
        p, row = p_sums + i * dim, first_row + i_row
        add_tile(b_grad, m, p, low, high, row, i_column, dim, CELL_ROWS, CELL_COLUMNS, BM, BN)


@triton.jit
def accumulate_samples(
    p_inputs,
    p_grads,
    d_inputs,
    d_grads,
    p_cu_seqlens,
    p_reference,
    p_total,
    p_partials,
    p_sketches,
    p_keys,
    p_exp_avg,
    p_exp_avg_sq,
    keep_first,
    take_first,
    keep_second,
    take_second,
    eps,
    first_row,
    dim,
    S,
    D,
    P,
    first_tile,
    tiles,
    s_an,
    s_ad,
    s_gn,
    s_gp,
    s_rp,
    s_rd,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    OFFSET: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIBED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
    COPIES: tl.constexpr,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # Within a group the row of tiles runs fastest, then the column.
    i = first_tile + tl.program_id(0)
    i_group = i // (GROUP * tl.cdiv(D, BN))
    group_size = tl.minimum(tl.cdiv(P, BM) - i_group * GROUP, GROUP)
    i_m = i_group * GROUP + (i % (GROUP * tl.cdiv(D, BN))) % group_size
    i_n = (i % (GROUP * tl.cdiv(D, BN))) // group_size

    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    m_m = o_m < P
    m_n = o_n < D
    # A tile is addressed by a 64-bit base and offsets within it, which OFFSET makes as wide as the strides need.
    r_m = tl.arange(0, BM).to(OFFSET)
    r_n = tl.arange(0, BN).to(OFFSET)
    r_k = o_k.to(OFFSET)
    o_g = r_m[:, None] * s_gp + r_k[None, :] * s_gn  # [BM, BK]
    o_a = r_k[:, None] * s_an + r_n[None, :] * s_ad  # [BK, BN]
    p_g_first = p_grads + (i_m * BM).to(tl.int64) * s_gp
    p_a_first = p_inputs + (i_n * BN).to(tl.int64) * s_ad
    if HAS_DOTS:
        o_r = o_m.to(tl.int64)[:, None] * s_rp + o_n.to(tl.int64)[None, :] * s_rd

    # partials: [1 or 2, S, tiles]
    p_partial = p_partials + tl.program_id(0)
    s_dots = tl.full([], S, tl.int64) * tiles if HAS_NORMS else 0
    b_total = tl.zeros([BM, BN], tl.float32)
    for i_s in range(0, S):
        start = tl.load(p_cu_seqlens + i_s).to(tl.int64)
        length = (tl.load(p_cu_seqlens + i_s + 1).to(tl.int64) - start).to(tl.int32)
        b_grad = tl.zeros([BM, BN], tl.float32)
        described = 0  # blocks of BK tokens
        if DESCRIBED:
            # A descriptor would read on into the next sample: what is left of this one is loaded behind a mask.
            described = length // BK
            for k in range(0, described):
                o_t = (start + k * BK).to(tl.int32)
                b_g = d_grads.load([o_t, i_m * BM]).T  # [BM, BK]
                b_a = d_inputs.load([o_t, i_n * BN])  # [BK, BN]
                b_grad = tl.dot(b_g, b_a, b_grad, input_precision=PRECISION)
        p_g = p_g_first + (start + described * BK) * s_gn
        p_a = p_a_first + (start + described * BK) * s_an
        for k in tl.range(described, tl.cdiv(length, BK), num_stages=1 if DESCRIBED else None):
            m_k = o_k < length - k * BK
            if EVEN:
                b_g = tl.load(p_g + o_g, mask=m_k[None, :], other=0.0)  # [BM, BK]
                b_a = tl.load(p_a + o_a, mask=m_k[:, None], other=0.0)  # [BK, BN]
            else:
                b_g = tl.load(p_g + o_g, mask=m_m[:, None] & m_k[None, :], other=0.0)
                b_a = tl.load(p_a + o_a, mask=m_k[:, None] & m_n[None, :], other=0.0)
            b_grad = tl.dot(b_g, b_a, b_grad, input_precision=PRECISION)
            p_g += tl.full([], BK, tl.int64) * s_gn
            p_a += tl.full([], BK, tl.int64) * s_an
        b_reference = b_grad
        if HAS_DOTS:
            b_reference = tl.load(p_reference + o_r, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        meet_sample(b_grad, b_reference, p_partial, s_dots, HAS_NORMS, HAS_DOTS)
        if HAS_TOTAL:
            b_total += b_grad
        if COPIES:
            # sketches: [programs, S, COPIES * dim]. A quarter of the columns at a time: all of them, with their
            # addresses and signs, do not fit into registers.
            p_sketch = p_sketches + (tl.program_id(0).to(tl.int64) * S + i_s) * (dim * COPIES)
            # A length is not negative, which the compiler does not know: it would form the hashes of all quarters once
            # and keep them.
            opaque = tl.minimum(length, 0)
            b_left, b_right = halves(b_grad, BM, BN)
            b_0, b_1 = halves(b_left, BM, BN // 2)
            b_2, b_3 = halves(b_right, BM, BN // 2)
            for QUARTER in tl.static_range(4):
                sketch_columns(
                    b_0 if QUARTER == 0 else b_1 if QUARTER == 1 else b_2 if QUARTER == 2 else b_3,
                    p_sketch,
                    p_keys,
                    p_exp_avg,
                    p_exp_avg_sq,
                    keep_first,
                    take_first,
                    keep_second,
                    take_second,
                    eps,
                    tl.full([], first_row, tl.int64),
                    i_m * BM,
                    i_n * BN + QUARTER * (BN // 4) + opaque,
                    P,
                    D,
                    tl.full([], dim, tl.int32),
                    COPIES,
                    CELL_ROWS,
                    CELL_COLUMNS,
                    HAS_MAP,
                    HAS_MOMENTUM,
                    BM,
                    BN // 4,
                )
        p_partial += tiles
    if HAS_TOTAL:
        # total: [P, D]
        p_t = p_total + o_m.to(tl.int64)[:, None] * D + o_n[None, :]
        tl.store(p_t, b_total.to(p_total.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@triton.jit
def sum_tiles(p_partials, p_sums, tiles, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """sums[i] = sum over tiles of partials [rows, tiles], added to what is there if ADD."""
    i = tl.program_id(0).to(tl.int64)
    o = tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], tl.float64)
    for j in range(0, tl.cdiv(tiles, BLOCK)):
        m = j * BLOCK + o < tiles
        b_sum += tl.load(p_partials + i * tiles + j * BLOCK + o, mask=m, other=0.0).to(tl.float64)
    whole = tl.sum(b_sum, 0)
    if ADD:
        whole += tl.load(p_sums + i).to(tl.float64)
    tl.store(p_sums + i, whole.to(tl.float32))


@triton.jit
def reduce_panel_block(
    p_panel,
    p_reference,
    p_total,
    p_norms,
    p_dots,
    S,
    elements,
    s_reference,
    s_sums,
    BLOCK: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    START: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    HAS_DOTS: tl.constexpr,
):
    """Some elements of all samples: their part of the total, and of each sample's sums."""
    i = tl.program_id(0)
    o = i * BLOCK + tl.arange(0, BLOCK)
    m = o < elements
    b_total = tl.zeros([BLOCK], tl.float32)
    if HAS_TOTAL and not START:
        b_total = tl.load(p_total + o, mask=m, other=0.0)
    for i_s in range(0, S):
        at = tl.full([], i_s, tl.int64)
        b_x = tl.load(p_panel + at * elements + o, mask=m, other=0.0)
        if HAS_NORMS:
            p_sum = p_norms + at * s_sums + i
            tl.store(p_sum, tl.load(p_sum) + tl.sum(b_x * b_x).to(tl.float64))
        if HAS_DOTS:
            b_r = tl.load(p_reference + at * s_reference + o, mask=m, other=0.0)
            p_sum = p_dots + at * s_sums + i
            tl.store(p_sum, tl.load(p_sum) + tl.sum(b_x * b_r).to(tl.float64))
        if HAS_TOTAL:
            b_total += b_x
    if HAS_TOTAL:
        tl.store(p_total + o, b_total, mask=m)


def panel_blocks(elements: int) -> int:
    """How many numbers `reduce_panel` keeps of a sample, and sums into, for a panel of so many elements a sample."""
    return triton.cdiv(elements, PANEL_BLOCK)


def reduce_panel(
    panel: torch.Tensor,
    *,
    reference: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
    start_total: bool = False,
    norms_sq: torch.Tensor | None = None,
    dots: torch.Tensor | None = None,
) -> None:
    """One pass over contiguous float32 `panel` [S, ...]: adds each row's sum of squares, in parts, to the rows of
    `norms_sq`, its dot with `reference` ([...] or [S, ...]) to those of `dots`, both float64 [>= S, panel_blocks], and
    the sum of the rows to `total` [...]; `start_total` overwrites that instead. The same bits in every run.
    """
    samples, elements = panel.shape[0], panel[0].numel()
    sums = norms_sq if norms_sq is not None else dots
    with on_device_of(panel):
        reduce_panel_block[(panel_blocks(elements),)](
            panel,
            reference,
            total,
            norms_sq,
            dots,
            samples,
            elements,
            elements if reference is not None and reference.ndim == panel.ndim else 0,
            0 if sums is None else sums.stride(0),
            BLOCK=PANEL_BLOCK,
            HAS_TOTAL=total is not None,
            START=start_total,
            HAS_NORMS=norms_sq is not None,
            HAS_DOTS=dots is not None,
            num_warps=PANEL_WARPS,
        )


def linear_grad(
    inputs: torch.Tensor,
    grad_outputs: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    weight_grad: bool = True,
    norms: bool = True,
    reference: torch.Tensor | None = None,
    sketch: Sketch | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight_grad [P, D] in the dtype of `inputs`, norms_sq [S], dots [S] and sketches [S, dim] in float32; [0] where
    not asked for.

    `inputs` [N, D] and `grad_outputs` [N, P] in one dtype, `cu_seqlens` [S+1] int32 or int64. float32 products are
    exact unless torch.backends.cuda.matmul.allow_tf32. Beside the result: 32 MiB, or 1280 bytes a sample if more.
    """
    (d, p), samples = (inputs.shape[1], grad_outputs.shape[1]), cu_seqlens.numel() - 1
    wanted = norms + (reference is not None)
    total = torch.empty((p, d) if weight_grad else 0, dtype=inputs.dtype, device=inputs.device)
    sums = torch.empty((wanted, samples), dtype=torch.float32, device=inputs.device)
    capability = capability_of(inputs)
    config = config or pick_config(inputs.dtype, reference is not None or sketch is not None, capability, d * p)
    tiles = triton.cdiv(p, config.bm) * triton.cdiv(d, config.bn)
    # Before sm_90 no unit reads by descriptor.
    described = config.described and capability >= (9, 0) and describable(inputs) and describable(grad_outputs)
    step = min(tiles, max(LEAST_TILES, WORKSPACE // max(1, 4 * wanted * samples)))
    copies = 0 if sketch is None else len(sketch.keys)
    dim = 0 if sketch is None else sketch.dim
    sketches, keys, moments = sums.new_empty(0), None, (None, None)
    if sketch is not None:
        step = max(1, min(step, tiles, SKETCH_PROGRAMS, SKETCH_BYTES // max(1, 4 * samples * dim)))
        sketches = torch.zeros((step, samples, dim), dtype=torch.float32, device=inputs.device)
        halves = [half for key in sketch.keys for half in split_key(key)]
        keys = sent_to(inputs.device, torch.tensor(halves, dtype=torch.int32))
        moments = tuple(
            None if t is None else t.to(torch.float32).contiguous() for t in (sketch.exp_avg, sketch.exp_avg_sq)
        )
    cell_rows, cell_columns = cell_shape(dim // copies) if copies else (1, 1)
    partials = torch.empty(wanted * samples * step, dtype=torch.float32, device=inputs.device)
    cu_seqlens = sent_to(inputs.device, cu_seqlens)
    if tiles == 0:
        sums.zero_()
    with on_device_of(inputs):
        for first in range(0, tiles, max(1, step)):
            count = min(step, tiles - first)
            accumulate_samples[(count,)](
                inputs,
                grad_outputs,
                TensorDescriptor.from_tensor(inputs, [config.bk, config.bn]) if described else None,
                TensorDescriptor.from_tensor(grad_outputs, [config.bk, config.bm]) if described else None,
                cu_seqlens,
                reference,
                total if weight_grad else None,
                partials,
                sketches if copies else None,
                keys,
                *moments,
                *((sketch.coefficients if sketch is not None else ()) or (0.0, 1.0, 1.0, 0.0, 0.0)),
                sketch.first_row if sketch is not None else 0,
                dim // max(1, copies),
                samples,
                d,
                p,
                first,
                count,
                *inputs.stride(),
                *grad_outputs.stride(),
                *(reference.stride() if reference is not None else (0, 0)),
                BM=config.bm,
                BN=config.bn,
                BK=config.bk,
                OFFSET=offset_type((inputs, (config.bk, config.bn)), (grad_outputs, (config.bk, config.bm))),
                EVEN=p % config.bm == 0 and d % config.bn == 0,
                DESCRIBED=described,
                HAS_TOTAL=weight_grad,
                HAS_NORMS=norms,
                HAS_DOTS=reference is not None,
                COPIES=copies,
                CELL_ROWS=cell_rows,
                CELL_COLUMNS=cell_columns,
                HAS_MAP=moments[1] is not None,
                HAS_MOMENTUM=moments[0] is not None,
                PRECISION="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
                num_warps=config.num_warps,
                num_stages=config.num_stages,
            )
            if sums.numel():
                sum_tiles[(sums.numel(),)](partials, sums, count, ADD=first > 0, BLOCK=SUM_BLOCK)
    empty = sums.new_empty(0)
    if sketch is not None:
        sketches = sketches.sum(0).mul_(copies**-0.5)
    return total, sums[0] if norms else empty, sums[-1] if reference is not None else empty.clone(), sketches
