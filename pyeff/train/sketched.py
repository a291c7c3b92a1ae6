"""The matrices whose gradients a factored sketch is of, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from pyeff.scoring.language_model import without_adapters

if TYPE_CHECKING:
    from pyeff.ops import FactoredSketch


class SketchedMatrices:
    """The trained matrices of a language model, by what they multiply: tokens, or the positions that are predicted."""

    def __init__(self, model: nn.Module) -> None:
        head = without_adapters(model).get_output_embeddings()
        self._layers: list[tuple[int, int]] = []
        self._head: list[tuple[int, int]] = []
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2 or not weight.requires_grad:
                continue
            rows, columns = weight.shape
            if isinstance(module, nn.Embedding):
                self._layers.append((columns, 0))
            else:
                (self._head if module is head else self._layers).append((columns, rows))
        self.parameters = sum(p.ndim == 2 and p.requires_grad for p in model.parameters())
        """How many there are; one that is used twice counts once."""
        self._vectors = sum(p.numel() for p in model.parameters() if p.ndim == 1 and p.requires_grad)

    def vector_flops(self, kept: int) -> int:
        """Of weighing so many samples' gradients of the vectors, of which each sample's is there."""
        return 2 * kept * self._vectors

    def flops(self, sketch: FactoredSketch, lengths: Sequence[int], answers: Sequence[int]) -> int:
        """Of the sketches of samples of these many tokens, so many of which are predicted."""
        shapes = [(shape, lengths) for shape in self._layers] + [(shape, answers) for shape in self._head]
        return sum(sketch.flops(*shape, tokens) for shape, tokens in shapes)
