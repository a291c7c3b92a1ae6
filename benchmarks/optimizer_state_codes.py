"""Which 8-bit code should Adam's moments be stored in? A simulation that answers with three numbers.

    python benchmarks/optimizer_state_codes.py            # two minutes on one core
    python benchmarks/optimizer_state_codes.py --quick    # a few seconds, noisier

Adam runs twice on the same gradients, once with fp32 moments and once with moments that are encoded and decoded
after every step. Gradients are sigma_i (N(0, 1) + 0.1), with sigma_i lognormal inside a block of 256: the log's
standard deviation, the *spread*, is 0, 0.5, 1 or 2 (a language model has 0.4 to 1.1, see
`optimizer_state_gradients.py`; 2 shows what holds beyond). At three fifths of the run all gradients fall to 0.3 of
their size, as after a change of the learning rate or of the data. In a fifth section the spread is 1 and every sigma_i
moves, along a straight line of its logarithm, to another draw: training changes which weights have large gradients.
Counted after a fifth of the run:

- error: ||u8 - u32|| / ||u32||, where u = m_hat / (sqrt(v_hat) + eps) is the update before the learning rate;
- largest: max |u8|; in fp32 it is about 1.3, and no gradients can make it larger than 7.3 (Cauchy and Schwarz);
- bias: the mean of log(sqrt(v8) / sqrt(v32)). Errors that cancel over elements do little harm, while a bias is a change
  of the learning rate.

Printed as a Markdown table, the one in docs/optimizer_states.md.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff.reference.optimizer_step import (
    decode_root,
    decode_signed,
    encode_root,
    encode_signed,
    first_offsets,
    root_offsets,
)

BLOCK = 256
SPREADS = (0.0, 0.5, 1.0, 2.0)
MOVING = 1.0
SECTIONS = [*[f"spread {spread:g}" for spread in SPREADS], f"{MOVING:g}, moving"]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Code:
    """Encode-then-decode of values relative to their block's largest magnitude, so in [-1, 1]."""

    name: str
    round_trip: Callable[[Tensor], Tensor]
    # What is stored of the second moment: "v" or "sqrt".
    of: str = "sqrt"
    block: int = BLOCK

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.view(-1, self.block)
        scale = rows.abs().amax(1, keepdim=True)
        # A block without any gradient so far stays zero.
        return (self.round_trip(rows / scale.where(scale > 0, 1.0)) * scale).view_as(x)


def from_table(levels: Tensor) -> Callable[[Tensor], Tensor]:
    """Nearest of these levels."""
    levels = levels.sort().values
    middles = (levels[1:] + levels[:-1]) / 2
    return lambda r: levels[torch.bucketize(r, middles)]


def dynamic_levels(*, signed: bool, zero: bool) -> Tensor:
    """The dynamic tree of Dettmers et al. (2022): in each decade half as many levels as in the one above.

    256 levels; an unsigned zero takes the place of the smallest, as in bitsandbytes.
    """
    bits = 6 if signed else 7
    levels = [1.0]
    for decade in range(bits if zero and not signed else bits + 1):
        edges = torch.linspace(0.1, 1.0, 2 ** (bits - decade) + 1, dtype=torch.float64)
        levels += (((edges[1:] + edges[:-1]) / 2) * 10.0**-decade).tolist()
    if signed:
        levels += [-level for level in levels[1:]]
    if zero:
        levels.append(0.0)
    return torch.tensor(levels, dtype=torch.float32)


