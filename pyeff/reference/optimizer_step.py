"""Adam, AdamW, Lion and SGD with momentum over states in 8 bits, in plain torch: what the kernels compute, to the bit.

Parameters, gradients and codes are cut into blocks of `block_size` elements; each block of each moment has one fp32
scale. Blocks run along the flattened trailing dimensions of each row of the first dimension and the last one of a row
may be shorter, so that no block is cut where a tensor is split between rows; a vector is one row. A step reads codes,
computes in fp32, and writes codes.
With t the number of steps taken including this one:

    AdamW   p <- p (1 - lr weight_decay)
            m <- m + (g - m) (1 - beta1)
            v <- beta2 v + (1 - beta2) g^2
            p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
    Adam    the same with g <- g + weight_decay p in place of the first line
    Lion    p <- p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
            m <- beta2 m + (1 - beta2) g
    SGD     g <- g + weight_decay p
            m <- momentum m + (1 - dampening) g, and m <- g in the first step
            p <- p - lr m, or with Nesterov's momentum p <- p - lr (g + momentum m)

Both codes are made of the bits of a float, read as an integer: B(x) is a piecewise linear 2^23 (log2 x + 127).

- m is k in -127..127, in two's complement: B(|m| / scale) = 4 B(|k| / 128) - 3 B(1), and k = 0 is zero. That is k^4
  with straight lines between powers of two, and reaches 28 binades down.
- sqrt(v) is k in 0..255: B(sqrt(v) / scale) = 3 B((k + 1) / 256) - 2 B(1), the cube in the same sense, 24 binades. No
  code is zero: a positive v never decodes to zero, so a step cannot become m / eps by rounding. A block whose v is all
  zero has scale 0. A step moves v by a thousandth of itself, far less than the distance of two codes, and rounding to
  nearest would not follow. So (k + 1) / 256 is rounded up or down at random, by one offset for all elements of a block:
  it begins at a random place for each block and goes on by the golden section with each step. Codes below 3 are not
  written, as it would change sqrt(v) by factors of 3 and 8 to round one to another: what is written spans 18 binades.

Encoding takes a quarter and a third of the bits, so neither direction needs a table, a root or a logarithm. Why these
codes: docs/optimizer_states.md.

A weight in bf16 is rounded once a step, by the rule named `master`: "none" to nearest; "stochastic" up with the
probability of what is cut off, by random bits made of (seed, key of the parameter, step, block, place in the block);
"ecc8" by the same bits to eight more, and these kept in a byte beside the nearest bf16; "fp32" to nearest of an fp32
twin.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CODE = "quartic7-cube8-rows"
"""Names both codes and the layout of their blocks; states in another code are not readable."""

RULES = ("adam", "lion", "sgd")
MASTERS = ("stochastic", "ecc8", "fp32", "none")
AT_RANDOM = ("stochastic", "ecc8")
"""Those that round by random bits."""

_ONE = 0x3F800000  # bits of 1.0
_BINADE = 1 << 23
_TWO_THIRDS = 0x2A555500  # of the bits of 1.0
_LARGEST_CODED = 31 / 32  # what k = 127 stands for, relative to the scale
_SMALLEST_T = 1 / 64  # codes below 3 are read and not written
_SMALLEST_SCALE = 2.0**-126  # below it 1 / scale overflows
_WORD, _LONG = (1 << 32) - 1, (1 << 64) - 1
_BF16_NAN = 0x7FC0
_GOLDEN = 0x9E3779B97F4A7C15
_ROOT_OF_TWO = 0x6A09E667  # what it is over one, in 2^32
_NORM_CHUNK = 4096
_LARGEST_FLOAT = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class OptimizerRule:
    """What all parameters of a step share; the fields that a rule does not have are ignored by it.

    rule: "adam", "lion" or "sgd" (its momentum is beta1). coded: states in 8 bits, else fp32. coupled: weight decay is
    added to the gradient (Adam, SGD) instead of taken off the weight (AdamW, Lion). clip_norm: gradients are scaled by
    min(1, clip_norm / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_ does. seed: of the random bits.
    """

    rule: str
    lr: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    dampening: float = 0.0
    clip_norm: float = math.inf
    seed: int = 0
    block_size: int = 256
    coded: bool = True
    coupled: bool = False
    nesterov: bool = False


@dataclass(frozen=True)
class StepScalars:
    """The numbers one step shares among a parameter's elements, rounded from float64 to float32 once.

    With codes, Adam works on M = m / (1 - beta1) and R = sqrt(v / (1 - beta2)), to which a gradient is added as it is.
    What brings them back is applied to the scales of blocks, and the corrections for bias to lr and eps.
    """

    clip: float
    l2: float
    decay: float
    step_size: float
    first_in: float
    gradient_in: float
    second_in: float
    gradient_in2: float
    eps: float
    first_out: float
    second_out: float
    pattern: int
    stream: int

    @classmethod
    def of(
        cls,
        rule: OptimizerRule,
        step: int,
        powers: tuple[float, float] = (1.0, 1.0),
        *,
        norm: float = 0.0,
        key: int = 0,
    ) -> StepScalars:
        """`step` and the powers of the betas are those of the step about to be taken, counted from 1."""
        clip = 1.0
        if rule.clip_norm < math.inf:
            clip = min(1.0, rule.clip_norm / (norm + 1e-6))
        lr, beta1, beta2 = rule.lr, rule.beta1, rule.beta2
        first_out = second_out = 1.0
        step_size, eps = lr, 0.0
        first_in, gradient_in, second_in, gradient_in2 = beta1, 1.0 - beta1, beta2, 1.0 - beta2
        if rule.rule == "adam":
            correction = math.sqrt(1.0 - powers[1])
            if rule.coded:
                first_out, second_out = 1.0 - beta1, math.sqrt(1.0 - beta2)
                unit = correction / second_out
                first_in, second_in = beta1 / first_out, math.sqrt(beta2) / second_out
                gradient_in = gradient_in2 = 1.0
                step_size = lr * unit * first_out / (1.0 - powers[0])
                eps = rule.eps * unit
            else:
                step_size = lr * correction / (1.0 - powers[0])
                eps = rule.eps * correction
        elif rule.rule == "sgd":
            gradient_in = 1.0 - rule.dampening if step > 1 else 1.0
        pattern = _mixed(rule.seed + _GOLDEN * (key + 1))
        return cls(
            clip=_float32(clip),
            l2=_float32(rule.weight_decay) if rule.coupled else 0.0,
            decay=1.0 if rule.coupled else _float32(1.0 - lr * rule.weight_decay),
            step_size=_float32(step_size),
            first_in=_float32(first_in),
            gradient_in=_float32(gradient_in),
            second_in=_float32(second_in),
            gradient_in2=_float32(gradient_in2),
            eps=_float32(eps),
            first_out=_float32(first_out),
            second_out=_float32(second_out),
            pattern=pattern,
            stream=_mixed(pattern ^ step),
        )


def _float32(x: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def _mixed(x: int) -> int:
    """A permutation of 64-bit integers that spreads every bit (splitmix64's)."""
    x &= _LONG
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _LONG
    return x ^ (x >> 31)


def update(
    rule: OptimizerRule, s: StepScalars, p: Tensor, g: Tensor, first: Tensor, second: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The new weight and moments of one shape and dtype.

    With codes, Adam takes beta1 M and sqrt(beta2) R and gives M and R; else `first` is m and `second` is v.
    """
    if rule.rule == "adam":
        assert second is not None
        if rule.coded:
            m = first + g
            square = second * second + g * g
        else:
            m = first + (g - first) * s.gradient_in
            square = second * s.second_in + (g * s.gradient_in2) * g
        # torch's float32 sqrt may be off by a rounding; through float64 it is IEEE's.
        root = square.double().sqrt().to(square.dtype)
        step = (m * s.step_size) * (1.0 / (root + s.eps))
        return p * s.decay - step, m, root if rule.coded else square
    mean = first * s.first_in + g * s.gradient_in
    if rule.rule == "lion":
        sign = torch.where(mean.isnan(), mean, mean.sign())
        return p * s.decay - sign * s.step_size, first * s.second_in + g * s.gradient_in2, None
    direction = g + mean * s.first_in if rule.nesterov else mean
    return p - direction * s.step_size, mean, None


# ------------------------------------------------------------------------------------------------------- the codes


def decode_signed(code: Tensor, factor: Tensor) -> Tensor:
    """m fp32 [blocks, block_size] of codes of that shape, times a factor [blocks] in which the scale is one."""
    k = code.view(torch.int8).float()
    quartic = _from_bits(4 * _bits(k.abs()).long() - (3 * _ONE + 28 * _BINADE))
    # The kernels find quartic / 128 with fewer operations; the clamp keeps a factor near the end of the range finite.
    scaled = (factor * 128).clamp_max(_LARGEST_FLOAT)[:, None]
    magnitude = torch.where(k == 0, 0.0, quartic / 128) * scaled
    return torch.where(k < 0, -magnitude, magnitude)


def encode_signed(m: Tensor, out: float = 1.0, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of `out` times the values fp32 [blocks, block_size].

    offset: added to t of each block before rounding, fp32 [blocks] from `first_offsets`; else to nearest.
    """
    largest = _largest_finite(m.abs())
    scale = (largest * out * _float32(32 / 31)).clamp_min(_SMALLEST_SCALE)
    relative = m * (torch.full_like(scale, out) / scale)[:, None]  # out / scale would be two roundings
    relative = torch.where(relative.isnan(), _LARGEST_CODED, relative.clamp(-_LARGEST_CODED, _LARGEST_CODED))
    t = _from_bits((_bits(relative.abs()).long() + 3 * _ONE) >> 2) * relative.sign()
    if offset is not None:
        t = t + offset[:, None]
    k = (t * 128).round()
    return k.to(torch.int8).view(torch.uint8), scale


def decode_root(code: Tensor, factor: Tensor) -> Tensor:
    """sqrt(v) fp32 [blocks, block_size] of codes of that shape, times a factor [blocks] in which the scale is one."""
    cube = _from_bits(3 * _bits(code.float() + 1.0).long() - 2 * _ONE - 2 * _BINADE)
    # The kernels leave 2^22 on this side of the product, too.
    return cube * (factor / (1 << 22))[:, None]


def encode_root(root: Tensor, out: float = 1.0, offset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and scales of `out` times the values fp32 [blocks, block_size], none of them negative.

    offset: added to t of each block before rounding, fp32 [blocks] from `root_offsets`; else to nearest.
    """
    scale = _largest_finite(root) * out
    relative = root * (torch.full_like(scale, out) / scale.clamp_min(_SMALLEST_SCALE))[:, None]
    relative = torch.where(relative.isnan(), 1.0, relative.clamp_max(1.0))
    # A third of the bits in fp32, rounded to units of 2^8 as where 2^31 is added; 2/3 B(1) so that 1 becomes 1.
    third = _bits(relative).float() * _float32(1 / 3) + _float32(2.0**31 + _TWO_THIRDS)
    t = _from_bits(third.long() - (1 << 31))
    if offset is not None:
        t = t + offset[:, None]
    return (t.clamp_min(_SMALLEST_T) * 256 - 1).round().to(torch.uint8), scale


def root_offsets(blocks: int, pattern: int, step: int, *, first_block: int = 0) -> Tensor:
    """What is added to t of each block before it is rounded to 1/256, fp32 [blocks] within half of that."""
    starts = [_mixed(pattern + _GOLDEN * block) >> 32 for block in range(first_block, first_block + blocks)]
    return _offsets(starts, step * (_GOLDEN >> 32))


def first_offsets(blocks: int, pattern: int, step: int, *, first_block: int = 0) -> Tensor:
    """The same of a first moment, whose t is rounded to 1/128."""
    starts = [_mixed(pattern + _GOLDEN * block) & _WORD for block in range(first_block, first_block + blocks)]
    return 2 * _offsets(starts, step * _ROOT_OF_TWO)


def _offsets(starts: list[int], turn: int) -> Tensor:
    place = (torch.tensor(starts, dtype=torch.int64) + turn) & _WORD
    return (2.0 * (place >> 20).float() - 4095) / (1 << 21)


# ----------------------------------------------------------------------------------------------------- the weights


def random_bits(blocks: int, block_size: int, stream: int, *, first_block: int = 0) -> Tensor:
    """Sixteen random bits for each element, int64 [blocks, block_size]."""
    keys = [_mixed(stream + _GOLDEN * block) for block in range(first_block, first_block + blocks)]
    low = torch.tensor([key & _WORD for key in keys], dtype=torch.int64)[:, None]
    high = torch.tensor([key >> 32 for key in keys], dtype=torch.int64)[:, None]
    x = (torch.arange(block_size)[None] * 0x9E3779B9 + low) & _WORD
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & _WORD  # 32 by 30 bits: fits in 63
    x = x ^ high
    return (((x ^ (x >> 15)) * 0x735A2D97) & _WORD) >> 16


def round_at_random(x: Tensor, random: Tensor) -> Tensor:
    """fp32 to bf16, up with the probability of what is cut off; `random` int64 of the same shape in 0..65535."""
    bits = _bits(x).long()
    halves = torch.where(x.isnan(), _BF16_NAN, (bits + random) >> 16)
    return halves.to(torch.int16).view(torch.bfloat16)


def split_in_24_bits(x: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 to the nearest bf16 and the rest, uint8 in two's complement, in units of 2^-8 of its last place.

    The sum of both is rounded up with the probability of what is cut off; `random` as in `round_at_random`.
    """
    bits = _bits(x).long() & _WORD
    kept = torch.where(x.isnan(), _BF16_NAN << 8, (bits + (random >> 8)) >> 8)
    return (kept + 0x80 >> 8).to(torch.int16).view(torch.bfloat16), (kept & 0xFF).to(torch.uint8)


def join_from_24_bits(half: Tensor, error: Tensor) -> Tensor:
    """The inverse of `split_in_24_bits`."""
    return _from_bits((half.view(torch.int16).long() << 16) + (error.view(torch.int8).long() << 8))


# -------------------------------------------------------------------------------------------------------- the step


def optimizer_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    first: Sequence[Tensor],
    first_scale: Sequence[Tensor],
    second: Sequence[Tensor],
    second_scale: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    beta_powers: Sequence[Tensor],
    *,
    rule: OptimizerRule,
    master: str,
    keys: Sequence[int],
    first_blocks: Sequence[int] | None = None,
    norm: float = 0.0,
) -> bool:
    """One step for every parameter, in place, and whether it was taken: not if `norm` is not finite.

    The layout of the states is `pyeff.ops.OptimizerStates`; lists that a rule does not need are empty. first_blocks:
    where in its parameter each tensor begins, for the random bits, if it is a shard of one.
    """
    if not math.isfinite(norm):
        return False
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        steps[i].add_(1.0)
        powers = (1.0, 1.0)
        if beta_powers:
            beta_powers[i].mul_(torch.tensor([rule.beta1, rule.beta2], dtype=torch.float64))
            powers = (beta_powers[i][0].item(), beta_powers[i][1].item())
        step = int(steps[i].item())
        if p.numel() == 0:
            continue
        s = StepScalars.of(rule, step, powers, norm=norm, key=keys[i])
        half = p.dtype == torch.bfloat16
        weight = p.detach().float()
        if half and master == "ecc8":
            weight = join_from_24_bits(p.detach(), masters[i])
        elif half and master == "fp32":
            weight = masters[i]
        row = row_length(p.shape)
        old, gradient = to_blocks(weight, rule.block_size, row), to_blocks(g.float(), rule.block_size, row)
        if s.clip != 1.0:
            gradient = gradient * s.clip
        if s.l2 != 0.0:
            gradient = gradient + old * s.l2
        # Padding decodes to positive v, which must not raise the scale of the last block.
        inside = to_blocks(torch.ones(p.numel(), dtype=torch.bool, device=p.device), rule.block_size, row)
        start = first_blocks[i] if first_blocks else 0
        if rule.coded:
            factor = first_scale[i].flatten() * (s.first_in if rule.rule == "adam" else 1.0)
            m = decode_signed(to_blocks(first[i], rule.block_size, row), factor)
            root = None
            if second:
                factor = second_scale[i].flatten() * s.second_in
                root = decode_root(to_blocks(second[i], rule.block_size, row), factor)
            new, m, root = update(rule, s, old, gradient, m, root)
            if root is not None:
                # g^2 overflows for g beyond 1.8e19. The root is coded as the block's largest; its moment would be huge.
                m = m.where(root.isfinite(), 0.0)
            around = first_offsets(m.shape[0], s.pattern, step, first_block=start).to(p.device)
            code, scale = encode_signed(m.where(inside, 0.0), s.first_out, around)
            first[i].copy_(from_blocks(code, p, row))
            first_scale[i].copy_(scale.view_as(first_scale[i]))
            if root is not None:
                offset = root_offsets(root.shape[0], s.pattern, step, first_block=start).to(p.device)
                code, scale = encode_root(root.where(inside, 0.0), s.second_out, offset)
                second[i].copy_(from_blocks(code, p, row))
                second_scale[i].copy_(scale.view_as(second_scale[i]))
        else:
            moments = [to_blocks(x[i], rule.block_size, row) if x else None for x in (first, second)]
            assert moments[0] is not None
            new, m, square = update(rule, s, old, gradient, moments[0], moments[1])
            first[i].copy_(from_blocks(m, p, row))
            if square is not None:
                second[i].copy_(from_blocks(square, p, row))
        if half and master in AT_RANDOM:
            random = random_bits(new.shape[0], rule.block_size, s.stream, first_block=start).to(p.device)
        if half and master == "stochastic":
            p.copy_(from_blocks(round_at_random(new, random), p, row))
        elif half and master == "ecc8":
            halves, errors = split_in_24_bits(new, random)
            p.copy_(from_blocks(halves, p, row))
            masters[i].copy_(from_blocks(errors, p, row))
        else:
            p.copy_(from_blocks(new, p, row))
            if half and master == "fp32":
                masters[i].copy_(from_blocks(new, p, row))
    return True


def global_norm(tensors: Sequence[Tensor]) -> float:
    """The 2-norm of all tensors together, with the kernels' order of addition.

    Chunks of 4096 elements are squared and summed in fp32, in float64 where that overflows, and the chunks in float64.
    """
    squares = []
    for x in tensors:
        chunks = to_blocks(x.detach().float(), _NORM_CHUNK).cpu()
        sums = _squares(chunks).double()
        fine = sums <= _LARGEST_FLOAT
        squares.append(torch.where(fine, sums, _squares(chunks.double())))
    # As many running sums as a thread block has threads, each over every 256th chunk.
    rows = to_blocks(torch.cat(squares), 256) if squares else torch.zeros(1, 256, dtype=torch.float64)
    total = torch.zeros(1, 256, dtype=torch.float64)
    for row in rows:
        total = total + row
    return math.sqrt(_halved(total).item())


def _squares(chunks: Tensor) -> Tensor:
    # Sixteen groups of 256 elements, sixteen lanes each.
    x = chunks.view(-1, 16, 16, 16)
    total = torch.zeros_like(x[:, :, 0])
    for i in range(16):
        total = total + x[:, :, i] * x[:, :, i]
    return _halved(total.reshape(-1, 256))


def _halved(x: Tensor) -> Tensor:
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x[:, 0]


def _bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def _from_bits(bits: Tensor) -> Tensor:
    # Through the low 32 bits: a weight below zero has the top one set.
    return (bits & _WORD).sub(1 << 32).where(bits & (1 << 31) != 0, bits & _WORD).to(torch.int32).view(torch.float32)


def _largest_finite(magnitude: Tensor) -> Tensor:
    # NaN and Inf belong to their element alone: a scale made of them would spoil the whole block.
    return torch.where(magnitude.isfinite(), magnitude, 0.0).amax(1)


def row_length(shape: Sequence[int]) -> int:
    """The number of consecutive elements that are cut into blocks of their own: of one row, or of a whole vector."""
    return math.prod(shape[1:] if len(shape) > 1 else shape)


def to_blocks(x: Tensor, block_size: int, row: int | None = None) -> Tensor:
    """The flattened tensor as [blocks, block_size], the last block of each `row` elements filled up with zeros."""
    rows = x.reshape(-1, row or max(x.numel(), 1))
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % block_size)).view(-1, block_size)


def from_blocks(blocks: Tensor, like: Tensor, row: int | None = None) -> Tensor:
    """The inverse of `to_blocks`: a tensor of the shape of `like`."""
    row = row or max(like.numel(), 1)
    width = -(-row // blocks.shape[1]) * blocks.shape[1]
    return blocks.reshape(-1, width)[:, :row].reshape(like.shape)
