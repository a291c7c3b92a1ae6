"""The gradient of a vector that acts on every token (a bias, a gain), with every sample's share of it measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.ops._packed import Samples, check_borders, samples_of
from pyeff.ops.linear_grad import check_inputs, check_rows, float32_limits


@dataclass(frozen=True)
class VectorGrad:
    """The gradient of a vector of d entries and what each of S samples contributes; None where not asked for.

    With D_s [d] the sample's own gradient:

    - `grad` [d]: sum_s D_s
    - `norms_sq` [S]: ||D_s||^2
    - `sample_grads` [S, d]: D_s
    """

    grad: Tensor
    norms_sq: Tensor | None
    sample_grads: Tensor | None


def vector_grad(
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    inputs: Tensor | None = None,
    norms: bool = True,
    sample_grads: bool = False,
    impl: str = "auto",
) -> VectorGrad:
    """The gradient of an offset or a gain, and every sample's squared norm.

        D_s = sum_{t in s} g_t,  with `inputs`  D_s = sum_{t in s} g_t * x_t;   grad = sum_s D_s,  norms_sq = ||D_s||^2

    Shapes and dtypes: `grad_outputs` [N, d] (the gradient of the loss by y = x + b or y = x * w) and `inputs` [N, d]
    (x of the gain) of one dtype among float16, bfloat16, float32 and float64, of any strides; `cu_seqlens` [S+1], int32
    or int64 on any device, the samples' borders in the token axis, from 0 to N, never falling. All results are float32
    (float64 inputs: float64, by the reference implementation alone).

    An empty sample has gradient 0. NaN or infinity in a sample spoils that sample's numbers, and the sum.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (C++) and "reference" (plain torch); an
    explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits in every run on the same
    device, on the CPU for any number of threads. Not differentiable. Under `torch.compile` one operator of the graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together.
    Borders on a GPU are read back for that at their first use, which waits for the stream; borders on the CPU never do.

    Cost: one read of `grad_outputs` and `inputs`. Memory beside the result: a row of d float32 numbers for each sample
    and each 64 tokens of it. Rows that are not contiguous, and float16 on the CPU, are copied first.

    >>> import torch, pyeff
    >>> grad_outputs = torch.tensor([[1.0, 0.0], [2.0, 1.0], [5.0, -1.0]])
    >>> grad = pyeff.vector_grad(grad_outputs, torch.tensor([0, 2, 3]))
    >>> grad.grad, grad.norms_sq
    (tensor([8., 0.]), tensor([10., 26.]))
    """
    if inputs is None:
        check_rows("grad_outputs", grad_outputs)
        check_borders(cu_seqlens)
    else:
        check_inputs(inputs, grad_outputs, cu_seqlens)
        check_width(inputs, grad_outputs)
    with torch.no_grad(), torch.autocast(grad_outputs.device.type, enabled=False):
        total, norms_sq, grads = _OP(grad_outputs, cu_seqlens, inputs, norms, sample_grads, impl)
    return VectorGrad(total, norms_sq if norms else None, grads if sample_grads else None)


def check_width(inputs: Tensor, grad_outputs: Tensor) -> None:
    """Raises `ValueError` unless both have as many features."""
    if grad_outputs.shape != inputs.shape:
        raise ValueError(
            f"grad_outputs must have the shape of inputs, {tuple(inputs.shape)}, got {tuple(grad_outputs.shape)}"
        )


def _limits(impl: str, grad_outputs: Tensor, *args: object, **kwargs: object) -> str | None:
    return float32_limits(impl, grad_outputs)


OPERATION = Operation("vector_grad", ("triton", "cpu", "reference"), _limits)


def _run(
    grad_outputs: Tensor, cu_seqlens: Tensor, inputs: Tensor | None, norms: bool, sample_grads: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    samples = samples_of(cu_seqlens, grad_outputs.shape[0])
    chosen = OPERATION.explain(grad_outputs, cu_seqlens, inputs=inputs, impl=impl).impl
    if chosen == "triton":
        from pyeff.triton_kernels import vector_grad as kernels

        table = chunk_table(samples, grad_outputs)
        return kernels.vector_grad(grad_outputs, table, inputs=inputs, norms=norms, sample_grads=sample_grads)
    if chosen == "cpu":
        return _on_cpu(grad_outputs, samples, inputs, norms, sample_grads)
    return _reference.vector_grad(grad_outputs, samples.borders, inputs=inputs, norms=norms, sample_grads=sample_grads)


def chunk_table(samples: Samples, rows: Tensor) -> object:
    """The samples cut into chunks of rows, which is kept with them, for the Triton kernels."""
    from pyeff.triton_kernels import vector_grad as kernels

    stream = torch.cuda.current_stream(rows.device) if rows.is_cuda else None
    return samples.made(("chunks", rows.device, stream), lambda: kernels.chunks_of(samples.borders, rows.device))


def _on_cpu(
    grad_outputs: Tensor, samples: Samples, inputs: Tensor | None, norms: bool, sample_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    d = grad_outputs.shape[1]
    result = result_rows(grad_outputs, samples, True, norms, sample_grads)
    g, x = plain_rows(grad_outputs), None if inputs is None else plain_rows(inputs)
    extension().vector_grad(
        grad_outputs=(g.data_ptr(), g.stride(0)),
        inputs=(0, 0) if x is None else (x.data_ptr(), x.stride(0)),
        half=g.dtype == torch.bfloat16,
        borders=samples.borders.data_ptr(),
        samples=len(samples.cuts) - 1,
        d=d,
        result=addresses(result),
        threads=torch.get_num_threads(),
    )
    return result


def result_rows(
    like: Tensor, samples: Samples, wanted: bool, norms: bool, sample_grads: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Float32 memory for a vector's gradient [d], its samples' norms [S] and their gradients [S, d]; [0] for none."""
    d, count = like.shape[1], len(samples.cuts) - 1
    return (
        like.new_empty(d if wanted else 0, dtype=torch.float32),
        like.new_empty(count if wanted and norms else 0, dtype=torch.float32),
        like.new_empty((count, d) if wanted and sample_grads else 0, dtype=torch.float32),
    )


