"""Factored sketches: every matrix's gradient projected on both sides, layer by layer, at the price of the tokens."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._packed import Samples, samples_of
from pyeff.ops.linear_grad import check_inputs
from pyeff.ops.sketch_grads import matrix_shape
from pyeff.reference.sketch_grads import word

VERSION = 1
_IN, _OUT = 0, 1  # what a hash is for
# Samples of different lengths share a product when padding makes no more than so many rows of each.
_MOST_PADDING = 4


@dataclass(frozen=True)
class FactoredSketch:
    """A linear map of each matrix's gradient to k_out x k_in numbers, which keeps inner products in expectation.

        F(M) = P_out M P_in^T,    F(sum_t g_t a_t^T) = sum_t (P_out g_t) (P_in a_t)^T

    with entries of P_in [k_in, columns] and P_out [k_out, rows] of +-1 / sqrt(k_in) and +-1 / sqrt(k_out), by hashing
    (seed, the parameter's name, the index): nothing is stored, and the map does not depend on batch, order or device.

        E <F(u), F(v)> = <u, v>,    Var <F(u), F(v)> <= |u|^2 |v|^2 ((1 + 2 / k_in) (1 + 2 / k_out) - 1)

    nearly reached by matrices of rank one. Per number kept that is much noisier than `Sketch`, whose variance is at
    most 2 |u|^2 |v|^2 / dim: 16 x 16 numbers of a layer serve as a sketch of 8 at worst. What it is for: features layer
    by layer, and their price, 2 N (d k_in + p k_out + k_in k_out) FLOPs for a linear layer d -> p and N tokens in place
    of the 2 N d p of the samples' gradients. Inner products over all layers add up the layers' own.

    Tensors of two or more dimensions are matrices as in `Sketch`; vectors are left out. The definition, version 1: the
    key is the first 8 bytes of BLAKE2b of the text "pyeff.FactoredSketch 1\\0SEED\\0NAME", and minus is where bit
    i mod 32 of word(0, i div 32, column) of row i of P_in is one, of word(1, j div 32, row) of row j of P_out
    (docs/sketches.md has `word`).

    Choe et al. 2024, "What is Your Data Worth to GPT?" (LoGra), arXiv:2405.13954, with random projections.

    Raises `ValueError` or `TypeError` for sizes that are none.

    >>> import torch, pyeff
    >>> sketch = pyeff.FactoredSketch(4, 2, seed=1)
    >>> sketch({"weight": torch.ones(3, 5), "bias": torch.ones(3)})["weight"].shape
    torch.Size([2, 4])
    """

    k_in: int
    k_out: int
    seed: int = 0

    def __init__(self, k_in: int, k_out: int, *, seed: int = 0) -> None:
        for name, value in {"k_in": k_in, "k_out": k_out, "seed": seed}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if name != "seed" and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
            object.__setattr__(self, name, value)

    @property
    def header(self) -> dict[str, Any]:
        """What two sketches must agree in to be compared; plain numbers and strings, for a file."""
        numbers = {"version": VERSION, "k_in": self.k_in, "k_out": self.k_out, "seed": self.seed}
        return {"format": "pyeff.FactoredSketch", **numbers}

    def __call__(self, named_tensors: Mapping[str, Tensor], *, batch_dims: int = 0) -> dict[str, Tensor]:
        """The sketches [*batch, k_out, k_in] of named tensors [*batch, *shape], vectors left out."""
        found = {}
        for name, tensor in named_tensors.items():
            batch, shape = tensor.shape[:batch_dims], tensor.shape[batch_dims:]
            if len(shape) > 1:
                found[name] = self.of(name, tensor.reshape(-1, *shape)).view(*batch, self.k_out, self.k_in)
        return found

    def of(self, name: str, grads: Tensor) -> Tensor:
        """The sketches [S, k_out, k_in] of S tensors [S, *shape] of one name, of two or more dimensions."""
        rows, columns = matrix_shape(tuple(grads.shape[1:]))
        wide = torch.promote_types(grads.dtype, torch.float32)
        matrices = grads.reshape(grads.shape[0], rows, columns).to(wide)
        left = self._whole(name, _OUT, rows, grads.device).to(wide)
        return self._scaled(left @ matrices @ self._whole(name, _IN, columns, grads.device).to(wide).T)

    def of_product(
        self, name: str, inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor, *, first_row: int = 0
    ) -> Tensor:
        """The sketches [S, k_out, k_in] of packed samples' gradients sum_t g_t a_t^T of a linear layer's weight.

        `inputs` [N, d], `grad_outputs` [N, p] and `cu_seqlens` [S+1] as for `linear_grad`; the layer's weight is the
        rows from `first_row` on of the parameter called `name`. float32, or float64 for float64; sums in the same.
        """
        check_inputs(inputs, grad_outputs, cu_seqlens)
        rows = torch.arange(first_row, first_row + grad_outputs.shape[1], device=inputs.device)
        left = self._signs(name, _OUT, rows) if first_row else self._whole(name, _OUT, len(rows), rows.device)
        with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
            return self._of_rows(name, inputs, _times(grad_outputs, left), cu_seqlens)

    def of_table(self, name: str, ids: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The sketches [S, k_out, k_in] of packed samples' gradients of a table that was read by `ids` [N]: of the sums
        of the rows of `grad_outputs` [N, d] that go to each row of the table."""
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            return self._of_rows(name, grad_outputs, self._signs(name, _OUT, ids).T, cu_seqlens)

    def flops(self, d: int, p: int, lengths: Sequence[int]) -> int:
        """Of `of_product` for a layer d -> p and samples of these many tokens, padding included; p = 0: `of_table`.

        >>> FactoredSketch(4, 2).flops(10, 20, [3, 3])
        1056
        """
        tokens, padded = sum(lengths), len(lengths) * max(lengths, default=0)
        rows = padded if padded <= _MOST_PADDING * tokens else tokens
        return 2 * tokens * (d * self.k_in + p * self.k_out) + 2 * rows * self.k_in * self.k_out

    def _of_rows(self, name: str, inputs: Tensor, outputs: Tensor, cu_seqlens: Tensor) -> Tensor:
        right = _times(inputs, self._whole(name, _IN, inputs.shape[1], inputs.device))  # [N, k_in]
        return self._scaled(_products(outputs.to(right.dtype), right, samples_of(cu_seqlens, right.shape[0])))

    def _scaled(self, sketches: Tensor) -> Tensor:
        return sketches / math.sqrt(self.k_in * self.k_out)

    def _signs(self, name: str, purpose: int, index: Tensor) -> Tensor:
        size = self.k_in if purpose == _IN else self.k_out
        return _unpacked(_words(self._key(name), purpose, size, index), size)

    def _whole(self, name: str, purpose: int, count: int, device: torch.device) -> Tensor:
        """The signs [k, count] of all columns or rows, unscaled."""
        size = self.k_in if purpose == _IN else self.k_out
        return _unpacked(_all_words(self._key(name), purpose, size, count, device), size)

    def _key(self, name: str) -> int:
        return _key_of(f"pyeff.FactoredSketch {VERSION}\0{self.seed}\0{name}")


@functools.lru_cache(maxsize=4096)
def _key_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _words(key: int, purpose: int, size: int, index: Tensor) -> Tensor:
    """The words [size / 32, n] of signs, 32 rows in each, of the columns `index` [n]."""
    group = torch.arange(-(-size // 32), device=index.device)[:, None]
    return word(key, purpose, group, index.long())


# A training step asks for the same layers again: 4 bytes for 32 signs are kept, where hashing them anew takes some
# thirty operations.
@functools.lru_cache(maxsize=4096)
def _all_words(key: int, purpose: int, size: int, count: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        words = _words(key, purpose, size, torch.arange(count, device=device))
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _unpacked(words: Tensor, size: int) -> Tensor:
    """Signs [size, n], +1 or -1, in float32, of words [size / 32, n]."""
    bit = torch.arange(32, dtype=words.dtype, device=words.device)[:, None]
    bits = (words[:, None] >> bit) & 1  # [size / 32, 32, n]
    return (1 - 2 * bits).flatten(0, 1)[:size].to(torch.float32)


def _times(rows: Tensor, signs: Tensor) -> Tensor:
    """rows signs^T [N, k], in float32 or wider."""
    if rows.dtype in (torch.float32, torch.float64):
        return rows @ signs.to(rows.dtype).T
    if rows.is_cuda:  # signs are exact in 16 bits, and the product accumulates and stays in float32
        return torch.mm(rows, signs.to(rows.dtype).T, out_dtype=torch.float32)
    return rows.to(torch.float32) @ signs.T


def _products(left: Tensor, right: Tensor, samples: Samples) -> Tensor:
    """left_s^T right_s of each sample's rows: [S, k_out, k_in]."""
    count, tokens = len(samples.cuts) - 1, left.shape[0]
    longest = int(samples.borders.diff().max()) if count else 0
    if count * longest == tokens:
        left, right = (x.unflatten(0, (count, longest)) for x in (left, right))
    elif count * longest <= _MOST_PADDING * tokens:
        place = samples.made(("padded", left.device), lambda: _padded(samples, longest).to(left.device))
        left, right = (
            x.new_zeros(count * longest, x.shape[1]).index_copy_(0, place, x).unflatten(0, (count, longest))
            for x in (left, right)
        )
    else:
        spans = [slice(*cut) for cut in zip(samples.cuts[:-1], samples.cuts[1:], strict=True)]
        return torch.stack([left[span].T @ right[span] for span in spans])
    return left.transpose(1, 2) @ right


def _padded(samples: Samples, longest: int) -> Tensor:
    """Where each token goes when all samples are as long as the longest."""
    starts, lengths = samples.borders[:-1], samples.borders.diff()
    shift = torch.arange(lengths.numel()) * longest - starts
    return torch.arange(int(samples.borders[-1])) + torch.repeat_interleave(shift, lengths)
