"""What is handed to the GPU, without one: no step reads a number back, and no table runs out of bits."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import mmap
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from pyeff.ops._optimizer_plan import FIELDS, StepPlan
from pyeff.ops._optimizer_states import OptimizerStates, scale_shape
from pyeff.optim import Adafactor8bit, Adam8bit, AdamW8bit, GradientRelease, Lion8bit, Muon8bit, SGD8bit, calls
from pyeff.reference.optimizer_step import OptimizerRule

# csrc/common/optimizer_step.h
SIZE, FIRST_BLOCK, FIRST_CHUNK = 9, 13, 14
CHUNK = 4096
INT32 = 2**31


class FakeExtension:
    """Keeps what the kernels would get."""

    OPTIMIZER_CHUNK, OPTIMIZER_SCALARS_BYTES = CHUNK, 56

    def __init__(self) -> None:
        self.rows = torch.empty(0)
        self.calls: list[str] = []
        self.chunk_count = 0

    def optimizer_table_cuda(self, rows: int, count: int, *rest: int) -> None:
        numbers = (ctypes.c_int64 * (count * FIELDS)).from_address(rows)
        self.rows = torch.tensor(np.array(numbers)).view(count, FIELDS)
        self.chunk_count = rest[2]
        self.calls.append("table")

    def optimizer_step_cuda(self, *arguments: Any) -> None:
        self.calls.append("step")

    def global_norm_cuda(self, *arguments: Any) -> None:
        self.calls.append("norm")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeExtension:
    """Tensors on the CPU are stepped as if they were on a GPU."""
    fake = FakeExtension()
    cuda = SimpleNamespace(impl="cuda")
    # The packages' attributes of these names are the functions.
    steps, norms = (importlib.import_module(f"pyeff.ops.{name}") for name in ("_optimizer_plan", "global_norm"))
    for module in (steps, norms):
        monkeypatch.setattr(module, "extension", lambda: fake)
    monkeypatch.setattr(calls, "OPERATION", SimpleNamespace(on_device=lambda device: cuda))
    monkeypatch.setattr(norms, "OPERATION", SimpleNamespace(explain=lambda *args, **kwargs: cuda))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: SimpleNamespace(cuda_stream=0))
    return fake


class NothingIsRead(TorchDispatchMode):
    """A number read from a tensor waits for the device and cannot be captured."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read from a tensor"
        assert func is not torch.ops.aten.is_nonzero.default, "a number was read from a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"skip_nonfinite": True, "master": "ecc8"}])
