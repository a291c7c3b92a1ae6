"""Sketches of samples' own gradients, or of the steps an optimizer would make of them, as features."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.observation import GradientObservation, observe
from pyeff.observation.features import Variant
from pyeff.ops import Sketch
from pyeff.scoring.backward import backward_of_answers, backward_of_classes
from pyeff.scoring.language import BatchWork, Reduction, check_reduction, variant
from pyeff.scoring.method import FeatureMethod
from pyeff.scoring.work import Digest

if TYPE_CHECKING:
    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class GradientSketches(FeatureMethod):
    """The sketch of the gradient of a sample's own loss by all parameters that require one.

        x = S g,   or S Gamma(g),   g = d l / d theta,   E <S u, S v> = <u, v>

    with Gamma the step that Adam would make of g: see `pyeff.AdamWDirection` for its variants and `pyeff.Sketch` for S.
    l is the mean loss of a sample's answer tokens (``reduction="sum"``: their sum), or a classifier's cross entropy.
    All samples of a batch come out of one backward pass, see `pyeff.observe`.

    Args:
        sketch: The linear map; its header, what is sketched and of which parameters stand in the features' header.
        optimizer: Adam or AdamW of the model, having stepped: its moments define Gamma. None: plain gradients.
        variant: "adamw", or "adamw-frozen", which is linear in g.
        reduction: "mean" or "sum" over answer tokens.
        strict: If False, parameters that cannot be observed are left out.

    A gradient of zero has the sketch 0 (with "adamw", that of the momentum's step); one that is not finite, and that of
    a sample without answer tokens, is NaN.

    Cost: a forward pass and the backward pass of full training, and the sketch; no more than one layer's gradient is in
    memory, and `.grad` is left as it was.

    >>> import torch, pyeff
    >>> from pyeff.scoring import GradientSketches
    >>> model = torch.nn.Linear(3, 2)
    >>> data = (torch.ones(5, 3), torch.tensor([0, 1, 0, 1, 0]))
    >>> GradientSketches(pyeff.Sketch(16)).features(model, data, progress=False).shape
    (5, 16)
    """

    def __init__(
        self,
        sketch: Sketch,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        variant: Variant = "adamw",
        reduction: Reduction = "mean",
        strict: bool = True,
    ) -> None:
        if not isinstance(sketch, Sketch):
            raise TypeError(f"sketch must be a pyeff.Sketch, got {type(sketch).__name__}")
        check_reduction(reduction)
        self._sketch, self._optimizer, self._variant = sketch, optimizer, variant
        self._reduction: Reduction = reduction
        self._strict = strict

    @property
    def name(self) -> str:
        """Sketched gradients; what is sketched stands beside it, so that updates may be compared with gradients."""
        what = [] if self._reduction == "mean" else ["sum over answer tokens"]
        return variant("sketched gradients", *what, *([] if self._strict else ["observable parameters"]))

    def dim(self, model: nn.Module) -> int:
        """Numbers of the sketch."""
        return self._sketch.dim

    def settings(self, model: nn.Module | None, *, stored: bool) -> dict[str, Any]:
        """The sketch, its variant and parameters; if ``stored``, a fingerprint of the optimizer's moments."""
        assert model is not None
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        what = "gradient" if self._optimizer is None else self._variant
        names = Digest().any([(name, *p.shape) for name, p in sorted(named.items())]).hex()
        settings: dict[str, Any] = {"sketch": {**self._sketch.header, "variant": what, "parameters": names}}
        if self._optimizer is not None and stored:
            settings["optimizer"] = _moments_fingerprint(named, self._optimizer)
        return settings

    @contextmanager
    def _observed(self, model: nn.Module) -> Iterator[GradientObservation]:
        with observe(
            model,
            norms=False,
            strict=self._strict,
            gradient=False,
            sketch=self._sketch,
            optimizer=self._optimizer,
            variant=self._variant,
        ) as seen:
            yield seen

    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Sketches [B, D]."""
        with self._observed(model) as seen:
            backward_of_classes(model, inputs, targets)
        return seen.sketches

    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Sketches [S, D], float32."""
        if where.targets.numel() == 0:
            return torch.full((batch.samples, self._sketch.dim), torch.nan)
        with self._observed(model) as seen:
            backward_of_answers(seen, model, batch, where, self._reduction)
        return torch.where((where.cu_seqlens.diff() > 0)[:, None], seen.sketches, torch.nan)

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int:
        """FLOPs of a forward and backward pass with the head at answer tokens; a sketch adds none."""
        return work.of(costs.train)


def _moments_fingerprint(named: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    digest = Digest()
    for name, parameter in named.items():
        group, state = groups.get(id(parameter), {}), optimizer.state.get(parameter, {})
        digest.text(name).any([group.get("betas"), group.get("eps")])
        for key in sorted(state):
            digest.text(key).any(state[key])
    return digest.hex()
