"""Random choices that a seed repeats on every machine."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from pyeff.selection.matrix import IntArray


def generator(seed: int) -> np.random.Generator:
    """A counter-based generator of this seed.

    Raises `TypeError` or `ValueError` unless ``seed`` is an int in [0, 2**64).
    """
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    return np.random.Generator(np.random.Philox(key=int(seed)))


def boltzmann(values: ArrayLike, k: int, *, temperature: float = 1.0, seed: int = 0) -> IntArray:
    """Draw ``k`` samples without replacement, each time with probability proportional to exp(value / temperature).

    In the order drawn. ``temperature`` is in units of the values: towards 0 this is `top_k`, towards infinity a uniform
    draw. Samples whose value is NaN or -inf are never drawn, so that fewer than ``k`` may come back. All draws at once
    are the ``k`` largest of value / temperature plus Gumbel noise (Kool et al., 2019, arXiv:1903.06059); every prefix
    is the draw for a smaller ``k``. OPUS draws its batches so (2026, arXiv:2602.05400), but one sample at a time,
    as what is drawn lowers the values of the others.

    Raises `ValueError` for a negative ``k``, a temperature that is not positive, and for +inf.

    >>> sorted(boltzmann([0.0, 50.0, 49.0, 0.0], 2, seed=3).tolist())
    [1, 2]
    """
    from pyeff.selection.subset import top_k

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"values must be [samples], got {array.shape}")
    if not math.isfinite(temperature) or temperature <= 0:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if np.isposinf(array).any():
        raise ValueError(f"values must not be +inf, but that of sample {int(np.isposinf(array).argmax())} is")
    noise = generator(seed).gumbel(size=array.size)
    return top_k(np.where(np.isneginf(array), np.nan, array / temperature + noise), k)


def uniform(count: int, k: int, *, seed: int = 0) -> IntArray:
    """Draw ``k`` of ``count`` samples, each set of them equally likely; in the order drawn.

    What every method must beat, for the nothing it costs.

    >>> uniform(5, 2, seed=1).tolist() == uniform(5, 5, seed=1).tolist()[:2]
    True
    """
    from pyeff.selection.subset import top_k

    return top_k(generator(seed).random(count), k)
