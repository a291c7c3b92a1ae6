"""The weight gradient of a linear layer, with every sample's share of it measured on the way."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation, check_layout, environment_problem
from pyeff.ops._packed import Samples, check_borders, samples_of
from pyeff.ops.sketch_grads import FlatSketch, ParameterSketch

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Gradients of single samples exist on the CPU as a panel of at most this size. Two cores of a Zen 5 server, d = 576,
# p = 1536, 8 samples of 512 tokens: a panel of everything takes 3 % more than the plain gradient, of a quarter of the
# rows 6 %, of a sixteenth 15 %.
_PANEL_BYTES = 32 << 20
# Where it cannot hold all samples at full length, fewer rows of all of them, so that the total is not read and written
# once a sample, but no fewer than the product needs. The same machine, busy, 16384 rows, 8 samples of 128 tokens: 14563
# rows of one sample at a time take 1.15 x the plain gradient's processor time, 1820 of all eight 1.13 x, 910 1.15 x.
_LEAST_ROWS = 1024
# Most of a float32 copy of 16-bit inputs.
_COPY_BYTES = 16 << 20
# On a GPU a panel takes this part of the L2 cache: the rest is for what the product reads.
_L2_PART = 0.5
# With the 4096 columns of a large model two samples of 512 rows are 256 tiles of 128 x 128: two for a processor of an
# H100, and a panel, its total among it, of 24 MiB.
_LEAST_ROWS_ON_GPU = 512


@dataclass(frozen=True)
class GpuRates:
    """What `gram_add_on_is_cheaper` weighs: 16-bit FLOP/s of the Gram kernel, and what the end of a sample costs."""

    gram_flops: float
    drain_seconds: float


# Numbers in the samples' sketches that the Triton kernel takes: 64 programs then fill its 64 MiB.
_MOST_SKETCHED = 1 << 18

# By compute capability. Estimates, none measured yet: a bit over half of what large products reach on A100 and H100; a
# load from memory, the squares of a tile, and the first products of the next sample. The extra launches are two.
# Gram tiles of 64 tokens, for short samples, reach three quarters of the rate.
GPU_RATES = {(8, 0): GpuRates(1.3e14, 1.5e-6), (9, 0): GpuRates(4.0e14, 1.5e-6)}
_GRAM_LAUNCHES_SECONDS, _NARROW_RATE = 6e-6, 0.75
_TILE = 128  # of both kernels


@dataclass(frozen=True)
class LinearGrad:
    """The gradient of a linear layer's weight and what each of S samples contributes; None where not asked for.

    With D_s = sum over the tokens t of sample s of g_t a_t^T, the sample's own gradient:

    - `weight_grad` [p, d]: sum_s D_s
    - `norms_sq` [S]: || D_s ||_F^2
    - `dots` [S]: <D_s, R>, R being the `reference`
    - `sketches` [S, dim]: of D_s, or of the direction that the `sketch` maps it to; `sketched` is the map's name:
      "gradient", "adamw" or "adamw-frozen"
    """

    weight_grad: Tensor | None
    norms_sq: Tensor | None
    dots: Tensor | None
    sketches: Tensor | None = None
    sketched: str | None = None


def linear_grad(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_grad: bool = True,
    norms: bool = True,
    reference: Tensor | None = None,
    sketch: ParameterSketch | None = None,
    impl: str = "auto",
) -> LinearGrad:
    """The weight gradient of a linear layer, and every sample's squared norm, dot with a reference gradient and sketch.

        D_s = sum_{t in s} g_t a_t^T,   weight_grad = sum_s D_s,   norms_sq = || D_s ||_F^2,   dots = <D_s, reference>,
        sketches = sketch(direction(D_s))

    The samples' gradients are never stored together: beside inputs and outputs at most 32 MiB of memory are used, or
    48 MiB for 16-bit inputs on the CPU, or 1280 bytes a sample on a GPU if that is more. On the CPU the 32 MiB are kept
    for the thread's next call.

    Shapes and dtypes: `inputs` [N, d] (what the layer was given) and `grad_outputs` [N, p] (the gradient of the loss by
    what it returned) of one dtype among float16, bfloat16, float32 and float64, of any strides; `cu_seqlens` [S+1],
    int32 or int64 on any device, the samples' borders in the token axis, from 0 to N, never falling; `reference` [p, d]
    of any floating dtype; `sketch` a `ParameterSketch`, whose direction has moments [p, d], by `pyeff.sketch_grads`.

    Everything accumulates in float32 (float64 inputs: in float64, by the reference implementation alone). `weight_grad`
    is rounded once at the end to the dtype of `inputs`, which is what autograd's would have; `norms_sq` and `dots` are
    float32. An empty sample has norm and dot 0, and the sketch of a
    gradient of zeros. NaN or infinity in a sample makes that sample's numbers infinite or NaN
    (which of the two may differ between implementations), and spoils the sum.

    `impl`, which runs or raises `RuntimeError` with the reason; each gives the same bits in every run on one device:

    - "triton" (GPU): one kernel; a sample's tile meets its norm, its dot and its sketch in registers. Sketches of up to
      64 MiB / 64 programs, "balanced" alone.
    - "gram" (GPU): torch's product for the gradient, with the rounding torch is set to, and `gram_norms` for the norms.
      No dots, no sketches; memory, and the rounding of small norms where the gradients of a sample's tokens cancel, as
      said there.
    - "panels" (GPU): torch's product for some samples' gradients at a time, into a panel that takes half of the L2
      cache and is read there, by one more kernel; 3 KiB a sample.
    - "cpu": the same with a panel of 32 MiB and C++.
    - "reference": plain torch.

    "auto" takes "cpu" on the CPU. On a GPU it takes "gram" where gradient and norms are wanted of 16-bit inputs and
    Gram matrices should cost less than the kernel loses at the ends of samples (by their FLOPs, at every call: up to
    about 700 tokens a sample on an H100 at d = p = 4096), else "triton". Where these cannot run, "reference".

    Not differentiable. Under `torch.compile` one operator of the graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together.
    Borders on a GPU are read back for that at their first use, which waits for the stream; borders on the CPU never do.

    Cost: 2 N d p FLOPs of matmul, those of the gradient alone, and about 3 S d p of vector arithmetic. Where only norms
    are wanted and samples are short, `gram_norms` takes fewer.

    Gray et al. 2024, "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
    Transformers", arXiv:2411.00999.

    >>> import torch, pyeff
    >>> inputs, grad_outputs = torch.ones(3, 2), torch.tensor([[1.0], [2.0], [5.0]])
    >>> grad = pyeff.linear_grad(inputs, grad_outputs, torch.tensor([0, 2, 3]))
    >>> grad.weight_grad, grad.norms_sq
    (tensor([[8., 8.]]), tensor([18., 50.]))
    """
    check_inputs(inputs, grad_outputs, cu_seqlens)
    _check(inputs, grad_outputs, weight_grad, norms, reference, sketch)
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        wanted = (inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference)
        sketches = None
        if sketch is None:
            total, norms_sq, dots = _OP(*wanted, impl)
        else:
            total, norms_sq, dots, sketches = _SKETCHING_OP(*wanted, *sketch.flat, impl)
    return LinearGrad(
        total if weight_grad else None,
        norms_sq if norms else None,
        dots if reference is not None else None,
        sketches,
        None if sketch is None else sketch.variant,
    )


def check_inputs(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> None:
    """Raises unless the three fit together, what `cu_seqlens` holds aside: a traced call cannot read that."""
    check_rows("inputs", inputs)
    if isinstance(grad_outputs, Tensor) and grad_outputs.device != inputs.device:
        raise ValueError(
            f"grad_outputs must be on the device of inputs, {inputs.device}, and is on {grad_outputs.device}"
        )
    check_rows("grad_outputs", grad_outputs)
    if grad_outputs.dtype != inputs.dtype:
        raise ValueError(
            f"grad_outputs must have the dtype of inputs, {inputs.dtype}, got {grad_outputs.dtype}; cast one of them"
        )
    if grad_outputs.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"grad_outputs must have the {inputs.shape[0]} tokens of inputs, got shape {tuple(grad_outputs.shape)}"
        )
    check_borders(cu_seqlens)


def check_rows(name: str, rows: Tensor) -> None:
    """Raises unless `rows` is a dense matrix of numbers that can be computed with."""
    if not isinstance(rows, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(rows).__name__}")
    check_layout(name, rows)
    if rows.ndim != 2:
        raise ValueError(f"{name} must be [tokens, features], got shape {tuple(rows.shape)}; flatten the batch first")
    if rows.dtype not in _FLOATS:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {rows.dtype}")


def float32_limits(impl: str, inputs: Tensor, *args: object, **kwargs: object) -> str | None:
    """Why an implementation that computes in float32 cannot take `inputs`, or None."""
    if impl != "reference" and inputs.dtype == torch.float64:
        return "it computes in float32, and inputs are float64"
    if impl in _KERNELS and inputs.is_cuda and torch.cuda.get_device_capability(inputs.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if impl in ("triton", "gram") and inputs.dtype == torch.bfloat16 and not inputs.is_cuda:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


# Implementations that launch Triton kernels.
_KERNELS = ("triton", "panels", "gram")


def _environment(impl: str, device: str) -> str | None:
    return environment_problem("triton" if impl in _KERNELS else impl, device)


def _limits(
    impl: str,
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    reference: Tensor | None = None,
    sketch: ParameterSketch | FlatSketch | None = None,
    **_: object,
) -> str | None:
    if impl == "gram" and reference is not None:
        return "Gram matrices hold no dots with a reference"
    if impl == "gram" and sketch is not None:
        return "Gram matrices hold no sketches"
    if impl == "triton" and sketch is not None:
        flat = sketch.flat if isinstance(sketch, ParameterSketch) else sketch
        if flat.kind != "balanced":
            return f"its kernel forms 'balanced' sketches, and this one is {flat.kind!r}"
        if (cu_seqlens.numel() - 1) * flat.dim > _MOST_SKETCHED:
            return f"its programs hold sketches of {_MOST_SKETCHED} numbers, and these have more"
    return float32_limits(impl, inputs)


def _order(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_grad: bool = True,
    norms: bool = True,
    reference: Tensor | None = None,
    sketch: ParameterSketch | FlatSketch | None = None,
) -> tuple[str, ...]:
    """The rule of `auto`."""
    if not inputs.is_cuda:
        return ("triton", "cpu", "reference")
    if sketch is not None:
        return ("triton", "panels", "reference")
    if weight_grad and norms and reference is None and inputs.dtype in (torch.float16, torch.bfloat16):
        capability, processors = _gpu(inputs.device)
        samples = samples_of(cu_seqlens, inputs.shape[0])
        if gram_add_on_is_cheaper(samples, inputs.shape[1], grad_outputs.shape[1], capability, processors):
            return ("gram", "triton", "reference")
    return ("triton", "reference")


@functools.cache
def _gpu(device: torch.device) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def gram_add_on_is_cheaper(samples: Samples, d: int, p: int, capability: tuple[int, int], processors: int) -> bool:
    """Whether Gram norms beside a plain weight gradient cost less than its interruption at the end of every sample.

    With M tiles of 128 x 128 of the gradient on P processors, each holding one, the right side is what the Triton
    kernel loses by emptying its pipeline; the left what Gram matrices add to torch's product, in tiles of b tokens:

        2 b^2 (d + p) (pairs of blocks) / gram_flops + launches < S ceil(M / P) drain,     b of 64 or 128

    with the constants of `GPU_RATES`; never on a GPU that is not listed there. 16-bit inputs only.
    """
    rates = GPU_RATES.get(capability)
    if rates is None:
        return False
    wide, narrow = (2 * block**2 * (d + p) * samples.block_pairs(block) for block in (_TILE, _TILE // 2))
    seconds = min(wide, narrow / _NARROW_RATE) / rates.gram_flops + _GRAM_LAUNCHES_SECONDS
    waves = -(-(-(-p // _TILE) * -(-d // _TILE)) // processors)
    return seconds < (len(samples.cuts) - 1) * waves * rates.drain_seconds


OPERATION = Operation("linear_grad", ("triton", "cpu", "gram", "panels", "reference"), _limits, _environment, _order)


def _run(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _take(inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference, None, impl)[:3]


def _run_sketching(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference = args[:6]
    sketch, impl = FlatSketch(*args[6:-1]), args[-1]
    return _take(inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference, sketch, impl)


def _take(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    sketch: FlatSketch | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    samples = samples_of(cu_seqlens, inputs.shape[0])
    options: dict[str, Any] = {"weight_grad": weight_grad, "norms": norms, "reference": reference, "sketch": sketch}
    chosen = OPERATION.explain(inputs, grad_outputs, cu_seqlens, **options, impl=impl).impl
    if chosen in _WITH_SAMPLES:
        return _WITH_SAMPLES[chosen](inputs, grad_outputs, samples, **options)
    # On a GPU the kernel reads the borders, so those already there are better; elsewhere the host does.
    borders = cu_seqlens if inputs.device == cu_seqlens.device else samples.borders
    if chosen == "triton":
        from pyeff.triton_kernels.linear_grad import linear_grad as kernels

        return kernels(inputs, grad_outputs, borders, **options)
    del options["sketch"]
    sketched = None if sketch is None else functools.partial(sketch.of, impl="reference")
    found = _reference.linear_grad(inputs, grad_outputs, samples.borders, **options, sketched=sketched)
    if sketch is not None and len(samples.cuts) == 1:
        return (*found[:3], found[3].new_zeros(0, sketch.dim))
    return found


def _on_cpu(
    inputs: Tensor, grad_outputs: Tensor, samples: Samples, **wanted: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _by_panels(
        inputs,
        grad_outputs,
        samples,
        **wanted,
        reduce=reduce_panel,
        parts=lambda elements: 1,
        panel_bytes=_PANEL_BYTES,
        least_rows=_LEAST_ROWS,
        memory=kept_memory,
    )


def _on_gpu(
    inputs: Tensor, grad_outputs: Tensor, samples: Samples, **wanted: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pyeff.triton_kernels import linear_grad as kernels

    return _by_panels(
        inputs,
        grad_outputs,
        samples,
        **wanted,
        reduce=kernels.reduce_panel,
        parts=kernels.panel_blocks,
        panel_bytes=_panel_bytes(inputs.device),
        least_rows=_LEAST_ROWS_ON_GPU,
        memory=lambda elements: torch.empty(elements, dtype=torch.float32, device=inputs.device),
    )


@functools.cache
def _panel_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _PANEL_BYTES
    return int(_L2_PART * torch.cuda.get_device_properties(device).L2_cache_size)


def _with_gram(
    inputs: Tensor,
    grad_outputs: Tensor,
    samples: Samples,
    *,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    sketch: FlatSketch | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pyeff.ops.gram_norms import norms_by_kernels

    empty = inputs.new_empty(0, dtype=torch.float32)
    total = torch.mm(grad_outputs.T, inputs) if weight_grad else inputs.new_empty(0)
    return total, norms_by_kernels(inputs, grad_outputs, samples) if norms else empty, empty.clone(), empty.clone()


_WITH_SAMPLES: dict[str, Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]] = {
    "cpu": _on_cpu,
    "panels": _on_gpu,
    "gram": _with_gram,
}


def _by_panels(
    inputs: Tensor,
    grad_outputs: Tensor,
    samples: Samples,
    *,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    sketch: FlatSketch | None,
    reduce: Callable[..., None],
    parts: Callable[[int], int],
    panel_bytes: int,
    least_rows: int,
    memory: Callable[[int], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Some samples' gradients at a time, of some rows, in a panel of `memory` that `reduce` passes over.

    `reduce` leaves the numbers of a sample in `parts` (of how many elements the panel has a sample) to be summed.
    """
    p, d = grad_outputs.shape[1], inputs.shape[1]
    # Samples without a token own no border: the others stand side by side.
    borders = [border for border, _ in groupby(samples.cuts)]
    count = len(borders) - 1 if p and d else 0
    total = inputs.new_empty((p, d) if weight_grad else 0)

    # Sums of 16-bit inputs are float32 until they are complete, and the reduction reads a plain float32 reference.
    sums_apart = weight_grad and total.dtype != torch.float32
    others = sums_apart + (reference is not None)
    fits = panel_bytes // (4 * max(1, d))  # rows of length d
    rows = max(1, min(p, fits // (1 + others), max(least_rows, fits // (max(1, count) + others))))
    most = max(1, min(count, fits // rows - others))
    panel = memory(most * rows * d)
    apart = inputs.new_empty((rows, d) if sums_apart else 0, dtype=torch.float32)
    shape = (len(borders) - 1, parts(rows * d))
    norms_sq = inputs.new_zeros(shape, dtype=torch.float64) if norms else None
    dots = None if reference is None else inputs.new_zeros(shape, dtype=torch.float64)
    sketches = None if sketch is None else inputs.new_zeros((len(borders) - 1, sketch.dim), dtype=torch.float32)
    for row in range(0, p if count else 0, rows):
        part = grad_outputs[:, row : row + rows]
        width = part.shape[1]
        sums = apart[:width] if sums_apart else total[row : row + rows] if weight_grad else None
        target = None if reference is None else reference[row : row + rows].to(torch.float32).contiguous()
        for first in range(0, count, most):
            cut = borders[first : first + most + 1]
            grads = panel[: (len(cut) - 1) * width * d].view(-1, width, d)
            _sample_grads(inputs, part, cut, grads)
            reduce(
                grads,
                reference=target,
                total=sums,
                start_total=first == 0,
                norms_sq=None if norms_sq is None else norms_sq[first:],
                dots=None if dots is None else dots[first:],
            )
            if sketch is not None and sketches is not None:
                sketches[first : first + grads.shape[0]] += sketch.rows(row, width).of(grads)
        if sums is not None and sums_apart:
            total[row : row + rows] = sums
    numbers = (None if sums is None else sums.sum(1) for sums in (norms_sq, dots))
    missing = None
    if sketch is not None and sketch.exp_avg is not None and len(borders) < len(samples.cuts):
        # What AdamW makes of no gradient at all.
        missing = sketch.of(inputs.new_zeros((1, p, d), dtype=torch.float32))[0]
    of_norms, of_dots = (_of_all(sums, samples, total) for sums in numbers)
    return total if count else total.zero_(), of_norms, of_dots, _of_all(sketches, samples, total, missing)


def _of_all(sums: Tensor | None, samples: Samples, like: Tensor, missing: Tensor | None = None) -> Tensor:
    """The sums [S, ...] in float32 from those of the samples that have tokens, and `missing`, or 0, for the others; [0]
    for None."""
    if sums is None:
        return like.new_empty(0, dtype=torch.float32)
    sums = sums.to(torch.float32)
    if sums.shape[0] == len(samples.cuts) - 1:
        return sums
    # A list sent on one stream may not be there yet for another.
    stream = torch.cuda.current_stream(like.device) if like.is_cuda else None
    where = samples.made(("with tokens", like.device, stream), lambda: _with_tokens(samples, like.device))
    every = sums.new_zeros((len(samples.cuts) - 1, *sums.shape[1:]))
    if missing is not None:
        every += missing
    return every.index_copy_(0, where, sums)


def _with_tokens(samples: Samples, device: torch.device) -> Tensor:
    where = samples.borders.diff().nonzero()[:, 0]
    # A copy from pinned memory does not wait for the stream.
    return where.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else where


class _Kept(threading.local):
    memory: Tensor | None = None


_KEPT = _Kept()


def kept_memory(elements: int) -> Tensor:
    """Uninitialised float32 memory of this thread, the same at every call: touching fresh pages takes time."""
    if _KEPT.memory is None or _KEPT.memory.numel() < elements:
        # A tensor born in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            _KEPT.memory = torch.empty(elements, dtype=torch.float32)
    return _KEPT.memory[:elements]


def _sample_grads(inputs: Tensor, grad_outputs: Tensor, borders: list[int], grads: Tensor) -> None:
    """Writes G_s^T A_s of the samples between `borders` to `grads` [S, p, d]; samples of one length share a matmul."""
    (d, p), first = (inputs.shape[1], grad_outputs.shape[1]), 0
    # A GPU's product takes 16 bits to float32; a CPU's needs a copy, of so many tokens.
    copied = inputs.dtype != torch.float32 and not inputs.is_cuda
    chunk = max(1, _COPY_BYTES // (4 * max(1, d + p))) if copied else borders[-1]
    for length, run in groupby(end - start for start, end in pairwise(borders)):
        count = len(list(run))
        together = max(1, chunk // length)
        for s in range(first, first + count, together):
            out = grads[s : min(s + together, first + count)]
            tokens = slice(borders[s], borders[s] + out.shape[0] * length)
            a = inputs[tokens].unflatten(0, (-1, length))  # [S, T, d]
            g = grad_outputs[tokens].unflatten(0, (-1, length)).transpose(1, 2)  # [S, p, T]
            for t in range(0, length, chunk):
                g_t, a_t = g[:, :, t : t + chunk], a[:, t : t + chunk]
                if copied:
                    g_t, a_t = g_t.to(torch.float32), a_t.to(torch.float32)
                if t > 0:
                    out.baddbmm_(g_t, a_t)
                elif g_t.dtype == torch.float32:
                    torch.bmm(g_t, a_t, out=out)
                else:
                    torch.bmm(g_t, a_t, torch.float32, out=out)
        first += count


def reduce_panel(
    panel: Tensor,
    *,
    reference: Tensor | None = None,
    total: Tensor | None = None,
    start_total: bool = False,
    norms_sq: Tensor | None = None,
    dots: Tensor | None = None,
) -> None:
    """One pass over contiguous float32 `panel` [S, ...]: adds each row's sum of squares to `norms_sq`, its dot with
    `reference` ([...] or [S, ...]) to `dots`, both float64 [>= S], and the sum of the rows to `total` [...].

    `start_total` overwrites `total` instead. The same bits for every number of threads and at every CPU level.
    """
    samples, elements = panel.shape[0], panel[0].numel()
    extension().reduce_panel(
        panel=panel.data_ptr(),
        samples=samples,
        elements=elements,
        reference=0 if reference is None else reference.data_ptr(),
        reference_stride=elements if reference is not None and reference.ndim == panel.ndim else 0,
        total=0 if total is None else total.data_ptr(),
        start_total=start_total,
        norms_sq=0 if norms_sq is None else norms_sq.data_ptr(),
        dots=0 if dots is None else dots.data_ptr(),
        threads=torch.get_num_threads(),
    )


def _fake(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    samples = cu_seqlens.shape[0] - 1
    return (
        inputs.new_empty((grad_outputs.shape[1], inputs.shape[1]) if weight_grad else 0),
        inputs.new_empty(samples if norms else 0, dtype=dtype),
        inputs.new_empty(samples if reference is not None else 0, dtype=dtype),
    )


def _fake_sketching(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference = args[:6]
    found = _fake(inputs, grad_outputs, cu_seqlens, weight_grad, norms, reference, args[-1])
    return (*found, found[1].new_empty((cu_seqlens.shape[0] - 1, FlatSketch(*args[6:-1]).dim)))


torch.library.define(
    "pyeff::linear_grad",
    "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, bool weight_grad, bool norms, Tensor? reference, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::linear_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::linear_grad", _fake)
_OP = torch.ops.pyeff.linear_grad.default
torch.library.define(
    "pyeff::linear_grad_sketches",
    "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, bool weight_grad, bool norms, Tensor? reference, "
    "SymInt first_row, SymInt dim, int[] keys, str kind, Tensor? exp_avg, Tensor? exp_avg_sq, float[] coefficients, "
    "str impl) -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::linear_grad_sketches", ("cpu", "cuda"), _run_sketching)
torch.library.register_fake("pyeff::linear_grad_sketches", _fake_sketching)
_SKETCHING_OP = torch.ops.pyeff.linear_grad_sketches.default


def _check(
    inputs: Tensor,
    grad_outputs: Tensor,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    sketch: ParameterSketch | None,
) -> None:
    if not (weight_grad or norms or reference is not None or sketch is not None):
        raise ValueError("nothing is asked for: weight_grad and norms are False, reference and sketch are None")
    if sketch is not None:
        _check_sketch(sketch, inputs, (grad_outputs.shape[1], inputs.shape[1]))
    if reference is None:
        return
    if not isinstance(reference, Tensor):
        raise TypeError(f"reference must be a tensor or None, got {type(reference).__name__}")
    shape = (grad_outputs.shape[1], inputs.shape[1])
    if reference.shape != shape:
        raise ValueError(f"reference must be {list(shape)} like the weight, got {tuple(reference.shape)}")
    if reference.dtype not in _FLOATS:
        raise TypeError(f"reference must be floating point, got {reference.dtype}")
    if reference.device != inputs.device:
        raise ValueError(f"reference must be on the device of inputs, {inputs.device}, and is on {reference.device}")
    check_layout("reference", reference)


def _check_sketch(sketch: ParameterSketch, inputs: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(sketch, ParameterSketch):
        raise TypeError(f"sketch must be a pyeff.ParameterSketch or None, got {type(sketch).__name__}")
    if sketch.direction is None:
        return
    moments = sketch.direction.exp_avg_sq
    if moments.shape != shape:
        raise ValueError(f"sketch must have moments of shape {list(shape)} like the weight, got {tuple(moments.shape)}")
    if moments.device != inputs.device:
        raise ValueError(f"sketch must have moments on the device of inputs, {inputs.device}, not on {moments.device}")
