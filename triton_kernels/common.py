"""What the kernels share: arithmetic on tiles, and the device they are launched on."""

from __future__ import annotations

import contextlib

import torch
import triton
import triton.language as tl

# The lowest finite float32: a maximum that has met nothing yet, which can be subtracted from itself.
LOWEST = tl.constexpr(-3.4028234663852886e38)
INFINITE = tl.constexpr(float("inf"))
# A NaN cannot stand here: Triton compares globals between launches, and NaN differs from itself.


@triton.jit
def tanh_and_slope(u):
    """tanh u and its derivative, of float32.

    With q = e^(-2|u|): tanh|u| = (1 - q) / (1 + q) and the slope is 4 q / (1 + q)^2, which keeps its digits where tanh
    rounds to 1. Near 0, where 1 - q cancels, tanh u is u + u^3 P(u^2) (Cephes' tanhf).
    """
    q = tl.exp(-2.0 * tl.abs(u))
    inverse = 1.0 / (1.0 + q)
    far = (1.0 - q) * inverse
    s = u * u
    p = -5.70498872745e-3
    p = p * s + 2.06390887954e-2
    p = p * s - 5.37397155531e-2
    p = p * s + 1.33314422036e-1
    p = p * s - 3.33332819422e-1
    near = u + u * (s * p)
    return tl.where(tl.abs(u) < 0.625, near, tl.where(u < 0, -far, far)), 4.0 * q * inverse * inverse


@triton.jit
def log1p(x):
    """log(1 + x) of float64 x >= 0, to full relative accuracy however small x is.

    The rounding of u = 1 + x is undone by x / (u - 1) (Kahan; Goldberg 1991, theorem 4).
    """
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Makes the tensor's GPU the current one, where Triton launches; nothing for the interpreter's CPU tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def capability_of(tensor: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the tensor's GPU; the interpreter plays a Hopper."""
    return torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else (9, 0)


def sent_to(device: torch.device, table: torch.Tensor) -> torch.Tensor:
    """A small table on the device; from host memory without waiting for the stream, which pageable memory might."""
    if device.type == "cuda" and table.device.type == "cpu":
        table = table.pin_memory()
    return table.to(device, non_blocking=True)


def offset_type(*tiles: tuple[torch.Tensor, tuple[int, ...]]) -> tl.dtype:
    """The integer that holds the offsets within tiles: of each, the tensor and the extent along every dimension."""
    spans = (sum(n * stride for n, stride in zip(size, t.stride(), strict=True)) for t, size in tiles)
    return tl.int32 if max(spans) < 2**31 else tl.int64


def describable(tensor: torch.Tensor) -> bool:
    """Whether a tensor descriptor can stand for `tensor`: rows of adjacent elements that begin aligned."""
    aligned = 16 // tensor.element_size()
    return (
        tensor.stride(-1) == 1
        and all(stride >= tensor.shape[-1] and stride % aligned == 0 for stride in tensor.stride()[:-1])
        and tensor.data_ptr() % 16 == 0
        and tensor.numel() > 0
        and max(tensor.shape) < 2**31
    )
