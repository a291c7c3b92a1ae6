"""The optimizer step: accurate against float64, the same bits everywhere, and codes that keep their promises."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff._extension import extension
from pyeff.ops import OPERATIONS, OptimizerRule, OptimizerStates, global_norm, optimizer_step
from pyeff.ops._optimizer_plan import FIELDS
from pyeff.ops._optimizer_states import BLOCK_SIZES, STATES
from pyeff.reference.optimizer_step import (
    MASTERS,
    RULES,
    StepScalars,
    decode_root,
    decode_signed,
    encode_root,
    encode_signed,
    first_offsets,
    join_from_24_bits,
    random_bits,
    root_offsets,
    round_at_random,
    split_in_24_bits,
    update,
)

ROOT = Path(__file__).resolve().parents[2]
ADAMW = OptimizerRule("adam", lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
DTYPES = (torch.float32, torch.bfloat16)
# Around the width of a vector and of a block, more than one block a thread, nothing at all, and a scalar.
SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (255,), (256,), (257,), (37, 19), (5, 4096), (3, 0, 2), (5, 300)]
ALL_CODES = torch.arange(256, dtype=torch.uint8)[None]
ROOT_CODES = ALL_CODES[:, 3:]  # all that are written


def problem(
    p_dtype: torch.dtype = torch.float32,
    g_dtype: torch.dtype = torch.float32,
    *,
    shapes: list[tuple[int, ...]] = SHAPES,
    steps: int = 4,
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Parameters and the gradients of some steps: wide in size, with zeros, denormals and huge values."""
    generator = torch.Generator().manual_seed(5)
    params = [torch.randn(shape, generator=generator).to(p_dtype) for shape in shapes]
    grads = []
    for _ in range(steps):
        row = []
        for shape in shapes:
            g = torch.randn(shape, generator=generator) * torch.exp(3 * torch.randn(shape, generator=generator))
            for value in (0.0, 1e-40, -1e15, 1e-20):
                g[torch.rand(shape, generator=generator) < 0.02] = value
            row.append(g.to(g_dtype))
        grads.append(row)
    return params, grads


def train(
    params: list[Tensor],
    grads: list[list[Tensor]],
    *,
    impl: str = "auto",
    rule: OptimizerRule = ADAMW,
    master: str = "none",
) -> tuple[list[Tensor], OptimizerStates]:
    params = [p.clone() for p in params]
    states = OptimizerStates.zeros(
        params,
        rule=rule.rule,
        states="8bit" if rule.coded else "fp32",
        master=master,
        block_size=rule.block_size,
    )
    for row in grads:
        norm = global_norm(row, impl=impl) if rule.clip_norm < math.inf else None
        optimizer_step(params, row, states, rule, norm=norm, impl=impl)
    return params, states


def tensors_of(params: list[Tensor], states: OptimizerStates) -> list[Tensor]:
    return [*params, *(tensor for one in states.lists() for tensor in one)]


def assert_same_bits(a: tuple[list[Tensor], OptimizerStates], b: tuple[list[Tensor], OptimizerStates]) -> None:
    for x, y in zip(tensors_of(*a), tensors_of(*b), strict=True):
        # The payload of a NaN is nobody's promise; its place is.
        if x.is_floating_point():
            assert torch.equal(x.isnan(), y.isnan())
            x, y = x.nan_to_num(0.0, torch.inf, -torch.inf), y.nan_to_num(0.0, torch.inf, -torch.inf)
        assert torch.equal(x, y)


def digest(result: tuple[list[Tensor], OptimizerStates]) -> str:
    sums = hashlib.sha256()
    for x in tensors_of(*result):
        if x.is_floating_point():
            x = x.where(~x.isnan(), torch.nan)  # one payload for all
        sums.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


# -------------------------------------------------------------------------------------------------------- the codes


def test_every_code_survives_decoding_and_encoding() -> None:
    """All that encoding writes: of m's all but -128."""
    one = torch.ones(1)
    for codes, decode, encode in (
        (ALL_CODES[:, [*range(128), *range(129, 256)]], decode_signed, encode_signed),
        (ROOT_CODES, decode_root, encode_root),
    ):
        code, scale = encode(decode(codes, one))
        assert torch.equal(code, codes)
        assert torch.equal(scale, one)


def test_first_moment_has_a_zero_a_sign_and_twelve_binades() -> None:
    levels = decode_signed(ALL_CODES, torch.ones(1))[0]
    assert levels[0] == 0.0
    assert torch.equal(levels[129:], -levels[1:128].flip(0))
    assert (levels[1:128].diff() > 0).all()
    assert levels[127] / levels[1] >= 2.0**12


def test_second_moment_has_no_zero_and_eighteen_binades_of_its_root() -> None:
    levels = decode_root(ALL_CODES, torch.ones(1))[0]
    assert (levels > 0).all()
    assert (levels.diff() > 0).all()
    assert encode_root(torch.tensor([[1.0, 0.0]]))[0].tolist() == [[255, 3]]
    assert levels[255] / levels[3] == 2.0**18


@given(st.lists(st.floats(min_value=2.0**-70, max_value=2.0**60, width=32), min_size=1, max_size=64))
def test_no_positive_second_moment_decodes_to_zero(roots: list[float]) -> None:
    root = torch.tensor([roots])
    decoded = decode_root(*encode_root(root))
    assert (decoded > 0).all()
    assert decoded.max() == root.max()


