"""Rows of numbers as codes and one float32 scale each, x ~ scale q:

========= ======================== =========================================== ==================
dtype     scale                    codes                                       bytes a row
========= ======================== =========================================== ==================
float32   1                        x                                           4 D
float16   2^e, 2^e <= max|x|       x / scale: no overflow, no early underflow  2 D
int8      max|x| / 127             rounded to the nearest, -127 to 127         D
1bit      mean|x|                  the sign, first coordinate in the high bit  D / 8
========= ======================== =========================================== ==================

The scale is a sample's own, so that the cosine of a row does not depend on it. int8 and 1bit are the absmax and sign
quantisers of QLESS (Ananta et al., 2025, arXiv:2502.01703), applied here to the features before they are normalised. A
row that is not finite has the scale NaN and reads as NaN, so that no rule of selection takes it.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

FeatureType = Literal["float32", "float16", "int8", "1bit"]


def encode_rows(rows: NDArray[np.floating[Any]], dtype: FeatureType) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [n, bytes] and scales [n] of rows [n, D]."""
    x = np.ascontiguousarray(rows, dtype=np.float32)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    if not finite.all():
        x = np.where(finite[:, None], x, np.float32(0))
    largest = np.abs(x).max(axis=1, initial=0.0).astype(np.float64)
    scale: NDArray[np.float64]
    codes: NDArray[np.uint8]
    if dtype == "float32":
        scale, codes = np.ones(len(x)), x.view(np.uint8)
    elif dtype == "float16":
        scale = np.where(largest > 0, np.ldexp(1.0, np.frexp(largest)[1] - 1), 0.0)
        codes = _divided(x, scale).astype(np.float16).view(np.uint8)
    elif dtype == "int8":
        # Rounded up where it would vanish; a code is never beyond 127 then either.
        scale = np.where(largest > 0, np.maximum(largest / 127, np.finfo(np.float32).smallest_subnormal), 0.0)
        scale = scale.astype(np.float32).astype(np.float64)
        codes = np.clip(np.rint(_divided(x, scale)), -127, 127).astype(np.int8).view(np.uint8)
    else:
        scale = np.abs(x).mean(axis=1, dtype=np.float64) if x.shape[1] else np.zeros(len(x))
        codes = np.packbits(x >= 0, axis=1)
    scales = scale.astype(np.float32)
    scales[~finite] = np.nan
    return codes.reshape(len(x), row_bytes(x.shape[1], dtype)), scales


def decode_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], dim: int, dtype: FeatureType
) -> NDArray[np.float32]:
    """Rows [n, D], float32, of codes [n, bytes] and scales [n]."""
    if dtype == "1bit":
        signs = np.unpackbits(codes, axis=1, count=dim).astype(np.float32)
        rows = 2 * signs - 1
    else:
        rows = codes.view({"float32": np.float32, "float16": np.float16, "int8": np.int8}[dtype]).astype(np.float32)
    rows *= scales[:, None]
    return rows


def row_bytes(dim: int, dtype: FeatureType) -> int:
    """Bytes of a row's codes."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "1bit": -(-dim // 8)}[dtype]


def _divided(x: NDArray[np.float32], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(x, scale[:, None], out=np.zeros(x.shape), where=scale[:, None] > 0)