def addresses(result: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Where the C++ kernels write; 0 for what is empty."""
    return tuple(t.data_ptr() if t.numel() else 0 for t in result)


def plain_rows(rows: Tensor) -> Tensor:
    """Rows [N, d] as the C++ kernels read them: float32 or bfloat16, each row contiguous."""
    if rows.dtype == torch.float16:
        return rows.to(torch.float32, memory_format=torch.contiguous_format)
    return rows if rows.stride(1) == 1 and (rows.shape[1] > 1 or rows.stride(0) == 1) else rows.contiguous()


def _fake(
    grad_outputs: Tensor, cu_seqlens: Tensor, inputs: Tensor | None, norms: bool, sample_grads: bool, impl: str
) -> tuple[Tensor, ...]:
    return fake_result(grad_outputs, cu_seqlens, True, norms, sample_grads)


def fake_result(like: Tensor, cu_seqlens: Tensor, wanted: bool, norms: bool, sample_grads: bool) -> tuple[Tensor, ...]:
    """Tensors of the shapes and dtypes that an operation returns for a vector."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    d, samples = like.shape[1], cu_seqlens.shape[0] - 1
    return (
        like.new_empty(d if wanted else 0, dtype=dtype),
        like.new_empty(samples if wanted and norms else 0, dtype=dtype),
        like.new_empty((samples, d) if wanted and sample_grads else 0, dtype=dtype),
    )


torch.library.define(
    "pyeff::vector_grad",
    "(Tensor grad_outputs, Tensor cu_seqlens, Tensor? inputs, bool norms, bool sample_grads, str impl)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::vector_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::vector_grad", _fake)
_OP = torch.ops.pyeff.vector_grad.default