def float8_levels(dtype: torch.dtype, *, zero: bool) -> Tensor:
    """All finite values of a float8 format relative to its largest; without signs and zero if not `zero`."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    values = values[values.isfinite()].unique()
    values = values / values.max()
    return values if zero else values[values > 0]


def power(exponent: float, *, signed: bool) -> Callable[[Tensor], Tensor]:
    """r = (k / 127)^exponent with a sign, or ((k + 1) / 256)^exponent, k rounded to nearest."""
    if signed:
        return lambda r: r.sign() * ((r.abs() ** (1 / exponent) * 127).round() / 127) ** exponent
    return lambda r: ((r ** (1 / exponent) * 256).round().clamp_min(1) / 256) ** exponent


def logarithmic(binades: float, *, signed: bool) -> Callable[[Tensor], Tensor]:
    """Levels evenly spaced in log2 |r| over this many binades: 256 without zero, or 127 with a sign, and a zero."""
    if signed:
        tiny = 2.0**-binades
        return lambda r: torch.where(r.abs() < tiny / 2, 0.0, r.sign() * _evenly_in_log(r.abs(), binades, 126))
    return lambda r: _evenly_in_log(r, binades, 255)


def _evenly_in_log(r: Tensor, binades: float, steps: int) -> Tensor:
    return torch.exp2((r.clamp_min(2.0**-binades).log2() * (steps / binades)).round() * (binades / steps))


def offset_float(offset: float, shift: int, *, signed: bool) -> Callable[[Tensor], Tensor]:
    """The top bits of the float r K + offset: logarithmic far above the offset, linear below it.

    Unsigned: cells are cut by a shift and decoded at their middle, so no code is zero. Signed: k = 0 is zero.
    K makes the largest code decode to exactly 1.
    """
    base = torch.tensor(offset).view(torch.int32).item()
    top, half = (127, 0) if signed else (255, 1 << (shift - 1))

    def decode(k: Tensor) -> Tensor:
        return ((k << shift) + (base + half)).view(torch.float32) - offset

    factor = decode(torch.tensor(top, dtype=torch.int32)).item()

    def round_trip(r: Tensor) -> Tensor:
        bits = (r.abs() * factor + offset).view(torch.int32) - base
        k = (bits + (1 << (shift - 1) if signed else 0)) >> shift
        return r.sign() * decode(k.clamp_max(top)) / factor

    return round_trip


def bit_power(exponent: float) -> Callable[[Tensor], Tensor]:
    """`power`, unsigned, with a float's own bits for log2: integer arithmetic both ways and no root."""
    one, top = 0x3F800000, 0x3F800000 + (8 << 23)

    def round_trip(r: Tensor) -> Tensor:
        bits = r.clamp_min(1e-30).view(torch.int32).double()
        k = ((bits - one) / exponent + top).to(torch.int32).view(torch.float32).round().clamp(1, 256)
        return ((k.view(torch.int32).double() - top) * exponent + one).to(torch.int32).view(torch.float32)

    return round_trip


def linear_then_quartic(r: Tensor) -> Tensor:
    """What pyeff stored of sqrt(v) before: linear in the top binade, below it the fourth power of the bits."""
    one, binade = 0x3F800000, 1 << 23
    quarter = ((r.view(torch.int32).long() + (3 * one - 3 * binade)) >> 2).to(torch.int32).view(torch.float32)
    t = ((torch.maximum(r, quarter).clamp_min(1 / 256) * 256 - 1).round() + 1) / 256
    below = (4 * t.view(torch.int32).long() - (3 * one - 3 * binade)).to(torch.int32).view(torch.float32)
    return torch.minimum(t, below)


class Shipped:
    """What pyeff stores of a moment, rounded at random by one offset a block, or its code to nearest."""

    def __init__(
        self, encode: Callable[..., Any], decode: Callable[..., Tensor], offsets: Callable[..., Tensor] | None
    ):
        self.encode, self.decode, self.offsets, self.step = encode, decode, offsets, 0

    def __call__(self, r: Tensor) -> Tensor:
        self.step += 1
        offsets = None if self.offsets is None else self.offsets(r.shape[0], 0, self.step)
        return self.decode(*self.encode(r, 1.0, offsets))


def exact(r: Tensor) -> Tensor:
    """No rounding."""
    return r


