"""GraNd: the norm of each sample's own loss gradient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.observation import GradientObservation, UnobservableError, observe
from pyeff.scoring.backward import backward_of_answers, backward_of_classes
from pyeff.scoring.flops import weight_norms_flops
from pyeff.scoring.language import (
    BatchWork,
    Reduction,
    check_reduction,
    undefined_if_empty,
    variant,
)
from pyeff.scoring.language_model import layer_matrices
from pyeff.scoring.method import ScoreMethod

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class GraNd(ScoreMethod):
    """The norm of the gradient of a sample's own loss by all parameters that require one.

        score = || d l(x, y) / d theta ||_2

    For a language model l is the mean loss of the sample's answer tokens; with `reduction="sum"` their sum, of which
    long answers have larger gradients.

    All norms of a batch come out of one backward pass, see `pyeff.observe`, which also says which layers can be
    observed; ``strict=False`` leaves parameters out that cannot. It is an expectation over initialisations: take the
    `average` of several. At initialisation itself GraNd is known not to find important samples (Kirsch 2023,
    arXiv:2303.14753); score after a little training.

    Cost: one forward pass, one backward pass to the inputs of every layer, and for each layer's norms the smaller of
    2 T d p and T^2 (d + p) FLOPs a sample (`pyeff.gram_norms`). `.grad` is left as it was; no more than one layer's
    gradient is in memory. A language model's logits are, at the answer tokens of a batch.

    Paul, Ganguli, Dziugaite 2021, "Deep Learning on a Data Diet", arXiv:2107.07075.

    >>> import torch
    >>> from pyeff.scoring import GraNd
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> scores = GraNd().score(model, (torch.zeros(5, 3), torch.tensor([0, 1, 0, 1, 0])), progress=False)
    >>> len(scores), scores.method
    (5, 'GraNd')
    """

    def __init__(self, *, reduction: Reduction = "mean", strict: bool = True) -> None:
        check_reduction(reduction)
        self._reduction: Reduction = reduction
        self._strict = strict

    @property
    def name(self) -> str:
        """GraNd, with how answer tokens are reduced, if not to their mean, and what was left out."""
        what = [] if self._reduction == "mean" else ["sum over answer tokens"]
        return variant("GraNd", *what, *([] if self._strict else ["observable parameters"]))

    @contextmanager
    def _observed(self, model: nn.Module) -> Iterator[GradientObservation]:
        try:
            with observe(model, strict=self._strict, gradient=False) as seen:
                yield seen
        except UnobservableError as error:
            raise UnobservableError(f"{error}\nto score by the other parameters: GraNd(strict=False)") from error

    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] by one backward pass of the summed loss: a sample's share of it is its own gradient."""
        with self._observed(model) as seen:
            backward_of_classes(model, inputs, targets)
        return seen.grad_norms

    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Scores [S] by one backward pass of the samples' losses, summed."""
        if where.targets.numel() == 0:
            return torch.full((batch.samples,), torch.nan)
        with self._observed(model) as seen:
            backward_of_answers(seen, model, batch, where, self._reduction)
        return undefined_if_empty(seen.grad_norms, where.cu_seqlens)

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int | None:
        """FLOPs of the passes and of the norms, which take the place of the weights' gradients."""
        if costs.adapters:
            return None
        matrices = layer_matrices(model)
        head = (costs.shape.hidden_size, costs.shape.vocab_size)
        answers = sum(work.answers)
        total = work.of(costs.train) - 2 * answers * head[0] * head[1]
        total -= sum(2 * work.tokens * d * p for d, p in matrices)
        total += sum(weight_norms_flops(work.lengths, d, p) for d, p in matrices)
        total += weight_norms_flops(work.answers, *head)
        if costs.shape.tied_embeddings:  # the product of the head's gradient with the embedding's
            total += sum(2 * t * a * head[0] for t, a in zip(work.lengths, work.answers, strict=True))
        return total
