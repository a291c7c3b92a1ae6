"""The backward pass in which every sample's share of the gradient is the gradient of that sample's own loss."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.scoring.classification import check_targets, logits_of
from pyeff.scoring.language import Reduction, token_weights
from pyeff.scoring.language_model import answer_logits

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.observation import GradientObservation


@torch.enable_grad()
def backward_of_classes(model: nn.Module, inputs: Any, targets: Tensor) -> None:
    """Backpropagate the summed cross entropy of a classifier's batch."""
    logits = logits_of(model, inputs)
    check_targets(targets, logits)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nn.functional.cross_entropy(logits, targets, reduction="sum").backward()


@torch.enable_grad()
def backward_of_answers(
    seen: GradientObservation, model: nn.Module, batch: PackedBatch, where: LabelPositions, reduction: Reduction
) -> None:
    """Backpropagate the sum of a packed batch's sample losses: of each the mean, or sum, over its answer tokens.

    `seen` is told where the samples lie. There must be an answer token.
    """
    weights = token_weights(where.cu_seqlens, where.targets.numel(), reduction)
    seen.segments(batch.cu_seqlens, kept=where.cu_seqlens)
    logits = answer_logits(model, batch, where)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = nn.functional.cross_entropy(logits, where.targets, reduction="none")
    (losses * weights).sum().backward()