FP32 = Code("fp32", exact)
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SHIPPED_M = Code("**quartic in bits, at random**", Shipped(encode_signed, decode_signed, first_offsets))
SHIPPED_V = Code("**sqrt v, cube in bits, at random**", Shipped(encode_root, decode_root, root_offsets))
NEAREST_M = Code("quartic in bits", Shipped(encode_signed, decode_signed, None))
DYNAMIC_M = Code("dynamic tree", from_table(dynamic_levels(signed=True, zero=True)))
DYNAMIC_V = Code("v, dynamic tree with zero", from_table(dynamic_levels(signed=False, zero=True)), of="v")
DYNAMIC_ROOT = Code("sqrt v, dynamic tree", from_table(dynamic_levels(signed=False, zero=False)))
FLOAT8_M = Code("float8 e4m3", from_table(float8_levels(E4M3, zero=True)))
FLOAT8_V = Code("v, float8 e4m3 with zero", from_table(float8_levels(E4M3, zero=True)), of="v")
LOG_M = Code("log, 16 binades", logarithmic(16, signed=True))
LOG_ROOT = Code("sqrt v, log, 16 binades", logarithmic(16, signed=False))
M_CODES = [
    SHIPPED_M,
    NEAREST_M,
    DYNAMIC_M,
    FLOAT8_M,
    Code("float8 e5m2", from_table(float8_levels(E5M2, zero=True))),
    LOG_M,
    Code("linear", power(1, signed=True)),
    Code("square", power(2, signed=True)),
    Code("cube", power(3, signed=True)),
    Code("offset 2^-4, 1/32 binade", offset_float(2.0**-4, 18, signed=True)),
    Code("offset 2^-8, 1/16 binade", offset_float(2.0**-8, 19, signed=True)),
]
V_CODES = [
    SHIPPED_V,
    Code("sqrt v, cube in bits", Shipped(encode_root, decode_root, None)),
    DYNAMIC_ROOT,
    DYNAMIC_V,
    Code("v, dynamic tree", from_table(dynamic_levels(signed=False, zero=False)), of="v"),
    FLOAT8_V,
    Code("sqrt v, float8 e5m2", from_table(float8_levels(E5M2, zero=False))),
    Code("sqrt v, linear", power(1, signed=False)),
    Code("sqrt v, square in bits", bit_power(2)),
    Code("sqrt v, power 5/2 in bits", bit_power(2.5)),
    Code("sqrt v, linear then quartic in bits", linear_then_quartic),
    Code("sqrt v, log, 12 binades", logarithmic(12, signed=False)),
    LOG_ROOT,
    Code("sqrt v, offset 2^-8, 1/32 binade", offset_float(2.0**-8, 18, signed=False)),
]
PAIRS = [
    (SHIPPED_M, SHIPPED_V),
    (DYNAMIC_M, DYNAMIC_V),
    (DYNAMIC_M, DYNAMIC_ROOT),
    (FLOAT8_M, FLOAT8_V),
    (LOG_M, LOG_ROOT),
    (NEAREST_M, SHIPPED_V),
    *[(NEAREST_M, v) for v in V_CODES if v.name.endswith("in bits")],
    *[(m, FP32) for m in M_CODES],
    *[(FP32, v) for v in V_CODES],
]


@dataclass(frozen=True)
class Result:
    """Error, largest step and bias for each section."""

    error: tuple[float, ...]
    largest: tuple[float, ...]
    bias: tuple[float, ...]


