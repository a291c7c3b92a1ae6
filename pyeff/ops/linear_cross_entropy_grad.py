"""The gradient of a language-model head's loss, with every sample's share of it measured, without its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation
from pyeff.ops._packed import host_borders, remember_borders
from pyeff.ops.gram_norms import gram_is_cheaper, gram_norms
from pyeff.ops.linear_cross_entropy_scores import check_head, float32_limits, linear_cross_entropy_scores
from pyeff.ops.linear_grad import linear_grad

# The gradients by the logits exist as a panel of so many bytes, of all tokens and as many classes as fit. Every panel
# adds to the hidden gradient, which is read and written in float32 then: on an H100 (estimate) that traffic takes
# 836 / classes of the product's own time.
_PANEL_BYTES = {"cpu": 16 << 20, "triton": 128 << 20}
# Fewer classes than this are no matrix product worth the name, however many tokens there are.
_LEAST_CLASSES = 256
# Panels hold a multiple of so many classes: a row of tiles.
_ALIGNED = 128
# Without a weight gradient tokens need not be together: in groups of this size panels are wide.
_GROUP_TOKENS = 2048


@dataclass(frozen=True)
class HeadGrad:
    """The gradient of a head's loss by what it is made of, and each of S samples' share; None where not asked for.

    With g_t [V] the gradient of the loss by the logits of token t and D_s = sum over the tokens t of s of g_t h_t^T:

    - `losses` [N]: -log p_y of each token, NaN at ignored positions
    - `hidden_grad` [N, d]: g_t weight
    - `weight_grad` [V, d]: sum_s D_s
    - `bias_grad` [V]: sum_t g_t; None without a bias
    - `norms_sq` [S]: || D_s ||_F^2
    - `bias_norms_sq` [S]: || sum over the tokens of s of g_t ||^2; None without a bias
    """

    losses: Tensor
    hidden_grad: Tensor | None
    weight_grad: Tensor | None
    bias_grad: Tensor | None
    norms_sq: Tensor | None
    bias_norms_sq: Tensor | None


def linear_cross_entropy_grad(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    grad_losses: Tensor | float = 1.0,
    hidden_grad: bool = True,
    weight_grad: bool = True,
    norms: bool = True,
    impl: str = "auto",
) -> HeadGrad:
    """Losses of a language-model head, their gradient, and every sample's squared norm of it.

        x = hidden weight^T + bias,   z = x, or softcap tanh(x / softcap),   p = softmax(z),   nll_t = -log p_y

        g_t = grad_losses_t (p - onehot(y)) dz/dx,   and from these the fields of `HeadGrad`

    The logits [N, V] are never stored. A first pass over the vocabulary finds the losses, a second one forms g_t again
    for a panel of classes at a time. Beside inputs and outputs this takes a panel of 16 MiB on the CPU or 128 MiB on a
    GPU (or 256 classes a token, if that is more), the workspace of `linear_grad`, and the sums of `hidden_grad` in
    float32; on the CPU also float32 copies of 16-bit `hidden` and of 16 MiB of `weight`.

    Shapes and dtypes: `hidden` [N, d] and `weight` [V, d] of one dtype among float16, bfloat16, float32 and float64, of
    any strides; `targets` [N] int64 or int32; `cu_seqlens` [S+1], int32 or int64 on any device, the samples' borders in
    the token axis, from 0 to N, never falling; `bias` [V] of any floating dtype; `grad_losses`, the gradient of the
    loss by each nll, a number or [N] (1 / N for a mean). Everything accumulates in float32 (float64 inputs: in float64,
    by the reference alone); gradients are rounded once at the end to the dtype of what they are gradients of, losses
    and norms are float32. On a GPU g_t is rounded to the dtype of `hidden` as autograd's would be: float16 needs a loss
    scale there.

    An ignored token has no gradient; its hidden state must be finite. A token whose target is no class (on a GPU) or
    whose logits have no softmax has NaN for its loss, its row of `hidden_grad` and its sample's norms, and spoils the
    sums. An empty sample has norm 0.

    With `weight_grad`, norms come from the product that forms it (`linear_grad`). Without it, each panel takes what
    needs fewer FLOPs, that product or Gram matrices (`gram_norms`, with their cancellation).

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (C++ beside torch's matmul) and "reference"
    (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits in every run
    on the same device. Not differentiable: `linear_cross_entropy` is.

    Raises `TypeError` or `ValueError` for arguments that are wrong or do not fit together. A target that is no class
    raises `ValueError` on the CPU. Borders on a GPU are read back at their first use, which waits for the stream.

    Cost: 2 N d V FLOPs each for the losses, for g_t, for `hidden_grad` and for `weight_grad`; a head that stores its
    logits takes 6 N d V. On the CPU ignored positions cost nothing.

    Li et al. 2021, arXiv:2110.05679 (norms); Wijmans et al. 2024, "Cut Your Losses in Large-Vocabulary Language
    Models", arXiv:2411.09009 (the recomputed softmax).

    >>> import torch, pyeff
    >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2)
    >>> grad = pyeff.linear_cross_entropy_grad(hidden, weight, torch.tensor([0, 1, 1]), torch.tensor([0, 1, 3]))
    >>> grad.norms_sq
    tensor([1.5000, 6.0000])
    """
    check_head(hidden, weight, targets, bias, softcap, ignore_index)
    host_borders(cu_seqlens, hidden.shape[0])
    if not (hidden_grad or weight_grad or norms):
        raise ValueError(
            "nothing is asked for: hidden_grad, weight_grad and norms are False; linear_cross_entropy_scores has losses"
        )
    scale = _scale(grad_losses, hidden)
    impl = OPERATION.explain(hidden, weight, targets, impl=impl).impl
    scores = linear_cross_entropy_scores(
        hidden, weight, targets, bias=bias, softcap=softcap, ignore_index=ignore_index, impl=impl
    )
    return gradient_of_scored(
        hidden,
        weight,
        targets,
        cu_seqlens,
        scores.nll,
        scores.lse,
        scale,
        bias=bias,
        softcap=softcap,
        ignore_index=ignore_index,
        hidden_grad=hidden_grad,
        weight_grad=weight_grad,
        norms=norms,
        impl=impl,
    )


def gradient_of_scored(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    norms: bool,
    impl: str = "auto",
) -> HeadGrad:
    """`linear_cross_entropy_grad` of checked arguments whose `nll` and `lse` [N] are known."""
    impl = OPERATION.explain(hidden, weight, targets, impl=impl).impl
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        of_hidden, of_weight, of_bias, norms_sq, bias_norms_sq = _OP(
            hidden,
            weight,
            targets,
            cu_seqlens,
            nll,
            lse,
            grad_losses,
            bias,
            softcap,
            ignore_index,
            hidden_grad,
            weight_grad,
            norms,
            impl,
        )
    has_bias = bias is not None
    return HeadGrad(
        nll,
        of_hidden if hidden_grad else None,
        of_weight if weight_grad else None,
        of_bias if weight_grad and has_bias else None,
        norms_sq if norms else None,
        bias_norms_sq if norms and has_bias else None,
    )


OPERATION = Operation("linear_cross_entropy_grad", ("triton", "cpu", "reference"), float32_limits)


class _Wanted(NamedTuple):
    hidden_grad: bool
    weight_grad: bool
    norms: bool


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    norms: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if impl == "reference":
        return _reference.linear_cross_entropy_grad(
            hidden,
            weight,
            targets,
            cu_seqlens,
            grad_losses=grad_losses,
            bias=bias,
            softcap=softcap,
            ignore_index=ignore_index,
            hidden_grad=hidden_grad,
            weight_grad=weight_grad,
            norms=norms,
        )
    wanted = _Wanted(hidden_grad, weight_grad, norms)
    run = _on_cpu if impl == "cpu" else _on_gpu
    head = _Head(weight, None if bias is None else bias.to(torch.float32).contiguous(), softcap)
    found = run(hidden, targets, cu_seqlens, nll, lse, grad_losses, head, ignore_index, wanted)
    of_hidden, of_weight, of_bias, norms_sq, bias_norms_sq = found
    return of_hidden, of_weight, of_bias if bias is None else of_bias.to(bias.dtype), norms_sq, bias_norms_sq


class _Head(NamedTuple):
    weight: Tensor
    bias: Tensor | None
    softcap: float | None


class _Tokens(NamedTuple):
    """What a token brings: its hidden state, its target, and three numbers in float32."""

    hidden: Tensor  # [N, d]
    targets: Tensor
    lse: Tensor
    missing: Tensor  # 1 - p_y, with all its digits
    scale: Tensor

    def part(self, rows: slice) -> _Tokens:
        return _Tokens(*(field[rows] for field in self))


# Fills the panel [N, C] with the gradients by the logits of the classes from `first` on.
_LogitGrads = Callable[[_Tokens, _Head, int, Tensor], None]
_Grads = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _on_gpu(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    head: _Head,
    ignore_index: int,
    wanted: _Wanted,
) -> _Grads:
    from pyeff.triton_kernels.linear_cross_entropy_grad import logit_grads

    def fill(tokens: _Tokens, part: _Head, first: int, grads: Tensor) -> None:
        logit_grads(
            *tokens[:1], part.weight, *tokens[1:], grads, first_class=first, bias=part.bias, softcap=part.softcap
        )

    # Which tokens count is not known here without waiting: an ignored one gets probabilities of 0 all over.
    ignored = targets == ignore_index
    tokens = _Tokens(
        hidden,
        targets.contiguous(),
        lse.masked_fill(ignored, torch.inf),
        torch.expm1(-nll).neg_().masked_fill_(ignored, 0.0),
        grad_losses.masked_fill(ignored, 0.0),
    )
    return _by_panels(tokens, cu_seqlens, head, wanted, "triton", fill)


def _on_cpu(
    hidden: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    head: _Head,
    ignore_index: int,
    wanted: _Wanted,
) -> _Grads:
    native, threads = extension(), torch.get_num_threads()

    def fill(tokens: _Tokens, part: _Head, first: int, grads: Tensor) -> None:
        torch.mm(tokens.hidden, part.weight.T, out=grads)
        native.logit_grads(
            logits=grads.data_ptr(),
            rows=grads.shape[0],
            columns=grads.shape[1],
            first_class=first,
            targets=tokens.targets.data_ptr(),
            lse=tokens.lse.data_ptr(),
            missing=tokens.missing.data_ptr(),
            scale=tokens.scale.data_ptr(),
            bias=0 if part.bias is None else part.bias.data_ptr(),
            softcap=part.softcap or 0.0,
            threads=threads,
        )

    counts = targets != ignore_index
    kept = counts.nonzero()[:, 0]
    everything = kept.numel() == counts.numel()

    def picked(t: Tensor) -> Tensor:
        return t if everything else t.index_select(0, kept)

    tokens = _Tokens(
        picked(hidden).to(torch.float32),
        picked(targets).to(torch.int64).contiguous(),
        picked(lse).contiguous(),
        torch.expm1(-picked(nll)).neg_().contiguous(),
        picked(grad_losses).contiguous(),
    )
    borders = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[cu_seqlens.to("cpu", torch.int64)]
    found = _by_panels(tokens, borders, head, wanted, "cpu", fill)
    of_hidden = found[0]
    if wanted.hidden_grad and not everything:
        of_hidden = of_hidden.new_zeros(hidden.shape).index_copy_(0, kept, of_hidden)
    return of_hidden.to(hidden.dtype), *found[1:]


def _by_panels(
    tokens: _Tokens, cu_seqlens: Tensor, head: _Head, wanted: _Wanted, impl: str, fill: _LogitGrads
) -> _Grads:
    """All gradients; `hidden_grad` in the dtype of the tokens' hidden states, the others as they are returned."""
    weight, bias, softcap = head
    hidden, (v, d) = tokens.hidden, weight.shape
    samples, has_bias = cu_seqlens.numel() - 1, bias is not None
    # On a GPU the products choose for themselves; interpreted kernels are taken only when named.
    products = "auto" if hidden.is_cuda else impl
    sums = hidden.new_zeros(hidden.shape if wanted.hidden_grad else 0, dtype=torch.float32)
    of_weight = weight.new_zeros((v, d) if wanted.weight_grad else 0)
    of_bias = hidden.new_zeros(v if wanted.weight_grad and has_bias else 0, dtype=torch.float32)
    norms_sq = hidden.new_zeros(samples if wanted.norms else 0, dtype=torch.float32)
    bias_norms_sq = hidden.new_zeros(samples if wanted.norms and has_bias else 0, dtype=torch.float32)
    for rows, members, borders, squared_lengths in _groups(cu_seqlens, hidden, wanted):
        group = tokens.part(rows)
        count = group.hidden.shape[0]
        width = _panel_width(count, weight, hidden.dtype, impl)
        # The GPU wants aligned rows, the CPU neighbouring ones.
        panel = hidden.new_empty(count, width if impl == "cpu" else -(-width // _ALIGNED) * _ALIGNED)
        for first in range(0, v, width):
            classes = slice(first, min(first + width, v))
            part = _Head(_readable(weight[classes], impl), bias[classes] if bias is not None else None, softcap)
            columns = classes.stop - first
            grads = panel.view(-1)[: count * columns].view(count, -1) if impl == "cpu" else panel[:, :columns]
            fill(group, part, first, grads)
            if wanted.hidden_grad:
                _add_product(sums[rows], grads, part.weight)
            if wanted.norms:
                if not wanted.weight_grad and gram_is_cheaper(squared_lengths // count, d, grads.shape[1]):
                    norms_sq[members] += gram_norms(group.hidden, grads, borders, impl=products)
                else:
                    found = linear_grad(group.hidden, grads, borders, weight_grad=wanted.weight_grad, impl=products)
                    assert found.norms_sq is not None
                    norms_sq[members] += found.norms_sq
                    if found.weight_grad is not None:
                        of_weight[classes] = found.weight_grad
            elif wanted.weight_grad:
                of_weight[classes] = grads.T @ group.hidden
            if has_bias and wanted.weight_grad:
                of_bias[classes] = grads.sum(0, dtype=torch.float32)
            if has_bias and wanted.norms:
                # A bias is a weight whose input is 1.
                one = hidden.new_ones(1, 1).expand(count, 1)
                bias_norms = linear_grad(one, grads, borders, weight_grad=False, impl=products).norms_sq
                assert bias_norms is not None
                bias_norms_sq[members] += bias_norms
    return sums.to(hidden.dtype), of_weight, of_bias, norms_sq, bias_norms_sq


def _groups(cu_seqlens: Tensor, hidden: Tensor, wanted: _Wanted) -> Iterator[tuple[slice, slice, Tensor, int]]:
    """Tokens that share panels: their rows, their samples, these samples' borders, and the sum of squared lengths."""
    n = hidden.shape[0]
    host = host_borders(cu_seqlens, n)
    if n == 0:
        return
    if wanted.weight_grad or n <= _GROUP_TOKENS:
        borders = cu_seqlens if cu_seqlens.device == hidden.device else _sent(host, hidden.device)
        yield slice(0, n), slice(0, host.numel() - 1), borders, int(host.diff().square().sum())
        return
    if not wanted.norms:
        for start in range(0, n, _GROUP_TOKENS):
            yield slice(start, min(start + _GROUP_TOKENS, n)), slice(0, 0), host, 0
        return
    cuts, first = host.tolist(), 0
    while first + 1 < len(cuts):
        last = first + 1
        while last + 1 < len(cuts) and cuts[last + 1] - cuts[first] <= _GROUP_TOKENS:
            last += 1
        if cuts[last] > cuts[first]:
            borders = host[first : last + 1] - cuts[first]
            squared_lengths = int(borders.diff().square().sum())
            yield slice(cuts[first], cuts[last]), slice(first, last), _sent(borders, hidden.device), squared_lengths
        first = last


def _sent(borders: Tensor, device: torch.device) -> Tensor:
    # From pageable memory a copy would wait for the stream.
    sent = (borders.pin_memory() if device.type == "cuda" else borders).to(device, non_blocking=True)
    remember_borders(sent, borders)
    return sent


def _panel_width(tokens: int, weight: Tensor, dtype: torch.dtype, impl: str) -> int:
    """How many classes a panel of so many tokens holds."""
    fits = _PANEL_BYTES[impl] // (tokens * dtype.itemsize)
    if impl == "cpu" and not _readable_in_place(weight):
        fits = min(fits, _PANEL_BYTES[impl] // (4 * max(1, weight.shape[1])))
    return min(weight.shape[0], max(_LEAST_CLASSES, fits // _ALIGNED * _ALIGNED))


def _readable_in_place(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.stride(1) == 1 and weight.stride(0) >= weight.shape[1]


def _readable(weight: Tensor, impl: str) -> Tensor:
    """Rows of the weight as the implementation's products take them."""
    return weight if impl != "cpu" or _readable_in_place(weight) else weight.to(torch.float32).contiguous()


def _add_product(sums: Tensor, grads: Tensor, weight: Tensor) -> None:
    """sums += grads weight, in float32."""
    if grads.dtype == torch.float32:
        sums.addmm_(grads, weight)
    elif grads.is_cuda:
        torch.addmm(sums, grads, weight, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(grads.to(torch.float32), weight.to(torch.float32))


def _scale(grad_losses: Tensor | float, hidden: Tensor) -> Tensor:
    """`grad_losses` as a number for each token."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if isinstance(grad_losses, float | int) and not isinstance(grad_losses, bool):
        return hidden.new_full(hidden.shape[:1], grad_losses, dtype=dtype)
    if not isinstance(grad_losses, Tensor):
        raise TypeError(f"grad_losses must be a number or a tensor, got {type(grad_losses).__name__}")
    if not grad_losses.is_floating_point():
        raise TypeError(f"grad_losses must be floating point, got {grad_losses.dtype}")
    if grad_losses.shape not in ((), hidden.shape[:1]):
        raise ValueError(f"grad_losses must be [{hidden.shape[0]}] to fit hidden, got {tuple(grad_losses.shape)}")
    if grad_losses.device != hidden.device:
        raise ValueError(
            f"grad_losses must be on the device of hidden, {hidden.device}, and is on {grad_losses.device}"
        )
    return grad_losses.detach().to(dtype).expand(hidden.shape[:1]).contiguous()


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    cu_seqlens: Tensor,
    nll: Tensor,
    lse: Tensor,
    grad_losses: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    hidden_grad: bool,
    weight_grad: bool,
    norms: bool,
    impl: str,
) -> _Grads:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    samples = cu_seqlens.shape[0] - 1
    has_bias = bias is not None
    return (
        hidden.new_empty(hidden.shape if hidden_grad else 0),
        weight.new_empty(weight.shape if weight_grad else 0),
        weight.new_empty(
            weight.shape[0] if weight_grad and has_bias else 0, dtype=dtype if bias is None else bias.dtype
        ),
        hidden.new_empty(samples if norms else 0, dtype=dtype),
        hidden.new_empty(samples if norms and has_bias else 0, dtype=dtype),
    )


torch.library.define(
    "pyeff::linear_cross_entropy_grad",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor cu_seqlens, Tensor nll, Tensor lse, Tensor grad_losses,"
    " Tensor? bias, float? softcap, int ignore_index, bool hidden_grad, bool weight_grad, bool norms, str impl)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("pyeff::linear_cross_entropy_grad", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::linear_cross_entropy_grad", _fake)
_OP = torch.ops.pyeff.linear_cross_entropy_grad.default
