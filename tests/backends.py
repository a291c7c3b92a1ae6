"""The implementations that a test of an operation runs on, here and on a GPU."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import pytest
import torch

from pyeff.ops._dispatch import interpreting

# The interpreter computes with NumPy, which warns where a GPU would return inf or NaN without a word.
quiet_interpreter = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


class Backend(NamedTuple):
    """An implementation and the device its tensors are on; an operation's tests add the call."""

    impl: str
    device: str

    def supports(self, dtype: torch.dtype) -> bool:
        """Whether bfloat16 need not be multiplied by the interpreter, which cannot."""
        return not (self.impl in ("triton", "gram") and self.device == "cpu" and dtype == torch.bfloat16)


B = TypeVar("B", bound=Backend)


def on_cpu(kind: type[B], *others: str) -> list[B]:
    """Every implementation that CPU tensors can have here; `others` launch Triton kernels too."""
    found = [kind("reference", "cpu"), kind("cpu", "cpu")]
    return [*found, *(kind(impl, "cpu") for impl in ("triton", *others))] if interpreting() else found


def on_every(kind: type[B], *others: str) -> pytest.MarkDecorator:
    """Parametrises `backend`: those of the CPU, and the GPU's for `-m gpu`."""
    gpu = [pytest.param(kind(impl, "cuda"), marks=pytest.mark.gpu) for impl in ("reference", "triton", *others)]
    return pytest.mark.parametrize("backend", [*on_cpu(kind, *others), *gpu], ids=name_of)


def name_of(value: object) -> str | None:
    return f"{value.impl}-{value.device}" if isinstance(value, Backend) else None
