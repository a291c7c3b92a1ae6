"""Last-layer GraNd: the norm of the gradient of each sample's loss by the output head alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.ops import linear_cross_entropy_grad
from pyeff.scoring.classification import check_targets, error_vectors, logits_of
from pyeff.scoring.flops import weight_norms_flops
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
    from pyeff.scoring.model_costs import ModelCosts


class LastLayerGraNd(ScoreMethod):
    """The norm of the gradient of a sample's loss by the weight of the last layer, from forward passes alone.

        score = || sum_t c_t (p_t - onehot(y_t)) h_t^T ||_F

    over the sample's predictions t with inputs h_t of the last layer and probabilities p_t: one for a classifier
    (c = 1), the answer tokens of a language model (c = 1 over their number, or 1 with `reduction="sum"`). For a single
    prediction it is EL2N times the norm of h. A softcap of the logits is differentiated; a bias is left out.

    Cost: one forward pass, the head's softmax formed once more, and T^2 (D + V) FLOPs for a sample of T answer tokens.
    The logits are never stored, see `pyeff.linear_cross_entropy_grad`; what it multiplies twice because classes come in
    panels is not counted.

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
        weight, bias, softcap = head_weight(model)
        norms_sq = linear_cross_entropy_grad(
            rows,
            weight,
            where.targets,
            where.cu_seqlens,
            bias=bias,
            softcap=softcap,
            grad_losses=token_weights(where.cu_seqlens, where.targets.numel(), self._reduction),
            hidden_grad=False,
            weight_grad=False,
        ).norms_sq
        assert norms_sq is not None
        # Rounding in a difference of Gram matrices can pass below zero.
        return undefined_if_empty(norms_sq.clamp(min=0).sqrt(), where.cu_seqlens)

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int:
        """FLOPs of the forward pass, of the softmax formed again and of the norms."""
        d, v = costs.shape.hidden_size, costs.shape.vocab_size
        return work.of(costs.forward) + 2 * sum(work.answers) * d * v + weight_norms_flops(work.answers, d, v)


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
