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

from pyeff.ops._packed import samples_of

# What a matrix product compiles to on sm_90, sm_100 and before.
TENSOR_CORE = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def linear_cross_entropy_scores(
    dtype: torch.dtype, *, n: int = 8192, d: int = 4096, v: int = 131072, stride: int = 0, softcapped: bool = False
) -> None:
    """A scoring pass of n tokens over v classes; `stride` elements from one weight row to the next, if not d."""
    from pyeff.triton_kernels import linear_cross_entropy_scores as module

    hidden = torch.empty(n, d, dtype=dtype, device="meta")
    weight = torch.empty_strided((v, d), (stride or d, 1), dtype=dtype, device="meta")
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    options: dict[str, Any] = {"softcap": 30.0, "bias": torch.empty(v, device="meta")} if softcapped else {}
    module.linear_cross_entropy_scores(hidden, weight, targets, **options)


def linear_cross_entropy_grad(
    dtype: torch.dtype, *, n: int = 8192, d: int = 4096, v: int = 4096, stride: int = 0, softcapped: bool = False
) -> None:
    """The gradient by v logits of n tokens; `stride` elements from one weight row to the next, if not d."""
    from pyeff.triton_kernels import linear_cross_entropy_grad as module

    hidden = torch.empty(n, d, dtype=dtype, device="meta")
    weight = torch.empty_strided((v, d), (stride or d, 1), dtype=dtype, device="meta")
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    rows = [torch.empty(n, device="meta") for _ in range(3)]
    grads = torch.empty(n, v, dtype=dtype, device="meta")
    options: dict[str, Any] = {"softcap": 30.0, "bias": torch.empty(v, device="meta")} if softcapped else {}
    module.logit_grads(hidden, weight, targets, *rows, grads, first_class=4096, **options)


