"""Packed batches: where the samples lie on the flat token axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

# Reading borders back from a GPU waits for its stream, and a step passes the same ones for every layer: those of a
# tensor that has not been written since are remembered.
_READ_BACK: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def host_borders(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """`cu_seqlens` [S+1] as int64 on the CPU, once it is known to cut [0, tokens) into S samples.

    Raises `TypeError` or `ValueError` when it is no such list of borders: integers from 0 to `tokens`, never falling.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"cu_seqlens must be a tensor of samples + 1 borders, got {type(cu_seqlens).__name__}")
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be a list of samples + 1 borders, int32 or int64, got {cu_seqlens.dtype} of shape "
            f"{tuple(cu_seqlens.shape)}"
        )
    borders = _read(cu_seqlens)
    if borders[0] != 0 or borders[-1] != tokens or (borders.diff() < 0).any():
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {_shortened(borders)}")
    return borders


def remember_borders(cu_seqlens: Tensor, borders: Tensor) -> None:
    """Say what `cu_seqlens` holds, where `borders` (on the CPU) is known already: nobody waits to read it back."""
    if cu_seqlens.device.type != "cpu":
        _READ_BACK[cu_seqlens] = (cu_seqlens._version, borders.to(torch.int64))


def _read(cu_seqlens: Tensor) -> Tensor:
    # An inference tensor does not count its writes.
    if cu_seqlens.device.type == "cpu" or cu_seqlens.is_inference():
        return cu_seqlens.to("cpu", torch.int64)
    known = _READ_BACK.get(cu_seqlens)
    if known is None or known[0] != cu_seqlens._version:
        known = _READ_BACK[cu_seqlens] = (cu_seqlens._version, cu_seqlens.to("cpu", torch.int64))
    return known[1]


def _shortened(values: Tensor) -> str:
    numbers = [str(v) for v in values.tolist()]
    return "[" + ", ".join(numbers if len(numbers) <= 8 else [*numbers[:4], "...", *numbers[-3:]]) + "]"
