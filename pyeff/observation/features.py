"""What `observe` takes from every sample's gradient beside its norm: a sketch, and its dot with a reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from pyeff import reference as _reference
from pyeff.observation.rows import Rows
from pyeff.ops._optimizer_states import decode_moment, decode_square
from pyeff.ops.factored_sketch import FactoredSketch
from pyeff.ops.sketch_grads import AdamWDirection, ParameterSketch, Sketch, matrix_shape

Variant = Literal["adamw", "adamw-frozen"]


class Noted(NamedTuple):
    """What one use of a parameter adds: to the samples' sketches [S, dim], to their dots [S], and to the parameter's
    own factored sketches [S, k_out, k_in]; None where not asked for."""

    sketches: Tensor | None
    dots: Tensor | None
    factored: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """The sketches and the reference gradient of every watched parameter, by its name; None where not asked for.

    `directions` reads AdamW's moments of each parameter, which 8-bit states are decoded for one at a time; empty where
    gradients are sketched as they are.
    """

    sketch: Sketch | None
    factored: FactoredSketch | None
    reference: Mapping[str, Tensor] | None
    directions: Mapping[str, Callable[[], AdamWDirection]]
    variant: str
    shapes: Mapping[str, torch.Size]
    prefix: str = ""

    def direction(self, name: str) -> AdamWDirection | None:
        """The map of a parameter's gradient before it is sketched."""
        return self.directions[name]() if name in self.directions else None

    def plain(self, name: str) -> str:
        """The name by which a parameter is hashed: that of the model itself, wrapped or not."""
        return name.removeprefix(self.prefix)

    @property
    def linear(self) -> bool:
        """Whether sketches of parts of a gradient add up to the sketch of the whole."""
        return self.sketch is None or self.variant != "adamw"

    def parameter_sketch(self, name: str, part: int | None = None) -> ParameterSketch | None:
        """How a layer sketches the gradient of a matrix, or of matrix `part` of a stack of them."""
        if self.sketch is None:
            return None
        rows, columns = matrix_shape(self.shapes[name])
        direction = self.direction(name)
        if direction is not None:
            direction = direction.viewed(rows, columns)
        if part is None:
            return ParameterSketch(self.sketch, self.plain(name), 0, direction)
        height = self.shapes[name][1]
        if direction is not None:
            direction = direction.rows(part * height, height)
        return ParameterSketch(self.sketch, self.plain(name), part * height, direction)

    def parameter_reference(self, name: str) -> Tensor | None:
        """The reference gradient of a parameter."""
        return None if self.reference is None else self.reference.get(name)

    def factored_sketch(
        self, name: str, inputs: Tensor, grad_outputs: Tensor, borders: Tensor, first_row: int = 0
    ) -> Tensor | None:
        """The factored sketches [S, k_out, k_in] of a linear layer whose weight begins in this row of the parameter."""
        if self.factored is None:
            return None
        return self.factored.of_product(self.plain(name), inputs, grad_outputs, borders, first_row=first_row)

    def of_sample_grads(self, name: str, grads: Tensor) -> Noted:
        """What is wanted of gradients [S, ...] of a parameter that are there."""
        reference, sketches, dots = self.parameter_reference(name), None, None
        whole = grads.reshape(grads.shape[0], *self.shapes[name])
        factored = None
        if self.factored is not None and len(self.shapes[name]) > 1:
            factored = self.factored.of(self.plain(name), whole)
        if self.sketch is not None:
            sketches = self.sketch.of(self.plain(name), whole, direction=self.direction(name))
        if reference is not None:
            # One number a sample for a scalar parameter, whose `whole` has no second dimension.
            flat = whole.reshape(whole.shape[0], reference.numel())
            dots = flat @ reference.flatten().to(whole.dtype)
        return Noted(sketches, dots, factored)

    def of_rows(self, name: str, ids: Tensor, grads: Tensor, rows: Rows) -> Noted:
        """What is wanted of a table's gradient: `grads` [N, d] go to the rows `ids` [N] for the samples of `rows`."""
        factored = None
        if self.factored is not None:
            factored = self.factored.of_table(self.plain(name), ids, grads, rows.borders)
        if self.sketch is None and self.parameter_reference(name) is None:
            return Noted(None, None, factored)
        sketches, dots = self._of_summed_rows(name, ids, grads, rows.sample_of_row(), rows.samples)
        return Noted(sketches, dots, factored)

    def _of_summed_rows(
        self, name: str, ids: Tensor, grads: Tensor, sample: Tensor, samples: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Every (sample, row) is summed before it is sketched. Waits for the GPU, which says how many there are."""
        wide = torch.promote_types(grads.dtype, torch.float32)
        height = self.shapes[name][0]
        pairs, which = torch.unique(sample * height + ids, return_inverse=True)
        sums = grads.new_zeros(pairs.numel(), grads.shape[1], dtype=wide).index_add_(0, which, grads.to(wide))
        row, owner = pairs % height, pairs // height
        reference, sketches, dots = self.parameter_reference(name), None, None
        if reference is not None:
            products = (sums * reference[row].to(wide)).sum(1)
            dots = sums.new_zeros(samples).index_add_(0, owner, products)
        if self.sketch is not None:
            direction = self.direction(name)
            missing = sums.new_zeros(self.sketch.dim)
            if direction is not None:
                of_rows = direction.taken(row)
                if direction.momentum is not None:
                    # The rows nobody asked for step by their momentum all the same.
                    nothing = of_rows(torch.zeros_like(sums))
                    missing = self.sketch.of(
                        self.plain(name), sums.new_zeros(1, *self.shapes[name]), direction=direction
                    )[0]
                    sums = of_rows(sums) - nothing
                else:
                    sums = of_rows(sums)
            found, keys = [], self.sketch.keys(self.plain(name))
            for part, of in zip(
                *(t.split(owner.bincount(minlength=samples).tolist()) for t in (sums, row)), strict=True
            ):
                found.append(_reference.sketch_rows(part[None], of, self.sketch.dim, keys, kind=self.sketch.kind)[0])
            sketches = torch.stack(found) + missing
        return sketches, dots


def features_of(
    parameters: Mapping[str, nn.Parameter],
    prefix: str,
    sketch: Sketch | FactoredSketch | None,
    reference: Mapping[str, Tensor] | None,
    optimizer: torch.optim.Optimizer | None,
    variant: Variant,
) -> Features | None:
    """What was asked of `observe`, checked; None if nothing."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be 'adamw' or 'adamw-frozen', got {variant!r}")
    if sketch is None and optimizer is not None:
        raise ValueError("optimizer maps what is sketched: pass a sketch too")
    if sketch is None and reference is None:
        return None
    if sketch is not None and not isinstance(sketch, Sketch | FactoredSketch):
        raise TypeError(f"sketch must be a pyeff.Sketch, a pyeff.FactoredSketch or None, got {type(sketch).__name__}")
    factored = sketch if isinstance(sketch, FactoredSketch) else None
    if factored is not None and optimizer is not None:
        raise ValueError("optimizer maps gradients entry by entry, which a factored sketch does not see: pass a Sketch")
    if reference is not None:
        _check_reference(parameters, reference)
    directions = {} if optimizer is None else _directions(parameters, optimizer, variant == "adamw-frozen")
    mapped = "gradient" if optimizer is None else variant
    shapes = {name: p.shape for name, p in parameters.items()}
    hashed = sketch if isinstance(sketch, Sketch) else None
    return Features(hashed, factored, reference, directions, mapped, shapes, prefix)


