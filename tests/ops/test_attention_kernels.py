"""What the kernels behind attention are told, tile by tile and kernel by kernel."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from typing import Any

import backends
import pytest
import torch
from attention_problems import (
    PROBLEMS,
    Problem,
    assert_accurate,
    borders_of,
    results,
)
from torch import Tensor

from pyeff.ops._attention_choice import OPERATION
from pyeff.ops._dispatch import interpreting

pytestmark = backends.quiet_interpreter


# ---------------------------------------------------------------------------------------------------- the CPU kernel


@pytest.mark.parametrize("block", [1, 5, 64])
@pytest.mark.parametrize(
    "which", ["window", "whole window", "more keys", "more queries", "more queries, whole window", "more keys, window"]
)
def test_blocks_of_masked_queries_change_only_the_rounding(
    block: int, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.import_module("pyeff.ops._cpu_attention"), "_MASKED_QUERIES", block)
    for dtype in (torch.float32, torch.bfloat16):
        problem = replace(PROBLEMS[which], dtype=dtype)
        tensors = problem.tensors()
        assert_accurate(results(problem, tensors, impl="cpu"), problem, tensors, impl="cpu")


# ------------------------------------------------------------------------------------------- others' kernels for GPUs


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))


def head_of(size: int, tokens: int = 16) -> Tensor:
    return torch.randn(1, tokens, 1, size).bfloat16()


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("impl", "most"), [("cudnn", 128), ("flash", 256), ("flash_attn_2", 256), ("flash_attn_3", 256)]
)
def test_a_gradient_of_lse_has_room_in_a_head_or_is_refused(impl: str, most: int) -> None:
    limits = OPERATION.limits
    for size in (most - 8, most):
        q = head_of(size)
        assert limits(impl, q, q, q) is None
        problem = limits(impl, q, q, q, lse_gradient=True)
        assert (problem is None) == (size < most)
    assert f"{most + 8} of at most {most}" in problem


def test_the_backward_asks_for_a_kernel_that_takes_the_gradient_of_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.ops.attention")
    asked: list[bool] = []

    def seen(*args: Any, **kwargs: Any) -> str | None:
        asked.append(kwargs["lse_gradient"])
        return OPERATION.limits(*args, **kwargs)

    monkeypatch.setattr(module, "OPERATION", replace(OPERATION, limits=seen))
    problem = Problem((3, 2))
    tensors = problem.tensors()
    for with_lse in (False, True):
        results(problem, tensors, with_lse=with_lse)
    assert asked == [False, False, False, True]  # forward and backward of each


@pytest.mark.usefixtures("hopper")
def test_flash_attention_4_is_not_asked_for_softcaps_of_packed_samples() -> None:
    limits = OPERATION.limits
    q = head_of(64)
    assert limits("flash_attn_4", q, q, q, softcap=30.0) is None
    packed = limits("flash_attn_4", q[0], q[0], q[0], softcap=30.0, cu_seqlens=borders_of((16,)))
    assert "no softcap of packed samples" in packed


def test_rows_that_begin_between_16_bytes_are_copied_for_gpu_kernels() -> None:
    module = importlib.import_module("pyeff.ops._gpu_attention")
    wide = torch.randn(1, 4, 2, 48).bfloat16()
    for cut, copied in ((wide[..., 8:40], False), (wide[..., 1:33], True), (wide[..., :40:2], True)):
        (found,) = module._aligned(cut)
        assert torch.equal(found, cut)
        assert (found.data_ptr() != cut.data_ptr()) == copied
        assert found.data_ptr() % 16 == 0
    rows = torch.randn(1, 4, 2, 33).bfloat16()[..., :32]
    assert module._aligned(rows)[0].is_contiguous()


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_wider_than_all_samples_is_none_for_gpu_kernels(causal: bool) -> None:
    module = importlib.import_module("pyeff.ops._gpu_attention")
    pack = module._Pack.of(head_of(32, 5), head_of(32, 9), None, None)
    for window, left in ((None, -1), (2**31 - 1, -1), (9, -1), (8, 7)):
        call = pack.call(causal, 1.0, window, None)
        assert (call.left, call.right) == (left, 0 if causal else left)


# ------------------------------------------------------------------------------------------------- the Triton kernel


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("tile", [(16, 16), (32, 16), (64, 32)], ids=str)
@pytest.mark.parametrize("which", ["causal", "packed, two lengths", "whole window", "window"])
def test_tiles_change_only_the_rounding(tile: tuple[int, int], which: str, deterministic: bool) -> None:
    forward = importlib.import_module("pyeff.triton_kernels.attention")
    backward = importlib.import_module("pyeff.triton_kernels.attention_backward")
    problem, device = PROBLEMS[which], "cpu" if interpreting() else "cuda"
    tensors = problem.tensors()
    q, k, v, grad_out, grad_lse = (t.to(device) for t in tensors)
    options = problem.options | {"scale": 32**-0.5} | {name: t.to(device) for name, t in problem.borders().items()}
    out, lse = forward.attention(q, k, v, **options, config=forward.Config(*tile, 4, 2, described=deterministic))
    config = backward.Config(*tile, 4, 2)
    configs = backward.Configs(config if deterministic else None, config)
    grads = backward.attention_backward(grad_out, q, k, v, out, lse, grad_lse=grad_lse, **options, configs=configs)
    assert_accurate([t.cpu() for t in (out, lse, *grads)], problem, tensors)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("which", PROBLEMS)
def test_the_deterministic_backward_is_as_accurate(which: str, device: str) -> None:
    if device == "cpu" and not interpreting():
        pytest.skip("a GPU is here: Triton does not interpret")
    problem = replace(PROBLEMS[which], dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tensors = problem.tensors()
    found = results(problem, tensors, impl="triton", device=device, deterministic=True)
    assert_accurate(found, problem, tensors, impl="triton")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
def test_head_sizes_of_the_triton_kernels(head_size: int, deterministic: bool) -> None:
    device = "cpu" if interpreting() else "cuda"
    problem = Problem((0, 1, 33, 0, 20), head_size=head_size, dtype=torch.float16)
    tensors = problem.tensors()
    found = results(problem, tensors, impl="triton", device=device, deterministic=deterministic)
    assert_accurate(found, problem, tensors, impl="triton")


def test_the_triton_kernels_are_told_to_be_deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("pyeff.triton_kernels.attention_backward")
    device = "cpu" if interpreting() else "cuda"
    asked: list[bool] = []
    pick = module.pick_configs
    monkeypatch.setattr(module, "pick_configs", lambda *args: asked.append(args[-1]) or pick(*args))
    problem = Problem((3, 2))
    tensors = problem.tensors()
    for deterministic in (False, True):
        results(problem, tensors, impl="triton", device=device, deterministic=deterministic)
    torch.use_deterministic_algorithms(True)
    try:
        results(problem, tensors, impl="triton", device=device)
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [False, True, True]


def test_descriptors_stay_within_a_sample() -> None:
    module = importlib.import_module("pyeff.triton_kernels.attention")
    device = "cpu" if interpreting() else "cuda"
    problem = Problem((50, 30), dtype=torch.float16, causal=False)
    q, k, v, *_ = (t.to(device) for t in problem.tensors())
    config = module.Config(16, 16, 4, 2, described=True)
    assert module.descriptor(k, config.bn, (9, 0)) is not None
    options = {"scale": 0.1, "cu_seqlens": borders_of(problem.queries), "causal": False, "config": config}
    clean, _ = module.attention(q, k, v, **options)
    for t in (q, k, v):
        t[50:] = math.nan
    found, _ = module.attention(q, k, v, **options)
    assert torch.equal(found[:50], clean[:50])
    # Every second head: rows that begin at 16 bytes and follow one another at 128; and rows that do not.
    assert module.descriptor(k[:, ::2], config.bn, (9, 0)) is not None
    assert module.descriptor(k[..., 1:], config.bn, (9, 0)) is None
