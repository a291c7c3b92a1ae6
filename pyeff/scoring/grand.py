"""GraNd: the norm of each sample's own loss gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyeff.observation import observe
from pyeff.scoring.classification import check_targets, logits_of
from pyeff.scoring.method import ScoreMethod


class GraNd(ScoreMethod):
    """The norm of the gradient of a sample's own loss by all parameters that require one.

        score = || d l(x, y) / d theta ||_2

    All norms of a batch come out of one backward pass, see `pyeff.observe`, which also says which layers can be
    observed; ``strict=False`` leaves parameters out that cannot. It is an expectation over initialisations: take the
    `average` of several. At initialisation itself GraNd is known not to find important samples (Kirsch 2023,
    arXiv:2303.14753); score after a little training.

    Cost: one forward and one backward pass. `.grad` is left as it was; no more than one layer's gradient is in memory.

    Paul, Ganguli, Dziugaite 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> import torch
    >>> from pyeff.scoring import GraNd
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> scores = GraNd().score(model, (torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])), progress=False)
    >>> len(scores), scores.method
    (5, 'GraNd')
    """

    def __init__(self, *, strict: bool = True) -> None:
        self._strict = strict

    @property
    def name(self) -> str:
        """GraNd, with what was left out."""
        return "GraNd" if self._strict else "GraNd (observable parameters)"

    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] by one backward pass of the summed loss: a sample's share of it is its own gradient."""
        with torch.enable_grad(), observe(model, strict=self._strict, gradient=False) as seen:
            logits = logits_of(model, inputs)
            check_targets(targets, logits)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            torch.nn.functional.cross_entropy(logits, targets, reduction="sum").backward()
        return seen.grad_norms
