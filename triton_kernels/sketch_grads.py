"""Sketches of many matrices by hashing: sketch[s, j] = sum of sign(r, c) x_s[r, c] over the elements that go to j.

Shapes: x [S, rows, columns] of any floating type but float64, sketches [S, dim] in float32. Rows and columns fall into
cells, in each of which every element has a place of its own, so place j gathers at most one element of a cell: a
program keeps some places of some samples in registers and walks over cells. No atomics; the same bits in every run.

The hash and the cells are those of csrc/common/sketch.h and docs/sketches.md.

Cost: one read of x, some 30 integer operations an element for all samples of a program, 8 bytes for each of the
(part, sample, place) that are summed. `add_tile` is the other way round, for a tile that is in registers already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from .common import on_device_of

CELL, COLUMNS = 8192, 64
SIGN_ROWS = tl.constexpr(32)
SIGNS = tl.constexpr(0)
ROTATIONS = tl.constexpr(1)
# Samples and places of a program, on four warps: 16 sums a thread.
SAMPLES_BLOCK, PLACES_BLOCK, NUM_WARPS = 4, 512, 4
# Programs that fill a large GPU a few times over; parts of fewer cells would cost more to sum than they gain.
PROGRAMS, LEAST_CELLS = 2048, 4


def cell_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a cell: as many elements as a power of two not above `dim` or 8192."""
    elements = min(CELL, 1 << (dim.bit_length() - 1))
    columns = min(COLUMNS, elements)
    return elements // columns, columns


def split_key(key: int) -> tuple[int, int]:
    """A key of 64 bits in two halves, each as the int32 of the same bits."""
    halves = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    low, high = (half - (1 << 32) if half >= 1 << 31 else half for half in halves)
    return low, high


@triton.jit
def mixed(x):
    """A bijection of 32 bits (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15)
    x = x * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def hashed(key_low, key_high, PURPOSE: tl.constexpr, row, column):
    """32 bits of a row (int64) and a column (int32)."""
    a = key_low.to(tl.uint32, bitcast=True)
    b = key_high.to(tl.uint32, bitcast=True)
    low = row.to(tl.uint32)
    high = (row >> 32).to(tl.uint32)
    first = mixed(mixed(mixed(low ^ a) ^ high) + b + PURPOSE)
    second = mixed(mixed(mixed(low + b) ^ high) ^ (a + (0xFFFFFFFF - PURPOSE)))
    return mixed(mixed(column.to(tl.uint32) ^ first) + second)


@triton.jit
def rotation_of(key_low, key_high, cell_row, cell_column, dim):
    """Where the first element of a cell goes."""
    word = hashed(key_low, key_high, ROTATIONS, cell_row, cell_column)
    return ((word.to(tl.uint64) * dim.to(tl.uint64)) >> 32).to(tl.int32)


@triton.jit
def signed(x, key_low, key_high, row, column):
    """x with the signs of its elements; `row` (int64) and `column` broadcast to it."""
    word = hashed(key_low, key_high, SIGNS, row // SIGN_ROWS, column)
    negative = (word >> (row % SIGN_ROWS).to(tl.uint32)) & 1
    return tl.where(negative == 1, -x, x)


@triton.jit
def adamw_step(g, m, v, keep_first, take_first, keep_second, take_second, eps):
    """AdamW's direction as a function of one gradient."""
    return (keep_first * m + take_first * g) / (tl.sqrt_rn(keep_second * v + take_second * (g * g)) + eps)


