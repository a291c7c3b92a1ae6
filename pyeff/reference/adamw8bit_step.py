"""AdamW with moments stored in 8 bits, in plain torch: what the kernels compute, to the bit.

Parameters, gradients and codes are cut into blocks of `block_size` elements of the flattened tensor (the last one may
be shorter); each block of each moment has one fp32 scale. A step reads codes, computes in fp32, and writes codes:

    p <- p (1 - lr weight_decay)
    m <- m + (g - m) (1 - beta1)
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Both codes are made of the bits of a float, read as an integer: B(x) is a piecewise linear 2^23 (log2 x + 127).

- m is k in -127..127, in two's complement: B(|m| / scale) = 4 B(|k| / 128) - 3 B(1), and k = 0 is zero. That is k^4
  with straight lines between powers of two, and reaches 28 binades down.
- sqrt(v) is k in 0..255: with t = (k + 1) / 256, sqrt(v) / scale is t in the top binade and falls four binades for
  each halving of t below it, 29 in all. No code is zero: a positive v never decodes to zero, so a step cannot become
  m / eps by rounding. A block whose v is all zero has scale 0.

Encoding halves and quarters bits too, so neither direction needs a table, a root or a logarithm. Why these codes:
docs/optimizer_states.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODE = "quartic7-linear_quartic8-flat"
"""Names both codes and the layout of their blocks; states in another code are not readable."""

_ONE = 0x3F800000  # bits of 1.0
_BINADE = 1 << 23
_LARGEST_M = 31 / 32  # what k = 127 stands for, relative to the scale
_SMALLEST_SCALE = 2.0**-126  # below it 1 / scale overflows


@dataclass(frozen=True)
class AdamWScalars:
    """The numbers one step shares among all elements; rounded from float64 to float32 once, as the kernels do."""

    decay: float
    exp_avg_in: float
    exp_avg_out: float
    root_in: float
    root_out: float
    step_size: float
    eps: float

    @classmethod
    def of(
        cls,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        beta1_power: float,
        beta2_power: float,
    ) -> AdamWScalars:
        """From hyperparameters and beta^t, t counting the step about to be taken from 1.

        The step works on M = m / (1 - beta1) and R = sqrt(v / (1 - beta2)), to which a gradient is added as it is.
        What brings them back is applied to the scales of blocks, and the corrections for bias to lr and eps.
        """
        root_out = math.sqrt(1.0 - beta2)
        correction = math.sqrt(1.0 - beta2_power) / root_out
        return cls(
            decay=_float32(1.0 - lr * weight_decay),
            exp_avg_in=_float32(beta1 / (1.0 - beta1)),
            exp_avg_out=_float32(1.0 - beta1),
            root_in=_float32(math.sqrt(beta2) / root_out),
            root_out=_float32(root_out),
            step_size=_float32(lr * correction * (1.0 - beta1) / (1.0 - beta1_power)),
            eps=_float32(eps * correction),
        )


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def adamw_update(p: Tensor, g: Tensor, m: Tensor, root: Tensor, s: AdamWScalars) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step from p, g, beta1 M and sqrt(beta2) R, of one shape and dtype; the new p, M and R."""
    m = m + g
    # torch's float32 sqrt may be off by a rounding; through float64 it is IEEE's.
    root = (root * root + g * g).double().sqrt().to(root.dtype)
    p = p * s.decay - (m * s.step_size) / (root + s.eps)
    return p, m, root


def decode_exp_avg(code: Tensor, factor: Tensor) -> Tensor:
    """m fp32 [blocks, block_size] of codes of that shape, times a factor [blocks] in which the scale is one."""
    k = code.view(torch.int8).float()
    quartic = _from_bits(4 * _bits(k.abs()).long() - (3 * _ONE + 28 * _BINADE))
    # The kernels find quartic / 128 with fewer operations; the clamp keeps a factor near the end of the range finite.
    scaled = (factor * 128).clamp_max(torch.finfo(torch.float32).max)[:, None]
    magnitude = torch.where(k == 0, 0.0, quartic / 128) * scaled
    return torch.where(k < 0, -magnitude, magnitude)