@settings(deadline=None)
@given(st.floats(min_value=2.0**-24, max_value=1.0, width=32))
def test_a_value_is_coded_to_one_of_its_two_neighbours(x: float) -> None:
    for codes, decode, encode in ((ALL_CODES, decode_signed, encode_signed), (ROOT_CODES, decode_root, encode_root)):
        value = torch.tensor([[x, 1.0]])
        decoded = decode(*encode(value))[0, 0]
        levels = decode(codes, encode(value)[1])[0].unique()
        inside = value[0, 0].clamp_min(levels[0])
        below, above = levels[levels <= inside].max(), levels[levels >= inside].min()
        assert below <= decoded <= above


def slack_of_a_third() -> int:
    """How far encoding may miss the bits of t, by the roundings of a third."""
    one, eps = 0x3F800000, torch.finfo(torch.float32).eps
    # Of B(r) and of its third to fp32, of the constant 1/3, of the sum to 2^8, of 2/3 B(1).
    constant = abs(torch.tensor(1 / 3).double().item() * 3 - 1)
    return math.ceil(one * eps / 3 + one / 3 * (eps + constant) + 2**7 + 2 * one / 3 - 0x2A555500)


def test_second_moment_goes_to_the_nearest_code_in_the_measure_of_its_bits() -> None:
    """Between two codes the border is at the middle of t, where B(r) = 3 B(t) - 2 B(1), to the roundings of a third."""
    one, slack = 0x3F800000, slack_of_a_third()
    middle = ((torch.arange(255) + 1.5) / 256).view(torch.int32).long()
    assert 8 * slack < 2**16, "a code is 2^16 wide"
    for side, expected in ((-1, torch.arange(255)), (1, torch.arange(1, 256))):
        r = (3 * (middle + side * slack) - 2 * one).to(torch.int32).view(torch.float32)
        code, _ = encode_root(torch.cat([r, torch.ones(1)])[None])
        assert torch.equal(code[0, :-1].long(), expected.clamp_min(3))


def test_second_moment_is_rounded_up_with_the_probability_of_what_is_cut_off() -> None:
    """Exactly: of the 4096 offsets a block can have, as many as 4096ths are cut off, to one and a rounding."""
    offsets = (2.0 * torch.arange(4096) - 4095) / (1 << 21)
    parts = torch.arange(3.0, 254.9, 0.37)
    r = (3 * ((parts + 1) / 256).view(torch.int32).long() - 2 * 0x3F800000).to(torch.int32).view(torch.float32)
    codes, _ = encode_root(torch.cat([r, torch.ones(1)]).expand(4096, -1), 1.0, offsets)
    assert (codes[:, -1] == 255).all(), "the largest keeps its code whatever is drawn"
    codes = codes[:, :-1]
    third = slack_of_a_third() / 2**16  # in codes, which are as wide or wider in bits
    assert (codes >= (parts - third).floor()).all()
    assert (codes <= (parts + third).ceil()).all()
    # Below the middle of code 3 and the next all is rounded up to it.
    above = parts > 3.5
    assert ((codes.double().mean(0) - parts).abs() <= 1 / 4096 + third)[above].all()


def test_first_moment_is_rounded_up_with_the_probability_of_what_is_cut_off() -> None:
    offsets = (2.0 * torch.arange(4096) - 4095) / (1 << 20)
    parts = torch.arange(1.0, 127.0, 0.37)
    m = (4 * (parts / 128).view(torch.int32).long() - 3 * 0x3F800000).to(torch.int32).view(torch.float32)
    row = torch.cat([m, -m, torch.tensor([31 / 32, -31 / 32, 0.0])])
    parts = torch.cat([parts, -parts])
    codes = encode_signed(row.expand(4096, -1), 1.0, offsets)[0].view(torch.int8).double()
    assert (codes[:, -3:] == torch.tensor([127.0, -127.0, 0.0])).all(), "these stay whatever is drawn"
    codes = codes[:, :-3]
    assert ((codes == parts.floor()) | (codes == parts.ceil())).all()
    # The quarter drops what the scale's rounding changed and two bits of 2^-16 of a code at most.
    assert ((codes.mean(0) - parts).abs() <= 1 / 4096 + 2.0**-13).all()


@pytest.mark.parametrize(("offsets_of", "bound", "widest"), [(root_offsets, 1 / 512, 2), (first_offsets, 1 / 256, 3)])
def test_offsets_go_evenly_round_with_the_steps_and_differ_between_blocks(
    offsets_of: Any, bound: float, widest: int
) -> None:
    steps = torch.stack([offsets_of(64, 1, step) for step in range(4096)])
    assert torch.equal(offsets_of(4, 1, 7, first_block=60), steps[7, 60:])
    assert steps.abs().max() < bound
    # The golden section leaves no gap wider than 2 / n steps, the root of two none than 3 / n, in any part of these.
    for part in (steps[:1000], steps[3000:]):
        gaps = (part.sort(0).values.diff(dim=0) / (2 * bound)).max()
        assert gaps <= widest / len(part) + 1 / 4096
    # Blocks begin at random: six standard errors of the correlation of 64 of them.
    one, other = (offsets_of(4096, pattern, 1) / bound for pattern in (1, 2))
    for a, b in ((one, other), (one[1:], one[:-1])):
        assert ((a * b).mean() * 3).abs() <= 6 / a.numel() ** 0.5


def test_the_two_offsets_of_a_block_know_nothing_of_each_other() -> None:
    pairs = torch.stack([torch.cat([root_offsets(1, 1, k) * 512, first_offsets(1, 1, k) * 256]) for k in range(4096)])
    assert (pairs[:, 0] * pairs[:, 1]).mean().abs() * 3 <= 6 / 4096**0.5


