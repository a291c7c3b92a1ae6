"""Scoring tokens at the head against the bare matrix product, and against what computes the loss alone.

    pytest benchmarks/bench_linear_cross_entropy_scores.py --benchmark-only

The peers give less: torch's linear_cross_entropy, Cut Cross Entropy and Liger return the loss and no other score.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.reference.linear_cross_entropy_scores import FIELDS


def inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, device=device, generator=generator)
    weight = torch.randn(v, d, dtype=dtype, device=device, generator=generator) * d**-0.5
    targets = torch.randint(0, v, (n,), device=device, generator=generator)
    return hidden, weight, targets


def check_answer(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The first 64 tokens against float64, before anything is timed."""
    rows = hidden[:64], weight, targets[:64]
    exact = pyeff.linear_cross_entropy_scores(rows[0].double(), weight.double(), rows[2], impl="reference")
    peer = pyeff.linear_cross_entropy_scores(*rows, impl="reference")
    actual = pyeff.linear_cross_entropy_scores(*rows)
    for name in FIELDS:
        assert_as_accurate(getattr(actual, name), getattr(exact, name), getattr(peer, name), what=name)


def peers(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], object]]:
    """Whatever else is installed and computes a per-token loss from the same tensors."""
    found: dict[str, Callable[[], object]] = {
        "eager torch, loss alone": lambda: torch.nn.functional.cross_entropy(
            (hidden @ weight.T).float(), targets, reduction="none"
        ),
    }
    linear_cross_entropy: Any = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if linear_cross_entropy is not None:
        found["torch linear_cross_entropy, loss"] = lambda: linear_cross_entropy(
            hidden, weight, targets, reduction="none"
        )
    if not hidden.is_cuda:
        return found
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["Cut Cross Entropy, loss"] = lambda: cut(hidden, weight, targets, reduction="none")
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["Liger, loss"] = lambda: liger(hidden, weight, targets)
    except ImportError:
        pass
    return found


@pytest.mark.benchmark(group="linear_cross_entropy_scores")
def test_scores_cost_little_more_than_their_matrix_product(contest: Callable[..., Any], device: str) -> None:
    n, d, v, dtype = (8192, 4096, 131072, torch.bfloat16) if device == "cuda" else (512, 576, 49152, torch.float32)
    hidden, weight, targets = inputs(n, d, v, dtype, device)
    check_answer(hidden, weight, targets)
    logits = torch.empty(n, v, dtype=dtype, device=device)
    functions = {
        "torch.mm into a buffer": lambda: torch.mm(hidden, weight.T, out=logits),
        "hidden @ weight.T": lambda: hidden @ weight.T,
        "pyeff, seven scores": lambda: pyeff.linear_cross_entropy_scores(hidden, weight, targets),
        **peers(hidden, weight, targets),
    }
    with torch.no_grad():
        contest(
            "pyeff, seven scores",
            functions,
            baseline="torch.mm into a buffer",
            target=1.12,
            flops=2 * n * d * v,
            bound="torch.mm into a buffer",
        )


@pytest.mark.benchmark(group="linear_cross_entropy_scores")
def test_sixteen_bit_inputs_with_softcap(contest: Callable[..., Any], device: str) -> None:
    n, d, v = (8192, 2304, 256000) if device == "cuda" else (256, 576, 49152)
    hidden, weight, targets = inputs(n, d, v, torch.bfloat16, device)
    check_answer(hidden, weight, targets)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32  # the product of equal accuracy
    wide_hidden, wide_weight = hidden.to(dtype), weight.to(dtype)
    logits = torch.empty(n, v, dtype=dtype, device=device)
    functions = {
        f"torch.mm in {dtype}": lambda: torch.mm(wide_hidden, wide_weight.T, out=logits),
        "pyeff, bf16": lambda: pyeff.linear_cross_entropy_scores(hidden, weight, targets),
        "pyeff, bf16, softcap": lambda: pyeff.linear_cross_entropy_scores(hidden, weight, targets, softcap=30.0),
    }
    contest(
        "pyeff, bf16, softcap",
        functions,
        baseline=f"torch.mm in {dtype}",
        flops=2 * n * d * v,
        bound=f"torch.mm in {dtype}",
    )
