"""Tests of operations: reproducible inputs, and allocations that betray whoever leaves them unwritten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    if tensor.dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64):
        return tensor.fill_(0x5A)
    return tensor


@pytest.fixture(autouse=True)
def poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty and its relatives return NaN (integers: 0x5A), so an output nobody wrote fails its test."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: _poison(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: _poison(empty_like(*a, **k)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *a, **k: _poison(new_empty(*a, **k)))
    return


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random inputs in every run; a test that wants others seeds its own generator."""
    torch.manual_seed(0)