@pytest.mark.parametrize(
    "rule",
    [
        OptimizerRule("adam", lr=1.0, beta1=0.9, beta2=0.95),
        OptimizerRule("adam", lr=1.0, beta1=0.95, beta2=0.99),
        OptimizerRule("sgd", lr=1.0, beta1=0.9),
    ],
    ids=["adam", "adam-slower", "sgd"],
)
def test_an_element_whose_gradients_end_comes_to_rest_beside_others_that_go_on(rule: OptimizerRule) -> None:
    """Rounded to nearest its moment would stay for ever, and beside a root that falls make steps of 60 to 9,000 lr."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(1024)
    states = OptimizerStates.zeros([p], rule=rule.rule)
    for step in range(900):
        g = torch.randn(4, 256, generator=generator)
        if step >= 100:
            g[:, :8], g[:, 8:] = 1.0, 0.0
        if step == 800:
            before = p.clone()
        optimizer_step([p], [g.view(-1)], states, rule)
    moved = (p - before).view(4, 256)
    assert (moved[:, :8] != 0).all()
    assert (moved[:, 8:] == 0).all()


def test_a_moment_that_moves_less_than_a_code_still_moves() -> None:
    """sqrt(v) after 3,000 steps whose gradients are a tenth of the first thousand's, against torch's, on average.

    Rounded to nearest nothing would move but with a block's largest: v changes by a thousandth of itself in a step.
    """
    generator = torch.Generator().manual_seed(0)
    p, q = torch.zeros(16 * 256), torch.nn.Parameter(torch.zeros(16 * 256))
    states = OptimizerStates.zeros([p])
    rule = OptimizerRule("adam", lr=0.0)
    peer = torch.optim.Adam([q], lr=0.0)
    sizes = torch.ones(16, 256)
    for step in range(3000):
        g = torch.randn(16, 256, generator=generator) * sizes
        if step >= 1000:
            g[:, 1:] *= 0.1  # one element keeps the block's scale up
        q.grad = g.view(-1)
        optimizer_step([p], [q.grad], states, rule)
        peer.step()
    v = states.decode(0)[1]
    assert v is not None
    ratio = (v / peer.state[q]["exp_avg_sq"]).sqrt().view(16, 256)[:, 1:].mean(1)
    # Blocks are independent, elements of a block are not: six standard errors of the mean over blocks.
    assert (ratio.mean() - 1).abs() <= 6 * ratio.std() / 4


def test_a_block_of_zeros_stays_zero() -> None:
    p, g = torch.ones(300), torch.zeros(300)
    states = OptimizerStates.zeros([p])
    optimizer_step([p], [g], states, dataclasses.replace(ADAMW, weight_decay=0.0))
    m, v = states.decode(0)
    assert not m.any()
    assert not v.any()
    assert torch.equal(p, torch.ones(300))


# -------------------------------------------------------------------------------------------------- weights in bf16


def bf16_levels(x: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 numbers on either side of fp32 ones, as fp32."""
    below = (x.view(torch.int32) & -65536).view(torch.float32)
    return below, (below.view(torch.int32) + 65536).view(torch.float32)


def test_rounding_at_random_takes_a_neighbour_and_is_right_on_average() -> None:
    x = torch.linspace(-3, 3, 1001)
    draws = 4096
    random = random_bits(draws, 1001, stream=12345)
    rounded = round_at_random(x.expand(draws, -1).contiguous(), random).float()
    near, far = bf16_levels(x)
    assert ((rounded == near) | (rounded == far)).all()
    # Six standard deviations of a mean of draws from two neighbours, and a place of the fp32 mean.
    share = (x - near) / (far - near)
    deviation = (share * (1 - share) / draws).sqrt() * (far - near).abs()
    error = (rounded.double().mean(0) - x).abs()
    assert (error <= 6 * deviation + torch.finfo(torch.float32).eps * x.abs() + (far - near).abs() / 65536).all()


def test_random_bits_are_even_and_differ_between_blocks_streams_and_places() -> None:
    bits = random_bits(2000, 256, stream=7)
    assert (bits.min(), bits.max()) == (0, 65535)
    # Every bit of the sixteen is set half of the time, to six deviations.
    for i in range(16):
        share = (bits >> i & 1).double().mean().item()
        assert abs(share - 0.5) <= 6 * 0.5 / bits.numel() ** 0.5
    # Neighbours in a block, blocks, and streams are uncorrelated.
    centred = bits.double() - 32767.5
    other = random_bits(2000, 256, stream=8).double() - 32767.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1]), (centred, other)):
        correlation = ((a * b).mean() / centred.square().mean()).item()
        assert abs(correlation) <= 6 / a.numel() ** 0.5


def joined_at_random(x: Tensor, random: Tensor) -> Tensor:
    return join_from_24_bits(*split_in_24_bits(x, random))


@settings(deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=64), st.integers(0, 65535))
def test_a_weight_in_24_bits_is_a_neighbour_and_its_half_the_nearest_bf16(values: list[float], draw: int) -> None:
    x = torch.tensor(values)
    random = torch.full(x.shape, draw)
    half, error = split_in_24_bits(x, random)
    joined = join_from_24_bits(half, error)
    assert torch.equal(joined.isnan(), x.isnan())
    fine = x.isfinite() & joined.isfinite()
    ulp = torch.exp2(x[fine].double().abs().clamp_min(2.0**-126).log2().floor() - 7)
    assert ((joined[fine].double() - x[fine].double()).abs() < ulp / 256).all()
    # Beyond the largest bf16 the nearest one is infinite, while 24 bits still say the number.
    near = half[fine].isfinite()
    assert ((half[fine].double() - joined[fine].double()).abs() <= ulp / 2)[near].all()
    assert (joined[fine].abs() > torch.finfo(torch.bfloat16).max)[~near].all()
    assert torch.equal(half[~fine].nan_to_num(), x.bfloat16()[~fine].nan_to_num())
    # What 24 bits can say stays as it is, whatever is drawn.
    assert torch.equal(joined_at_random(joined[fine], random[fine]), joined[fine])


