"""The gradient of an embedding table, with every sample's share of it measured on the way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation, check_layout
from pyeff.ops._packed import Samples, check_borders, samples_of
from pyeff.ops.linear_grad import check_rows, float32_limits
from pyeff.ops.vector_grad import plain_rows


@dataclass(frozen=True)
class EmbeddingGrad:
    """The gradient of an embedding table and what each of S samples contributes; None where not asked for.

    With D_s [V, d] the sample's own gradient, whose row v is the sum over the sample's tokens of index v:

    - `weight_grad` [V, d]: sum_s D_s
    - `norms_sq` [S]: || D_s ||_F^2
    """

    weight_grad: Tensor | None
    norms_sq: Tensor | None


def embedding_grad(
    indices: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    num_embeddings: int,
    *,
    padding_idx: int | None = None,
    weight_grad: bool = True,
    norms: bool = True,
    impl: str = "auto",
) -> EmbeddingGrad:
    """The gradient of an embedding table, and every sample's squared norm, from tokens sorted by index.

        D_s[v] = sum of g_t over t in s with i_t = v,   weight_grad = sum_s D_s,   norms_sq = || D_s ||_F^2

    Shapes and dtypes: `indices` [N], int32 or int64, from 0 to `num_embeddings` - 1; `grad_outputs` [N, d] (the
    gradient of the loss by the rows that were read) of float16, bfloat16, float32 or float64, of any strides;
    `cu_seqlens` [S+1] as for `linear_grad`. The row `padding_idx` (negative ones count from the end) has no gradient.
    Sums are float32 (float64 inputs: float64, by the reference implementation alone); `weight_grad` is rounded once at
    the end to the dtype of `grad_outputs`, `norms_sq` is float32.

    An empty sample has norm 0. NaN or infinity in a sample spoils that sample's norm and the rows it reads.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (C++) and "reference" (plain torch); an
    explicit one runs or raises `RuntimeError` with the reason. No atomics: each gives the same bits in every run on the
    same device, on the CPU for any number of threads. Not differentiable. Under `torch.compile` one operator of the
    graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together. On
    the CPU an index outside of the table is a `ValueError` too. On a GPU, where finding out would wait for the stream,
    the token of such an index joins no row and makes its sample's norm NaN.

    Cost: a stable sort of N indices, one read of `grad_outputs`, one write of `weight_grad`. Memory beside the result:
    for the sort at most 32 N bytes on the CPU and 48 N on a GPU (8 N more for int32 indices, and what torch's own sort
    takes while it runs), and 4 bytes for each token and 512 columns (256 on a GPU).

    >>> import torch, pyeff
    >>> indices, grad_outputs = torch.tensor([1, 0, 1, 1]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    >>> grad = pyeff.embedding_grad(indices, grad_outputs, torch.tensor([0, 3, 4]), 2)
    >>> grad.weight_grad, grad.norms_sq
    (tensor([[2.],
            [8.]]), tensor([20., 16.]))
    """
    check_rows("grad_outputs", grad_outputs)
    check_borders(cu_seqlens)
    padding_idx = _check(indices, grad_outputs, num_embeddings, padding_idx, weight_grad or norms)
    with torch.no_grad():
        total, norms_sq = _OP(indices, grad_outputs, cu_seqlens, num_embeddings, padding_idx, weight_grad, norms, impl)
    return EmbeddingGrad(total if weight_grad else None, norms_sq if norms else None)


def _check(
    indices: Tensor, grad_outputs: Tensor, num_embeddings: int, padding_idx: int | None, wanted: bool
) -> int | None:
    if not isinstance(indices, Tensor):
        raise TypeError(f"indices must be a tensor, got {type(indices).__name__}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"indices must be int32 or int64, got {indices.dtype}")
    if indices.shape != grad_outputs.shape[:1]:
        raise ValueError(
            f"indices must be one for each of the {grad_outputs.shape[0]} rows of grad_outputs, got shape "
            f"{tuple(indices.shape)}"
        )
    if indices.device != grad_outputs.device:
        raise ValueError(
            f"indices must be on the device of grad_outputs, {grad_outputs.device}, and is on {indices.device}"
        )
    check_layout("indices", indices)
    for name, number in (("num_embeddings", num_embeddings), ("padding_idx", padding_idx)):
        optional = name == "padding_idx" and number is None
        if not optional and (isinstance(number, bool) or not isinstance(number, int | torch.SymInt)):
            raise TypeError(f"{name} must be an int, got {type(number).__name__}")
    if num_embeddings < 0:
        raise ValueError(f"num_embeddings must be 0 or more, got {num_embeddings}")
    if not wanted:
        raise ValueError("nothing is asked for: weight_grad and norms are False")
    if padding_idx is None:
        return None
    if num_embeddings == 0:
        raise ValueError(f"padding_idx must be None for a table without rows (num_embeddings=0), got {padding_idx}")
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(f"padding_idx must be an index of the {num_embeddings} rows, got {padding_idx}")
    return padding_idx % num_embeddings


def _limits(impl: str, indices: Tensor, grad_outputs: Tensor, *args: object, **kwargs: object) -> str | None:
    return float32_limits(impl, grad_outputs)


OPERATION = Operation("embedding_grad", ("triton", "cpu", "reference"), _limits)


def _run(
    indices: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    num_embeddings: int,
    padding_idx: int | None,
    weight_grad: bool,
    norms: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    samples = samples_of(cu_seqlens, indices.shape[0])
    chosen = OPERATION.explain(indices, grad_outputs, cu_seqlens, num_embeddings, impl=impl).impl
    # Tokens of one index keep their order, so those of one sample stay together.
    index, order = torch.sort(indices.to(torch.int64), stable=True)
    if not indices.is_cuda and index.numel() and not 0 <= int(index[0]) <= int(index[-1]) < num_embeddings:
        if num_embeddings == 0:
            raise ValueError(
                f"indices must be none for a table without rows (num_embeddings=0), got {index.numel()} of them"
            )
        raise ValueError(
            f"indices must be from 0 to {num_embeddings - 1}, the last row of the table, and go from {int(index[0])} "
            f"to {int(index[-1])}"
        )
    if chosen == "reference":
        return _reference.embedding_grad(
            indices,
            grad_outputs,
            samples.borders,
            num_embeddings,
            padding_idx=padding_idx,
            weight_grad=weight_grad,
            norms=norms,
        )
    padding = -1 if padding_idx is None else padding_idx
    if chosen == "cpu":
        return _on_cpu(index, order, grad_outputs, samples, num_embeddings, padding, weight_grad, norms)
    from pyeff.triton_kernels import embedding_grad as kernels

    borders = cu_seqlens if indices.device == cu_seqlens.device else samples.borders
    return kernels.embedding_grad(
        index, order, grad_outputs, borders, num_embeddings, padding, weight_grad=weight_grad, norms=norms
    )


def _on_cpu(
    index: Tensor,
    order: Tensor,
    grad_outputs: Tensor,
    samples: Samples,
    num_embeddings: int,
    padding: int,
    weight_grad: bool,
    norms: bool,
) -> tuple[Tensor, Tensor]:
    g = plain_rows(grad_outputs)
    d = g.shape[1]
    total = torch.zeros((num_embeddings, d) if weight_grad else 0, dtype=g.dtype)
    norms_sq = torch.empty(len(samples.cuts) - 1 if norms else 0)
    extension().embedding_grad(
        index=index.data_ptr(),
        order=order.data_ptr(),
        tokens=index.numel(),
        grad_outputs=g.data_ptr(),
        stride=g.stride(0),
        d=d,
        half=g.dtype == torch.bfloat16,
        borders=samples.borders.data_ptr(),
        samples=len(samples.cuts) - 1,
        padding_idx=padding,
        weight_grad=total.data_ptr() if total.numel() else 0,
        norms_sq=norms_sq.data_ptr() if norms_sq.numel() else 0,
        threads=torch.get_num_threads(),
    )
    return total.to(grad_outputs.dtype), norms_sq


def _fake(
    indices: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    num_embeddings: int,
    padding_idx: int | None,
    weight_grad: bool,
    norms: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if grad_outputs.dtype == torch.float64 else torch.float32
    return (
        grad_outputs.new_empty((num_embeddings, grad_outputs.shape[1]) if weight_grad else 0),
        grad_outputs.new_empty(cu_seqlens.shape[0] - 1 if norms else 0, dtype=dtype),
    )


torch.library.define(
    "pyeff::embedding_grad",
    "(Tensor indices, Tensor grad_outputs, Tensor cu_seqlens, SymInt num_embeddings, SymInt? padding_idx,"
    " bool weight_grad, bool norms, str impl) -> (Tensor, Tensor)",
)
torch.library.impl("pyeff::embedding_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::embedding_grad", _fake)
_OP = torch.ops.pyeff.embedding_grad.default
