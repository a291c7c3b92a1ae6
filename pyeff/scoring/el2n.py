"""EL2N: how far the model's probabilities are from the truth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pyeff.scoring.classification import check_targets, error_vectors, logits_of
from pyeff.scoring.language import BatchWork, check_reduction, require_plain_head, variant
from pyeff.scoring.language_model import head_weight, last_hidden_state
from pyeff.scoring.method import ScoreMethod
from pyeff.scoring.pool import answer_scores

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class EL2N(ScoreMethod):
    """The norm of the error vector, from forward passes alone.

        score = || softmax(f(x)) - onehot(y) ||_2,   between 0 and sqrt(2)

    For a language model, the mean of this over the answer tokens (`reduction="sum"` or "max" instead), from
    `pyeff.linear_cross_entropy_scores`: the logits are never stored.

    Where the gradients of the logits are orthogonal and of equal norm it ranks as GraNd does. It is an expectation over
    initialisations: score several short trainings and take their `average`.

    Cost: one forward pass; of a language model's head, over answer tokens only.

    Paul, Ganguli, Dziugaite 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> import torch
    >>> from pyeff.scoring import EL2N
    >>> model = torch.nn.Linear(3, 2)
    >>> scores = EL2N().score(model, (torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])), progress=False)
    >>> len(scores), scores.method
    (5, 'EL2N')
    """

    def __init__(self, *, reduction: Literal["mean", "sum", "max"] = "mean") -> None:
        check_reduction(reduction, ("mean", "sum", "max"))
        self._reduction = reduction

    @property
    def name(self) -> str:
        """EL2N and how answer tokens are reduced, if not to their mean."""
        return variant("EL2N", *([] if self._reduction == "mean" else [f"{self._reduction} over answer tokens"]))

    @torch.no_grad()
    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] from the logits, in float32 or wider."""
        logits = logits_of(model, inputs)
        check_targets(targets, logits)
        return torch.linalg.vector_norm(error_vectors(logits, targets), dim=1)

    def prepare(self, model: nn.Module) -> None:
        """Refuse a language model whose logits are not those of its head."""
        require_plain_head(model)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Scores [S] from the last hidden states."""
        weight, bias, softcap = head_weight(model)
        rows = last_hidden_state(model, batch)[where.positions]
        return answer_scores(rows, weight, where, bias=bias, softcap=softcap, reduction=self._reduction).el2n

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int:
        """FLOPs of the forward pass."""
        return work.of(costs.forward)