def test_a_weight_in_24_bits_is_rounded_up_with_the_probability_of_what_is_cut_off() -> None:
    """Exactly: of the 256 values of the bits that decide, as many as 256ths are cut off, and away from zero."""
    cut = torch.arange(256)
    x = torch.cat([(0x3F812300 + cut).int(), (0x3F812300 + cut - 2**31).int()]).view(torch.float32)
    below = (x.view(torch.int32) & -256).view(torch.float32)
    ups = sum((joined_at_random(x, torch.full(x.shape, draw << 8)) != below).int() for draw in range(256))
    assert torch.equal(ups, cut.int().repeat(2))


# ---------------------------------------------------------------------------------------------------------- the step


def test_step_is_as_accurate_as_torchs() -> None:
    """From the same decoded states: parameters against float64, torch.optim.AdamW being the peer."""
    params, grads = problem()
    _, states = train(params, grads[:3])
    before = [states.decode(i) for i in range(len(params))]
    after = [p.clone() for p in params]
    optimizer_step(after, grads[3], states, ADAMW)
    scalars = StepScalars.of(ADAMW, 4, (0.9**4, 0.99**4))
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue
        m, v = before[i]
        assert v is not None
        g = grads[3][i]
        # The update counts m and sqrt(v) in units of 1 - beta1 and sqrt(1 - beta2).
        exact_m, exact_root = m.double() * (0.9 / 0.1), v.double().sqrt() * (0.99 / 0.01) ** 0.5
        exact, _, _ = update(ADAMW, scalars, p.double(), g.double(), exact_m, exact_root)
        twin = torch.nn.Parameter(p.clone())
        peer = torch.optim.AdamW([twin], foreach=False, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
        peer.state[twin] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        twin.grad = g
        peer.step()
        assert_as_accurate(after[i], exact, twin.detach(), what=f"parameter {tuple(p.shape)}")


def test_stored_moments_are_within_a_code_of_the_exact_ones() -> None:
    params, grads = problem(shapes=[(1000,)])
    _, states = train(params, grads[:1])
    m, v = states.decode(0)
    assert v is not None
    g = grads[0][0].double()
    for block in range(4):
        part = slice(256 * block, 256 * (block + 1))
        for stored, exact, codes, decode, scale in (
            (m, g * 0.1, ALL_CODES, decode_signed, states.first_scale[0]),
            (v.sqrt(), g.abs() * 0.01**0.5, ROOT_CODES, decode_root, states.second_scale[0]),
        ):
            levels = decode(codes, scale[block : block + 1])[0].double().unique()
            levels = torch.cat([levels.new_zeros(1), levels]).unique()  # below the smallest root all is coded as it
            above = torch.searchsorted(levels, exact[part].contiguous()).clamp(1, len(levels) - 1)
            gap = levels[above] - levels[above - 1]
            assert ((stored[part].double() - exact[part]).abs() <= gap).all()


# Every rule with and without what it can have, in both kinds of states.
VARIANTS = [
    dataclasses.replace(ADAMW, rule=rule, coded=states == "8bit", **options)
    for rule, states in itertools.product(RULES, STATES)
    for options in ({}, {"coupled": True, "clip_norm": 1e16}, {"nesterov": True})
    if not (rule == "lion" and "coupled" in options) and not (rule != "sgd" and "nesterov" in options)
]
# Each way of keeping weights, with gradients of one dtype or the other.
WEIGHTS = [
    (torch.float32, "none", torch.float32),
    (torch.float32, "none", torch.bfloat16),
    (torch.bfloat16, "none", torch.bfloat16),
    (torch.bfloat16, "stochastic", torch.float32),
    (torch.bfloat16, "ecc8", torch.bfloat16),
    (torch.bfloat16, "fp32", torch.bfloat16),
]


def hard_problem(p_dtype: torch.dtype, g_dtype: torch.dtype) -> tuple[list[Tensor], list[list[Tensor]]]:
    params, grads = problem(p_dtype, g_dtype, steps=3)
    grads[1][8][3] = torch.nan
    grads[2][9][0, 0] = torch.inf
    grads[2][10][4, 1000] = -torch.inf
    grads[0][10][2, 7] = 3e38  # finite, but its square is not
    return params, grads


@pytest.mark.parametrize(("p_dtype", "master", "g_dtype"), WEIGHTS)
@pytest.mark.parametrize("rule", VARIANTS, ids=str)
def test_extension_gives_the_bits_of_the_reference(
    rule: OptimizerRule, p_dtype: torch.dtype, master: str, g_dtype: torch.dtype
) -> None:
    params, grads = hard_problem(p_dtype, g_dtype)
    if rule.clip_norm < math.inf:
        params, grads = problem(p_dtype, g_dtype, steps=3)  # else the steps would be skipped
    fast = train(params, grads, impl="cpu", rule=rule, master=master)
    assert_same_bits(fast, train(params, grads, impl="reference", rule=rule, master=master))


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_block_size_gives_the_bits_of_the_reference(block_size: int) -> None:
    rule = dataclasses.replace(ADAMW, block_size=block_size)
    params, grads = hard_problem(torch.bfloat16, torch.bfloat16)
    fast = train(params, grads, impl="cpu", rule=rule, master="stochastic")
    assert_same_bits(fast, train(params, grads, impl="reference", rule=rule, master="stochastic"))


def everything() -> str:
    digests = [
        digest(train(*hard_problem(p, g), impl="cpu", rule=rule, master=m)) for rule in VARIANTS for p, m, g in WEIGHTS
    ]
    digests += [str(global_norm(hard_problem(dtype, dtype)[1][0], impl="cpu").item()) for dtype in DTYPES]
    return ",".join(digests)


def test_all_instruction_levels_agree_bitwise() -> None:
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    program = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(Path(__file__).parent)!r}]; "
    program += "import test_optimizer_step as t; print(t.everything())"
    for level in levels:
        environment = {**os.environ, "PYEFF_CPU_LEVEL": level}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == everything(), level


