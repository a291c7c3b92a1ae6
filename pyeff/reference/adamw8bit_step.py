"""AdamW with moments stored in 8 bits, in plain torch: what the kernels compute, to the bit.

Parameters, gradients and codes are cut into blocks of `block_size` elements of the flattened tensor (the last one may
be shorter); each block of each moment has one fp32 scale. A step reads codes, computes in fp32, and writes codes:

    p <- p (1 - lr weight_decay)
    m <- m + (g - m) (1 - beta1)
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Both codes are made of the bits of a float, read as an integer: B(x) is a piecewise linear 2^23 (log2 x + 127).

- m is a sign and k in 0..127: B(|m| / scale) = 4 B(k / 128) - 3 B(1), and k = 0 is zero. That is k^4 with straight
  lines between powers of two: 28 binades below the largest magnitude.
- sqrt(v) is k in 0..255: with t = (k + 1) / 256, sqrt(v) / scale is t in the top binade and falls four binades for
  each halving of t below it, 29 in all. No code is zero: a positive v never decodes to zero, so a step cannot become
  m / eps by rounding. A block whose v is all zero has scale 0.

Encoding halves and quarters bits too, so neither direction needs a table, a root or a logarithm. Why these codes:
docs/optimizer_states.md.
"""

from __future__ import annotations

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
    """The numbers one step shares among all elements; float64 rounded to float32 once, as the kernels do."""

    decay: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    step_size: float
    root_factor: float
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
        """From hyperparameters and beta^t, t counting the step about to be taken from 1."""
        return cls(
            decay=_float32(1.0 - lr * weight_decay),
            one_minus_beta1=_float32(1.0 - beta1),
            beta2=_float32(beta2),
            one_minus_beta2=_float32(1.0 - beta2),
            step_size=_float32(lr / (1.0 - beta1_power)),
            root_factor=_float32(1.0 / (1.0 - beta2_power) ** 0.5),
            eps=_float32(eps),
        )


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def adamw_update(p: Tensor, g: Tensor, m: Tensor, root: Tensor, s: AdamWScalars) -> tuple[Tensor, Tensor, Tensor]:
    """One AdamW step from p, g, m and sqrt(v), all of one shape and dtype; the new p, m and sqrt(v)."""
    m = m + (g - m) * s.one_minus_beta1
    # torch's float32 sqrt may be off by a rounding; through float64 it is IEEE's.
    root = ((root * root) * s.beta2 + (g * g) * s.one_minus_beta2).double().sqrt().to(root.dtype)
    p = p * s.decay - (m * s.step_size) / (root * s.root_factor + s.eps)
    return p, m, root


def decode_exp_avg(code: Tensor, scale: Tensor) -> Tensor:
    """First moments fp32 [blocks, block_size] of codes of that shape and scales [blocks]."""
    u = code.to(torch.int32)
    k = u & 127
    magnitude = _from_bits(4 * _bits(k.float() / 128).long() - 3 * _ONE)
    magnitude = torch.where(k == 0, 0.0, magnitude) * scale[:, None]
    return torch.where(u >= 128, -magnitude, magnitude)


def encode_exp_avg(m: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of first moments fp32 [blocks, block_size]."""
    largest = _largest_finite(m.abs())
    scale = (largest * (1 / _float32(_LARGEST_M))).clamp_min(_SMALLEST_SCALE)
    relative = m * (1.0 / scale)[:, None]
    sign = torch.where(relative.signbit() & ~relative.isnan(), 128, 0)
    magnitude = torch.where(relative.isnan(), _LARGEST_M, relative.abs().clamp_max(_LARGEST_M))
    t = _from_bits((_bits(magnitude).long() + 3 * _ONE) >> 2)
    k = (t + 65536.0).view(torch.int32) & 127  # adding 2^16 rounds t to nearest even 1/128
    return (sign | k).to(torch.uint8), scale


def decode_root(code: Tensor, scale: Tensor) -> Tensor:
    """sqrt(v) fp32 [blocks, block_size] of codes of that shape and scales [blocks]."""
    t = (code.to(torch.int32) + 1).float() / 256
    quartic = _from_bits(4 * _bits(t).long() - (3 * _ONE - 3 * _BINADE))
    return torch.minimum(t, quartic) * scale[:, None]


def encode_root(root: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of sqrt(v) fp32 [blocks, block_size], root >= 0."""
    scale = _largest_finite(root)
    relative = root * (1.0 / scale.clamp_min(_SMALLEST_SCALE))[:, None]
    relative = torch.where(relative.isnan(), 1.0, relative.clamp_max(1.0))
    quarter = _from_bits((_bits(relative).long() + (3 * _ONE - 3 * _BINADE)) >> 2)
    t = torch.maximum(relative, quarter).clamp_min(1 / 256)
    code = (t + (32768.0 - 1 / 256)).view(torch.int32) & 255  # rounds t to nearest 1/256 and takes one off
    return code.to(torch.uint8), scale


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
        m = decode_exp_avg(to_blocks(code_m, block_size), scale_m)
        root = decode_root(to_blocks(code_v, block_size), scale_v)
        old = to_blocks(p.detach().float(), block_size)
        new, m, root = adamw_update(old, to_blocks(g.float(), block_size), m, root, scalars)
        # Padding decodes to positive v, which must not raise the scale of the last block.
        inside = to_blocks(torch.ones(p.numel(), dtype=torch.bool, device=p.device), block_size)
        m, root = m.where(inside, 0.0), root.where(inside, 0.0)
        p.copy_(from_blocks(new, p))
        for code, scale, (new_code, new_scale) in (
            (code_m, scale_m, encode_exp_avg(m)),
            (code_v, scale_v, encode_root(root)),
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
