"""What an observation has found, read from what the layers have noted."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.observation.features import Features
from pyeff.observation.noise_scale import NoiseScaleEstimate, estimate_noise_scale
from pyeff.observation.recording import Forward


class Findings:
    """The results that `observe` offers, by what it was asked for."""

    model: nn.Module
    norms: bool
    gradient: bool
    features: Features | None
    parameters: dict[int, tuple[str, nn.Parameter]]
    unobserved: dict[str, str]
    _by_parameter: bool
    _forwards: list[Forward]
    _contributions: dict[str, int]
    _had_gradient: bool | None
    _left: dict[str, tuple[int, int]]

    @property
    def grad_norms(self) -> Tensor:
        """The norm of each sample's share of the gradient [samples], fp32, in the order the samples came.

        Samples of several forward passes (gradient accumulation) follow each other. NaN or infinite gradients give NaN
        or infinity for their own sample only. Raises `RuntimeError` before the first backward pass, and if
        `norms=False`.
        """
        if not self.norms:
            raise RuntimeError("norms are formed with observe(model, norms=True)")
        sums = [functools.reduce(torch.add, f.result().values(), self._zeros(f)) for f in self._finished()]
        return torch.cat(sums).sqrt().float()

    @property
    def sketches(self) -> Tensor:
        """The sketch of each sample's gradient, or of the direction AdamW maps it to: [samples, dim], fp32.

        In the order of `grad_norms`. Of a `FactoredSketch`, `layer_sketches` side by side, in the order of their names.
        Raises `RuntimeError` unless `observe(..., sketch=...)` asked for it.
        """
        if self.features is not None and self.features.factored is not None:
            layers = self.layer_sketches
            return torch.cat([layers[name].flatten(1) for name in sorted(layers)], 1)
        if self.features is None or self.features.sketch is None:
            raise RuntimeError("sketches are formed with observe(model, sketch=pyeff.Sketch(...))")
        dim = self.features.sketch.dim
        return torch.cat([self._found(f, f.features()[0].sketches, (dim,)) for f in self._finished()]).float()

    @property
    def layer_sketches(self) -> dict[str, Tensor]:
        """Matrix's name (of the plain model) -> its gradients' factored sketches [samples, k_out, k_in], fp32.

        In the order of `grad_norms`. Vectors have none. Raises `RuntimeError` unless
        `observe(..., sketch=pyeff.FactoredSketch(...))` asked for it.
        """
        if self.features is None or self.features.factored is None:
            raise RuntimeError("layer_sketches are formed with observe(model, sketch=pyeff.FactoredSketch(...))")
        shape = self.features.factored.k_out, self.features.factored.k_in
        found = [(f, f.features()[1]) for f in self._finished()]
        return {
            self.features.plain(name): torch.cat([self._found(f, of.get(name), shape) for f, of in found]).float()
            for name in self._sketched()
        }

    def _sketched(self) -> list[str]:
        """The parameters that sketches are of."""
        assert self.features is not None
        matrices = self.features.factored is not None
        shapes = {name: shape for name, shape in self.features.shapes.items() if name not in self.unobserved}
        return sorted(name for name, shape in shapes.items() if len(shape) > 1 or not matrices)

    @property
    def dots(self) -> Tensor:
        """The inner product of each sample's gradient with the reference: [samples], fp32.

        In the order of `grad_norms`. Raises `RuntimeError` unless `observe(..., reference=...)` asked for it.
        """
        if self.features is None or self.features.reference is None:
            raise RuntimeError("dots are formed with observe(model, reference=gradients)")
        return torch.cat([self._found(f, f.features()[0].dots, ()) for f in self._finished()]).float()

    @property
    def sketch_header(self) -> dict[str, Any]:
        """The sketch's header, what was sketched ("gradient", "adamw", "adamw-frozen") and of which parameters."""
        sketch = None if self.features is None else self.features.sketch or self.features.factored
        if self.features is None or sketch is None:
            raise RuntimeError("sketches are formed with observe(model, sketch=pyeff.Sketch(...))")
        names = sorted(self.features.plain(name) for name in self._sketched())
        return {**sketch.header, "variant": self.features.variant, "parameters": names}

    def _found(self, forward: Forward, found: Tensor | None, shape: tuple[int, ...]) -> Tensor:
        return self._zeros(forward).new_zeros(forward.batch.samples, *shape) if found is None else found

    @property
    def by_parameter(self) -> dict[str, Tensor]:
        """Parameter name -> squared norms of the samples' shares [samples], fp32.

        Raises `RuntimeError` unless `observe(..., by_parameter=True)` asked for it.
        """
        if not self._by_parameter:
            raise RuntimeError("squared norms by parameter are kept with observe(model, by_parameter=True)")
        results = [(f.result(), self._zeros(f)) for f in self._finished()]
        names = [name for name, _ in self.parameters.values() if name not in self.unobserved]
        return {name: torch.cat([result.get(name, zeros) for result, zeros in results]).float() for name in names}

    @property
    def noise_scale(self) -> NoiseScaleEstimate:
        """B_simple from the samples' norms and the gradient they add up to.

        Reads `param.grad` of the observed parameters, so ask before it is clipped or cleared. Under
        `DistributedDataParallel` the ranks' samples count together, and all ranks must ask. Cost: one pass over the
        gradient. Raises `ValueError` when a gradient was there before the first observed backward pass, or is no longer
        what that pass left, or for fewer than two samples.
        """
        if not self.gradient:
            raise RuntimeError("noise_scale needs the gradient: observe(model, gradient=True, defer=False)")
        norms_sq = self.grad_norms.double().square()
        if self._had_gradient:
            raise ValueError(
                "parameters held a gradient before the first observed backward pass, so that the samples' shares do "
                "not add up to it: call zero_grad(set_to_none=True) before"
            )
        self._refuse_changed_gradients()
        gradients = [
            p.grad for name, p in self.parameters.values() if p.grad is not None and name not in self.unobserved
        ]
        total = torch.zeros((), dtype=torch.float64, device=norms_sq.device)
        for gradient in gradients:
            total += torch.linalg.vector_norm(gradient, dtype=_wide(gradient.dtype)).double().square().to(total.device)
        sums = torch.stack([norms_sq.sum(), torch.tensor(float(norms_sq.numel()), device=norms_sq.device).double()])
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            # The gradient is the mean over ranks, and a sample's share of it that much smaller.
            torch.distributed.all_reduce(sums, group=self.model.process_group)
            sums[0] /= self.model.process_group.size() ** 2
        return estimate_noise_scale(float(sums[0]), float(total), int(sums[1]))

    def _refuse_changed_gradients(self) -> None:
        for name, parameter in self.parameters.values():
            if name in self.unobserved or name not in self._contributions:
                continue
            gradient = parameter.grad
            if gradient is None or self._left.get(name, mark(gradient)) != mark(gradient):
                raise ValueError(
                    f"the gradient of {name} is no longer what the backward pass left in .grad: ask for noise_scale, "
                    "or leave the context, before gradients are cleared, clipped or unscaled"
                )

    def _finished(self) -> list[Forward]:
        forwards = [f for f in self._forwards if f.began_backward]
        if not forwards:
            raise RuntimeError("no backward pass has been observed yet")
        return forwards

    def _zeros(self, forward: Forward) -> Tensor:
        return torch.zeros(forward.batch.samples, device=forward.device)


def mark(gradient: Tensor) -> tuple[int, int]:
    """What changes when a gradient is replaced or written to."""
    return id(gradient), gradient._version


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