def test_threads_splitting_and_order_change_nothing() -> None:
    shapes = [(70_001,), (3,), (129, 513), (256,)]
    params, grads = problem(torch.bfloat16, shapes=shapes)
    whole = train(params, grads, master="stochastic")
    assert_same_bits(whole, train(params, grads, master="stochastic"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert_same_bits(whole, train(params, grads, master="stochastic"))
        torch.set_num_threads(1)
        assert_same_bits(whole, train(params, grads, master="stochastic"))
    finally:
        torch.set_num_threads(threads)
    for i in reversed(range(len(params))):
        p = params[i].clone()
        states = OptimizerStates.zeros([p], keys=[i])
        for row in grads:
            optimizer_step([p], [row[i]], states, ADAMW)
        assert torch.equal(p, whole[0][i])
        assert torch.equal(states.first[0], whole[1].first[i])
        assert torch.equal(states.second_scale[0], whole[1].second_scale[i])


def test_seed_key_and_step_each_change_the_random_bits() -> None:
    p = torch.full((100_000,), 1.0, dtype=torch.bfloat16)
    g = torch.zeros(100_000)
    # A decay of three tenths of the distance to the next bf16 below.
    rule = OptimizerRule("adam", lr=1.0, weight_decay=0.3 * 2.0**-8)

    def stepped(seed: int = 0, key: int = 0, steps: int = 0) -> Tensor:
        q, states = p.clone(), OptimizerStates.zeros([p], keys=[key])
        states.steps[0].fill_(steps)
        optimizer_step([q], [g], states, dataclasses.replace(rule, seed=seed))
        return q

    first = stepped()
    assert torch.equal(first, stepped())
    for other in (stepped(seed=1), stepped(key=1), stepped(steps=1)):
        # Of 100,000 draws at 0.3, 2 0.3 0.7 differ, to six deviations.
        share = (other != first).double().mean().item()
        assert abs(share - 0.42) <= 6 * (0.42 * 0.58 / 100_000) ** 0.5


def test_views_that_are_unaligned_or_not_contiguous_give_the_same_bits() -> None:
    params, grads = problem(shapes=[(96, 112)])
    expected, _ = train(params, grads)
    unaligned = torch.zeros(96 * 112 + 1)[1:].view(96, 112).copy_(params[0])
    transposed = torch.zeros(112, 96).T.copy_(params[0])
    strided = torch.zeros(96, 224)[:, ::2].copy_(params[0])
    for p in (unaligned, transposed, strided):
        states = OptimizerStates.zeros([p])
        for i, row in enumerate(grads):
            g = row[0] if i % 2 else row[0].T.contiguous().T
            optimizer_step([p], [g], states, ADAMW)
        assert torch.equal(p, expected[0])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_a_bad_gradient_spoils_its_own_weight_alone(rule: str, bad: float, impl: str) -> None:
    params, grads = problem(shapes=[(600,)])
    quiet = [[row[0].clone().index_fill_(0, torch.tensor([300]), 0.0)] for row in grads]
    loud = [[row[0].clone()] for row in quiet]
    loud[1][0][300] = bad
    made = dataclasses.replace(ADAMW, rule=rule)
    a, states_a = train(params, quiet, impl=impl, rule=made)
    b, states_b = train(params, loud, impl=impl, rule=made)
    others = torch.arange(600) != 300
    assert not b[0][300].isfinite()
    assert torch.equal(a[0][others], b[0][others])
    for x, y in zip(states_a.decode(0), states_b.decode(0), strict=True):
        assert x is y is None or torch.equal(x[others], y[others])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("size", [1e18, 1.8e19, 1.9e19, 1e25, 3.4e38])
def test_no_finite_gradient_makes_a_step_large(size: float, impl: str) -> None:
    """Not the step of one whose square is beyond fp32, as in torch, and not those after it."""
    p = torch.ones(512)
    states = OptimizerStates.zeros([p])
    bound = (1 - 0.9) / ((1 - 0.999) * (1 - 0.9**2 / 0.999)) ** 0.5  # of |m| / sqrt(v), by Cauchy and Schwarz
    for step in range(30):
        g = torch.full((512,), 1e-3)
        if step in (3, 4, 20):
            g[7] = size
        before = p.clone()
        optimizer_step([p], [g], states, OptimizerRule("adam", lr=1e-3), impl=impl)
        # A code may be off by a sixteenth of its value in m and in sqrt(v).
        assert (p - before).abs().max() <= 1e-3 * bound * (1 + 1 / 16) / (1 - 1 / 16)
    assert torch.equal(p[256:], p[300].expand(256)), "the block beside knows nothing of it"


def test_a_norm_that_is_not_finite_skips_the_whole_step_and_is_counted() -> None:
    for impl, rule in itertools.product(("cpu", "reference"), VARIANTS):
        params, grads = problem(torch.bfloat16, steps=2)
        params, states = train(params, grads[:1], impl=impl, rule=rule, master="ecc8")
        before = [x.clone() for x in tensors_of(params, states)]
        skipped = torch.zeros((), dtype=torch.int64)
        for bad in (math.nan, math.inf):
            norm = torch.tensor(bad, dtype=torch.float64)
            optimizer_step(params, grads[1], states, rule, norm=norm, skipped=skipped, impl=impl)
        assert skipped.item() == 2
        assert all(torch.equal(x, y) for x, y in zip(before, tensors_of(params, states), strict=True))


def test_clipping_is_a_step_with_smaller_gradients() -> None:
    params, grads = problem(steps=1)
    grads = [[torch.randn_like(g) for g in grads[0]]]
    norm = global_norm(grads[0])
    factor = torch.tensor(0.5 * norm.item() / (norm.item() + 1e-6)).item()
    rule = dataclasses.replace(ADAMW, clip_norm=0.5 * norm.item())
    clipped = train(params, grads, rule=rule)
    smaller = train(params, [[g * factor for g in grads[0]]])
    assert_same_bits(clipped, smaller)
    assert_same_bits(
        train(params, grads, rule=dataclasses.replace(ADAMW, clip_norm=2 * norm.item())), train(params, grads)
    )


def test_first_step_is_minus_lr_times_the_sign() -> None:
    """Whatever the size of the gradient: in-block spreads of 2^24 must not make a step larger or smaller."""
    g = torch.exp2(torch.linspace(-12, 12, 256)) * torch.tensor([1.0, -1.0]).repeat(128)
    p = torch.zeros(256)
    optimizer_step([p], [g], OptimizerStates.zeros([p]), OptimizerRule("adam", lr=1.0, eps=0.0))
    twin = torch.nn.Parameter(torch.zeros(256))
    twin.grad = g
    torch.optim.AdamW([twin], lr=1.0, eps=0.0, weight_decay=0.0).step()
    assert_as_accurate(p, -g.sign(), twin.detach())


def test_weight_decay_alone_is_torchs() -> None:
    p = torch.linspace(-3, 3, 300)
    twin = torch.nn.Parameter(p.clone())
    twin.grad = torch.zeros(300)
    peer = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    states = OptimizerStates.zeros([p])
    for _ in range(10):
        optimizer_step([p], [torch.zeros(300)], states, OptimizerRule("adam", lr=0.1, weight_decay=0.5))
        peer.step()
    assert_as_accurate(p, torch.linspace(-3, 3, 300).double() * 0.95**10, twin.detach())


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-4])
@pytest.mark.parametrize("master", MASTERS)
def test_decay_alone_for_2000_steps_is_not_lost(master: str, rate: float) -> None:
    """A step is far below a bf16's last place, and at 1e-6 below that of 24 bits. Only "none" loses it."""
    steps = 2000
    start = torch.linspace(0.5, 2.0, 4096).bfloat16()
    p, g = start.clone(), torch.zeros(4096, dtype=torch.bfloat16)
    states = OptimizerStates.zeros([p], master=master)
    rule = OptimizerRule("adam", lr=1e-3, weight_decay=rate / 1e-3)
    for _ in range(steps):
        optimizer_step([p], [g], states, rule)
    weight = p.float()
    if master == "ecc8":
        weight = join_from_24_bits(p, states.masters[0])
    elif master == "fp32":
        weight = states.masters[0]
    if master == "none":
        assert torch.equal(p, start)
        return
    decay = torch.tensor(1 - rate).double().item()  # the fp32 number that weights are multiplied by
    exact = start.double() * decay**steps
    ulp = torch.exp2(start.double().log2().floor() - 7)
    # The product is rounded to fp32, by up to 2^-17 ulp, and alike in all steps at worst.
    rounding = steps * ulp * 2.0**-17
    if master == "fp32":
        assert (rounding < (start.double() - exact) / 2).all(), "a bound as large as the decay would allow none"
        assert ((weight.double() - exact).abs() <= rounding).all()
        assert ((p.double() - weight.double()).abs() <= ulp / 2).all()
        return
    # A sum of independent roundings by at most a place, each with the variance of its share, at most a quarter; and of
    # those to fp32, uniform and independent where the weights differ.
    place = ulp if master == "stochastic" else ulp * 2.0**-8
    variance = steps * ((1 - decay) * start.double() / place).clamp_max(0.25) * place**2
    alike = (rounding.square().mean() / 3 / len(start.unique())).sqrt()
    deviation = variance.sum().sqrt() / len(start) + alike
    assert 6 * deviation < (start.double() - exact).mean() / 2, "a bound as large as the decay would allow none"
    assert (weight.double() - exact).mean().abs() <= 6 * deviation
    if master == "ecc8":
        assert ((p.double() - weight.double()).abs() <= ulp / 2).all()


