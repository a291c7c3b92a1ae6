"""`pyeff.observe`: every sample's gradient norm, from the backward pass that computes the gradient."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.observation import deferral
from pyeff.observation.experts import observe_experts
from pyeff.observation.features import Features, Variant, features_of
from pyeff.observation.findings import Findings, mark
from pyeff.observation.graph import grad_fns, unobserved_uses
from pyeff.observation.interception import Interception
from pyeff.observation.noise_scale import NoiseScale
from pyeff.observation.recording import Forward
from pyeff.observation.refusals import check_deferred, check_wanted, known_unobservable, refuse_compiled
from pyeff.observation.rows import batch_of_call
from pyeff.ops.factored_sketch import FactoredSketch
from pyeff.ops.sketch_grads import Sketch


class UnobservableError(ValueError):
    """Some parameters' gradients cannot be told apart by sample; the message names them and says why."""


def observe(
    model: nn.Module,
    *,
    norms: bool = True,
    by_parameter: bool = False,
    strict: bool = True,
    noise_scale: NoiseScale | None = None,
    gradient: bool = True,
    defer: bool = False,
    sketch: Sketch | FactoredSketch | None = None,
    reference: Mapping[str, Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    variant: Variant = "adamw",
) -> GradientObservation:
    """Watch a model's backward passes for the norm of every sample's share of the gradient.

    If L is the loss that is backpropagated and theta_s the parameters as sample s reads them, then

        grad_norms[s] = |dL / dtheta_s|,   dL/dtheta = sum over s of dL / dtheta_s.

    For a loss that is a mean over B samples, B * grad_norms are the norms of the samples' own gradients.

    Samples are the indices of dimension 0 of the batch; in a packed batch what `segments`, the batch's `cu_seq_lens_q`
    or, where no attention mask is passed, restarting `position_ids` part. Every activation of a watched layer must keep
    them: samples first, or flattened tokens, sample after sample.

    Watched is every parameter that requires a gradient when the context begins. Linear layers, transposed ones
    (`Conv1D` of transformers), embeddings, positions shared by all samples, LayerNorm, RMSNorm, gains, offsets, biases,
    stacked experts (transformers' experts interface) and an embedding tied to the head are observed, whatever module
    uses them.

    Args:
        model: Its forward pass must run inside the context, and so must the backward pass. Activation checkpointing,
            autocast, accumulation and `DistributedDataParallel` work; under the latter, norms are of the rank's samples
            and its own loss.
        norms: Offer the per-sample norms. They may be left out where a sketch, a reference or `defer` is asked for.
        by_parameter: Offer squared norms for each parameter.
        strict: Raise `UnobservableError` before the gradient is computed, listing what cannot be observed exactly. If
            False, such parameters are left out of the norms and named in `unobserved`.
        noise_scale: Takes in each context's estimate when the context ends without an error.
        gradient: Compute the gradient too. If False, `.grad` stays as it is: linear layers and convolutions yield their
            norms by `pyeff.gram_norms` where that takes fewer FLOPs than their gradient, and what other layers form is
            freed at once. For scoring.
        defer: Compute no gradient of a parameter in the backward pass, but what is wanted of the samples, and keep what
            the gradient takes until `accumulate(keep)` forms it of the samples chosen meanwhile.
        sketch: Offer `sketches` of the samples' gradients, by the names of `model.named_parameters()` (without the
            prefix of DistributedDataParallel). With a `FactoredSketch`, `layer_sketches` of each matrix.
        reference: Names of parameters and gradients of their shapes: offer the samples' `dots` with them. A parameter
            that is not named adds nothing.
        optimizer: Adam or AdamW, of torch or of `pyeff.optim`, having stepped: sketch the direction it would step in
            after each sample's gradient alone (`pyeff.AdamWDirection`), with the moments as they are on entering;
            states in 8 bits are decoded for one parameter at a time.
        variant: "adamw", or "adamw-frozen" for the linear map by the moments as they are.

    Returns:
        A context manager and, inside and after it, the `GradientObservation`.

    Raises:
        UnobservableError: On entering, for what is known to be unobservable; otherwise when the forward pass ends or
            the backward pass begins, before any gradient is computed.
        ValueError: For a model that is compiled or has nothing to train, or options that make no sense.

    `param.grad` is that of the model alone up to the order of its sums. Cost: for a linear layer, one pass over its
    weight gradient per sample at most, see `pyeff.ops.linear_grad`; elsewhere, sums that the plain backward pass forms
    too. Memory: one number per sample and parameter, the workspace of one layer at a time, and for a tied embedding as
    many fp32 numbers as one layer's activations.

    >>> import torch, pyeff
    >>> model = torch.nn.Linear(4, 2)
    >>> x, y = torch.randn(3, 4), torch.randn(3, 2)
    >>> with pyeff.observe(model) as seen:
    ...     (model(x) - y).square().sum().backward()
    >>> seen.grad_norms.shape
    torch.Size([3])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if noise_scale is not None and not isinstance(noise_scale, NoiseScale):
        raise TypeError(f"noise_scale must be a pyeff.NoiseScale or None, got {type(noise_scale).__name__}")
    check_wanted(norms, by_parameter, noise_scale, sketch is None and reference is None and not defer)
    if defer:
        check_deferred(model, strict, noise_scale, gradient)
    if not gradient:
        if noise_scale is not None:
            raise ValueError("noise_scale needs the gradient: leave gradient=True")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ValueError("gradient=False leaves DistributedDataParallel nothing to reduce: observe model.module")
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    prefix = "module." if isinstance(model, nn.parallel.DistributedDataParallel) else ""
    features = features_of(named, prefix, sketch, reference, optimizer, variant)
    return GradientObservation(
        model,
        norms=norms,
        by_parameter=by_parameter,
        strict=strict,
        noise_scale=noise_scale,
        gradient=gradient,
        defer=defer,
        features=features,
    )


class GradientObservation(Findings):
    """What `observe` has seen; also the context manager itself. Make it with `observe`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        norms: bool,
        by_parameter: bool,
        strict: bool,
        noise_scale: NoiseScale | None,
        gradient: bool,
        defer: bool,
        features: Features | None = None,
    ) -> None:
        self.model, self._strict, self._smoothed, self.norms, self.defer = model, strict, noise_scale, norms, defer
        self.gradient = gradient and not defer  # whether the backward pass forms it
        self._by_parameter, self.features = by_parameter, features
        self.parameters: dict[int, tuple[str, nn.Parameter]] = {}
        self._by_name: dict[str, nn.Parameter] = {}
        self._own_hooks: set[int] = set()
        self._reduces = False
        self.unobserved: dict[str, str] = {}
        """Parameter name -> why its share is missing from the norms (only with `strict=False`)."""
        self._forwards: list[Forward] = []
        self._segments: tuple[Tensor | None, Tensor | None] = (None, None)
        self._input_shapes: set[torch.Size] = set()
        self._contributions: dict[str, int] = {}
        self._settled = 0
        self.in_forward = False
        self._had_gradient: bool | None = None
        self._left: dict[str, tuple[int, int]] = {}
        self._undo: list[Any] = []
        self._state = "new"

    def parameter(self, name: str) -> nn.Parameter:
        """The watched parameter of this name."""
        return self._by_name[name]

    def segments(self, cu_seqlens: Tensor, *, kept: Tensor | None = None) -> None:
        """Say where the samples of the next forward pass lie among its tokens: borders [samples + 1], int32.

        `kept` are the borders among the tokens whose logits alone are computed, where the model is told so
        (`logits_to_keep` of transformers). All are checked when the batch comes: `ValueError` unless they rise from 0,
        `cu_seqlens` to the batch's tokens.
        """
        self._segments = cu_seqlens, kept

    # What comes after the backward pass

    @property
    def held_bytes(self) -> int:
        """Memory that `defer=True` keeps until `accumulate`; of tensors that overlap the whole storage counts, once."""
        return deferral.held_bytes(self._forwards)

    def accumulate(self, keep: Tensor | Sequence[float] | None = None) -> None:
        """Form the gradient of the chosen samples and add it to `.grad`; with `observe(..., defer=True)`.

            param.grad += sum over samples s of keep[s] dL / dtheta_s

        The samples are those of all backward passes since the last `accumulate`, in the order of `grad_norms`. The
        loss is as it was backpropagated: where that was a mean over B samples and k are kept, weights of B / k make it
        the mean over these. Samples that are not kept are not read, so their NaN and infinity stay with them.

        Inside the context or after it, before the optimizer steps. Hooks of parameters run here and not in the backward
        pass. Under
        `DistributedDataParallel` each rank keeps some of its own samples, all ranks must call, and the gradients are
        averaged over the ranks here (not inside `no_sync`).

        Args:
            keep: Indices of samples (int, each once), a mask (bool [S]), or a weight for each sample (float [S]); None
                keeps all.

        Cost: 2 n (numbers of parameters) FLOPs for the n tokens kept, as their part of the backward pass would have
        taken, a copy of their rows unless all are kept, and of a head by `linear_cross_entropy` its logits again.
        Memory: a layer's kept rows beside `held_bytes`, which go layer by layer.

        Raises `RuntimeError` without `defer=True` or before a backward pass, `ValueError` or `TypeError` for a bad
        `keep`: then nothing has changed.
        """
        if not self.defer:
            raise RuntimeError("accumulate forms gradients that observe(model, defer=True) has deferred")
        pending = [f for f in self._forwards if f.began_backward and not f.accumulated]
        if not pending:
            raise RuntimeError("no backward pass has been observed since gradients were last accumulated")
        weights = deferral.weights_of(keep, sum(f.batch.samples for f in pending))
        own_hooks, self._state = int(self.is_open), "accumulating" if self.is_open else self._state
        try:
            with torch.no_grad():
                deferral.accumulate(pending, weights, own_hooks)
                if self._reduces and isinstance(self.model, nn.parallel.DistributedDataParallel):
                    deferral.average_over_ranks(self.model, self._by_name.values())
        finally:
            self._state = "open" if own_hooks else self._state

    # The context

    def __enter__(self) -> GradientObservation:
        if self._state != "new":
            raise RuntimeError("an observation can be entered once: call observe(model) again")
        self.parameters = {id(p): (n, p) for n, p in self.model.named_parameters() if p.requires_grad}
        self._by_name = dict(self.parameters.values())
        refuse_compiled(self.model)
        if not self.parameters:
            raise ValueError("the model has no parameter that requires a gradient: there is nothing to observe")
        for name, reason in known_unobservable(self.model, self.parameters).items():
            self.refuse(name, reason)
        self.raise_if_refused()
        watched = {key for other in list(_OPEN) for key in other.parameters}
        shared = [name for key, (name, _) in self.parameters.items() if key in watched]
        if shared:
            raise ValueError(f"{shared[0]} is observed already: leave that observation before another one begins")
        self._state = "open"
        _OPEN.add(self)
        try:
            self._install()
        except BaseException:
            self._restore()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()
        if kind is None and self._smoothed is not None and any(f.began_backward for f in self._forwards):
            self._smoothed.update(self.noise_scale)

    def _install(self) -> None:
        before = self.model.register_forward_pre_hook(_Hook(self._before_forward), with_kwargs=True)
        self._undo.append(before.remove)
        self._undo.append(self.model.register_forward_hook(_Hook(self._after_forward), always_call=True).remove)
        if self.defer and isinstance(self.model, nn.parallel.DistributedDataParallel):
            # As in no_sync: the backward pass leaves nothing to reduce.
            self._reduces = bool(self.model.require_backward_grad_sync)
            self._undo.append(functools.partial(setattr, self.model, "require_backward_grad_sync", self._reduces))
            self.model.require_backward_grad_sync = False
        elif not self.gradient and not self.defer:
            for _, parameter in self.parameters.values():
                self._undo.append(functools.partial(setattr, parameter, "grad", parameter.grad))
                parameter.grad = None
                self._undo.append(parameter.register_post_accumulate_grad_hook(_free).remove)
        for name, parameter in self.parameters.values():
            handle = parameter.register_hook(functools.partial(self._on_gradient, name, [0]))
            self._own_hooks.add(handle.id)
            self._undo.append(handle.remove)
        self._undo += observe_experts(self)
        self.mode = Interception(self)
        self.mode.__enter__()
        self._undo.append(self.mode.leave)

    def _restore(self) -> None:
        self._state = "closed"
        _OPEN.discard(self)
        while self._undo:
            self._undo.pop()()

    # What happens in a step

    def _before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        segments, self._segments = self._segments, (None, None)
        batch = batch_of_call(module, args, kwargs, *segments)
        self._input_shapes = {value.shape for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
        self._forwards.append(Forward(batch, self))
        self.in_forward = True

    def _after_forward(self, module: nn.Module, args: Any, output: Any) -> None:
        self.in_forward = False
        if output is not None:
            self.raise_if_refused()

    def current_forward(self) -> Forward:
        """The forward pass that a layer called now belongs to."""
        if not self._forwards:
            raise RuntimeError("a watched parameter is used before the observed model was called: its batch is unknown")
        if torch._C._current_graph_task_id() != -1:
            self.require_one_pending()
        return self._forwards[-1]

    def pending_forwards(self) -> list[Forward]:
        """The forward passes that may still get their backward pass, newest first."""
        return self._forwards[self._settled :][::-1]

    def require_one_pending(self) -> None:
        """Raise `RuntimeError` if a forward pass repeated by the backward pass could be one of several."""
        if len(self._forwards) - self._settled > 1:
            raise RuntimeError(
                f"{len(self._forwards) - self._settled} forward passes wait for their backward pass, and a re-entrant "
                "checkpoint does not say which of them it repeats: set use_reentrant=False, or call backward() after "
                "each forward pass"
            )

    def is_input_shape(self, shape: torch.Size) -> bool:
        """Whether the model was called with a tensor of this shape."""
        return shape in self._input_shapes

    def before_backward(self, roots: Any) -> None:
        """Look for uses that no layer observes, before any gradient is computed."""
        if torch._C._current_graph_task_id() == -1:
            if self._had_gradient is None:
                self._had_gradient = any(p.grad is not None for _, p in self.parameters.values())
            self._settle()
        found, others = unobserved_uses(grad_fns(roots), self.parameters)
        if found and self._strict and not self._forwards:
            raise UnobservableError(
                "no forward pass was observed: call the observed model inside the context, and then backward"
            )
        if others:
            found |= {
                name: "it did not require a gradient, or was not there, when the observation began"
                for name, parameter in self.model.named_parameters()
                if id(parameter) in others
            }
        for name, reason in found.items():
            self.refuse(name, reason)
        self.raise_if_refused()

    @contextlib.contextmanager
    def hooks_waiting(self) -> Iterator[None]:
        """A backward pass that leaves gradients for later: hooks of parameters would be called without one."""
        waiting: list[tuple[dict[int, Any], int, Any]] = []
        for _, parameter in self.parameters.values() if self.defer else ():
            for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
                hooks: dict[int, Any] = getattr(parameter, kind, None) or {}
                for key in [key for key in hooks if key not in self._own_hooks]:
                    waiting.append((hooks, key, hooks.pop(key)))
        try:
            yield
        finally:
            for hooks, key, hook in waiting:
                hooks[key] = hook

    def after_backward(self) -> None:
        """Note what a backward pass has left in `.grad`."""
        for name, parameter in self.parameters.values():
            if parameter.grad is not None:
                self._left[name] = mark(parameter.grad)

    def _settle(self) -> None:
        # Forward passes up to the newest that an earlier backward pass has reached wait no longer.
        for index in range(self._settled, len(self._forwards)):
            if self._forwards[index].began_backward:
                self._settled = index + 1

    def _on_gradient(self, name: str, known: list[int], gradient: Tensor) -> None:
        if self._state == "accumulating":
            return
        # A gradient has come. Did an observed layer note anything about it?
        count = self._contributions.get(name, 0)
        if count == known[0]:
            self.refuse(name, "its gradient came from something that is not observed", now=True)
        known[0] = count

    def count_contribution(self, name: str) -> None:
        """Note that a layer has measured its share of a parameter's gradient."""
        self._contributions[name] = self._contributions.get(name, 0) + 1

    @property
    def is_open(self) -> bool:
        """Whether the context is active."""
        return self._state == "open"

    def refuse(self, name: str, reason: str, *, now: bool = False) -> None:
        """Leave a parameter out; with `strict` that is an error, raised at once or when the listing is complete."""
        self.unobserved.setdefault(name, reason)
        if now or torch._C._current_graph_task_id() != -1:
            self.raise_if_refused()

    def raise_if_refused(self) -> None:
        """Raise `UnobservableError` when `strict` and something was refused."""
        if self._strict and self.unobserved:
            listing = "\n".join(f"  {name}: {reason}" for name, reason in self.unobserved.items())
            raise UnobservableError(
                f"these parameters cannot be observed exactly (strict=False leaves them out):\n{listing}"
            )


# Those that are active, in any thread.
_OPEN: weakref.WeakSet[GradientObservation] = weakref.WeakSet()


class _Hook:
    """A hook of an observed module. Nobody observes a copy of the module: there it does nothing."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        self._call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (_nothing,)


def _nothing(*args: Any) -> None:
    pass


def _free(parameter: Tensor) -> None:
    parameter.grad = None
