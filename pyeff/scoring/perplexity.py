"""Perplexity: how unexpected a sample's answer is to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.scoring.classification import check_targets, logits_of
from pyeff.scoring.language import BatchWork, require_plain_head
from pyeff.scoring.language_model import head_weight, last_hidden_state
from pyeff.scoring.method import ScoreMethod
from pyeff.scoring.pool import answer_scores

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class Perplexity(ScoreMethod):
    """The perplexity of a sample's answer given its prompt, from forward passes alone.

        score = exp(mean over answer tokens of -log p(token))

    For a classifier, one over the probability of the class. Which end to keep is the user's choice: Yin and Rush
    (2025, arXiv:2410.16208) rank by it as the selector that costs exactly one forward pass.

    Cost: one forward pass; of a language model's head, over answer tokens only.

    >>> import torch
    >>> from pyeff.scoring import Perplexity
    >>> model = torch.nn.Linear(3, 2, bias=False)
    >>> Perplexity().score(model, (torch.zeros(2, 3), torch.tensor([0, 1])), progress=False).values.round(4).tolist()
    [2.0, 2.0]
    """

    @property
    def name(self) -> str:
        """Perplexity."""
        return "perplexity"

    @torch.no_grad()
    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] from the logits, in float32 or wider."""
        logits = logits_of(model, inputs)
        check_targets(targets, logits)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, targets, reduction="none").exp()

    def prepare(self, model: nn.Module) -> None:
        """Refuse a language model whose logits are not those of its head."""
        require_plain_head(model)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Scores [S] from the last hidden states."""
        weight, bias, softcap = head_weight(model)
        rows = last_hidden_state(model, batch)[where.positions]
        return answer_scores(rows, weight, where, bias=bias, softcap=softcap).nll.exp()

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int:
        """FLOPs of the forward pass."""
        return work.of(costs.forward)
