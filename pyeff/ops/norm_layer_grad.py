"""The backward pass of LayerNorm and RMSNorm, with every sample's share of gain and offset measured on the way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation, check_layout
from pyeff.ops._packed import Samples, samples_of
from pyeff.ops.linear_grad import check_inputs, float32_limits
from pyeff.ops.vector_grad import (
    VectorGrad,
    addresses,
    check_width,
    chunk_table,
    fake_result,
    plain_rows,
    result_rows,
)

# The widest row that a program of the Triton kernel holds in registers.
WIDEST_ROW = 16384


@dataclass(frozen=True)
class NormLayerGrad:
    """The gradients of a norm layer; None where not asked for.

    - `input_grad` [N, d]: the gradient by the layer's input
    - `weight`: of the gain, `bias`: of the offset, each with what the samples contribute
    """

    input_grad: Tensor | None
    weight: VectorGrad | None
    bias: VectorGrad | None


def norm_layer_grad(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    *,
    eps: float,
    weight: Tensor | None = None,
    center: bool = False,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    input_grad: bool = True,
    weight_grad: bool = True,
    bias_grad: bool = False,
    norms: bool = True,
    sample_grads: bool = False,
    impl: str = "auto",
) -> NormLayerGrad:
    """The backward pass of RMSNorm, or of LayerNorm with `center`, and every sample's squared norm for gain and offset.

        r_t = 1 / sqrt(mean((x_t - m_t)^2) + eps),   n_t = (x_t - m_t) r_t,   m_t = mean(x_t) with `center`, else 0
        input_grad_t = r_t (w g_t - n_t mean(w g_t n_t) - [center] mean(w g_t))
        weight: D_s = sum_{t in s} g_t n_t,   bias: D_s = sum_{t in s} g_t,   norms_sq = ||D_s||^2

    Shapes and dtypes: `inputs` [N, d] (what the layer was given) and `grad_outputs` [N, d] (the gradient of the loss by
    what it returned) of one dtype among float16, bfloat16, float32 and float64, of any strides; `weight` [d] of any
    floating dtype, None for ones; `cu_seqlens` [S+1] as for `linear_grad`. `mean` and `rstd` [N] are m and r where the
    forward pass has kept them, of any floating dtype. `input_grad` has the dtype of `inputs`; all else is float32
    (float64 inputs: float64, by the reference implementation alone), and so is every sum on the way.

    An empty sample has gradient 0. NaN or infinity in a token spoils its row of `input_grad`, its sample's numbers, and
    the sums.

    `impl`: "auto" takes the first that can run of "triton" (GPU, rows of up to 16384), "cpu" (C++) and "reference"
    (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits in every run
    on the same device, on the CPU for any number of threads. Not differentiable. Under `torch.compile` one operator of
    the graph.

    Raises `TypeError` for an argument of a wrong type or dtype, `ValueError` for arguments that do not fit together or
    where nothing is asked for.

    Cost: one read of `inputs` and `grad_outputs` and one write of `input_grad`; on a GPU rows of more than 8192 are
    read twice. Memory beside the result: a row of d float32 numbers per parameter for each sample and each 64 tokens of
    it.

    Gray et al. 2024, "Normalization Layer Per-Example Gradients are Sufficient to Predict Gradient Noise Scale in
    Transformers", arXiv:2411.00999.

    >>> import torch, pyeff
    >>> x, g = torch.tensor([[3.0, -3.0], [1.0, 1.0]]), torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    >>> grad = pyeff.norm_layer_grad(x, g, torch.tensor([0, 1, 2]), eps=0.0)
    >>> grad.weight.grad, grad.weight.norms_sq
    (tensor([1., 1.]), tensor([5., 9.]))
    """
    check_inputs(inputs, grad_outputs, cu_seqlens)
    check_width(inputs, grad_outputs)
    _check(inputs, weight, mean, rstd, center)
    eps = _epsilon(eps)
    if not (input_grad or weight_grad or bias_grad):
        raise ValueError("nothing is asked for: input_grad, weight_grad and bias_grad are False")
    with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False):
        grad_x, *found = _OP(
            inputs,
            grad_outputs,
            cu_seqlens,
            weight,
            mean,
            rstd,
            eps,
            center,
            input_grad,
            weight_grad,
            bias_grad,
            norms,
            sample_grads,
            impl,
        )

    def vector(wanted: bool, total: Tensor, norms_sq: Tensor, grads: Tensor) -> VectorGrad | None:
        return VectorGrad(total, norms_sq if norms else None, grads if sample_grads else None) if wanted else None

    return NormLayerGrad(grad_x if input_grad else None, vector(weight_grad, *found[:3]), vector(bias_grad, *found[3:]))


def _check(inputs: Tensor, weight: Tensor | None, mean: Tensor | None, rstd: Tensor | None, center: bool) -> None:
    tokens, d = inputs.shape
    for name, tensor, size in (("weight", weight, d), ("mean", mean, tokens), ("rstd", rstd, tokens)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor or None, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
        if tensor.numel() != size:
            raise ValueError(f"{name} must hold {size} numbers, got shape {tuple(tensor.shape)}")
        if tensor.device != inputs.device:
            raise ValueError(f"{name} must be on the device of inputs, {inputs.device}, and is on {tensor.device}")
        check_layout(name, tensor)
    if mean is not None and not center:
        raise ValueError("mean is of LayerNorm: pass center=True with it")


def _epsilon(eps: float) -> float:
    try:
        number = float(eps)
    except (TypeError, ValueError, OverflowError) as error:
        raise TypeError(f"eps must be a number, got {eps!r:.40}") from error
    if not 0 <= number < math.inf:
        raise ValueError(f"eps must be a finite number of 0 or more, got {number}")
    return number


def _limits(impl: str, inputs: Tensor, *args: object, **kwargs: object) -> str | None:
    if impl == "triton" and inputs.shape[1] > WIDEST_ROW:
        return f"a row must have at most {WIDEST_ROW} numbers, and these have {inputs.shape[1]}"
    return float32_limits(impl, inputs)


OPERATION = Operation("norm_layer_grad", ("triton", "cpu", "reference"), _limits)


def _run(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    center: bool,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    norms: bool,
    sample_grads: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    samples = samples_of(cu_seqlens, inputs.shape[0])
    chosen = OPERATION.explain(inputs, grad_outputs, cu_seqlens, impl=impl).impl
    options: dict[str, Any] = {
        "weight": weight,
        "center": center,
        "eps": eps,
        "mean": mean,
        "rstd": rstd,
        "input_grad": input_grad,
        "weight_grad": weight_grad,
        "bias_grad": bias_grad,
        "norms": norms,
        "sample_grads": sample_grads,
    }
    if chosen == "triton":
        from pyeff.triton_kernels import norm_layer_grad as kernels

        return kernels.norm_layer_grad(inputs, grad_outputs, chunk_table(samples, inputs), **options)
    if chosen == "cpu":
        return _on_cpu(inputs, grad_outputs, samples, **options)
    return _reference.norm_layer_grad(inputs, grad_outputs, samples.borders, **options)


def _on_cpu(
    inputs: Tensor,
    grad_outputs: Tensor,
    samples: Samples,
    *,
    weight: Tensor | None,
    center: bool,
    eps: float,
    mean: Tensor | None,
    rstd: Tensor | None,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    norms: bool,
    sample_grads: bool,
) -> tuple[Tensor, ...]:
    x, g = plain_rows(inputs), plain_rows(grad_outputs)
    grad_x = torch.empty(x.shape if input_grad else 0, dtype=x.dtype)
    of_weight, of_bias = (result_rows(x, samples, wanted, norms, sample_grads) for wanted in (weight_grad, bias_grad))
    w, mean, rstd = (None if t is None else t.reshape(-1).to(torch.float32).contiguous() for t in (weight, mean, rstd))
    extension().norm_layer_grad(
        grad_outputs=(g.data_ptr(), g.stride(0)),
        inputs=(x.data_ptr(), x.stride(0)),
        half=x.dtype == torch.bfloat16,
        borders=samples.borders.data_ptr(),
        samples=len(samples.cuts) - 1,
        d=x.shape[1],
        weight=0 if w is None else w.data_ptr(),
        mean=0 if mean is None else mean.data_ptr(),
        rstd=0 if rstd is None else rstd.data_ptr(),
        eps=eps,
        center=center,
        input_grad=grad_x.data_ptr() if input_grad else 0,
        weight_result=addresses(of_weight),
        bias_result=addresses(of_bias),
        threads=torch.get_num_threads(),
    )
    return (grad_x.to(inputs.dtype), *of_weight, *of_bias)


def _fake(
    inputs: Tensor,
    grad_outputs: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    eps: float,
    center: bool,
    input_grad: bool,
    weight_grad: bool,
    bias_grad: bool,
    norms: bool,
    sample_grads: bool,
    impl: str,
) -> tuple[Tensor, ...]:
    return (
        inputs.new_empty(inputs.shape if input_grad else 0),
        *fake_result(inputs, cu_seqlens, weight_grad, norms, sample_grads),
        *fake_result(inputs, cu_seqlens, bias_grad, norms, sample_grads),
    )


torch.library.define(
    "pyeff::norm_layer_grad",
    "(Tensor inputs, Tensor grad_outputs, Tensor cu_seqlens, Tensor? weight, Tensor? mean, Tensor? rstd, float eps,"
    " bool center, bool input_grad, bool weight_grad, bool bias_grad, bool norms, bool sample_grads, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::norm_layer_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::norm_layer_grad", _fake)
_OP = torch.ops.pyeff.norm_layer_grad.default
