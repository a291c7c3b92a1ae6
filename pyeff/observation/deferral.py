# ruff: noqa: D102 (`Held` says what `tensors` and `gradient` are)
"""Weight gradients that are formed after the backward pass, of the samples that were chosen by what it measured.

While `observe(model, defer=True)` watches, layers form no gradients of parameters. Each leaves instead what it needs to
form them later: the activations it was given and the gradients by what it returned. `Selection` says which samples
count and how much; rows of the others are not read, so their NaN and infinity do not spread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from pyeff.observation.rows import Rows
from pyeff.ops import embedding_grad

if TYPE_CHECKING:
    from pyeff.observation.recording import Forward

# Gradients are averaged over the ranks in pieces of so many bytes, as DistributedDataParallel's buckets.
_BUCKET_BYTES = 25 << 20


class Kept(NamedTuple):
    """Some rows of an activation: their places (None: all of them, in order), the factor of each (None: 1), and how
    many of each span of rows are among them."""

    places: Tensor | None
    factors: Tensor | None
    lengths: list[int]

    def rows(self, t: Tensor) -> Tensor:
        """Those rows of `t` [N, ...]."""
        return t if self.places is None else t.index_select(0, self.places)

    def scaled(self, t: Tensor) -> Tensor:
        """Those rows of `t` [N, ...] times their factors, rounded once."""
        rows = self.rows(t)
        if self.factors is None:
            return rows
        wide = torch.promote_types(t.dtype, torch.float32)
        return (rows.to(wide) * self.factors.to(wide).view(-1, *[1] * (t.ndim - 1))).to(t.dtype)


class Selection:
    """The factors [S] (float64, on the CPU) of the samples of one forward pass."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self._known: dict[tuple[int, int], tuple[Rows, Kept]] = {}

    def of(self, rows: Rows, repeats: int = 1) -> Kept:
        """The kept ones of `rows`, whose samples follow each other `repeats` times."""
        key = id(rows), repeats
        if key not in self._known:
            self._known[key] = rows, self._kept(rows, self.weights.repeat(repeats))
        return self._known[key][1]

    def _kept(self, rows: Rows, weights: Tensor) -> Kept:
        spans = list(rows.spans())
        device = rows.borders.device
        lengths = [span.stop - span.start if w else 0 for span, w in zip(spans, weights.tolist(), strict=True)]
        index = factors = None
        if bool((weights == 0).any()):
            chosen = [
                torch.arange(span.start, span.stop) for span, length in zip(spans, lengths, strict=True) if length
            ]
            index = (torch.cat(chosen) if chosen else torch.zeros(0, dtype=torch.int64)).to(device)
        if bool(((weights != 0) & (weights != 1)).any()):
            factors = torch.repeat_interleave(weights, torch.tensor(lengths)).to(device)
        return Kept(index, factors, lengths)

    def sum(self, sample_grads: Tensor) -> Tensor:
        """The weighted sum of samples' gradients [S, ...], those with weight 0 left out."""
        wide = torch.promote_types(sample_grads.dtype, torch.float32)
        index = self.weights.nonzero()[:, 0]
        weights = self.weights[index].to(sample_grads.device, wide)
        return torch.tensordot(weights, sample_grads[index.to(sample_grads.device)].to(wide), 1)


class Held(Protocol):
    """What a layer left behind to form the gradient of the tensor it was given."""

    def tensors(self) -> Iterable[Tensor]:
        """What is kept in memory for it."""

    def gradient(self, selection: Selection) -> Tensor:
        """The gradient summed over the selected samples."""


class HeldProduct(NamedTuple):
    """outputs^T inputs, for `inputs` [N, d] and `outputs` [N, p]."""

    rows: Rows
    inputs: Tensor
    outputs: Tensor

    def tensors(self) -> Iterable[Tensor]:
        return self.inputs, self.outputs

    def gradient(self, selection: Selection) -> Tensor:
        return _product(selection.of(self.rows), self.inputs, self.outputs)


class HeldExperts(NamedTuple):
    """outputs^T inputs of the rows of each of E experts: [E, p, d]; `pairs` has the rows of (expert, sample)."""

    pairs: Rows
    inputs: Tensor
    outputs: Tensor
    experts: int

    def tensors(self) -> Iterable[Tensor]:
        return self.inputs, self.outputs

    def gradient(self, selection: Selection) -> Tensor:
        kept = selection.of(self.pairs, self.experts)
        inputs, outputs = _operands(kept, self.inputs, self.outputs)
        grad = inputs.new_zeros(self.experts, outputs.shape[1], inputs.shape[1])
        samples, begin = self.pairs.samples // self.experts, 0
        for expert in range(self.experts):
            end = begin + sum(kept.lengths[expert * samples : (expert + 1) * samples])
            if end > begin:
                torch.mm(outputs[begin:end].t(), inputs[begin:end], out=grad[expert])
            begin = end
        return grad


class HeldRows(NamedTuple):
    """Rows of a table of `height` that were read by index: `ids` [N], `outputs` [N, d]."""

    rows: Rows
    ids: Tensor
    outputs: Tensor
    height: int
    padding_idx: int | None

    def tensors(self) -> Iterable[Tensor]:
        return self.ids, self.outputs

    def gradient(self, selection: Selection) -> Tensor:
        kept = selection.of(self.rows)
        ids, outputs = kept.rows(self.ids), kept.scaled(self.outputs)
        borders = torch.tensor([0, ids.shape[0]])
        grad = embedding_grad(ids, outputs, borders, self.height, padding_idx=self.padding_idx, norms=False)
        assert grad.weight_grad is not None
        return grad.weight_grad


