"""Time the launch choices of linear_grad's GPU kernel and print the table that `pick_config` reads.

    python benchmarks/tune_linear_grad.py [OUT.json]

Needs a GPU of compute capability 8.0 or higher; some minutes, most of them compilation. Every choice is checked against
torch in float32 before it is timed, one that spills or does not fit is named and left out. The last lines are an entry
for `MEASURED` in `triton_kernels/linear_grad.py`; all times, and those of torch's product and of the other
implementations beside them, go to OUT.json.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Timing, interleaved

import pyeff

# Features in and out, and tokens a sample: layers of models of 0.1, 1 and 8 billion parameters, all of 16384 tokens.
LAYERS = [(576, 1536), (2048, 2048), (4096, 4096), (4096, 14336)]
LENGTHS = [256, 2048]
TOKENS = 16384
# (BM, BN, BK, warps, stages): with 128 x 128 two accumulators leave a program a processor to itself, narrower tiles
# let one program drain while another multiplies.
TILES = [
    (128, 128, 64, 8, 4),
    (128, 128, 64, 8, 3),
    (128, 128, 32, 8, 4),
    (128, 64, 64, 8, 3),
    (128, 64, 64, 4, 4),
    (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 4),
]


def candidates(capability: tuple[int, int]) -> list[Any]:
    """Every tile, loaded by pointers and, where the GPU has such a unit, by tensor descriptors."""
    from pyeff.triton_kernels.linear_grad import Config

    described = [False, True] if capability >= (9, 0) else [False]
    return [Config(*tile, each) for tile in TILES for each in described]


def runs(call: Callable[[], tuple[torch.Tensor, ...]], total: torch.Tensor, norms_sq: torch.Tensor) -> str | None:
    """Why a choice is left out, or None."""
    try:
        found, norms, *_ = call()
        if found.is_cuda:
            torch.cuda.synchronize()
    except Exception as problem:  # a compiler has many ways to say that something does not fit
        return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    # 16-bit sums of the same products differ by their rounding alone.
    close = torch.finfo(found.dtype).eps * total.abs().max() + torch.finfo(torch.float32).eps * TOKENS
    if not ((found.float() - total).abs().max() <= 2 * close):
        return "wrong gradient"
    return None if torch.allclose(norms, norms_sq, rtol=1e-3) else "wrong norms"


def tune(dots: bool, device: str = "cuda", pairs: int = 15) -> tuple[list[tuple[int, Any]], list[dict[str, Any]]]:
    """The ladder of (least elements, fastest choice), and every measurement."""
    from pyeff.triton_kernels.linear_grad import linear_grad

    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    ladder, records = [], []
    for d, p in LAYERS:
        relative: dict[Any, list[float]] = {}  # to torch's product, so that long and short samples weigh the same
        for length in LENGTHS:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            inputs, grad_outputs = (torch.randn(TOKENS, k, dtype=dtype, device=device) for k in (d, p))
            reference = torch.randn(p, d, dtype=dtype, device=device) if dots else None
            cu_seqlens = torch.arange(0, TOKENS + 1, length, dtype=torch.int32, device=device)
            exact = pyeff.linear_grad(inputs.float(), grad_outputs.float(), cu_seqlens, impl="reference")
            assert exact.weight_grad is not None
            assert exact.norms_sq is not None
            functions: dict[Any, Callable[[], object]] = {"torch.mm": partial(torch.mm, grad_outputs.T, inputs)}
            for impl in ("panels", "gram") if not dots else ("panels",):
                functions[impl] = partial(
                    pyeff.linear_grad, inputs, grad_outputs, cu_seqlens, reference=reference, impl=impl
                )
            for config in candidates(capability):
                call = partial(linear_grad, inputs, grad_outputs, cu_seqlens, reference=reference, config=config)
                problem = runs(call, exact.weight_grad, exact.norms_sq)
                if problem is None:
                    functions[config] = call
                else:
                    print(f"{d} -> {p}, {length} tokens: not {config}: {problem}")
            timings: dict[Any, Timing] = interleaved(functions, pairs=pairs)
            for config, timing in timings.items():
                if not isinstance(config, str):
                    relative.setdefault(config, []).append(timing.median / timings["torch.mm"].median)
            print(f"{d} -> {p}, {length} tokens, {'dots' if dots else 'norms'}: torch.mm ", end="")
            print(f"{timings['torch.mm'].median * 1e3:.3f} ms")
            for config, timing in sorted(timings.items(), key=lambda item: item[1].median):
                print(f"    {timing.median / timings['torch.mm'].median:6.3f} x  {config}")
            records.append(
                {"d": d, "p": p, "length": length, "dots": dots}
                | {"seconds": {str(config): timing.median for config, timing in timings.items()}}
            )
        everywhere = [config for config, ratios in relative.items() if len(ratios) == len(LENGTHS)]
        fastest = min(everywhere, key=lambda config: math.prod(relative[config]))
        ladder.append((d * p, fastest))
    return shortened(ladder), records


def shortened(ladder: list[tuple[int, Any]]) -> list[tuple[int, Any]]:
    """From the largest down, a rung only where the choice changes; the last begins at 0."""
    rungs: list[tuple[int, Any]] = []
    for least, config in sorted(ladder, key=lambda rung: -rung[0]):
        if rungs and rungs[-1][1] == config:
            rungs[-1] = (least, config)
        else:
            rungs.append((least, config))
    return [*rungs[:-1], (0, rungs[-1][1])]


def main() -> None:
    """Tune with and without dots."""
    if not torch.cuda.is_available():
        sys.exit("tune_linear_grad.py times a GPU, and there is none")
    capability = torch.cuda.get_device_capability()
    ladders, records = {}, []
    for dots in (False, True):
        ladders[dots], measured = tune(dots)
        records += measured
    if len(sys.argv) > 1:
        written = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "measurements": records}
        Path(sys.argv[1]).write_text(json.dumps(written, indent=1) + "\n")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}")
    for dots, ladder in ladders.items():
        print(f"    ({capability}, {dots}): (")
        for least, config in ladder:
            print(f"        ({least}, {config}),")
        print("    ),")


if __name__ == "__main__":
    main()
