"""Packed batches: where the samples lie on the flat token axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from pyeff.ops._dispatch import check_layout

# Reading borders back from a GPU waits for its stream, and a step passes the same ones for every layer: those of a
# tensor that has not been written since are remembered. Those on the CPU are read anew, which takes microseconds: NumPy
# can write to them and no count would tell.
_READ_BACK: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(eq=False)
class Samples:
    """Borders on the host, and what was made from them before."""

    borders: Tensor  # [S+1], int64
    cuts: list[int]  # the same
    _made: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def rising(self) -> bool:
        return self.cuts == sorted(self.cuts)  # linear in what is sorted already

    def block_pairs(self, block: int) -> int:
        """How many pairs i <= j of blocks of so many tokens the samples have."""
        return self.made(("pairs", block), lambda: sum(self._pairs(block)))

    def _pairs(self, block: int) -> Iterator[int]:
        for start, end in pairwise(self.cuts):
            blocks = -(-(end - start) // block)
            yield blocks * (blocks + 1) // 2

    def made(self, key: object, make: Callable[[], Any]) -> Any:
        """What `make` returned at the first call with this `key`."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def samples_of(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens") -> Samples:
    """The samples that `cu_seqlens` [S+1] cuts [0, tokens) into; a `ValueError` that calls it `name` when it is no such
    list of borders."""
    samples = _read(cu_seqlens)
    if samples.cuts[0] != 0 or samples.cuts[-1] != tokens or not samples.rising:
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {tokens}, got {_shortened(samples.cuts)}")
    return samples


def check_borders(cu_seqlens: Tensor, name: str = "cu_seqlens") -> None:
    """Raises `TypeError` or `ValueError`, calling it `name`, when it cannot be borders, whatever numbers it holds."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a tensor of samples + 1 borders, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 or int64, got {cu_seqlens.dtype}")
    if not (cu_seqlens.is_meta and cu_seqlens in _READ_BACK):
        check_layout(name, cu_seqlens)
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1:
        raise ValueError(f"{name} must be a list of samples + 1 borders, got shape {tuple(cu_seqlens.shape)}")


def host_borders(cu_seqlens: Tensor, tokens: int, name: str = "cu_seqlens") -> Tensor:
    """`cu_seqlens` [S+1] as int64 on the CPU, once it is known to cut [0, tokens) into S samples.

    Raises `TypeError` or `ValueError`, calling it `name`, when it is no such list of borders: integers from 0 to
    `tokens`, never falling.
    """
    check_borders(cu_seqlens, name)
    return samples_of(cu_seqlens, tokens, name).borders


def remember_borders(cu_seqlens: Tensor, borders: Tensor) -> None:
    """Say what `cu_seqlens` holds, where `borders` (on the CPU) is known already: nobody waits to read it back."""
    if cu_seqlens.device.type != "cpu":
        _READ_BACK[cu_seqlens] = (cu_seqlens._version, _samples(borders))


def _samples(borders: Tensor) -> Samples:
    # A copy of their own: the kernels read neighbouring numbers, and must read those that were checked.
    borders = borders.to(torch.int64).clone(memory_format=torch.contiguous_format)
    return Samples(borders, borders.tolist())


def _read(cu_seqlens: Tensor) -> Samples:
    # An inference tensor does not count its writes.
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return _samples(cu_seqlens.cpu())
    known = _READ_BACK.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _READ_BACK[cu_seqlens] = (cu_seqlens._version, _samples(cu_seqlens.cpu()))
    return known[1]


def _shortened(values: list[int]) -> str:
    numbers = [str(v) for v in (values if len(values) <= 8 else [*values[:4], "...", *values[-3:]])]
    return "[" + ", ".join(numbers) + "]"
