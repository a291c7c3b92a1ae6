"""Per-token scores of a language-model head, without its logits in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff import reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation, check_layout
from pyeff.ops._packed import host_borders
from pyeff.reference.linear_cross_entropy_scores import FIELDS

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# On the CPU, logits exist as tiles of this many tokens and classes: 4 MiB, which stay in the last level of cache
# between the matmul and the reductions. Two cores of a Zen 5 server, D = 576: twice as many classes take 3 % longer,
# four times as many 8 %, and half the tokens at twice the classes 4 %.
_BLOCK_ROWS, _TILE_COLUMNS = 512, 2048
# Most of a copy: of hidden rows in float32, and of a weight tile that torch's matmul cannot read in place.
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class TokenScores:
    """Scores of N tokens, or of S samples once reduced: one tensor [N] a score, in nats where a logarithm is meant.

    With z the (capped) logits of a token, p = softmax(z), y its target and h its hidden state:

    - `nll`: -log p_y
    - `lse`: log sum_v exp z_v
    - `entropy`: -sum_v p_v log p_v
    - `el2n`: || p - onehot(y) ||_2, between 0 and sqrt(2)
    - `margin`: z_y - max_{v != y} z_v; NaN for a vocabulary of one
    - `p_target`: p_y
    - `head_grad_norm`: || d nll / d weight ||_F = || h ||_2 || (p - onehot(y)) (1 - (z / softcap)^2) ||_2

    float32, or float64 for float64 inputs. `scored` is False at ignored positions, where every score is NaN.
    """

    nll: Tensor
    lse: Tensor
    entropy: Tensor
    el2n: Tensor
    margin: Tensor
    p_target: Tensor
    head_grad_norm: Tensor
    scored: Tensor

    def per_sample(self, cu_seqlens: Tensor, reduction: str = "mean") -> TokenScores:
        """Every score reduced over the tokens of each sample of a packed batch: [N] to [S].

        `cu_seqlens` [S+1], an integer tensor, holds the samples' borders in the token axis: from 0 to N, never
        falling. `reduction` is "mean", "sum" or "max". Ignored positions are left out; a sample with none left is NaN
        under every reduction, and so is one with a NaN among the tokens that count. Accumulates in float64 and gives
        the same bits in every run. Cost: one pass over 8 N numbers; borders on a GPU are read back at their first use,
        which waits for the stream.

        Raises `TypeError` when `cu_seqlens` is no tensor of integers, `ValueError` when it is not such a list of
        borders or `reduction` is none of the three.

        >>> import torch, pyeff
        >>> scores = pyeff.linear_cross_entropy_scores(torch.zeros(3, 2), torch.ones(4, 2), torch.tensor([0, 1, -100]))
        >>> scores.per_sample(torch.tensor([0, 2, 3])).p_target
        tensor([0.2500,    nan])
        """
        if reduction not in ("mean", "sum", "max"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'max'; got {reduction!r}")
        borders = host_borders(cu_seqlens, self.nll.shape[0]).to(self.nll.device)
        kept = self.scored
        table = torch.stack([getattr(self, name) for name in FIELDS], dim=1).double()
        table = torch.where(kept[:, None], table, -math.inf if reduction == "max" else 0.0)
        counts = _segments("sum", kept.double()[:, None], borders)  # [S, 1]
        reduced = _segments("max" if reduction == "max" else "sum", table, borders)  # [S, 7]
        if reduction == "mean":
            reduced = reduced / counts
        reduced = torch.where(counts > 0, reduced, math.nan).to(self.nll.dtype)
        return _token_scores(reduced.T, counts[:, 0] > 0)


def linear_cross_entropy_scores(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> TokenScores:
    """Loss, entropy, EL2N, margin and head-gradient norm of every token, from its last hidden state.

        x = hidden weight^T + bias,   z = x, or softcap tanh(x / softcap),   p = softmax(z)

    and from these the fields of `TokenScores`. The logits [N, V] are never stored: at most 64 MiB of memory are used
    beside inputs and outputs, whatever V is.

    Shapes and dtypes: `hidden` [N, D] and `weight` [V, D] of one dtype among float16, bfloat16, float32 and float64, of
    any strides; `targets` [N] int64 or int32; `bias` [V] of any floating dtype. Logits are accumulated and every score
    is computed in float32 (float64 inputs: in float64, by the reference alone); on the CPU that holds for 16-bit inputs
    too, whose products are exact in float32, so they cost as much as float32.

    Undefined rows are NaN in every score: the target is `ignore_index` (which need be no class), or the logits hold NaN
    or +inf or nothing but -inf. A logit of -inf has probability 0.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (C++ beside torch's matmul) and "reference"
    (plain torch); an explicit one runs or raises `RuntimeError` with the reason. Each gives the same bits in every run
    on the same device. Not differentiable: this is the scoring pass, and nothing is saved for a backward. Under
    `torch.compile` one operator of the graph.

    Raises `TypeError` or `ValueError` for arguments that do not fit together. A target that is no class raises
    `ValueError` on the CPU; on a GPU finding it would stall the stream, and its row is NaN instead.

    Cost: 2 N D V FLOPs of matmul, about 40 N V of vector arithmetic; on the CPU ignored positions cost nothing.

    EL2N: Paul et al. 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> import torch, pyeff
    >>> hidden, weight = torch.zeros(2, 4), torch.ones(8, 4)
    >>> scores = pyeff.linear_cross_entropy_scores(hidden, weight, torch.tensor([3, -100]))
    >>> scores.p_target
    tensor([0.1250,    nan])
    """
    check_head(hidden, weight, targets, bias, softcap, ignore_index)
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        scores = _OP(hidden, weight, targets, bias, softcap, ignore_index, impl)
    return _token_scores(scores, targets != ignore_index)


def _token_scores(rows: Tensor, scored: Tensor) -> TokenScores:
    nll, lse, entropy, el2n, margin, p_target, head_grad_norm = rows.unbind(0)
    return TokenScores(nll, lse, entropy, el2n, margin, p_target, head_grad_norm, scored)


def float32_limits(impl: str, hidden: Tensor, *args: object, **kwargs: object) -> str | None:
    """Why an implementation that computes in float32 cannot take `hidden`, or None."""
    if impl != "reference" and hidden.dtype == torch.float64:
        return "it computes in float32, and hidden is float64"
    if impl == "triton" and hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "it needs a GPU of compute capability 8.0 or higher"
    if impl == "triton" and hidden.dtype == torch.bfloat16 and not hidden.is_cuda:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    return None


OPERATION = Operation("linear_cross_entropy_scores", ("triton", "cpu", "reference"), float32_limits)


def _run(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> Tensor:
    # Here and not in the caller, which torch.compile traces: it could not read the targets.
    _check_classes(targets, weight.shape[0], ignore_index)
    options: dict[str, Any] = {"bias": bias, "softcap": softcap, "ignore_index": ignore_index}
    run = _implementation(OPERATION.explain(hidden, weight, targets, **options, impl=impl).impl)
    return run(hidden, weight, targets, **options)


def _implementation(impl: str) -> Callable[..., Tensor]:
    if impl == "triton":
        from pyeff.triton_kernels.linear_cross_entropy_scores import linear_cross_entropy_scores as kernels

        return kernels
    return _on_cpu if impl == "cpu" else reference.linear_cross_entropy_scores


def _on_cpu(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> Tensor:
    scores = hidden.new_full((len(FIELDS), hidden.shape[0]), math.nan, dtype=torch.float32)
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    scored = (targets != ignore_index).nonzero()[:, 0]
    for rows in scored.split(max(1, _COPY_BYTES // (4 * max(64, hidden.shape[1])))):
        h = hidden.index_select(0, rows).to(torch.float32)
        y = targets.index_select(0, rows).to(torch.int64)
        scores[:, rows] = _scores_by_tiles(h, weight, y, bias, softcap)
    return scores


def _scores_by_tiles(h: Tensor, weight: Tensor, y: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """The scores [7, N] of float32 rows `h` [N, D]; a tile of logits is reduced while the cache still holds it."""
    native, threads = extension(), torch.get_num_threads()
    (tokens, features), vocabulary = h.shape, weight.shape[0]
    in_place = weight.dtype == torch.float32 and weight.stride(1) == 1 and weight.stride(0) >= features
    columns = min(vocabulary, _TILE_COLUMNS)
    if not in_place:
        columns = max(1, min(columns, _COPY_BYTES // (4 * max(1, features))))
        copy = h.new_empty((columns, features))
    buffer = h.new_empty(min(tokens, _BLOCK_ROWS) * columns)
    states = torch.empty((tokens, native.SCORE_STATE_BYTES), dtype=torch.uint8)
    for first in range(0, vocabulary, columns):
        tile = weight[first : first + columns]  # [C, D]
        if not in_place:
            tile = copy[: tile.shape[0]].copy_(tile)
        for start in range(0, tokens, _BLOCK_ROWS):
            block = h[start : start + _BLOCK_ROWS]  # [B, D]
            rows, width = block.shape[0], tile.shape[0]
            logits = torch.mm(block, tile.T, out=buffer[: rows * width].view(rows, width))
            native.meet_logits(
                logits=logits.data_ptr(),
                rows=rows,
                columns=width,
                first_class=first,
                targets=y[start:].data_ptr(),
                bias=0 if bias is None else bias[first:].data_ptr(),
                softcap=softcap or 0.0,
                states=states[start:].data_ptr(),
                threads=threads,
            )
    norms = torch.linalg.vector_norm(h, dim=1)
    scores = h.new_empty((len(FIELDS), tokens))
    native.finish_scores(
        states=states.data_ptr(),
        hidden_norms=norms.data_ptr(),
        rows=tokens,
        one_class=vocabulary == 1,
        scores=scores.data_ptr(),
        score_stride=tokens,
    )
    return scores


def _fake(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    impl: str,
) -> Tensor:
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return hidden.new_empty((len(FIELDS), hidden.shape[0]), dtype=dtype)


torch.library.define(
    "pyeff::linear_cross_entropy_scores",
    "(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float? softcap, int ignore_index, str impl)"
    " -> Tensor",
)
torch.library.impl("pyeff::linear_cross_entropy_scores", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::linear_cross_entropy_scores", _fake)
_OP = torch.ops.pyeff.linear_cross_entropy_scores.default


def check_head(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float | None, ignore_index: int
) -> None:
    """Raise `TypeError` or `ValueError` unless these are packed hidden states, a head and targets that fit together."""
    tensors = {"hidden": hidden, "weight": weight, "targets": targets} | ({} if bias is None else {"bias": bias})
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, and is on {tensor.device}")
        check_layout(name, tensor)
    if hidden.ndim != 2:
        raise ValueError(f"hidden must be [tokens, features], got shape {tuple(hidden.shape)}; flatten the batch first")
    if weight.ndim != 2 or weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must be [vocabulary, {hidden.shape[1]}] to fit hidden, got {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:1]:
        raise ValueError(f"targets must be [{hidden.shape[0]}] to fit hidden, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] to fit weight, got {tuple(bias.shape)}")
    if hidden.dtype not in _FLOATS:
        raise TypeError(f"hidden must be float16, bfloat16, float32 or float64, got {hidden.dtype}")
    if weight.dtype != hidden.dtype:
        raise ValueError(f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}; cast one of them")
    if targets.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"targets must be int64 or int32, got {targets.dtype}")
    if bias is not None and bias.dtype not in _FLOATS:
        raise TypeError(f"bias must be floating point, got {bias.dtype}")
    if softcap is not None and (isinstance(softcap, bool) or not isinstance(softcap, float | int)):
        raise TypeError(f"softcap must be a number or None, got {type(softcap).__name__}")
    # In float32 a smaller one is 0, which stands for none, and a larger one infinite.
    if softcap is not None and not torch.finfo(torch.float32).tiny <= softcap <= torch.finfo(torch.float32).max:
        raise ValueError(f"softcap must be a positive number within the range of float32 or None, got {softcap!r}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")


def _check_classes(targets: Tensor, classes: int, ignore_index: int) -> None:
    if targets.device.type == "cpu" and targets.numel():
        wrong = ((targets < 0) | (targets >= classes)) & (targets != ignore_index)
        if wrong.any():
            where = int(wrong.nonzero()[0, 0])
            raise ValueError(
                f"targets must be in [0, {classes}) or ignore_index ({ignore_index}), "
                f"got {int(targets[where])} at position {where}"
            )


def _segments(reduction: str, table: Tensor, borders: Tensor) -> Tensor:
    """Reduce the rows of `table` [N, K] between borders [S+1]: [S, K], the identity for an empty segment."""
    samples = borders.numel() - 1
    if samples == 0 or table.shape[0] == 0:
        return table.new_full((samples, table.shape[1]), -math.inf if reduction == "max" else 0.0)
    return torch.segment_reduce(table, reduction, lengths=borders.diff(), axis=0, unsafe=True)
