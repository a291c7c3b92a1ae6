"""The weight gradient of a linear layer, with every sample's share of it measured on the way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.ops._packed import host_borders

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# Gradients of single samples exist on the CPU as a panel of at most this size. Two cores of a Zen 5 server, d = 576,
# p = 1536, 8 samples of 512 tokens: a panel of everything takes 3 % more than the plain gradient, of a quarter of the
# rows 6 %, of a sixteenth 15 %.
_PANEL_BYTES = 32 << 20
# Most of a float32 copy of 16-bit inputs.
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class LinearGrad:
    """The gradient of a linear layer's weight and what each of S samples contributes; None where not asked for.

    With D_s = sum over the tokens t of sample s of g_t a_t^T, the sample's own gradient:

    - `weight_grad` [p, d]: sum_s D_s
    - `norms_sq` [S]: || D_s ||_F^2
    - `dots` [S]: <D_s, R>, R being the `reference`
    """

    weight_grad: Tensor | None
    norms_sq: Tensor | None
    dots: Tensor | None


def linear_grad(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_grad: bool = True,
    norms: bool = True,
    reference: Tensor | None = None,
    impl: str = "auto",
) -> LinearGrad:
    """The weight gradient of a linear layer, and every sample's squared norm and dot with a reference gradient.

        D_s = sum_{t in s} g_t a_t^T,   weight_grad = sum_s D_s,   norms_sq = || D_s ||_F^2,   dots = <D_s, reference>

    The samples' gradients are never stored together: beside inputs and outputs at most 32 MiB of memory are used, or
    48 MiB for 16-bit inputs on the CPU, or 1280 bytes a sample on a GPU if that is more. On the CPU the 32 MiB are kept
    for the thread's next call.

    Shapes and dtypes: `inputs` [N, d] (what the layer was given) and `grad_outputs` [N, p] (the gradient of the loss by
    what it returned) of one dtype among float16, bfloat16, float32 and float64, of any strides; `cu_seqlens` [S+1],
    int32 or int64 on any device, the samples' borders in the token axis, from 0 to N, never falling; `reference` [p, d]
    of any floating dtype.

    Everything accumulates in float32 (float64 inputs: in float64, by the reference implementation alone). `weight_grad`
    is rounded once at the end to the dtype of `inputs`, which is what autograd's would have; `norms_sq` and `dots` are
    float32. An empty sample has norm and dot 0. NaN or infinity in a sample spoils that sample's numbers, and the sum.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (torch's matmul and one pass in C++) and
    "reference" (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits
    in every run on the same device. Not differentiable.

    Raises `TypeError` or `ValueError` for arguments that do not fit together. Borders on a GPU are read back for that
    at their first use, which waits for the stream; borders on the CPU never do.

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
    borders = check_samples(inputs, grad_outputs, cu_seqlens)
    _check(inputs, grad_outputs, weight_grad, norms, reference)
    chosen = OPERATION.explain(
        inputs, grad_outputs, cu_seqlens, weight_grad=weight_grad, norms=norms, reference=reference, impl=impl
    ).impl
    # On a GPU the kernel reads the borders, so those already there are better; elsewhere the host does.
    samples = cu_seqlens if inputs.device == cu_seqlens.device else borders
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        total, norms_sq, dots = _OP(inputs, grad_outputs, samples, weight_grad, norms, reference, chosen)
    return LinearGrad(
        total if weight_grad else None, norms_sq if norms else None, dots if reference is not None else None
    )


def check_samples(inputs: Tensor, grad_outputs: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The borders of packed `inputs` and `grad_outputs` on the host, once the three are known to fit together."""
    for name, tensor in {"inputs": inputs, "grad_outputs": grad_outputs}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.ndim != 2:
            raise ValueError(
                f"{name} must be [tokens, features], got shape {tuple(tensor.shape)}; flatten the batch first"
            )
    if inputs.dtype not in _FLOATS:
        raise TypeError(f"inputs must be float16, bfloat16, float32 or float64, got {inputs.dtype}")
    if grad_outputs.dtype != inputs.dtype:
        raise TypeError(
            f"grad_outputs must have the dtype of inputs, {inputs.dtype}, got {grad_outputs.dtype}; cast one of them"
        )
    if grad_outputs.device != inputs.device:
        raise ValueError(
            f"grad_outputs must be on the device of inputs, {inputs.device}, and is on {grad_outputs.device}"
        )
    if grad_outputs.shape[0] != inputs.shape[0]:
        raise ValueError(
            f"grad_outputs must have the {inputs.shape[0]} tokens of inputs, got shape {tuple(grad_outputs.shape)}"
        )
    return host_borders(cu_seqlens, inputs.shape[0])


def float32_limits(impl: str, inputs: Tensor, *args: object, **kwargs: object) -> str | None:
    """Why an implementation that computes in float32 cannot take `inputs`, or None."""
    if impl != "reference" and inputs.dtype == torch.float64:
        return "it computes in float32, and inputs are float64"
    if impl == "triton" and inputs.is_cuda and torch.cuda.get_device_capability(inputs.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if impl == "triton" and inputs.dtype == torch.bfloat16 and not inputs.is_cuda:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


OPERATION = Operation("linear_grad", ("triton", "cpu", "reference"), float32_limits)


def _run(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = _implementation(impl)
    return run(inputs, grad_outputs, cu_seqlens, weight_grad=weight_grad, norms=norms, reference=reference)


def _implementation(impl: str) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    if impl == "triton":
        from pyeff.triton_kernels.linear_grad import linear_grad as kernels

        return kernels
    return _on_cpu if impl == "cpu" else _reference.linear_grad


def _on_cpu(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    weight_grad: bool,
    norms: bool,
    reference: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    p, d = grad_outputs.shape[1], inputs.shape[1]
    # Samples without a token own no border: the others stand side by side.
    has_tokens = cu_seqlens.diff() > 0
    borders = cu_seqlens.unique_consecutive().tolist()
    samples = len(borders) - 1 if p and d else 0
    total = inputs.new_empty((p, d) if weight_grad else 0)
    norms_sq = torch.zeros(len(borders) - 1, dtype=torch.float64) if norms else None
    dots = None if reference is None else torch.zeros(len(borders) - 1, dtype=torch.float64)

    # Sums of 16-bit inputs are float32 until they are complete, and the reduction reads a plain float32 reference.
    sums_apart = weight_grad and total.dtype != torch.float32
    others = sums_apart + (reference is not None)
    fits = _PANEL_BYTES // (4 * max(1, d))  # rows of length d
    rows = max(1, min(p, fits // (1 + others)))
    most = max(1, min(samples, fits // rows - others))
    panel = kept_memory(most * rows * d)
    apart = inputs.new_empty((rows, d) if sums_apart else 0, dtype=torch.float32)
    for row in range(0, p if samples else 0, rows):
        part = grad_outputs[:, row : row + rows]
        width = part.shape[1]
        sums = apart[:width] if sums_apart else total[row : row + rows] if weight_grad else None
        target = None if reference is None else reference[row : row + rows].to(torch.float32).contiguous()
        for first in range(0, samples, most):
            cut = borders[first : first + most + 1]
            grads = panel[: (len(cut) - 1) * width * d].view(-1, width, d)
            _sample_grads(inputs, part, cut, grads)
            reduce_panel(
                grads,
                reference=target,
                total=sums,
                start_total=first == 0,
                norms_sq=None if norms_sq is None else norms_sq[first:],
                dots=None if dots is None else dots[first:],
            )
        if sums is not None and sums_apart:
            total[row : row + rows] = sums
    return total if samples else total.zero_(), _spread(norms_sq, has_tokens), _spread(dots, has_tokens)


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
    chunk = borders[-1] if inputs.dtype == torch.float32 else max(1, _COPY_BYTES // (4 * max(1, d + p)))  # tokens
    for length, run in groupby(end - start for start, end in pairwise(borders)):
        count = len(list(run))
        together = max(1, chunk // length)
        for s in range(first, first + count, together):
            out = grads[s : min(s + together, first + count)]
            tokens = slice(borders[s], borders[s] + out.shape[0] * length)
            a = inputs[tokens].unflatten(0, (-1, length))  # [S, T, d]
            g = grad_outputs[tokens].unflatten(0, (-1, length)).transpose(1, 2)  # [S, p, T]
            for t in range(0, length, chunk):
                g_t, a_t = g[:, :, t : t + chunk].to(torch.float32), a[:, t : t + chunk].to(torch.float32)
                if t == 0:
                    torch.bmm(g_t, a_t, out=out)
                else:
                    out.baddbmm_(g_t, a_t)
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


def _spread(values: Tensor | None, has_tokens: Tensor) -> Tensor:
    """float32 `values` of the samples that have tokens, and 0 for the others: [S], or [0] for None."""
    if values is None:
        return torch.zeros(0)
    return torch.zeros(has_tokens.shape[0]).masked_scatter_(has_tokens, values.to(torch.float32))


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


torch.library.define(
    "pyeff::linear_grad",
    "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, bool weight_grad, bool norms, Tensor? reference, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::linear_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::linear_grad", _fake)
_OP = torch.ops.pyeff.linear_grad.default


def _check(inputs: Tensor, grad_outputs: Tensor, weight_grad: bool, norms: bool, reference: Tensor | None) -> None:
    if not (weight_grad or norms or reference is not None):
        raise ValueError("nothing is asked for: weight_grad and norms are False and reference is None")
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