def test_states_take_little_more_than_two_bytes_per_parameter() -> None:
    p = torch.zeros(1_000_000)
    for rule, most in (("adam", 2.04), ("lion", 1.02), ("sgd", 1.02)):
        states = OptimizerStates.zeros([p], rule=rule)
        assert sum(x.nbytes for x in tensors_of([], states)) <= most * p.numel()


# ---------------------------------------------------------------------------------------------------------- the norm


@pytest.mark.parametrize("dtype", DTYPES)
def test_global_norm_is_accurate_and_the_same_everywhere(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [*SHAPES, (70_001,), (4096,)]]
    tensors.append(torch.randn(64, 100).to(dtype).T)
    exact = torch.cat([x.double().reshape(-1) for x in tensors]).norm()
    peer = torch.nn.utils.get_total_norm([x.float() for x in tensors])
    norm = global_norm(tensors)
    assert_as_accurate(norm.float(), exact, peer)
    assert torch.equal(norm, global_norm(tensors, impl="reference"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(norm, global_norm(tensors))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_global_norm_survives_squares_beyond_fp32_and_shows_what_is_not_finite(impl: str) -> None:
    big = torch.full((5000,), 1e30)
    exact = big.double().norm()
    assert_as_accurate(global_norm([big], impl=impl).float(), exact, exact.float())
    assert global_norm([torch.zeros(0)], impl=impl) == 0.0
    for bad in (math.nan, math.inf):
        big[4999] = bad
        assert not global_norm([big], impl=impl).isfinite()


def test_global_norm_refuses_what_it_cannot_read() -> None:
    assert global_norm([]) == 0.0
    with pytest.raises(TypeError, match="dense fp32 or bf16"):
        global_norm([torch.zeros(3, dtype=torch.float64)])
    torch.library.opcheck(torch.ops.pyeff.global_norm.default, ([torch.ones(3)],), {"impl": "cpu"})


# ------------------------------------------------------------------------------------------------ contract and errors


def test_opcheck() -> None:
    params, grads = problem(torch.bfloat16, shapes=[(300,), (17, 3)], steps=1)
    states = OptimizerStates.zeros(params, master="ecc8")
    options = {"rule": "adam", "numbers": [0.1, 0.9, 0.99, 1e-8, 0.1, 0.0, math.inf], "integers": [0, 256, 1, 0, 0]}
    for impl in ("cpu", "reference"):
        torch.library.opcheck(
            torch.ops.pyeff.optimizer_step.default,
            (params, grads[0], *states.lists(), None, None, torch.zeros((), dtype=torch.int64)),
            {**options, "master": "ecc8", "keys": [0, 1], "impl": impl},
        )


def test_table_of_tensors_has_the_kernels_width() -> None:
    assert extension().OPTIMIZER_TENSOR_FIELDS == FIELDS


def test_unknown_and_impossible_implementations_are_refused() -> None:
    p = torch.zeros(3)
    rule = OptimizerRule("adam", lr=0.1)
    assert pyeff.explain("optimizer_step", [p], [p], OptimizerStates.zeros([p])).impl == "cpu"
    assert OPERATIONS["optimizer_step"].on_device("cuda").refused.keys() <= {"cuda", "cpu"}
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        optimizer_step([p], [p], OptimizerStates.zeros([p]), rule, impl="cuda")
    with pytest.raises(ValueError, match="impl must be"):
        optimizer_step([p], [p], OptimizerStates.zeros([p]), rule, impl="triton")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0"),
        ({"lr": float("inf")}, ValueError, "lr must be >= 0 and finite"),
        ({"beta2": 1.0}, ValueError, "betas must be"),
        ({"eps": -1e-8}, ValueError, "eps must be >= 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be > 0"),
        ({"clip_norm": 1.0}, ValueError, "clip_norm needs norm"),
        ({"seed": -1}, ValueError, "seed must be"),
        ({"rule": "sgd"}, ValueError, "the rule is for 'sgd'"),
        ({"coded": False}, ValueError, "coded=False"),
        ({"grads": []}, ValueError, "1 params need as many grads"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"grads\[0\] must be \(3,\)"),
        ({"grads": [torch.zeros(3).to_sparse()]}, TypeError, "dense fp32 or bf16"),
        ({"grads": [torch.zeros(3, dtype=torch.float64)]}, TypeError, "dense fp32 or bf16"),
        ({"params": [torch.zeros(3, dtype=torch.float16)]}, TypeError, "dense fp32 or bf16"),
        ({"states": OptimizerStates.zeros([torch.zeros(4)])}, ValueError, r"states.first\[0\] must be"),
        ({"states": OptimizerStates.zeros([])}, ValueError, "need as many grads and states"),
        ({"states": OptimizerStates.zeros([torch.zeros(3)], block_size=64)}, ValueError, "block_size=64"),
        ({"norm": torch.zeros(())}, ValueError, "norm must be one torch.float64"),
        ({"skipped": torch.zeros(2, dtype=torch.int64)}, ValueError, "skipped must be one torch.int64"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {
        "params": [torch.zeros(3)],
        "grads": [torch.ones(3)],
        "states": OptimizerStates.zeros([torch.zeros(3)]),
    }
    names = {field.name for field in dataclasses.fields(OptimizerRule)}
    rule = OptimizerRule(**{"rule": "adam", "lr": 0.1} | {k: v for k, v in change.items() if k in names})
    arguments |= {k: v for k, v in change.items() if k not in names}
    with pytest.raises(error, match=match):
        optimizer_step(**arguments, rule=rule)
    assert not arguments["params"][0].any()


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"block_size": 100}, "block_size must be one of 64"),
        ({"rule": "adagrad"}, "rule must be one of"),
        ({"states": "4bit"}, "states must be '8bit' or 'fp32'"),
        ({"master": "bf16"}, "master must be one of"),
    ],
)
def test_layouts_without_a_kernel_are_refused(option: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OptimizerStates.zeros([torch.zeros(3)], **option)


def test_scales_that_are_no_plain_memory_and_parameters_given_twice_are_refused() -> None:
    p = torch.ones(1000)
    rule = OptimizerRule("adam", lr=0.1)
    states = OptimizerStates.zeros([p])
    states.second_scale = [torch.zeros(1).expand(4)]
    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        optimizer_step([p], [torch.ones(1000)], states, rule)
    with pytest.raises(ValueError, match="twice"):
        optimizer_step([p, p], [torch.ones(1000)] * 2, OptimizerStates.zeros([p, p]), rule)
    assert torch.equal(p, torch.ones(1000))


# ----------------------------------------------------------------------------------------------------------- the GPU


def cuobjdump() -> str | None:
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernel_compiles_without_spills_into_vectors_of_16_bytes(tmp_path: Path) -> None:
    source, cubin = ROOT / "csrc" / "cuda" / "optimizer_step.cu", tmp_path / "out.cubin"
    command = [
        "nvcc",
        "-std=c++17",
        "-O3",
        "--fmad=false",
        f"-I{ROOT / 'csrc'}",
        "-arch=sm_90a",
        "-Xptxas=-v",
        "-cubin",
    ]
    ran = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True, check=True)
    log = ran.stdout + ran.stderr
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert set(frames) == {("0", "0", "0")}
    # Rule and codes are fixed in a kernel. Three thread blocks on a multiprocessor with codes, two without.
    steps = re.findall(r"step_kernelILi(\d)ELb(\d)E.*?Used (\d+) registers", log, re.DOTALL)
    assert len(steps) == 6
    for _, coded, registers in steps:
        assert int(registers) <= 65536 // ((3 if coded == "1" else 2) * 256) // 8 * 8
    tool = cuobjdump()
    assert tool is not None
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = {
        found.groups(): part
        for part in sass.split("Function : ")[1:]
        if (found := re.search(r"step_kernelILi(\d)ELb(\d)EE", part.splitlines()[0]))
    }
    assert len(kernels) == 6
    # fp32 and bf16 of weight and gradient; codes, error bytes.
    moments = {("0", "1"): 2, ("0", "0"): 8, ("1", "1"): 1, ("1", "0"): 4, ("2", "1"): 1, ("2", "0"): 4}
    for key, kernel in kernels.items():
        assert len(re.findall(r"LDG\.E\.128", kernel)) >= 4 + 2 + 4 + 2 + 1 + moments[key]
        assert len(re.findall(r"STG\.E\.128", kernel)) >= 4 + 2 + 1 + moments[key]
        assert not re.findall(r"\b(?:LD|ST|LDL|STL)\.", kernel)


