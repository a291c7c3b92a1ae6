"""Last-layer GraNd: the norm of the gradient of each sample's loss by the output head alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.scoring.classification import check_targets, error_vectors, logits_of
from pyeff.scoring.language import (
    BatchWork,
    Reduction,
    check_reduction,
    require_plain_head,
    token_weights,
    undefined_if_empty,
    variant,
)
from pyeff.scoring.language_model import head_weight, last_hidden_state
from pyeff.scoring.method import ScoreMethod

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.governor import TransformerShape

# Logits of so many bytes are in memory at a time, or those of one sample.
_LOGITS_BYTES = 64 << 20


class LastLayerGraNd(ScoreMethod):
    """The norm of the gradient of a sample's loss by the weight of the last layer, from forward passes alone.

        score = || sum_t c_t (p_t - onehot(y_t)) h_t^T ||_F

    over the sample's predictions t with inputs h_t of the last layer and probabilities p_t: one for a classifier
    (c = 1), the answer tokens of a language model (c = 1 over their number, or 1 with `reduction="sum"`). For a single
    prediction it is EL2N times the norm of h. A softcap of the logits is differentiated; a bias is left out.

    Cost: one forward pass, and T^2 (D + V) FLOPs for a sample of T answer tokens. At most 64 MiB of logits are in
    memory, or those of one sample.

    >>> import torch
    >>> from pyeff.scoring import LastLayerGraNd
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> data = (torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0]))
    >>> len(LastLayerGraNd().score(model, data, progress=False))
    5
    """

    def __init__(self, *, reduction: Reduction = "mean") -> None:
        check_reduction(reduction)
        self._reduction: Reduction = reduction

    @property
    def name(self) -> str:
        """Last-layer GraNd and how answer tokens are reduced, if not to their mean."""
        return variant("last-layer GraNd", *([] if self._reduction == "mean" else ["sum over answer tokens"]))

    @torch.no_grad()
    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B]; the last layer is the linear layer whose output the model returns."""
        with _linear_calls(model) as calls:
            logits = logits_of(model, inputs)
        hidden = next((x for x, y in calls if y is logits), None)
        if hidden is None or hidden.ndim != 2:
            raise ValueError(
                "the model's logits must be what one of its torch.nn.Linear modules makes of inputs [batch, features]"
            )
        check_targets(targets, logits)
        error = error_vectors(logits, targets)
        return torch.linalg.vector_norm(error, dim=1) * torch.linalg.vector_norm(hidden.to(error.dtype), dim=1)

    def prepare(self, model: nn.Module) -> None:
        """Refuse a language model whose logits are not those of its head."""
        require_plain_head(model)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Scores [S] from the last hidden states."""
        rows = last_hidden_state(model, batch)[where.positions]
        weights = token_weights(where.cu_seqlens, where.targets.numel(), self._reduction)
        norms_sq = _head_norms_sq(rows, *head_weight(model), where.targets, where.cu_seqlens, weights)
        return undefined_if_empty(norms_sq.clamp(min=0).sqrt(), where.cu_seqlens)

    def read_flops(self, model: nn.Module, shape: TransformerShape, work: BatchWork) -> int:
        """FLOPs of the forward pass and of the norms."""
        pairs = sum(answers**2 for answers in work.answers)
        return work.forward(shape) + pairs * (shape.hidden_size + shape.vocab_size)


def _head_norms_sq(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    targets: Tensor,
    cu_seqlens: Tensor,
    weights: Tensor,
) -> Tensor:
    """Squared norms [S] of the head's weight gradient of each sample's loss, in pieces of whole samples."""
    from pyeff.ops import gram_norms

    dtype = torch.promote_types(rows.dtype, torch.float32)
    borders: list[int] = cu_seqlens.tolist()
    most = max(1, _LOGITS_BYTES // (weight.shape[0] * dtype.itemsize))
    norms_sq = torch.zeros(len(borders) - 1, dtype=dtype, device=rows.device)
    first = 0
    while first < norms_sq.numel():
        end = first + 1
        while end < norms_sq.numel() and borders[end + 1] - borders[first] <= most:
            end += 1
        span = slice(borders[first], borders[end])
        h = rows[span]
        logits = nn.functional.linear(h, weight).to(dtype)
        if bias is not None:
            logits += bias.to(dtype)
        slope: Tensor | float = 1.0
        if softcap is not None:
            logits = torch.tanh(logits / softcap)
            slope = 1 - logits.square()
            logits *= softcap
        error = error_vectors(logits, targets[span])
        error *= weights[span, None] * slope
        cuts = torch.tensor([border - borders[first] for border in borders[first : end + 1]], dtype=torch.int32)
        norms_sq[first:end] = gram_norms(h.to(dtype), error, cuts)
        first = end
    return norms_sq


@contextmanager
def _linear_calls(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Input and output of the linear layer called last, once there is one."""
    calls: list[tuple[Tensor, Tensor]] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[:] = [(inputs[0], output)]

    hooks = [module.register_forward_hook(note) for module in model.modules() if isinstance(module, nn.Linear)]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
