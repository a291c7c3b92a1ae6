"""Compile what launchers would launch, for a GPU that is not there, and print what came out as JSON.

    python compile_kernels.py CAPABILITY CASE...        e.g. 90 linear_cross_entropy_scores.bf16

A launcher runs on meta tensors under a driver that only names a target. Every launch becomes a compilation with the
launcher's own configuration and Triton's own specialisation: meta tensors are aligned, as torch's allocations are.
Run without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

# What a matrix product compiles to on sm_90, sm_100 and before.
TENSOR_CORE = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def linear_cross_entropy_scores(dtype: torch.dtype, *, features: int = 4096, softcapped: bool = False) -> None:
    """A scoring pass of 8192 tokens over 131072 classes."""
    from pyeff.triton_kernels import linear_cross_entropy_scores as module

    hidden = torch.empty(8192, features, dtype=dtype, device="meta")
    weight = torch.empty(131072, features, dtype=dtype, device="meta")
    targets = torch.empty(8192, dtype=torch.int64, device="meta")
    options: dict[str, Any] = {"softcap": 30.0, "bias": torch.empty(131072, device="meta")} if softcapped else {}
    module.linear_cross_entropy_scores(hidden, weight, targets, **options)


# One entry for every way in which a launcher specialises its kernels so that registers or the pipeline could change.
CASES: dict[str, Callable[[], None]] = {
    "linear_cross_entropy_scores.bf16": partial(linear_cross_entropy_scores, torch.bfloat16),
    "linear_cross_entropy_scores.bf16_softcap": partial(linear_cross_entropy_scores, torch.bfloat16, softcapped=True),
    "linear_cross_entropy_scores.fp16_ragged": partial(linear_cross_entropy_scores, torch.float16, features=1040),
    "linear_cross_entropy_scores.fp32": partial(linear_cross_entropy_scores, torch.float32),
}


class NamedTarget:
    """A driver without a device: enough for Triton to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_cases(capability: int, cases: list[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """For every case the facts about every kernel it launches: {case: {kernel: facts}}."""
    driver.set_active(NamedTarget(capability))
    # Launchers ask a tensor whether it is on a GPU, and that GPU what it can do.
    torch.Tensor.is_cuda = property(lambda tensor: True)
    torch.cuda.get_device_capability = lambda device=None: divmod(capability, 10)
    torch.cuda.device = lambda device: contextlib.nullcontext()
    compiled: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled[case][kernel.__name__] = facts(run(kernel, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    for case in cases:
        compiled[case] = {}
        CASES[case]()
    return compiled


def facts(kernel: Any) -> dict[str, Any]:
    """Registers, memory and instructions of a compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    counts = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    ptx = kernel.asm["ptx"]
    # How many groups of copies may still be on their way when a stage is waited for.
    pending = [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    return {
        "registers": counts["REG"],
        "local_bytes": counts["LOCAL"] + counts["STACK"],
        "shared_bytes": kernel.metadata.shared,
        "threads": 32 * kernel.metadata.num_warps,
        "copies_in_flight": max(pending, default=0),
        "bulk_copies": "cp.async.bulk" in ptx,
        # cp.async.cg moves sixteen bytes; narrower copies are .ca: a divisibility hint got lost.
        "narrow_copies": "cp.async.ca.shared" in ptx,
        "tensor_core": next((name for name in TENSOR_CORE if name in ptx), None),
    }


if __name__ == "__main__":
    print(json.dumps(compile_cases(int(sys.argv[1]), sys.argv[2:])))
