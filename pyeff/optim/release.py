"""Steps inside the backward: a gradient is used and freed where it is made, instead of kept until all are there."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from pyeff.ops.global_norm import global_norm
from pyeff.optim.engine import Optimizer8bit
from pyeff.optim.sharding import is_distributed, local, part_of_grad, shard_groups

CLIPS = ("two-pass", "delayed")

_open: weakref.WeakSet[GradientRelease] = weakref.WeakSet()
"""Those whose hooks are on parameters."""


class GradientRelease:
    """Let `optimizer` step each parameter as soon as the backward has made its gradient, and free the gradient then.

    Memory for gradients falls from that of all parameters to that of the largest few. Without clipping the weights
    are bit for bit those of a backward followed by `optimizer.step()`, if every parameter is used once in the graph or
    its uses add up before the hook runs (autograd sees to it).

    clip_norm: the largest norm of all gradients together. clip="two-pass" is exact and costs a second backward: the
    first pass only measures the norm, each gradient freed after its squares are added. clip="delayed" is an
    approximation that costs nothing: it scales by min(1, clip_norm / norm) with the norm of the *previous* step, so a
    sudden large gradient passes unclipped once, and is followed by a step that is clipped too much; the first step is
    not clipped. The optimizer's own clip_norm and skip_nonfinite need all gradients at once and must be off: `backward`
    raises ValueError for one that was set in `param_groups` meanwhile. With two-pass clipping a norm that is not finite
    takes no step at all and is counted in `skipped_steps`.

    Parameters split by FSDP2 are stepped when the reduction has made their part of the gradient; the norm is that of
    all parts, added up by one all-reduce a pass. Every process must call `backward` alike.

    Each call of `backward` is one optimizer step. Gradients cannot be accumulated over several: a step is not linear
    in the gradient, so it needs the sum of all micro-batches, and between two of them the sums of *all* parameters
    would have to be kept, which is the memory that is to be saved. From its making to `close`, `loss.backward()` and
    an `optimizer.step()` that finds no gradient raise RuntimeError: neither would train. A newer release of the same
    parameters closes this one.

    Raises ValueError for options that do not go together, for parameters that have a gradient already, when it is made
    and in every `backward`, and in the first `backward` for parameters of a DistributedDataParallel: it reduces
    gradients after they would have been used, and keeps buckets as large as all of them, so nothing would be saved.

    Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources (LOMO, 2023).

    >>> import torch
    >>> from pyeff.optim import AdamW8bit, GradientRelease
    >>> model = torch.nn.Linear(8, 2)
    >>> optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    >>> with GradientRelease(optimizer, clip_norm=1.0) as release:
    ...     loss = release.backward(lambda: model(torch.ones(3, 8)).square().mean())
    >>> model.weight.grad is None, int(optimizer.state[model.weight]["step"])
    (True, 1)
    """

    def __init__(self, optimizer: Optimizer8bit, *, clip_norm: float | None = None, clip: str = "two-pass") -> None:
        if not isinstance(optimizer, Optimizer8bit):
            raise TypeError(f"optimizer must be one of pyeff.optim; got {type(optimizer).__name__}")
        if clip not in CLIPS:
            raise ValueError(f"clip must be one of {', '.join(CLIPS)}; got {clip!r}")
        if clip_norm is not None and not 0.0 < clip_norm < math.inf:
            raise ValueError(f"clip_norm must be > 0 and finite, or None not to clip; got {clip_norm!r}")
        self.optimizer, self.clip_norm, self.clip = optimizer, clip_norm, clip
        self._check_options()
        self._check_no_gradients()
        self.norm: Tensor | None = None
        """The norm of all gradients of the last step, float64; None before the first, or without clipping."""
        self._squares: dict[tuple[torch.device, tuple[Any, ...]], Tensor] = {}
        self._measures = self._steps = False
        self._clip_by: Tensor | None = None
        self._counted = False
        self._first = True
        for other in list(_open):
            if not self._parameters().keys().isdisjoint(other._parameters()):
                other.close()
        self._hooks = [
            p.register_post_accumulate_grad_hook(self._hook(index, place))
            for index, group in enumerate(optimizer.param_groups)
            for place, p in enumerate(group["params"])
            if p.requires_grad
        ]
        self._hooks.append(optimizer.register_step_pre_hook(self._refuse_empty_step))
        _open.add(self)

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the hooks off; the optimizer is then again what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        _open.discard(self)

    def backward(self, loss: Callable[[], Tensor]) -> Tensor:
        """Compute a loss, run its backward and take a step; returns the loss without its graph.

        With two-pass clipping `loss` is called twice and must give the same both times: the states of torch's random
        generators are put back between the calls. Nothing waits for the device. Raises RuntimeError if a parameter is
        left with a gradient, as those are that were frozen or not in the optimizer when this was made.
        """
        if not self._hooks:
            raise ValueError("this GradientRelease was closed; make a new one")
        if not callable(loss):
            raise TypeError(f"loss must be a function that computes one loss, of the whole batch; got {loss!r}")
        self._check_options()
        self._check_no_gradients()
        if self._first:
            self._check_no_replicas()
            self._first = False
        two_passes = self.clip_norm is not None and self.clip == "two-pass"
        delayed = self.clip_norm is not None and self.clip == "delayed"
        self._clip_by = None
        if two_passes:
            with torch.random.fork_rng():
                self._pass(loss(), measures=True, steps=False)
            self._clip_by = self.norm = self._total()
        elif self.norm is not None:
            # A norm that is not finite belongs to a step that was taken; it must not skip this one.
            self._clip_by = torch.where(self.norm.isfinite(), self.norm, 0.0)
        value = loss()
        self._pass(value, measures=delayed, steps=True)
        if delayed:
            self.norm = self._total()
        return value.detach()

    def _parameters(self) -> dict[int, Tensor]:
        return {id(p): p for group in self.optimizer.param_groups for p in group["params"]}

    def _check_options(self) -> None:
        self.optimizer.check_options()
        for group in self.optimizer.param_groups:
            if group["clip_norm"] is not None or group["skip_nonfinite"]:
                raise ValueError(
                    "the optimizer must have clip_norm=None and skip_nonfinite=False, which need all gradients at "
                    "once; give clip_norm to GradientRelease"
                )

    def _check_no_gradients(self) -> None:
        for p in self._parameters().values():
            if p.grad is not None:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a gradient already, and gradients cannot be "
                    "accumulated while they are released; zero_grad() first, or take the micro-batches' steps "
                    "without GradientRelease"
                )

    def _check_no_replicas(self) -> None:
        """Parameters do not know that a reducer's hooks are on them, so look for the modules that put them there."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        if self._replica() is None:
            return
        gc.collect()  # one that nobody holds any more takes its hooks along
        shape = self._replica()
        if shape is not None:
            raise ValueError(
                f"a parameter of shape {shape} belongs to a DistributedDataParallel, which reduces gradients only "
                "after GradientRelease has used them, so that replicas diverge; split the model with "
                "fully_shard (FSDP2), or step after the backward, without GradientRelease"
            )

    def _replica(self) -> tuple[int, ...] | None:
        """The shape of a parameter that a DistributedDataParallel reduces, if there is one."""
        mine = self._parameters()
        for found in gc.get_objects():
            # Not isinstance, which asks proxies for their __class__ and may wake them.
            if issubclass(type(found), torch.nn.parallel.DistributedDataParallel):
                if not hasattr(found, "module"):
                    continue  # its making failed
                for name, p in found.module.named_parameters():
                    if id(p) in mine and name not in found.parameters_to_ignore:
                        return tuple(p.shape)
        return None

    def _refuse_empty_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        # With gradients somebody has set it is a step like any other; torch's checkpoints make states in this way.
        if all(p.grad is None for p in self._parameters().values()):
            raise RuntimeError(
                "optimizer.step() finds no gradients while a GradientRelease is active, whose backward(lambda: loss) "
                "takes the steps; leave step() out, or close() the GradientRelease"
            )

    def _pass(self, value: Tensor, *, measures: bool, steps: bool) -> None:
        self._squares, self._counted = {}, False
        self._measures, self._steps = measures, steps
        try:
            value.backward()
        finally:
            self._measures = self._steps = False
        for p in self._parameters().values():
            if p.grad is not None:
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} is left with a gradient after the backward: it was frozen "
                    "or not in the optimizer when this GradientRelease was made (make a new one), or something writes "
                    "gradients after they were used, as DistributedDataParallel does (step without GradientRelease)"
                )

    def _total(self) -> Tensor:
        squares = []
        for (_, groups), square in self._squares.items():  # in the same order on every process
            for group in groups:
                torch.distributed.all_reduce(square, group=group)
            squares.append(square)
        total = torch.zeros((), dtype=torch.float64) if not squares else squares[0]
        for square in squares[1:]:
            total = total + square.to(total.device)
        return total.sqrt()

    def _hook(self, index: int, place: int) -> Callable[[Tensor], None]:
        def use(p: Tensor) -> None:
            if not (self._measures or self._steps):
                p.grad = None  # there was none before, and none is to refuse the call that replaces this one
                raise RuntimeError(
                    f"a backward outside of an active GradientRelease reached a parameter of shape {tuple(p.shape)} "
                    "that it steps; call release.backward(lambda: loss) instead of loss.backward(), or close() it "
                    "for a plain backward"
                )
            assert p.grad is not None
            if self._measures:
                part, parts = part_of_grad(p.grad.detach(), p), (p.device, shard_groups(p))
                square = global_norm([part]).square()
                before = self._squares.get(parts)
                self._squares[parts] = square if before is None else before + square
            if self._steps:
                norm = None if self._clip_by is None else self._clip_by.to(p.device)
                self.optimizer.step_parameter(
                    index,
                    place,
                    norm=norm,
                    clip_norm=None if norm is None else self.clip_norm,
                    counts_skipped=not self._counted,
                )
                self._counted = True
            if p.grad.is_cuda and is_distributed(p.grad):
                # FSDP2 makes parts on one stream and may run this hook on another.
                local(p.grad).record_stream(torch.cuda.current_stream(p.device))
            p.grad = None

        return use
