"""Measure what a training step keeps and how much is live at most, without computing it.

`trace_step` runs one forward and backward of any module on fake tensors, which have shapes, types and storages but no
data: it takes no memory worth mentioning, and neither a GPU nor weights. `measure_step` does the same on real tensors.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class StepError(ValueError):
    """The model's own step failed on tensors without data, or returned nothing to differentiate."""


@dataclass(frozen=True)
class Traced:
    """Bytes beside parameters and buffers: kept for the backward (each storage once), live at the end of the forward,
    the most live at any moment, the phase of that moment ("forward" or "backward"), all gradients, and the FLOPs of the
    matrix products."""

    saved: int
    forward_end: int
    peak: int
    phase: str
    gradients: int
    flops: int


def trace_step(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    device: str = "cpu",
    **kwargs: Any,
) -> Traced:
    """Run one step of `model(*args, **kwargs)` on fake tensors.

    The model may live on the meta device. Tensors among the arguments give shapes and types. `loss` makes a scalar of
    what the model returns; by default its `loss`, or the sum of its first floating-point tensor. device: where the
    tensors pretend to be. Kernels' own workspaces are not seen. Buffers that the model replaces are not counted.

    Raises `StepError`, a ValueError, for errors of the model's own step: what it decides by the values of its tensors
    cannot be followed.

    Cost: the time of dispatching the step's operations, about 0.1 ms each.

    >>> layer = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    >>> trace_step(layer, torch.empty(32, 64)).saved  # the input and the output of relu, 32 * 64 floats each
    16384
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

    mode = FakeTensorMode()

    def fake(t: Tensor) -> Tensor:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device).requires_grad_(t.requires_grad)

    with mode:
        weights = {name: fake(t) for name, t in [*model.named_parameters(), *model.named_buffers()]}
        args, kwargs = tree_map_only(Tensor, fake, (args, kwargs))
    name = type(model).__name__

    @contextlib.contextmanager
    def models_own() -> Iterator[None]:
        try:
            yield
        except DataDependentOutputException as error:
            raise StepError(
                f"{name} decides by the values of its tensors ({error}): it cannot be traced without data"
            ) from error
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise error if isinstance(error, StepError) else StepError(first) from error

    step = _Step(model, lambda: _observe(weights, lambda: model(*args, **kwargs), loss, (args, kwargs), models_own))
    with mode, _no_mask_from_values():
        traced: Traced = torch.func.functional_call(step, {f"model.{name}": t for name, t in weights.items()}, ())
        return traced


class _Step(nn.Module):
    """A whole step as one forward, so that what is recomputed in the backward finds the same fake weights."""

    def __init__(self, model: nn.Module, run: Callable[[], Traced]) -> None:
        super().__init__()
        self.model, self.run = model, run

    def forward(self) -> Traced:
        return self.run()


def measure_step(model: nn.Module, *args: Any, loss: Callable[[Any], Tensor] | None = None, **kwargs: Any) -> Traced:
    """Run one step on real tensors and count what `trace_step` counts; the model's gradients are left as they were.

    The model must have no gradients yet (`zero_grad(set_to_none=True)`); they are removed again. Raises ValueError
    otherwise.
    """
    if any(p.grad is not None for p in model.parameters()):
        raise ValueError("model must have no gradients: call zero_grad() first")
    weights: dict[str, Tensor] = dict([*model.named_parameters(), *model.named_buffers()])
    try:
        return _observe(weights, lambda: model(*args, **kwargs), loss, (args, kwargs))
    finally:
        model.zero_grad(set_to_none=True)


def _observe(
    weights: Mapping[str, Tensor],
    run: Callable[[], Any],
    loss: Callable[[Any], Tensor] | None,
    given: Any,
    models_own: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> Traced:
    """Count what a step keeps. What the model does happens in `models_own()`, which tells its errors from ours."""
    own = {_key(t) for t in weights.values()}
    saved: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if _key(t) not in own:
            saved[_key(t)] = t.untyped_storage().nbytes()
        return t

    live = _LiveBytes(own)
    for t in tree_leaves(given):
        if isinstance(t, Tensor):
            live.see(t)
    with live:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), models_own():
            value = (loss or _loss_of)(run())
        forward_end, forward_peak = live.now, live.peak
        with models_own():
            value.backward()
    if live.fault is not None:
        raise live.fault
    gradients = sum(t.grad.untyped_storage().nbytes() for t in weights.values() if t.grad is not None)
    phase = "forward" if forward_peak >= live.peak else "backward"
    return Traced(sum(saved.values()), forward_end, live.peak, phase, gradients, live.flops)


def _key(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _loss_of(output: Any) -> Tensor:
    found = getattr(output, "loss", None)
    if isinstance(found, Tensor):
        return found
    for t in tree_leaves(output):
        if isinstance(t, Tensor) and t.is_floating_point() and t.requires_grad:
            return t if t.numel() == 1 else t.float().sum()
    raise StepError("the model returned no floating-point tensor that requires a gradient: give loss=")


class _LiveBytes(TorchDispatchMode):
    """Counts the storages that operations make, from their making to their end."""

    def __init__(self, own: set[int]) -> None:
        super().__init__()
        self.known = set(own)
        self.now = self.peak = self.flops = 0
        self.fault: Exception | None = None

    def see(self, t: Tensor) -> None:
        storage = t.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self.known or nbytes == 0:
            return
        self.known.add(key)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._end, key, nbytes).atexit = False

    def _end(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.now -= nbytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        try:
            self._count(func, args, kwargs, result)
        except Exception as error:  # not the model's; torch does not survive one that leaves here
            self.fault = self.fault or error
        return result

    def _count(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        # FlopCounterMode would count the same but for the CPU's attention, and it keeps what a checkpoint frees alive.
        packet = func._overloadpacket
        if packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.flops += sdpa_flop_count(*(t.shape for t in args[:3]))
        elif packet is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.flops += sdpa_backward_flop_count(*(t.shape for t in args[:4]))
        elif packet in flop_registry:
            self.flops += int(flop_registry[packet](*args, **kwargs, out_val=result))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                self.see(t)


@contextlib.contextmanager
def _no_mask_from_values() -> Iterator[None]:
    # transformers looks for packed samples in the values of position_ids; fake tensors have none, and it then builds
    # a mask that a real step does not have. A caller with packed samples gives the mask.
    try:
        from transformers import masking_utils
    except ImportError:
        yield
        return
    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    with mock.patch.object(masking_utils, "find_packed_sequence_indices", return_value=None):
        yield