def compare(
    pairs: list[tuple[Code, Code]], gradients: Iterable[Tensor], sections: list[int], steps: int
) -> list[Result]:
    """Run fp32 Adam and one coded Adam per pair on the same gradients, flat ones of sum(sections) elements.

    A section is a whole number of blocks and has its own error, largest step and bias.
    """
    codes = [copy.deepcopy(pair) for pair in (*pairs, (FP32, FP32))]  # what counts steps counts those of its pair
    states = [[torch.zeros(sum(sections)), torch.zeros(sum(sections))] for _ in codes]
    squares = torch.zeros(len(codes), len(sections), dtype=torch.float64)
    largest = torch.zeros(len(codes), len(sections))
    ratios = torch.zeros(len(codes), len(sections), dtype=torch.float64)
    counted = 0
    for step, g in enumerate(gradients, start=1):
        correction1, correction2 = 1 - BETA1**step, (1 - BETA2**step) ** 0.5
        exact_update, exact_root = None, None
        counted += step > steps // 5
        for i in reversed(range(len(codes))):
            code_m, code_v = codes[i]
            m, stored = states[i]
            m = BETA1 * m + (1 - BETA1) * g
            v = BETA2 * (stored if code_v.of == "v" else stored * stored) + (1 - BETA2) * g * g
            root = v.sqrt()
            update = (m / correction1) / (root / correction2 + EPS)
            states[i] = [code_m(m), code_v(v if code_v.of == "v" else root)]
            exact_update = update if exact_update is None else exact_update
            exact_root = root if exact_root is None else exact_root
            if step > steps // 5:
                difference = update if i == len(pairs) else update - exact_update
                squares[i] += torch.stack([part.double().square().sum() for part in difference.split(sections)])
                reached = torch.stack([part.max() for part in update.abs().split(sections)])
                largest[i] = torch.maximum(largest[i], reached)
                # A root that neither has is no error; one that a zero code lost shows in the largest step.
                ratio = torch.where((root > 0) & (exact_root > 0), root / exact_root, 1.0).log().double()
                ratios[i] += torch.stack([part.mean() for part in ratio.split(sections)])
    errors = (squares[:-1] / squares[-1]).sqrt()
    bias = ratios[:-1] / counted
    return [
        Result(tuple(e.tolist()), tuple(big.tolist()), tuple(b.tolist()))
        for e, big, b in zip(errors, largest[:-1], bias, strict=True)
    ]


def synthetic(*, steps: int, blocks: int, seed: int) -> Iterator[Tensor]:
    """Gradients of the sizes described above, a section for each of SECTIONS."""
    generator = torch.Generator().manual_seed(seed)
    spreads = torch.tensor([*SPREADS, MOVING])[:, None]
    begin = spreads * torch.randn(len(spreads), blocks * BLOCK, generator=generator)
    end = begin.clone()
    end[-1] = MOVING * torch.randn(blocks * BLOCK, generator=generator)
    for step in range(1, steps + 1):
        sigma = torch.lerp(begin, end, step / steps).exp() * (0.3 if step > 0.6 * steps else 1.0)
        yield (sigma * (torch.randn(sigma.shape, generator=generator) + 0.1)).flatten()


def print_table(pairs: list[tuple[str, str]], columns: list[str], runs: list[list[Result]]) -> None:
    """Error / largest step / bias of each pair of codes, by their names, the worst of the runs; no bias below 0.1 %."""
    print("| m | second moment | " + " | ".join(columns) + " |")
    print("|---|---|" + "---|" * len(columns))
    for i, (m, v) in enumerate(pairs):
        cells = []
        for j in range(len(columns)):
            error = max(run[i].error[j] for run in runs)
            bias = max((run[i].bias[j] for run in runs), key=abs)
            shown = f" / {100 * bias:+.1f} %" if abs(bias) >= 0.001 else ""
            cells.append(f"{error:.3g} / {max(run[i].largest[j] for run in runs):.3g}{shown}")
        print(f"| {m} | {v} | " + " | ".join(cells) + " |")


def main() -> None:
    """Print the table: worst of the seeds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and one seed")
    options = parser.parse_args()
    seeds = (0,) if options.quick else (0, 1)
    steps, blocks = (1000, 4) if options.quick else (2500, 16)
    sections = [blocks * BLOCK] * len(SECTIONS)
    runs = [compare(PAIRS, synthetic(steps=steps, blocks=blocks, seed=seed), sections, steps) for seed in seeds]
    print(f"Worst of {len(seeds)} seeds, {steps} steps, {blocks} blocks of {BLOCK}: error / largest step / bias\n")
    print_table([(m.name, v.name) for m, v in PAIRS], SECTIONS, runs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