def _check_reference(parameters: Mapping[str, nn.Parameter], reference: Mapping[str, Tensor]) -> None:
    if not isinstance(reference, Mapping):
        raise TypeError(f"reference must map names of parameters to gradients, got {type(reference).__name__}")
    for name, gradient in reference.items():
        if name not in parameters:
            raise ValueError(f"reference names {name!r}, which is no parameter that requires a gradient")
        if not isinstance(gradient, Tensor):
            raise TypeError(f"reference[{name!r}] must be a tensor, got {type(gradient).__name__}")
        if gradient.shape != parameters[name].shape:
            raise ValueError(
                f"reference[{name!r}] must have the parameter's shape, {tuple(parameters[name].shape)}, "
                f"got {tuple(gradient.shape)}"
            )


def optimizer_directions(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, variant: Variant = "adamw"
) -> dict[str, AdamWDirection]:
    """The direction an optimizer would step each trainable parameter in after a gradient alone: by parameter's name.

    As `observe(..., optimizer=, variant=)` maps what it sketches. With variant "adamw-frozen" the map is linear and
    symmetric, so that a reference mapped by it yields dots in the optimizer's space:

        <P g, R> = <g, P R>:    observe(model, reference={name: directions[name](r) for name, r in reference.items()})

    `optimizer`: torch's or pyeff's Adam or AdamW, having stepped; moments in 8 bits are decoded to 8 bytes a parameter.
    Raises `ValueError` where it keeps no moments of a parameter.

    >>> import torch, pyeff
    >>> model = torch.nn.Linear(3, 1)
    >>> adamw = torch.optim.AdamW(model.parameters())
    >>> model(torch.ones(2, 3)).sum().backward()
    >>> adamw.step()
    >>> directions = pyeff.optimizer_directions(model, adamw, variant="adamw-frozen")
    >>> directions["weight"](torch.ones(1, 3))  # gradients were 2
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    if variant not in get_args(Variant):
        raise ValueError(f"variant must be 'adamw' or 'adamw-frozen', got {variant!r}")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name: read() for name, read in _directions(parameters, optimizer, variant == "adamw-frozen").items()}


def _directions(
    parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer, frozen: bool
) -> dict[str, Callable[[], AdamWDirection]]:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.NAdam | torch.optim.RAdam):  # the same states, another step
        raise ValueError(f"optimizer must be Adam or AdamW, whose step is known, got {type(optimizer).__name__}")
    groups: dict[int, dict[str, Any]] = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: dict[str, Callable[[], AdamWDirection]] = {}
    for name, parameter in parameters.items():
        group, state = groups.get(id(parameter)), optimizer.state.get(parameter, {})
        kept = [state.get(f"{moment}{code}") for moment in ("exp_avg", "exp_avg_sq") for code in ("", "_code")]
        moments = [t for t in kept if isinstance(t, Tensor) and t.shape == parameter.shape]
        if group is None or len(moments) != 2 or "betas" not in group:
            raise ValueError(
                f"optimizer keeps no exp_avg and exp_avg_sq of {name}: it must be Adam or AdamW, of torch.optim or "
                "pyeff.optim, over all observed parameters, and have stepped"
            )
        changed = next((option for option in ("amsgrad", "maximize") if group.get(option)), None)
        if changed is not None:
            raise ValueError(f"optimizer steps {name} with {changed}=True, which is another direction than AdamW's")
        if any(moment.device != parameter.device for moment in moments):
            raise ValueError(f"optimizer keeps the moments of {name} on another device than the parameter")
        found[name] = functools.partial(_direction, state, group, int(state["step"]), frozen)
    return found


def _direction(state: Mapping[str, Any], group: Mapping[str, Any], step: int, frozen: bool) -> AdamWDirection:
    if "exp_avg" in state:
        m, v = state["exp_avg"], state["exp_avg_sq"]
    else:
        size = group["block_size"]
        m = decode_moment(state["exp_avg_code"], state["exp_avg_scale"], size)
        v = decode_square(state["exp_avg_sq_code"], state["exp_avg_sq_scale"], size)
    return AdamWDirection(m, v, step, tuple(group["betas"]), group["eps"], frozen=frozen)
