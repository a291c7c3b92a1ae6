"""EL2N: how far the model's probabilities are from the truth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyeff.scoring.classification import check_targets, logits_of
from pyeff.scoring.method import ScoreMethod


class EL2N(ScoreMethod):
    """The norm of the error vector, from forward passes alone.

        score = || softmax(f(x)) - onehot(y) ||_2,   between 0 and sqrt(2)

    Where the gradients of the logits are orthogonal and of equal norm it ranks as GraNd does. It is an expectation over
    initialisations: score several short trainings and take their `average`.

    Cost: one forward pass.

    Paul, Ganguli, Dziugaite 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> import torch
    >>> from pyeff.scoring import EL2N
    >>> model = torch.nn.Linear(3, 2)
    >>> scores = EL2N().score(model, (torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])), progress=False)
    >>> len(scores), scores.method
    (5, 'EL2N')
    """

    @property
    def name(self) -> str:
        """EL2N."""
        return "EL2N"

    @torch.no_grad()
    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] from the logits, in float32 or wider."""
        logits = logits_of(model, inputs)
        check_targets(targets, logits)
        error = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
        error[torch.arange(targets.numel(), device=targets.device), targets] -= 1
        return torch.linalg.vector_norm(error, dim=1)
