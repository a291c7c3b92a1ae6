"""The head's loss and its gradient without logits, against torch with them, and against who else leaves them out.

    pytest benchmarks/bench_linear_cross_entropy.py --benchmark-only

A step is the loss of all tokens and its gradients by hidden states and weight. Peak memory beside inputs is printed and
kept for each contender. The floor is four matrix products where logits are formed twice, three where they are stored.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor
from torch.nn import functional

import pyeff

OURS = "pyeff, loss and gradient"
TORCH = "torch, with logits"


def inputs(n: int, d: int, v: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and weight that require gradients, and targets."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, dtype=dtype, device=device, generator=generator)
    weight = torch.randn(v, d, dtype=dtype, device=device, generator=generator) * d**-0.5
    targets = torch.randint(0, v, (n,), device=device, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The mean loss of the same tensors, by everybody who is installed."""
    found: dict[str, Callable[[], Tensor]] = {
        OURS: lambda: pyeff.linear_cross_entropy(hidden, weight, targets),
        TORCH: lambda: functional.cross_entropy((hidden @ weight.T).float(), targets),
    }
    linear_cross_entropy: Any = getattr(functional, "linear_cross_entropy", None)
    if linear_cross_entropy is not None:
        found["torch linear_cross_entropy"] = lambda: linear_cross_entropy(hidden, weight, targets)
    if not hidden.is_cuda:
        return found
    try:
        from cut_cross_entropy import linear_cross_entropy as cut

        found["Cut Cross Entropy"] = lambda: cut(hidden, weight, targets)
        # Its gradient without the filter that drops small probabilities.
        found["Cut Cross Entropy, exact"] = lambda: cut(hidden, weight, targets, filter_eps=None)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["Liger"] = lambda: liger(hidden, weight, targets)
    except ImportError:
        pass
    return found


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def check_answer(dtype: torch.dtype, device: str) -> None:
    """A small step against float64, before anything is timed."""
    hidden, weight, targets = inputs(200, 64, 3000, dtype, device)

    def gradients(h: Tensor, w: Tensor, loss: Callable[..., Tensor]) -> list[Tensor]:
        return list(torch.autograd.grad(loss(h, w, targets), [h, w]))

    def eager(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
        z = h @ w.T
        return functional.cross_entropy(z.to(torch.promote_types(z.dtype, torch.float32)), y)

    exact = gradients(*(t.detach().double().requires_grad_() for t in (hidden, weight)), eager)
    peer = gradients(hidden, weight, eager)
    actual = gradients(hidden, weight, pyeff.linear_cross_entropy)
    for what, *three in zip(("hidden", "weight"), actual, exact, peer, strict=True):
        assert_as_accurate(*three, multiple=4.0, what=what)


def peak_bytes(run: Callable[[], object]) -> int | None:
    """What a call takes at most beside what is there, on a GPU."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.benchmark(group="linear_cross_entropy")
@pytest.mark.parametrize("size", ["small model", "large model"])
def test_a_step_of_the_head(contest: Callable[..., Any], benchmark: Any, device: str, size: str) -> None:
    shapes = {
        ("cuda", "small model"): (16384, 2048, 128_256),
        ("cuda", "large model"): (8192, 4096, 128_256),
        ("cpu", "small model"): (512, 576, 49_152),
        ("cpu", "large model"): (256, 1024, 49_152),
    }
    n, d, v = shapes[device, size]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    check_answer(dtype, device)
    hidden, weight, targets = inputs(n, d, v, dtype, device)
    cu_seqlens = torch.arange(0, n + 1, n // 8, device=device)
    functions: dict[str, Callable[[], object]] = {
        name: (lambda loss=loss: step(loss, hidden, weight)) for name, loss in losses(hidden, weight, targets).items()
    }
    functions["pyeff, loss, gradient and norms"] = lambda: pyeff.linear_cross_entropy_grad(
        hidden, weight, targets, cu_seqlens, grad_losses=1 / n
    )
    functions["pyeff, loss and norms"] = lambda: pyeff.linear_cross_entropy_grad(
        hidden, weight, targets, cu_seqlens, grad_losses=1 / n, hidden_grad=False, weight_grad=False
    )
    logits = torch.empty(n, v, dtype=dtype, device=device)

    def products() -> None:
        with torch.no_grad():
            torch.mm(hidden, weight.T, out=logits)
            torch.mm(logits, weight)
            torch.mm(logits.T, hidden)

    functions["three products, torch.mm"] = products
    memory = {name: peak_bytes(function) for name, function in functions.items()}
    contest(OURS, functions, baseline=TORCH, flops=8 * n * d * v, bound="three products, torch.mm", pairs=20)
    benchmark.extra_info["peak_bytes"] = memory
    for name, taken in memory.items():
        if taken is not None:
            print(f"  {name:<34} {taken / 2**20:9.0f} MiB at most beside inputs")


# A process inherits ru_maxrss from the one that started it, but not VmHWM.
PEAK = """
import re, sys
sys.path[:0] = {paths}
import torch
from bench_linear_cross_entropy import inputs, losses, step
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1))
for rows, classes in ((1, 64), (2048, 49152)):
    hidden, weight, targets = inputs(rows, 64, classes, torch.float32, "cpu")
    weight.grad, hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    before = peak()
    losses(hidden, weight, targets)[{name!r}]().backward()
print(peak() - before)
"""


@pytest.mark.benchmark(group="linear_cross_entropy")
def test_memory_of_a_step_on_the_cpu(benchmark: Any, device: str) -> None:
    if device != "cpu":
        pytest.skip("the GPU's memory is measured beside its time")
    here = Path(__file__).parent
    paths = [str(here), str(here.parent / "tests")]
    taken = {}
    case = inputs(256, 64, 49_152, torch.float32, "cpu")
    for name in losses(*case):
        done = subprocess.run(
            [sys.executable, "-c", PEAK.format(paths=paths, name=name)], capture_output=True, text=True, check=True
        )
        taken[name] = int(done.stdout) << 10
        print(f"  {name:<34} {taken[name] / 2**20:9.0f} MiB at most beside inputs and gradients")
    benchmark.extra_info["peak_bytes"] = taken
    benchmark.pedantic(step, args=(losses(*case)[OURS], *case[:2]), rounds=1)
    logits = 2048 * 49_152 * 4
    assert taken[TORCH] > logits, "torch's own need has not been seen"
    assert taken[OURS] < logits / 2