def moved(states: OptimizerStates, device: str) -> OptimizerStates:
    names = ("first", "first_scale", "second", "second_scale", "masters", "steps", "beta_powers")
    return dataclasses.replace(states, **{name: [x.to(device) for x in getattr(states, name)] for name in names})


@pytest.mark.gpu
@pytest.mark.parametrize(("p_dtype", "master", "g_dtype"), WEIGHTS)
@pytest.mark.parametrize("rule", VARIANTS, ids=str)
def test_gpu_gives_the_bits_of_the_cpu(
    rule: OptimizerRule, p_dtype: torch.dtype, master: str, g_dtype: torch.dtype
) -> None:
    params, grads = hard_problem(p_dtype, g_dtype)
    if rule.clip_norm < math.inf:
        params, grads = problem(p_dtype, g_dtype, steps=3)
    there = train([p.cuda() for p in params], [[g.cuda() for g in row] for row in grads], rule=rule, master=master)
    back = [p.cpu() for p in there[0]], moved(there[1], "cpu")
    assert_same_bits(back, train(params, grads, rule=rule, master=master))


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_gpu_gives_the_bits_of_the_cpu_in_every_block_size(block_size: int) -> None:
    rule = dataclasses.replace(ADAMW, block_size=block_size)
    params, grads = hard_problem(torch.bfloat16, torch.bfloat16)
    there = train(
        [p.cuda() for p in params], [[g.cuda() for g in row] for row in grads], rule=rule, master="stochastic"
    )
    back = [p.cpu() for p in there[0]], moved(there[1], "cpu")
    assert_same_bits(back, train(params, grads, rule=rule, master="stochastic"))


