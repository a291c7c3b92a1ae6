"""Sketches by hashing: the definition, version 1 (docs/sketches.md), in integers and sums of torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CELL, COLUMNS, SIGN_ROWS = 8192, 64, 32
SIGNS, ROTATIONS, BUCKETS, BITS = 0, 1, 2, 3
_32_BITS = 0xFFFFFFFF
# Elements whose hashes exist at a time; a dense sketch forms dim numbers for each.
_PIECE = 1 << 20


def mixed(x: Tensor) -> Tensor:
    """A bijection of 32 bits, held in int64 (Wellons' lowbias32)."""
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & _32_BITS  # the product wraps at 64 bits, which leaves the lower 32 alone
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & _32_BITS
    return x ^ (x >> 16)


def word(key: int, purpose: int, row: Tensor, column: Tensor) -> Tensor:
    """32 hashed bits, in int64, of a row and a column (both int64, of shapes that broadcast)."""
    low, high = row & _32_BITS, row >> 32
    a, b = key & _32_BITS, (key >> 32) & _32_BITS
    first = mixed((mixed(mixed(low ^ a) ^ high) + purpose + b) & _32_BITS)
    second = mixed(mixed(mixed((low + b) & _32_BITS) ^ high) ^ ((a + (~purpose & _32_BITS)) & _32_BITS))
    return mixed((mixed(column ^ first) + second) & _32_BITS)


def cell_shape(dim: int) -> tuple[int, int]:
    """Rows and columns of a cell: as many elements as a power of two not above `dim` or 8192."""
    elements = min(CELL, 1 << (dim.bit_length() - 1))
    columns = min(COLUMNS, elements)
    return elements // columns, columns


def scaled(hashed: Tensor, dim: int) -> Tensor:
    """32 bits to an integer in [0, dim): the upper half of the product."""
    high, low = hashed >> 16, hashed & 0xFFFF
    return (high * dim + ((low * dim) >> 16)) >> 16


def signs(key: int, row: Tensor, column: Tensor) -> Tensor:
    """+1 or -1 (int64) for each element."""
    bits = word(key, SIGNS, row // SIGN_ROWS, column) >> (row % SIGN_ROWS)
    return 1 - 2 * (bits & 1)


def places(key: int, kind: str, dim: int, row: Tensor, column: Tensor) -> Tensor:
    """Where each element goes: int64 in [0, dim)."""
    if kind == "countsketch":
        return scaled(word(key, BUCKETS, row, column), dim)
    rows, columns = cell_shape(dim)
    rotation = scaled(word(key, ROTATIONS, row // rows, column // columns), dim)
    return (rotation + (row % rows) * columns + column % columns) % dim


def sketch_rows(x: Tensor, row: Tensor, dim: int, keys: list[int], *, kind: str = "balanced") -> Tensor:
    """What rows of a matrix add to the sketch: [S, dim] of `x` [S, n, d], the row i of which is row `row[i]` [n].

        sketch[s, j] = sum over the (i, c) that go to j of sign(row_i, c) x[s, i, c] / sqrt(keys)

    where each of the keys fills its share of the places, one after the other.

    For kind="rademacher" every element goes everywhere: sketch[s, j] = sum of sign_j(row_i, c) x[s, i, c] / sqrt(dim).
    Computed in float64 for float64 `x`, else in float32 with sums in float64.
    """
    samples, n, d = x.shape
    out = x.new_zeros(samples, len(keys), dim // len(keys), dtype=torch.float64)
    column = torch.arange(d, device=x.device)
    step = max(1, _PIECE // max(1, d * (dim if kind == "rademacher" else 1)))
    for begin in range(0, n if d else 0, step):
        some, of = x[:, begin : begin + step].flatten(1).double(), row[begin : begin + step, None]
        for i, key in enumerate(keys):
            if kind == "rademacher":
                out[:, i] += some @ _dense_signs(key, dim, of, column)
            else:
                place = places(key, kind, out.shape[2], of, column).flatten()
                # A bucket may come several times, and floats added in no fixed order would differ between runs; in
                # float64 that is far below what float32 shows.
                out[:, i].index_add_(1, place, some * signs(key, of, column).flatten())
    out = out.flatten(1) / math.sqrt(dim if kind == "rademacher" else len(keys))
    return out if x.dtype == torch.float64 else out.to(torch.float32)


def _dense_signs(key: int, dim: int, row: Tensor, column: Tensor) -> Tensor:
    """+1 or -1 [elements, dim] in float64: bit j % 32 of the word for purpose 3 + j // 32."""
    bit = torch.arange(32, device=row.device)
    words = torch.stack([word(key, BITS + i, row, column).flatten() for i in range((dim + 31) // 32)], 1)
    return (1 - 2 * ((words[:, :, None] >> bit) & 1)).flatten(1)[:, :dim].double()


def adamw_step(
    grad: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor,
    keep_first: float,
    take_first: float,
    keep_second: float,
    take_second: float,
    eps: float,
) -> Tensor:
    """AdamW's direction as a function of one gradient: (k1 m + t1 g) / (sqrt(k2 v + t2 g^2) + eps)."""
    dtype = torch.promote_types(grad.dtype, torch.float32)
    grad = grad.to(dtype)
    numerator = take_first * grad if exp_avg is None else keep_first * exp_avg.to(dtype) + take_first * grad
    return numerator / ((keep_second * exp_avg_sq.to(dtype) + take_second * grad.square()).sqrt() + eps)