def encode_exp_avg(m: Tensor, out: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of `out` times the values fp32 [blocks, block_size]."""
    largest = _largest_finite(m.abs())
    scale = (largest * out * _float32(32 / 31)).clamp_min(_SMALLEST_SCALE)
    relative = m * (torch.full_like(scale, out) / scale)[:, None]  # out / scale would be two roundings
    relative = torch.where(relative.isnan(), _LARGEST_M, relative.clamp(-_LARGEST_M, _LARGEST_M))
    t = _from_bits((_bits(relative.abs()).long() + 3 * _ONE) >> 2)
    k = (t * 128).round() * relative.sign()
    return k.to(torch.int8).view(torch.uint8), scale


def decode_root(code: Tensor, factor: Tensor) -> Tensor:
    """256 sqrt(v) fp32 [blocks, block_size] of codes of that shape, times a factor [blocks] with the scale in it."""
    t = code.float() + 1.0
    quartic = _from_bits(4 * _bits(t).long() - (3 * _ONE + 21 * _BINADE))
    return torch.minimum(t, quartic) * factor[:, None]


def encode_root(root: Tensor, out: float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes and scales of `out` times the values fp32 [blocks, block_size], none of them negative."""
    scale = _largest_finite(root) * out
    relative = root * (torch.full_like(scale, out) / scale.clamp_min(_SMALLEST_SCALE))[:, None]
    relative = torch.where(relative.isnan(), 1.0, relative.clamp_max(1.0))
    quarter = _from_bits((_bits(relative).long() + (3 * _ONE - 3 * _BINADE)) >> 2)
    t = torch.maximum(relative, quarter).clamp_min(1 / 256)
    return (t * 256 - 1).round().to(torch.uint8), scale


def adamw8bit_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg_code: Sequence[Tensor],
    exp_avg_scale: Sequence[Tensor],
    exp_avg_sq_code: Sequence[Tensor],
    exp_avg_sq_scale: Sequence[Tensor],
    *,
    scalars: AdamWScalars,
    block_size: int,
) -> None:
    """One step for every parameter, in place; the layout of the states is `pyeff.ops.AdamWStates`."""
    for p, g, code_m, scale_m, code_v, scale_v in zip(
        params, grads, exp_avg_code, exp_avg_scale, exp_avg_sq_code, exp_avg_sq_scale, strict=True
    ):
        if p.numel() == 0:
            continue
        m = decode_exp_avg(to_blocks(code_m, block_size), scale_m * scalars.exp_avg_in)
        root = decode_root(to_blocks(code_v, block_size), scale_v * scalars.root_in * (1 / 256))
        old = to_blocks(p.detach().float(), block_size)
        new, m, root = adamw_update(old, to_blocks(g.float(), block_size), m, root, scalars)
        # Padding decodes to positive v, which must not raise the scale of the last block.
        inside = to_blocks(torch.ones(p.numel(), dtype=torch.bool, device=p.device), block_size)
        m, root = m.where(inside, 0.0), root.where(inside, 0.0)
        p.copy_(from_blocks(new, p))
        for code, scale, (new_code, new_scale) in (
            (code_m, scale_m, encode_exp_avg(m, scalars.exp_avg_out)),
            (code_v, scale_v, encode_root(root, scalars.root_out)),
        ):
            code.copy_(from_blocks(new_code, code))
            scale.copy_(new_scale)


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _largest_finite(magnitude: Tensor) -> Tensor:
    # NaN and Inf belong to their element alone: a scale made of them would spoil the whole block.
    return torch.where(magnitude.isfinite(), magnitude, 0.0).amax(1)


def to_blocks(x: Tensor, block_size: int) -> Tensor:
    """The flattened tensor as [blocks, block_size], the last block filled up with zeros."""
    flat = x.reshape(-1)
    short = -flat.numel() % block_size
    return torch.cat([flat, flat.new_zeros(short)]).view(-1, block_size)


def from_blocks(blocks: Tensor, like: Tensor) -> Tensor:
    """The inverse of `to_blocks`: a tensor of the shape of `like`."""
    return blocks.reshape(-1)[: like.numel()].view(like.shape)
