"""Time the launch choices of attention's GPU kernels and print the tables that `pick_config` and `pick_configs` read.

    python benchmarks/tune_attention.py [HEAD_SIZE...] [--out OUT.json]

Needs a GPU of compute capability 8.0 or higher; some minutes, most of them compilation. Every choice is checked against
the choice that ships before it is timed; one that does not fit is named and left out. The last lines are entries for
`MEASURED` in `triton_kernels/attention.py` and `triton_kernels/attention_backward.py`; all times, and those of torch's
flash kernel, go to OUT.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timing import Timing, interleaved

from pyeff.ops.attention import BACKWARD, FORWARD

LENGTHS = [2048, 8192]
TOKENS, WIDTH = 16384, 2048
# (queries, keys, warps, stages), most of which spill nothing as compiled for sm_90. What does: (64, 128) of a backward
# without `deterministic` at a head size of 128, mostly addresses that do not change within its loop.
FORWARD_TILES = [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 4), (128, 64, 4, 3), (64, 64, 4, 3)]
QUERY_TILES = [(128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 3), (64, 64, 4, 3)]
KEY_TILES = [(32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 8, 3), (32, 64, 8, 3), (32, 64, 4, 2)]

Call = Callable[[], tuple[torch.Tensor, ...]]


def problem(tokens: int, head_size: int) -> list[torch.Tensor]:
    """q, k, v and the gradient of out, causal, of as many heads as fill the width."""
    shape = (TOKENS // tokens, tokens, WIDTH // head_size, head_size)
    return [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(4)]


def operator_options(head_size: int, impl: str) -> tuple[Any, ...]:
    return (None, None, True, head_size**-0.5, None, None, impl)


def left_out(call: Call, expected: tuple[torch.Tensor, ...]) -> str | None:
    """Why a choice is not timed, or None."""
    try:
        found = call()
        torch.cuda.synchronize()
    except Exception as problem:  # a compiler has many ways to say that something does not fit
        return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    for one, other in zip(found, expected, strict=True):
        # Other tiles round P and dS to 16 bits at other bases: each a few roundings, in norm.
        error = (one.float() - other.float()).norm() / other.float().norm()
        if not error <= 4 * torch.finfo(torch.bfloat16).eps:
            return f"wrong by {error:.1e}"
    return None


def fastest(kinds: dict[int, dict[Any, Call]], expected: dict[int, tuple[torch.Tensor, ...]]) -> tuple[Any, list[Any]]:
    """Of choices that run at every length, the fastest beside torch's kernel in the geometric mean; all timings."""
    relative: dict[Any, list[float]] = {}
    records = []
    for length, calls in kinds.items():
        functions = {}
        for config, call in calls.items():
            reason = None if config == "flash" else left_out(call, expected[length])
            if reason is None:
                functions[config] = call
            else:
                print(f"  {length} tokens: not {config}: {reason}")
        timings: dict[Any, Timing] = interleaved(functions, pairs=15)
        for config, timing in sorted(timings.items(), key=lambda item: item[1].median):
            print(f"  {length} tokens: {timing.median * 1e3:7.3f} ms  {config}")
            if config != "flash":
                relative.setdefault(config, []).append(timing.median / timings["flash"].median)
        records.append({"length": length, "seconds": {str(c): timing.median for c, timing in timings.items()}})
    everywhere = [config for config, ratios in relative.items() if len(ratios) == len(kinds)]
    return min(everywhere, key=lambda config: math.prod(relative[config])), records


def tune_forward(head_size: int, described: list[bool]) -> tuple[Any, list[Any]]:
    from pyeff.triton_kernels.attention import Config, attention

    kinds, expected = {}, {}
    for length in LENGTHS:
        q, k, v, _ = problem(length, head_size)
        run = partial(attention, q, k, v, scale=head_size**-0.5)
        expected[length] = run()
        configs = [Config(*tile, each) for tile in FORWARD_TILES for each in described]
        kinds[length] = {config: partial(run, config=config) for config in configs}
        kinds[length]["flash"] = partial(FORWARD, q, k, v, *operator_options(head_size, "flash"))
    return fastest(kinds, expected)


def tune_backward(head_size: int, deterministic: bool) -> tuple[Any, list[Any]]:
    """The keys' kernel with the queries' choice that ships, then that one with the fastest of the keys'."""
    from pyeff.triton_kernels.attention_backward import Config, Configs, attention_backward, pick_configs

    shipped = pick_configs(head_size, torch.bfloat16, False, False, torch.cuda.get_device_capability(), deterministic)

    def tuned(candidates: list[Any]) -> tuple[Any, list[Any]]:
        kinds, expected = {}, {}
        for length in LENGTHS:
            q, k, v, grad_out = problem(length, head_size)
            options = operator_options(head_size, "flash")
            kept = FORWARD(q, k, v, *options)
            run = partial(attention_backward, grad_out, q, k, v, *kept, scale=head_size**-0.5)
            expected[length] = run(configs=shipped)
            kinds[length] = {configs: partial(run, configs=configs) for configs in candidates}
            kinds[length]["flash"] = partial(BACKWARD, grad_out, q, k, v, *kept, None, *options)
        return fastest(kinds, expected)

    best, records = tuned([Configs(shipped.queries, Config(*tile)) for tile in KEY_TILES])
    if deterministic:
        best, more = tuned([Configs(Config(*tile), best.keys) for tile in QUERY_TILES])
        records += more
    return best, records


def main() -> None:
    """Tune the forward and both forms of the backward for every head size."""
    parser = argparse.ArgumentParser(description="Time the launch choices of attention's GPU kernels.")
    parser.add_argument("head_sizes", type=int, nargs="*", default=[64, 128], metavar="HEAD_SIZE")
    parser.add_argument("--out", type=Path, help="a JSON file for all times")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("tune_attention.py times a GPU, and there is none")
    capability = torch.cuda.get_device_capability()
    described = [False, True] if capability >= (9, 0) else [False]
    forward, backward, records = [], [], []
    for head_size in arguments.head_sizes:
        print(f"forward, head size {head_size}")
        config, measured = tune_forward(head_size, described)
        forward.append(f"    ({capability}, {head_size}): {config},")
        records.append({"pass": "forward", "head_size": head_size, "measurements": measured})
        for deterministic in (False, True):
            print(f"backward, head size {head_size}, {'deterministic' if deterministic else 'atomics'}")
            configs, measured = tune_backward(head_size, deterministic)
            backward.append(f"    ({capability}, {head_size}, {deterministic}): {configs},")
            records.append({"pass": "backward", "head_size": head_size, "deterministic": deterministic})
            records[-1]["measurements"] = measured
    if arguments.out is not None:
        written = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "measurements": records}
        arguments.out.write_text(json.dumps(written, indent=1) + "\n")
    print(f"# {torch.cuda.get_device_name()}, torch {torch.__version__}", *forward, "", *backward, sep="\n")


if __name__ == "__main__":
    main()