@triton.jit
def add_tile(
    b,
    m,
    p_sums,
    key_low,
    key_high,
    first_row,
    first_column,
    dim,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds a tile [BM, BN] of one sample, its element (0, 0) at a row and a column of the parameter, to its sketch
    [dim], which is this program's alone: cell by cell, because two elements of one cell never meet."""
    row = first_row + tl.arange(0, BM)
    column = first_column + tl.arange(0, BN)
    cell_row, cell_column = first_row // CELL_ROWS, first_column // CELL_COLUMNS
    b = signed(b, key_low, key_high, row[:, None], column[None, :])
    o_l = ((row % CELL_ROWS) * CELL_COLUMNS).to(tl.int32)[:, None] + (column % CELL_COLUMNS)[None, :]
    for i_r in range(0, (first_row + BM - 1) // CELL_ROWS - cell_row + 1):
        for i_c in range(0, (first_column + BN - 1) // CELL_COLUMNS - cell_column + 1):
            o = o_l + rotation_of(key_low, key_high, cell_row + i_r, cell_column + i_c, dim)
            o = tl.where(o >= dim, o - dim, o)
            of_cell = (row // CELL_ROWS == cell_row + i_r)[:, None] & (column // CELL_COLUMNS == cell_column + i_c)[
                None, :
            ]
            met = tl.load(p_sums + o, mask=m & of_cell, other=0.0)
            tl.store(p_sums + o, met + b, mask=m & of_cell)
            # Another thread may add to the same place next.
            tl.debug_barrier()


@triton.jit
def gather_places(
    p_x,
    p_exp_avg,
    p_exp_avg_sq,
    p_parts,
    key_low,
    key_high,
    S,
    rows,
    columns,
    first_row,
    s_sample,
    s_row,
    dim,
    cells,
    cells_across,
    cells_a_part,
    keep_first,
    take_first,
    keep_second,
    take_second,
    eps,
    CELL_ROWS: tl.constexpr,
    CELL_COLUMNS: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_MOMENTUM: tl.constexpr,
    BS: tl.constexpr,
    BJ: tl.constexpr,
):
    i_part = tl.program_id(1)
    o_s = tl.program_id(2) * BS + tl.arange(0, BS)
    o_j = tl.program_id(0) * BJ + tl.arange(0, BJ)
    m_s = o_s < S
    m_j = o_j < dim
    # Triton makes a constant of an integer argument that is 1.
    key_low = tl.full([], key_low, tl.int32)
    key_high = tl.full([], key_high, tl.int32)
    dim = tl.full([], dim, tl.int32)
    first_row = tl.full([], first_row, tl.int64)
    b_sum = tl.zeros([BS, BJ], tl.float32)
    first_cell_row = first_row // CELL_ROWS
    for i in range(i_part * cells_a_part, tl.minimum(cells, (i_part + 1) * cells_a_part)):
        cell_row = first_cell_row + i // cells_across
        cell_column = i % cells_across
        rotation = rotation_of(key_low, key_high, cell_row, cell_column, dim)
        o_l = o_j - rotation
        o_l = tl.where(o_l < 0, o_l + dim, o_l)  # [BJ], the element of the cell
        row = cell_row * CELL_ROWS + o_l // CELL_COLUMNS
        column = cell_column * CELL_COLUMNS + o_l % CELL_COLUMNS
        r = row - first_row
        m = m_j & (o_l < CELL_ROWS * CELL_COLUMNS) & (r >= 0) & (r < rows) & (column < columns)
        o = o_s.to(tl.int64)[:, None] * s_sample + (r * s_row + column)[None, :]
        b_x = tl.load(p_x + o, mask=m_s[:, None] & m[None, :], other=0.0).to(tl.float32)  # [BS, BJ]
        if HAS_MAP:
            b_v = tl.load(p_exp_avg_sq + r * columns + column, mask=m, other=1.0).to(tl.float32)[None, :]
            b_m = tl.zeros_like(b_v)
            if HAS_MOMENTUM:
                b_m = tl.load(p_exp_avg + r * columns + column, mask=m, other=0.0).to(tl.float32)[None, :]
            b_x = adamw_step(b_x, b_m, b_v, keep_first, take_first, keep_second, take_second, eps)
            b_x = tl.where(m[None, :], b_x, 0.0)
        b_sum += signed(b_x, key_low, key_high, row[None, :], column[None, :])
    p = p_parts + (i_part.to(tl.int64) * S + o_s)[:, None] * dim + o_j[None, :]
    tl.store(p, b_sum, mask=m_s[:, None] & m_j[None, :])


def sketch_grads(
    x: torch.Tensor,
    dim: int,
    keys: Sequence[int],
    *,
    first_row: int = 0,
    exp_avg: torch.Tensor | None = None,
    exp_avg_sq: torch.Tensor | None = None,
    coefficients: Sequence[float] = (0.0, 1.0, 1.0, 0.0, 0.0),
) -> torch.Tensor:
    """Sketches [S, dim] of `x` [S, rows, columns], whose last stride is 1, beginning at `first_row` of the parameter.

    The moments are contiguous [rows, columns]; without `exp_avg_sq` the map is the identity.
    """
    samples, rows, columns = x.shape
    if x.numel() == 0:
        return torch.zeros((samples, dim), dtype=torch.float32, device=x.device)
    dim //= len(keys)
    cell_rows, cell_columns = cell_shape(dim)
    down = (first_row + rows - 1) // cell_rows - first_row // cell_rows + 1
    across = triton.cdiv(columns, cell_columns)
    blocks, groups = triton.cdiv(dim, PLACES_BLOCK), triton.cdiv(samples, SAMPLES_BLOCK)
    cells = down * across
    parts = max(1, min(cells // LEAST_CELLS, triton.cdiv(PROGRAMS, max(1, blocks * groups)), 65535))
    a_part = triton.cdiv(cells, parts)
    parts = triton.cdiv(cells, a_part)
    sums = torch.empty((len(keys), parts, samples, dim), dtype=torch.float32, device=x.device)
    with on_device_of(x):
        for key, of_key in zip(keys, sums, strict=True):
            gather_places[(blocks, parts, groups)](
                x,
                exp_avg,
                exp_avg_sq,
                of_key,
                *split_key(key),
                samples,
                rows,
                columns,
                first_row,
                x.stride(0),
                x.stride(1),
                dim,
                cells,
                across,
                a_part,
                *coefficients,
                CELL_ROWS=cell_rows,
                CELL_COLUMNS=cell_columns,
                HAS_MAP=exp_avg_sq is not None,
                HAS_MOMENTUM=exp_avg is not None,
                BS=SAMPLES_BLOCK,
                BJ=PLACES_BLOCK,
                num_warps=NUM_WARPS,
            )
    return sums.sum(1).transpose(0, 1).reshape(samples, -1).mul_(len(keys) ** -0.5)