def linear_grad(
    dtype: torch.dtype,
    *,
    features: int = 4096,
    referenced: bool = False,
    sketched: dict[str, Any] | None = None,
    tile: tuple[Any, ...] | None = None,
) -> None:
    """A weight gradient of 16384 tokens in 8 samples, with their norms; from sm_90 with a `tile` of its own."""
    from pyeff.triton_kernels import linear_grad as module

    from pyeff.ops.sketch_grads import FlatSketch

    inputs = torch.empty(16384, features, dtype=dtype, device="meta")
    grad_outputs = torch.empty(16384, 4096, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    reference = torch.empty(4096, features, dtype=dtype, device="meta") if referenced else None
    config = module.Config(*tile) if tile and torch.cuda.get_device_capability() >= (9, 0) else None
    sketch = None
    if sketched is not None:
        moments = torch.empty(4096, features, device="meta") if sketched["mapped"] else None
        numbers = [0.9, 0.1, 0.9, 0.1, 1e-8] if sketched["mapped"] else []
        sketch = FlatSketch(0, sketched["dim"], [3], "balanced", moments, moments, numbers)
    module.linear_grad(inputs, grad_outputs, cu_seqlens, reference=reference, sketch=sketch, config=config)


def sketch_grads(dtype: torch.dtype, *, dim: int = 8192, rows: int = 4096, mapped: bool = False) -> None:
    """Sketches of 8 samples' gradients of a matrix."""
    from pyeff.triton_kernels import sketch_grads as module

    moments = torch.empty(rows, 4096, device="meta") if mapped else None
    options = {"exp_avg": moments, "exp_avg_sq": moments} if mapped else {}
    module.sketch_grads(torch.empty(8, rows, 4096, dtype=dtype, device="meta"), dim, [3], **options)


def directional_scores(dtype: torch.dtype, *, features: int = 4096, columns: int = 4096) -> None:
    """Inner products of 8 samples' gradients, of 16384 tokens in all, with 2 directions."""
    from pyeff.triton_kernels import directional_scores as module

    inputs = torch.empty(16384, features, dtype=dtype, device="meta")
    grad_outputs = torch.empty(16384, columns, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    directions = torch.empty(2, columns, features, dtype=dtype, device="meta")
    module.directional_scores(inputs, grad_outputs, cu_seqlens, directions)


def linear_grad_panel(*, referenced: bool = False) -> None:
    """The pass over a panel of two samples' gradients."""
    from pyeff.triton_kernels import linear_grad as module

    panel = torch.empty(2, 512, 4096, device="meta")
    sums = torch.empty(8, module.panel_blocks(panel[0].numel()), dtype=torch.float64, device="meta")
    dots = {"reference": panel[0], "dots": sums} if referenced else {}
    module.reduce_panel(panel, total=panel[0], norms_sq=sums, **dots)


def gram_norms(dtype: torch.dtype, *, features: int = 4096, tokens: int = 2048) -> None:
    """Norms of samples of so many tokens, 16384 in all."""
    from pyeff.triton_kernels import gram_norms as module

    inputs = torch.empty(16384, features, dtype=dtype, device="meta")
    grad_outputs = torch.empty(16384, 4096, dtype=dtype, device="meta")
    samples = samples_of(torch.arange(0, 16385, tokens), 16384)
    config = module.pick_config(dtype, torch.cuda.get_device_capability(), samples.block_pairs)
    plan = module.plan_of(samples.borders, config, torch.device("cpu"))
    module.gram_norms(inputs, grad_outputs, plan)


def attention(
    dtype: torch.dtype,
    *,
    head_size: int = 128,
    packed: bool = False,
    deterministic: bool = False,
    tile: tuple[Any, ...] | None = None,
    **options: Any,
) -> None:
    """Attention of 8192 tokens by 32 heads over 8 of keys, and a form of its backward; on sm_90 with a `tile` of its
    own."""
    from pyeff.triton_kernels import attention as forward
    from pyeff.triton_kernels import attention_backward as backward

    batch = () if packed else (4,)
    q = torch.empty(*batch, 8192, 32, head_size, dtype=dtype, device="meta")
    k = torch.empty(*batch, 8192, 8, head_size, dtype=dtype, device="meta")
    if packed:
        options["cu_seqlens"] = torch.empty(9, dtype=torch.int32, device="meta")
    config = forward.Config(*tile) if tile and torch.cuda.get_device_capability() == (9, 0) else None
    out, lse = forward.attention(q, k, k, scale=0.1, config=config, **options)
    backward.attention_backward(out, q, k, k, out, lse, scale=0.1, deterministic=deterministic, **options)


def vector_grad(dtype: torch.dtype, *, features: int = 4096, gain: bool = True) -> None:
    """The gradient of a vector that acts on 16384 tokens in 8 samples."""
    from pyeff.triton_kernels import vector_grad as module

    grad_outputs = torch.empty(16384, features, dtype=dtype, device="meta")
    chunks = module.chunks_of(torch.arange(0, 16385, 2048), torch.device("cpu"))
    module.vector_grad(grad_outputs, chunks, inputs=grad_outputs if gain else None)


def norm_layer_grad(dtype: torch.dtype, *, features: int = 4096, center: bool = False, kept: bool = False) -> None:
    """The backward pass of a norm layer for 16384 tokens in 8 samples, perhaps with statistics that were kept."""
    from pyeff.triton_kernels import norm_layer_grad as module
    from pyeff.triton_kernels.vector_grad import chunks_of

    inputs = torch.empty(16384, features, dtype=dtype, device="meta")
    weight = torch.empty(features, dtype=dtype, device="meta")
    rstd = torch.empty(16384, device="meta") if kept else None
    chunks = chunks_of(torch.arange(0, 16385, 2048), torch.device("cpu"))
    statistics = {"rstd": rstd, "mean": rstd if center else None}
    module.norm_layer_grad(
        inputs, inputs, chunks, weight=weight, center=center, eps=1e-5, bias_grad=center, **statistics
    )


def embedding_grad(dtype: torch.dtype) -> None:
    """The gradient of a table for 16384 tokens in 8 samples."""
    from pyeff.triton_kernels import embedding_grad as module

    index = torch.empty(16384, dtype=torch.int64, device="meta")
    grad_outputs = torch.empty(16384, 4096, dtype=dtype, device="meta")
    cu_seqlens = torch.empty(9, dtype=torch.int32, device="meta")
    module.embedding_grad(index, index, grad_outputs, cu_seqlens, 131072, -1)


# One entry for every way in which a launcher specialises its kernels so that registers or the pipeline could change.
CASES: dict[str, Callable[[], None]] = {
    "attention.bf16_64": partial(attention, torch.bfloat16, head_size=64),
    "attention.bf16_256": partial(attention, torch.bfloat16, head_size=256),
    "attention.bf16_packed": partial(attention, torch.bfloat16, packed=True),
    "attention.bf16_softcap": partial(attention, torch.bfloat16, softcap=30.0),
    "attention.fp16_80_window": partial(attention, torch.float16, head_size=80, window=1024),
    "attention.fp32": partial(attention, torch.float32),
    # The form of the backward that gives the same bits in every run.
    "attention.bf16_64_deterministic": partial(attention, torch.bfloat16, head_size=64, deterministic=True),
    "attention.bf16_256_deterministic": partial(attention, torch.bfloat16, head_size=256, deterministic=True),
    "attention.bf16_packed_deterministic": partial(attention, torch.bfloat16, packed=True, deterministic=True),
    "attention.bf16_softcap_deterministic": partial(attention, torch.bfloat16, softcap=30.0, deterministic=True),
    "attention.fp16_80_window_deterministic": partial(
        attention, torch.float16, head_size=80, window=1024, deterministic=True
    ),
    "attention.fp32_deterministic": partial(attention, torch.float32, deterministic=True),
    # What the tuning script tries beside the choice that ships.
    "attention.descriptors": partial(attention, torch.bfloat16, tile=(128, 128, 8, 3, True)),
    "attention.descriptors_packed": partial(attention, torch.bfloat16, packed=True, tile=(128, 128, 8, 2, True)),
    "linear_cross_entropy_scores.bf16": partial(linear_cross_entropy_scores, torch.bfloat16),
    "linear_cross_entropy_scores.bf16_softcap": partial(linear_cross_entropy_scores, torch.bfloat16, softcapped=True),
    "linear_cross_entropy_scores.fp16_ragged": partial(linear_cross_entropy_scores, torch.float16, d=1040),
    "linear_cross_entropy_scores.wide_offsets": partial(linear_cross_entropy_scores, torch.bfloat16, stride=1 << 26),
    # Triton makes a constant of every integer argument that is 1.
    "linear_cross_entropy_scores.ones": partial(linear_cross_entropy_scores, torch.float16, n=1, d=1, v=1),
    "linear_cross_entropy_scores.fp32": partial(linear_cross_entropy_scores, torch.float32),
    "linear_cross_entropy_grad.bf16": partial(linear_cross_entropy_grad, torch.bfloat16),
    "linear_cross_entropy_grad.bf16_softcap": partial(linear_cross_entropy_grad, torch.bfloat16, softcapped=True),
    "linear_cross_entropy_grad.fp16_ragged": partial(linear_cross_entropy_grad, torch.float16, d=1040),
    "linear_cross_entropy_grad.wide_offsets": partial(linear_cross_entropy_grad, torch.bfloat16, stride=1 << 26),
    "linear_cross_entropy_grad.ones": partial(linear_cross_entropy_grad, torch.float16, n=1, d=1, v=1),
    "linear_cross_entropy_grad.fp32": partial(linear_cross_entropy_grad, torch.float32),
    "linear_grad.bf16": partial(linear_grad, torch.bfloat16),
    "linear_grad.bf16_reference": partial(linear_grad, torch.bfloat16, referenced=True),
    "linear_grad.fp16_ragged": partial(linear_grad, torch.float16, features=1040),
    "linear_grad.fp32": partial(linear_grad, torch.float32),
    "linear_grad.fp32_reference": partial(linear_grad, torch.float32, referenced=True),
    # What the tuning script tries beside the choice that ships.
    "linear_grad.descriptors": partial(linear_grad, torch.bfloat16, tile=(128, 128, 64, 8, 4, True)),
    "linear_grad.narrow": partial(linear_grad, torch.bfloat16, tile=(64, 64, 64, 4, 4)),
    "linear_grad.bf16_sketch": partial(linear_grad, torch.bfloat16, sketched={"dim": 8192, "mapped": False}),
    "linear_grad.bf16_sketch_2048": partial(linear_grad, torch.bfloat16, sketched={"dim": 2048, "mapped": False}),
    "linear_grad.bf16_sketch_adamw": partial(linear_grad, torch.bfloat16, sketched={"dim": 8192, "mapped": True}),
    "linear_grad.fp32_sketch": partial(linear_grad, torch.float32, sketched={"dim": 8192, "mapped": True}),
    "linear_grad.panel": linear_grad_panel,
    "linear_grad.panel_reference": partial(linear_grad_panel, referenced=True),
    "directional_scores.bf16": partial(directional_scores, torch.bfloat16),
    "directional_scores.fp16_ragged": partial(directional_scores, torch.float16, features=1040),
    # Low-rank adapters.
    "directional_scores.bf16_64": partial(directional_scores, torch.bfloat16, columns=64),
    "directional_scores.bf16_16": partial(directional_scores, torch.bfloat16, columns=16),
    "directional_scores.fp32": partial(directional_scores, torch.float32),
    "directional_scores.ones": partial(directional_scores, torch.float16, features=1, columns=1),
    "gram_norms.bf16": partial(gram_norms, torch.bfloat16),
    "gram_norms.bf16_short": partial(gram_norms, torch.bfloat16, tokens=64),
    "gram_norms.fp16_ragged": partial(gram_norms, torch.float16, features=1040),
    "gram_norms.fp32": partial(gram_norms, torch.float32),
    "vector_grad.bf16": partial(vector_grad, torch.bfloat16),
    "vector_grad.bf16_offset": partial(vector_grad, torch.bfloat16, gain=False),
    "vector_grad.fp32": partial(vector_grad, torch.float32),
    "norm_layer_grad.bf16": partial(norm_layer_grad, torch.bfloat16),
    "norm_layer_grad.bf16_center": partial(norm_layer_grad, torch.bfloat16, center=True),
    "norm_layer_grad.bf16_kept": partial(norm_layer_grad, torch.bfloat16, center=True, kept=True),
    # The widest rows that keep their sums in registers, rows that do not, and those of one head.
    "norm_layer_grad.fp32_8192": partial(norm_layer_grad, torch.float32, features=8192, center=True),
    "norm_layer_grad.fp32_16384": partial(norm_layer_grad, torch.float32, features=16384),
    "norm_layer_grad.bf16_16384": partial(norm_layer_grad, torch.bfloat16, features=16384, center=True),
    "norm_layer_grad.fp32_64": partial(norm_layer_grad, torch.float32, features=64, center=True),
    "sketch_grads.bf16": partial(sketch_grads, torch.bfloat16),
    "sketch_grads.fp32_adamw": partial(sketch_grads, torch.float32, mapped=True),
    "sketch_grads.ones": partial(sketch_grads, torch.float32, dim=100, rows=1),
    "embedding_grad.bf16": partial(embedding_grad, torch.bfloat16),
    "embedding_grad.fp32": partial(embedding_grad, torch.float32),
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
        "wide_copies": "cp.async.cg.shared" in ptx,
        "tensor_core": next((name for name in TENSOR_CORE if name in ptx), None),
    }


if __name__ == "__main__":
    print(json.dumps(compile_cases(int(sys.argv[1]), sys.argv[2:])))
