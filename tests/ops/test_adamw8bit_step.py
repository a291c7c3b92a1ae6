"""The 8-bit AdamW step: accurate against float64, the same bits everywhere, and codes that keep their promises."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff._extension import extension
from pyeff.ops import OPERATIONS, AdamWStates, adamw8bit_step
from pyeff.ops.adamw8bit_step import _CHUNK, BLOCK_SIZES, _chunks
from pyeff.reference.adamw8bit_step import (
    AdamWScalars,
    adamw_update,
    decode_exp_avg,
    decode_root,
    encode_exp_avg,
    encode_root,
)

ROOT = Path(__file__).resolve().parents[2]
HYPERPARAMETERS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
DTYPES = (torch.float32, torch.bfloat16)
# Around the width of a vector and of a block, more than one block a thread, nothing at all, and a scalar.
SHAPES = [(), (0,), (1,), (15,), (16,), (17,), (255,), (256,), (257,), (37, 19), (5, 4096), (3, 0, 2)]
ALL_CODES = torch.arange(256, dtype=torch.uint8)[None]


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
    block_size: int = 256,
) -> tuple[list[Tensor], AdamWStates]:
    params = [p.clone() for p in params]
    states = AdamWStates.zeros(params, block_size=block_size)
    for row in grads:
        adamw8bit_step(params, row, states, impl=impl, **HYPERPARAMETERS)
    return params, states


def tensors_of(params: list[Tensor], states: AdamWStates) -> list[Tensor]:
    return [
        *params,
        *states.exp_avg_code,
        *states.exp_avg_scale,
        *states.exp_avg_sq_code,
        *states.exp_avg_sq_scale,
    ]


def assert_same_bits(a: tuple[list[Tensor], AdamWStates], b: tuple[list[Tensor], AdamWStates]) -> None:
    for x, y in zip(tensors_of(*a), tensors_of(*b), strict=True):
        # The payload of a NaN is nobody's promise; its place is.
        if x.is_floating_point():
            assert torch.equal(x.isnan(), y.isnan())
            x, y = x.nan_to_num(0.0, torch.inf, -torch.inf), y.nan_to_num(0.0, torch.inf, -torch.inf)
        assert torch.equal(x, y)


def digest(result: tuple[list[Tensor], AdamWStates]) -> str:
    sums = hashlib.sha256()
    for x in tensors_of(*result):
        sums.update(x.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sums.hexdigest()


# -------------------------------------------------------------------------------------------------------- the codes


def decode_whole_root(code: Tensor, scale: Tensor) -> Tensor:
    return decode_root(code, scale / 256)


def test_every_code_survives_decoding_and_encoding() -> None:
    """All but -128, which encoding never writes."""
    one = torch.ones(1)
    for codes, decode, encode in (
        (ALL_CODES[:, [*range(128), *range(129, 256)]], decode_exp_avg, encode_exp_avg),
        (ALL_CODES, decode_whole_root, encode_root),
    ):
        code, scale = encode(decode(codes, one))
        assert torch.equal(code, codes)
        assert torch.equal(scale, one)


def test_first_moment_has_a_zero_a_sign_and_twelve_binades() -> None:
    levels = decode_exp_avg(ALL_CODES, torch.ones(1))[0]
    assert levels[0] == 0.0
    assert torch.equal(levels[129:], -levels[1:128].flip(0))
    assert (levels[1:128].diff() > 0).all()
    assert levels[127] / levels[1] >= 2.0**12


def test_second_moment_has_no_zero_and_twelve_binades_of_its_root() -> None:
    levels = decode_root(ALL_CODES, torch.ones(1))[0]
    assert (levels > 0).all()
    assert (levels.diff() > 0).all()
    assert levels[-1] / levels[0] >= 2.0**12


@given(st.lists(st.floats(min_value=2.0**-70, max_value=2.0**60, width=32), min_size=1, max_size=64))
def test_no_positive_second_moment_decodes_to_zero(roots: list[float]) -> None:
    root = torch.tensor([roots])
    decoded = decode_whole_root(*encode_root(root))
    assert (decoded > 0).all()
    assert decoded.max() == root.max()


@settings(deadline=None)
@given(st.floats(min_value=2.0**-28, max_value=1.0, width=32))
def test_a_value_is_coded_to_one_of_its_two_neighbours(x: float) -> None:
    for decode, encode in ((decode_exp_avg, encode_exp_avg), (decode_whole_root, encode_root)):
        value = torch.tensor([[x, 1.0]])
        decoded = decode(*encode(value))[0, 0]
        levels = decode(ALL_CODES, encode(value)[1])[0].unique()
        below, above = levels[levels <= value[0, 0]].max(), levels[levels >= value[0, 0]].min()
        assert below <= decoded <= above


def test_a_block_of_zeros_stays_zero() -> None:
    p, g = torch.ones(300), torch.zeros(300)
    states = AdamWStates.zeros([p])
    adamw8bit_step([p], [g], states, **(HYPERPARAMETERS | {"weight_decay": 0.0}))
    m, v = states.decode(0)
    assert not m.any()
    assert not v.any()
    assert torch.equal(p, torch.ones(300))


# ---------------------------------------------------------------------------------------------------------- the step


def test_step_is_as_accurate_as_torchs() -> None:
    """From the same decoded states: parameters against float64, torch.optim.AdamW being the peer."""
    params, grads = problem()
    _, states = train(params, grads[:3])
    before = [states.decode(i) for i in range(len(params))]
    after = [p.clone() for p in params]
    adamw8bit_step(after, grads[3], states, **HYPERPARAMETERS)
    scalars = AdamWScalars.of(
        lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, beta1_power=0.9**4, beta2_power=0.99**4
    )
    for i, p in enumerate(params):
        if p.numel() == 0:
            continue
        m, v = before[i]
        g = grads[3][i]
        # The update counts m and sqrt(v) in units of 1 - beta1 and sqrt(1 - beta2).
        exact_m, exact_root = m.double() * (0.9 / 0.1), v.double().sqrt() * (0.99 / 0.01) ** 0.5
        exact, _, _ = adamw_update(p.double(), g.double(), exact_m, exact_root, scalars)
        twin = torch.nn.Parameter(p.clone())
        peer = torch.optim.AdamW([twin], foreach=False, **HYPERPARAMETERS)
        peer.state[twin] = {"step": torch.tensor(3.0), "exp_avg": m.clone(), "exp_avg_sq": v.clone()}
        twin.grad = g
        peer.step()
        assert_as_accurate(after[i], exact, twin.detach(), what=f"parameter {tuple(p.shape)}")


def test_stored_moments_are_within_a_code_of_the_exact_ones() -> None:
    params, grads = problem(shapes=[(1000,)])
    _, states = train(params, grads[:1])
    m, v = states.decode(0)
    g = grads[0][0].double()
    for block in range(4):
        part = slice(256 * block, 256 * (block + 1))
        for stored, exact, decode, scale in (
            (m, g * 0.1, decode_exp_avg, states.exp_avg_scale[0]),
            (v.sqrt(), g.abs() * 0.01**0.5, decode_root, states.exp_avg_sq_scale[0]),
        ):
            levels = decode(ALL_CODES, scale[block : block + 1])[0].double().unique()
            above = torch.searchsorted(levels, exact[part].contiguous()).clamp(1, len(levels) - 1)
            gap = levels[above] - levels[above - 1]
            assert ((stored[part].double() - exact[part]).abs() <= gap).all()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize("p_dtype", DTYPES)
def test_extension_gives_the_bits_of_the_reference(p_dtype: torch.dtype, g_dtype: torch.dtype, block_size: int) -> None:
    params, grads = problem(p_dtype, g_dtype)
    grads[1][8][3] = torch.nan
    grads[2][9][0, 0] = torch.inf
    grads[2][10][4, 1000] = -torch.inf
    grads[0][10][2, 7] = 3e38  # finite, but its square is not
    fast = train(params, grads, impl="cpu", block_size=block_size)
    assert_same_bits(fast, train(params, grads, impl="reference", block_size=block_size))


def everything() -> str:
    return ",".join(
        digest(train(*problem(p, g), impl="cpu", block_size=b)) for p in DTYPES for g in DTYPES for b in (64, 2048)
    )


def test_all_instruction_levels_agree_bitwise() -> None:
    levels = ["baseline", "avx2", "avx512"]
    levels = levels[: levels.index(extension().build_info()["highest_cpu_level"]) + 1]
    program = f"import sys; sys.path[:0] = [{str(ROOT / 'tests')!r}, {str(Path(__file__).parent)!r}]; "
    program += "import test_adamw8bit_step as t; print(t.everything())"
    for level in levels:
        environment = {**os.environ, "PYEFF_CPU_LEVEL": level}
        ran = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert ran.stdout.strip() == everything(), level


def test_threads_splitting_and_order_change_nothing() -> None:
    shapes = [(70_001,), (3,), (129, 513), (256,)]
    params, grads = problem(shapes=shapes)
    whole = train(params, grads)
    assert_same_bits(whole, train(params, grads))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert_same_bits(whole, train(params, grads))
        torch.set_num_threads(1)
        assert_same_bits(whole, train(params, grads))
    finally:
        torch.set_num_threads(threads)
    for i in reversed(range(len(params))):
        alone = train([params[i]], [[row[i]] for row in grads])
        states = whole[1]
        picked = AdamWStates(
            [states.exp_avg_code[i]],
            [states.exp_avg_scale[i]],
            [states.exp_avg_sq_code[i]],
            [states.exp_avg_sq_scale[i]],
        )
        assert_same_bits(([whole[0][i]], picked), alone)


def test_views_that_are_unaligned_or_not_contiguous_give_the_same_bits() -> None:
    params, grads = problem(shapes=[(96, 112)])
    expected, _ = train(params, grads)
    unaligned = torch.zeros(96 * 112 + 1)[1:].view(96, 112).copy_(params[0])
    transposed = torch.zeros(112, 96).T.copy_(params[0])
    strided = torch.zeros(96, 224)[:, ::2].copy_(params[0])
    for p in (unaligned, transposed, strided):
        states = AdamWStates.zeros([p])
        for i, row in enumerate(grads):
            g = row[0] if i % 2 else row[0].T.contiguous().T
            adamw8bit_step([p], [g], states, **HYPERPARAMETERS)
        assert torch.equal(p, expected[0])


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_bad_gradient_spoils_its_own_weight_alone(bad: float, impl: str) -> None:
    params, grads = problem(shapes=[(600,)])
    quiet = [[row[0].clone().index_fill_(0, torch.tensor([300]), 0.0)] for row in grads]
    loud = [[row[0].clone()] for row in quiet]
    loud[1][0][300] = bad
    a, states_a = train(params, quiet, impl=impl)
    b, states_b = train(params, loud, impl=impl)
    others = torch.arange(600) != 300
    assert b[0][300].isnan()
    assert torch.equal(a[0][others], b[0][others])
    for x, y in zip(states_a.decode(0), states_b.decode(0), strict=True):
        assert torch.equal(x[others], y[others])


def test_first_step_is_minus_lr_times_the_sign() -> None:
    """Whatever the size of the gradient: in-block spreads of 2^24 must not make a step larger or smaller."""
    g = torch.exp2(torch.linspace(-12, 12, 256)) * torch.tensor([1.0, -1.0]).repeat(128)
    p = torch.zeros(256)
    adamw8bit_step([p], [g], AdamWStates.zeros([p]), lr=1.0, eps=0.0, weight_decay=0.0)
    twin = torch.nn.Parameter(torch.zeros(256))
    twin.grad = g
    torch.optim.AdamW([twin], lr=1.0, eps=0.0, weight_decay=0.0).step()
    assert_as_accurate(p, -g.sign(), twin.detach())


def test_weight_decay_alone_is_torchs() -> None:
    p = torch.linspace(-3, 3, 300)
    twin = torch.nn.Parameter(p.clone())
    twin.grad = torch.zeros(300)
    peer = torch.optim.AdamW([twin], lr=0.1, weight_decay=0.5)
    states = AdamWStates.zeros([p])
    for _ in range(10):
        adamw8bit_step([p], [torch.zeros(300)], states, lr=0.1, weight_decay=0.5)
        peer.step()
    assert_as_accurate(p, torch.linspace(-3, 3, 300).double() * 0.95**10, twin.detach())


def test_states_take_little_more_than_two_bytes_per_parameter() -> None:
    p = torch.zeros(1_000_000)
    states = AdamWStates.zeros([p])
    taken = sum(x.nbytes for x in tensors_of([], states))
    assert taken <= 2.04 * p.numel()


# ------------------------------------------------------------------------------------------------ contract and errors


def test_opcheck() -> None:
    params, grads = problem(shapes=[(300,), (17, 3)], steps=1)
    states = AdamWStates.zeros(params)
    lists = (
        params,
        grads[0],
        states.exp_avg_code,
        states.exp_avg_scale,
        states.exp_avg_sq_code,
        states.exp_avg_sq_scale,
    )
    numbers = {"lr": 0.1, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1}
    powers = {"beta1_power": 0.9, "beta2_power": 0.99}
    for impl in ("cpu", "reference"):
        torch.library.opcheck(
            torch.ops.pyeff.adamw8bit_step.default, lists, {"block_size": 256, "impl": impl, **numbers, **powers}
        )


def test_unknown_and_impossible_implementations_are_refused() -> None:
    p = torch.zeros(3)
    assert pyeff.explain("adamw8bit_step", [p], [p], AdamWStates.zeros([p])).impl == "cpu"
    assert OPERATIONS["adamw8bit_step"].on_device("cuda").refused.keys() <= {"cuda", "cpu"}
    with pytest.raises(RuntimeError, match="runs on CUDA tensors"):
        adamw8bit_step([p], [p], AdamWStates.zeros([p]), lr=0.1, impl="cuda")
    with pytest.raises(ValueError, match="impl must be"):
        adamw8bit_step([p], [p], AdamWStates.zeros([p]), lr=0.1, impl="triton")


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"lr": -1.0}, ValueError, "lr must be >= 0"),
        ({"lr": float("nan")}, ValueError, "lr must be >= 0"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas must be"),
        ({"eps": -1e-8}, ValueError, "eps must be >= 0"),
        ({"weight_decay": -0.1}, ValueError, "weight_decay must be >= 0"),
        ({"grads": []}, ValueError, "1 params need as many grads"),
        ({"grads": [torch.zeros(4)]}, ValueError, r"grads\[0\] must be \(3,\)"),
        ({"grads": [torch.zeros(3).to_sparse()]}, TypeError, "dense fp32 or bf16"),
        ({"grads": [torch.zeros(3, dtype=torch.float64)]}, TypeError, "dense fp32 or bf16"),
        ({"params": [torch.zeros(3, dtype=torch.float16)]}, TypeError, "dense fp32 or bf16"),
        ({"states": AdamWStates.zeros([torch.zeros(4)])}, ValueError, "codes of params"),
        ({"states": AdamWStates.zeros([torch.zeros(3)], block_size=64)}, None, ""),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], error: type[Exception] | None, match: str) -> None:
    arguments = {"params": [torch.zeros(3)], "grads": [torch.ones(3)], "states": AdamWStates.zeros([torch.zeros(3)])}
    arguments |= {"lr": 0.1} | change
    if error is None:
        adamw8bit_step(**arguments)
        return
    with pytest.raises(error, match=match):
        adamw8bit_step(**arguments)
    assert not arguments["params"][0].any()


def test_a_block_size_without_a_kernel_is_refused() -> None:
    with pytest.raises(ValueError, match="block_size must be one of 64"):
        AdamWStates.zeros([torch.zeros(3)], block_size=100)


# ----------------------------------------------------------------------------------------------------------- the GPU


@given(st.lists(st.integers(min_value=0, max_value=5 * _CHUNK), max_size=8))
def test_chunks_cover_every_element_once(sizes: list[int]) -> None:
    seen = [0] * len(sizes)
    for tensor, index in _chunks(tuple(sizes)).tolist():
        assert index * _CHUNK == seen[tensor]
        seen[tensor] += min(_CHUNK, sizes[tensor] - index * _CHUNK)
    assert seen == sizes


def test_chunks_of_a_tensor_beyond_32_bits() -> None:
    size = 2**31 + 2**20 + 1
    chunks = _chunks((size,))
    assert chunks.dtype == torch.int32
    assert chunks[-1].tolist() == [0, size // _CHUNK]


def cuobjdump() -> str | None:
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else shutil.which("cuobjdump")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_cuda_kernel_compiles_without_spills_into_vectors_of_16_bytes(tmp_path: Path) -> None:
    source, cubin = ROOT / "csrc" / "cuda" / "adamw8bit.cu", tmp_path / "out.cubin"
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
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", log)]
    assert len(registers) == 4
    assert max(registers) <= 65536 // (3 * 256) // 8 * 8  # three thread blocks on a multiprocessor
    assert re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log) == [
        ("0", "0", "0")
    ] * len(registers)
    tool = cuobjdump()
    assert tool is not None
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = sass.split("Function : ")[1:]
    vectors = {"ff": (4 + 4, 4), "ft": (4 + 2, 4), "tf": (2 + 4, 2), "tt": (2 + 2, 2)}
    for kernel in kernels:
        reads, writes = vectors[re.search(r"step_kernelI(\w\w)EE", kernel).group(1)]
        assert len(re.findall(r"LDG\.E\.128", kernel)) == reads + 2
        assert len(re.findall(r"STG\.E\.128", kernel)) == writes + 2
        assert not re.findall(r"\b(?:LD|ST|LDL|STL)\.", kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("g_dtype", DTYPES)
@pytest.mark.parametrize("p_dtype", DTYPES)
def test_gpu_gives_the_bits_of_the_cpu(p_dtype: torch.dtype, g_dtype: torch.dtype, block_size: int) -> None:
    params, grads = problem(p_dtype, g_dtype)
    grads[1][8][3] = torch.nan
    grads[2][9][0, 0] = torch.inf
    on_gpu = train([p.cuda() for p in params], [[g.cuda() for g in row] for row in grads], block_size=block_size)
    params_back = [p.cpu() for p in on_gpu[0]]
    states = on_gpu[1]
    for name in ("exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"):
        setattr(states, name, [x.cpu() for x in getattr(states, name)])
    assert_same_bits((params_back, states), train(params, grads, block_size=block_size))


@pytest.mark.gpu
def test_gpu_takes_unaligned_views() -> None:
    params, grads = problem(shapes=[(5000,)])
    expected, _ = train(params, grads)
    p = torch.zeros(5001, device="cuda")[1:].copy_(params[0])
    states = AdamWStates.zeros([p])
    for row in grads:
        adamw8bit_step([p], [row[0].cuda()], states, **HYPERPARAMETERS)
    assert torch.equal(p.cpu(), expected[0])


@pytest.mark.gpu
def test_gpu_step_does_not_synchronise() -> None:
    p = torch.zeros(100_000, device="cuda")
    states = AdamWStates.zeros([p])
    grads = [torch.randn_like(p) for _ in range(3)]
    adamw8bit_step([p], [grads[0]], states, lr=0.1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for g in grads:
            adamw8bit_step([p], [g], states, lr=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scales_that_are_no_plain_memory_and_parameters_given_twice_are_refused():
    p = torch.ones(1000)
    states = AdamWStates.zeros([p])
    states.exp_avg_sq_scale = [torch.zeros(1).expand(4)]
    with pytest.raises(ValueError, match="contiguous fp32"):
        adamw8bit_step([p], [torch.ones(1000)], states, lr=0.1)
    with pytest.raises(ValueError, match="twice"):
        adamw8bit_step([p, p], [torch.ones(1000)] * 2, AdamWStates.zeros([p, p]), lr=0.1)
    assert torch.equal(p, torch.ones(1000))