class HeldSamples(NamedTuple):
    """The samples' gradients [S, ...] themselves."""

    grads: Tensor

    def tensors(self) -> Iterable[Tensor]:
        return (self.grads,)

    def gradient(self, selection: Selection) -> Tensor:
        return selection.sum(self.grads)


class HeldCall(NamedTuple):
    """Any other layer: `form(kept)` of its rows."""

    rows: Rows
    held: tuple[Tensor, ...]
    form: Callable[[Kept], Tensor]

    def tensors(self) -> Iterable[Tensor]:
        return self.held

    def gradient(self, selection: Selection) -> Tensor:
        return self.form(selection.of(self.rows))


def _operands(kept: Kept, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    # The narrower of both is scaled.
    if inputs.shape[1] < outputs.shape[1]:
        return kept.scaled(inputs), kept.rows(outputs)
    return kept.rows(inputs), kept.scaled(outputs)


def _product(kept: Kept, inputs: Tensor, outputs: Tensor) -> Tensor:
    inputs, outputs = _operands(kept, inputs, outputs)
    return outputs.t() @ inputs


def weights_of(keep: Tensor | Sequence[float] | None, samples: int) -> Tensor:
    """The weights [samples] (float64, on the CPU) that `keep` says: indices, a mask, or weights; None for all."""
    if keep is None:
        return torch.ones(samples, dtype=torch.float64)
    given = keep.detach().cpu() if isinstance(keep, Tensor) else torch.tensor(keep)
    if given.numel() == 0 and not isinstance(keep, Tensor):
        given = given.to(torch.int64)  # an empty list of indices
    if given.ndim != 1:
        raise ValueError(f"keep must be a list of indices, a mask or weights, got shape {tuple(given.shape)}")
    if given.dtype == torch.bool or given.is_floating_point():
        if given.numel() != samples:
            raise ValueError(f"keep must have a value for each of {samples} samples, got {given.numel()}")
        weights = given.to(torch.float64)
        if not bool(weights.isfinite().all()):
            raise ValueError(f"keep must be finite weights, got {weights[~weights.isfinite()][0].item()}")
        return weights
    if given.is_complex():
        raise TypeError(f"keep must be integers, booleans or real weights, got {given.dtype}")
    if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < samples:
        raise ValueError(f"keep must be indices from 0 to {samples - 1}, got {int(given.min())} to {int(given.max())}")
    weights = torch.zeros(samples, dtype=torch.float64).index_add_(0, given.long(), torch.ones(given.numel()).double())
    if bool((weights > 1).any()):
        raise ValueError(f"keep names sample {int(weights.argmax())} more than once: pass weights")
    return weights


def held_bytes(forwards: Iterable[Forward]) -> int:
    """Bytes of the memory that is kept for gradients to be formed; what several layers share counts once."""
    storages = {}
    for forward in forwards:
        for _, tensors in forward.held_tensors():
            for t in tensors:
                storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
    return sum(storages.values())


def accumulate(forwards: Sequence[Forward], weights: Tensor, own_hooks: int) -> None:
    """Form the gradients of the selected samples and add them to `.grad`, one parameter at a time."""
    selections = [Selection(part) for part in weights.split([forward.batch.samples for forward in forwards])]
    # As a backward pass would: from the last layer to the first.
    names = dict.fromkeys(name for forward in forwards for name, _ in forward.held_tensors())
    for name in names:
        parts = []
        for forward, selection in zip(forwards, selections, strict=True):
            parts += forward.take_held(name, selection)
        parameter = forwards[0].observation.parameter(name)
        add_gradient(parameter, functools.reduce(torch.add, parts).to(parameter.dtype), own_hooks)
    for forward in forwards:
        forward.accumulated = True


def add_gradient(parameter: nn.Parameter, gradient: Tensor, own_hooks: int = 0) -> None:
    """Add to `.grad` as a backward pass does, with the parameter's hooks, of which `own_hooks` do nothing."""
    hooks = len(parameter._backward_hooks or ()) - own_hooks
    if hooks > 0 or getattr(parameter, "_post_accumulate_grad_hooks", None):
        torch.autograd.backward([get_gradient_edge(parameter)], [gradient])
    elif parameter.grad is None:
        parameter.grad = gradient.contiguous()
    else:
        parameter.grad.add_(gradient)


def average_over_ranks(model: nn.parallel.DistributedDataParallel, parameters: Iterable[nn.Parameter]) -> None:
    """The mean of `.grad` over the ranks; one that this rank has none of is 0."""
    group: Any = model.process_group
    buckets: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}

    def reduce(grads: list[Tensor]) -> None:
        flat = torch.cat([grad.reshape(-1) for grad in grads]) / group.size()
        torch.distributed.all_reduce(flat, group=group)
        for grad, part in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket = buckets.setdefault((parameter.grad.dtype, parameter.grad.device), [])
        bucket.append(parameter.grad)
        if sum(grad.nbytes for grad in bucket) >= _BUCKET_BYTES:
            reduce(bucket)
            bucket.clear()
    for bucket in buckets.values():
        if bucket:
            reduce(bucket)