@pytest.mark.gpu
def test_gpu_takes_dtypes_of_all_kinds_and_many_tensors_in_one_call() -> None:
    torch.manual_seed(0)
    params = [torch.randn(1 + 37 * i).to(DTYPES[i % 2]) for i in range(100)]
    grads = [[torch.randn_like(p).to(DTYPES[i % 3 % 2]) for i, p in enumerate(params)] for _ in range(3)]
    there = train([p.cuda() for p in params], [[g.cuda() for g in row] for row in grads], master="ecc8")
    back = [p.cpu() for p in there[0]], moved(there[1], "cpu")
    assert_same_bits(back, train(params, grads, master="ecc8"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_gpu_gives_the_cpus_norm(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [*SHAPES, (3_000_001,)]]
    assert torch.equal(global_norm([x.cuda() for x in tensors]).cpu(), global_norm(tensors))
    tensors[3][2] = 1e30
    assert torch.equal(global_norm([x.cuda() for x in tensors]).cpu(), global_norm(tensors))
    tensors[3][2] = math.nan
    assert global_norm([x.cuda() for x in tensors]).isnan()


@pytest.mark.gpu
def test_gpu_takes_unaligned_views() -> None:
    params, grads = problem(shapes=[(5000,)])
    expected, _ = train(params, grads)
    p = torch.zeros(5001, device="cuda")[1:].copy_(params[0])
    states = OptimizerStates.zeros([p])
    for row in grads:
        optimizer_step([p], [row[0].cuda()], states, ADAMW)
    assert torch.equal(p.cpu(), expected[0])


@pytest.mark.gpu
def test_gpu_step_does_not_synchronise() -> None:
    p = torch.zeros(100_000, device="cuda")
    states = OptimizerStates.zeros([p])
    grads = [torch.randn_like(p) for _ in range(3)]
    rule = OptimizerRule("adam", lr=0.1, clip_norm=1.0)
    skipped, lr = torch.zeros((), dtype=torch.int64, device="cuda"), torch.tensor(0.1, device="cuda")
    optimizer_step([p], [grads[0]], states, rule, norm=global_norm([grads[0]]), lr=lr, skipped=skipped)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for g in grads:
            optimizer_step([p], [g], states, rule, norm=global_norm([g]), lr=lr, skipped=skipped)
    finally:
        torch.cuda.set_sync_debug_mode("default")