@pytest.mark.parametrize("cls", [Adam8bit, AdamW8bit, Lion8bit, SGD8bit])
def test_no_step_reads_a_number_from_a_tensor(cls: Any, options: dict[str, Any], gpu: FakeExtension) -> None:
    params = [nn.Parameter(torch.ones(300, 7)), nn.Parameter(torch.ones(5, dtype=torch.bfloat16))]
    optimizer = cls([{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.1}], **options)
    for step in range(3):
        if step != 1:  # gradients that stay where they are, and new ones
            for p in params:
                p.grad = torch.ones_like(p)
        gpu.calls.clear()
        with NothingIsRead():
            optimizer.step()
        assert gpu.calls.count("step") == 2
        if step == 1:
            # What a captured graph launches again is all there is to launch.
            assert gpu.calls == (["table", "norm"] if options else []) + ["step", "step"]
    with pytest.raises(AssertionError, match="was read"), NothingIsRead():
        optimizer.skipped_steps


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}, {"skip_nonfinite": True, "master": "ecc8"}])
@pytest.mark.parametrize(
    ("cls", "launches"), [(Muon8bit, 4), (Adafactor8bit, 2), (partial(Adafactor8bit, beta1=0.9), 4)]
)
def test_no_step_along_a_direction_reads_one(
    cls: Any, launches: int, options: dict[str, Any], gpu: FakeExtension
) -> None:
    params = [nn.Parameter(torch.ones(30, 7)), nn.Parameter(torch.ones(5, 9, dtype=torch.bfloat16))]
    optimizer = cls(params, lr=0.1, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.ones_like(p)
        gpu.calls.clear()
        with NothingIsRead():
            optimizer.step()
        assert gpu.calls.count("step") == launches


@pytest.mark.parametrize("clip", [None, "delayed", "two-pass"])
def test_no_step_inside_the_backward_reads_one(clip: str | None, gpu: FakeExtension) -> None:
    model = nn.Linear(30, 7)
    optimizer = AdamW8bit(model.parameters())
    with GradientRelease(optimizer, clip_norm=clip and 1.0, clip=clip or "delayed") as release, NothingIsRead():
        for _ in range(2):
            release.backward(lambda: model(torch.ones(2, 30)).sum())
    assert gpu.calls.count("step") == 4


# ---- more elements than 32 bits can count


def test_tables_of_large_tensors_count_in_64_bits(gpu: FakeExtension, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tensors without memory: sizes, first chunks and chunks of a launch, rows of whole blocks and ragged ones."""
    shapes = [(2**33 + 5,), (2**23, 300), (7,), (2**22, 4096)]
    params = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    states = OptimizerStates.zeros(params, master="none")
    monkeypatch.setattr(
        importlib.import_module("pyeff.ops._optimizer_plan"), "check_memory", lambda tensors, what: None
    )
    StepPlan(
        params, params, states.lists(), master="none", block_size=256, keys=range(4), first_blocks=[0, 0, 2**40, 0],
        impl="cuda",
    )  # fmt: skip
    sizes = [p.numel() for p in params]
    assert gpu.rows[:, SIZE].tolist() == sizes
    # Rows of 300 take two blocks each.
    chunks = [-(-n // CHUNK) for n in (sizes[0], 2**23 * 512, sizes[2], sizes[3])]
    starts = [sum(chunks[:i]) for i in range(5)]
    assert gpu.rows[:, FIRST_CHUNK].tolist() == starts[:4]
    assert gpu.rows[:, FIRST_BLOCK].tolist() == [0, 0, 2**40, 0]
    assert gpu.chunk_count == starts[4]
    # A launch has a grid of this size, and the number of a chunk within a tensor is kept in 32 bits: 8.8e12 elements.
    assert gpu.chunk_count < INT32
    assert max(sizes) > 2 * INT32


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_random_bits_of_blocks_beyond_32_bits_are_their_own(impl: str) -> None:
    """A piece of a large parameter starts at such a block."""

    def weights(first_block: int) -> Tensor:
        p = torch.full((512,), 1.0, dtype=torch.bfloat16)
        states = OptimizerStates.zeros([p])
        plan = StepPlan(
            [p], [torch.ones(512)], states.lists(), master="stochastic", block_size=256, keys=[0],
            first_blocks=[first_block], impl=impl,
        )  # fmt: skip
        plan.step(OptimizerRule("adam", lr=1e-3, block_size=256))
        return p

    far = 2**33 + 3
    assert torch.equal(weights(far)[256:], weights(far + 1)[:256])
    assert not torch.equal(weights(far), weights(far % 2**32))
    assert not torch.equal(weights(far), weights(far % 2**31))


def repeated(count: int, dtype: torch.dtype, fill: float, own: int) -> Tensor:
    """`count` elements in the memory of 16 MiB and `own` bytes: the same pages again and again, but for the end."""
    size = count * dtype.itemsize
    step, page = 2**24, mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    shared = os.memfd_create("repeated")
    os.ftruncate(shared, step)
    read_write = mmap.PROT_READ | mmap.PROT_WRITE
    reserve = libc.mmap(None, size + 2 * step, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    end = reserve + (size - own) // page * page
    at = reserve
    while at < end:
        length = min(step, end - at)
        assert libc.mmap(at, length, read_write, mmap.MAP_SHARED | 0x10, shared, 0) == at  # MAP_FIXED
        at += length
    fixed = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x10
    assert libc.mmap(end, reserve + size + page - end, read_write, fixed, -1, 0) == end
    os.close(shared)
    made = torch.frombuffer((ctypes.c_char * size).from_address(reserve), dtype=dtype)
    made[: step // dtype.itemsize] = fill
    made[-own // dtype.itemsize :] = fill
    return made


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs Linux to lay the same memory out many times")
def test_the_last_of_more_than_two_to_the_31_elements_takes_the_step_of_any() -> None:
    """Most of the parameter is the same memory, which is stepped over and over; its end has memory of its own."""
    count, tail = 2**31 + 2**20 + 77, 2**16
    p = repeated(count, torch.bfloat16, 1.0, 2 * tail)
    g = repeated(count, torch.bfloat16, 0.25, 2 * tail)
    code = repeated(count, torch.uint8, 0, tail)
    (scales,) = scale_shape((count,), 2048)
    zeros = OptimizerStates.zeros([torch.zeros(1, dtype=torch.bfloat16)], rule="lion", master="none")
    plan = StepPlan(
        [p], [g], [[code], [torch.zeros(scales)], [], [], [], zeros.steps, []], master="none", block_size=2048,
        keys=[0], impl="cpu",
    )  # fmt: skip
    plan.step(OptimizerRule("lion", lr=0.5, beta1=0.9, beta2=0.99, weight_decay=0.0, block_size=2048))
    assert torch.equal(p[-tail:], torch.full((tail,), 0.5, dtype=torch.bfloat16))
    assert (code[-tail:] == 127).all()
    # 0.0025 is 31/32 of its scale; the product that makes it is rounded, and so is the scale.
    largest = 0.01 * 0.25 * 32 / 31
    assert abs(plan.lists[1][0][-1].item() - largest) <= 4 * torch.finfo(torch.float32).eps * largest


@pytest.mark.parametrize("seen", [(2**31 + 3, 4), (3, 2**31 + 4)])
def test_pieces_of_large_parameters_start_where_they_should(seen: tuple[int, int]) -> None:
    from pyeff.optim.pieces import blocks_before, row_pieces

    pieces = row_pieces(seen, 2 * seen[0] * seen[1], block_size=256, limit=2**31)
    assert pieces[0][0] == 0
    assert pieces[-1][1] == seen[0]
    assert blocks_before(seen, pieces[-1][0], 256) == pieces[-1][0] * -(-seen[1] // 256)
