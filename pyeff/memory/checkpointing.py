"""`pyeff.checkpoint`: layers run again in the backward pass, their attention does not."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as run_checkpointed

from pyeff.memory.checkpointed_layers import (
    find_layers,
    refuse_gradient_checkpointing,
    refuse_nested,
    replace_attention,
    without_caches,
)
from pyeff.memory.stored import Compression, Offload, Storing
from pyeff.ops.attention import FORWARD, forward_by

Keep = Literal["attention", "nothing"]


class AttentionRerunError(RuntimeError):
    """Attention would run forward again in the backward pass; the message names the layer and the reason."""


@dataclass
class AttentionRuns:
    """How often a layer asked for attention in forward passes, in re-runs, and how often a kernel answered."""

    forward: int = 0
    rerun: int = 0
    computed: int = 0


def checkpoint(
    model: nn.Module,
    *,
    layers: Literal["auto"] | Iterable[str | nn.Module] = "auto",
    keep: Keep = "attention",
    offload: bool = False,
    compress: Compression | None = None,
    strict: bool = True,
) -> Checkpoints:
    """Keep of each layer its input and what attention returned, and run the rest of it again in the backward pass.

    A checkpointed layer keeps 2 s h bytes a token, its input, for s = 2 bytes an activation and width h; with
    `keep="attention"` also attention's output and log-sum-exp, 2 q + 4 a for q = a heads of a head size each. In the
    re-run, attention gets q, k and v computed again and what was kept, computes nothing forward, and its gradient is
    `torch.ops.pyeff.attention_backward` of these: gradients are those without checkpointing, to the bit where the
    kernels give the same bits in every run.

    Decoder layers of transformers are found by themselves, and `pyeff.attention` takes the place of their attention
    implementation while gradients are wanted: causal, bidirectional, sliding windows, softcaps, grouped heads, padding
    (`attention_mask` [batch, tokens]) and packed samples (`position_ids`, or `cu_seq_lens_q`). Outputs at padding are
    0, as flash-attention's are. Under `no_grad`, as in generation, the model runs as it did before. Other modules are
    named, and call `pyeff.attention` themselves.

    Args:
        model: Its layers' `forward` is replaced until the checkpoints are removed; parameters, hooks and
            `state_dict` stay. Wrap it in `DistributedDataParallel` or `fully_shard` as usual.
        layers: "auto", transformers' decoder layers; or modules or their names in `model`, where a `ModuleList` stands
            for its items.
        keep: "attention"; or "nothing", `torch.utils.checkpoint` around each layer with its attention untouched.
        offload: Hold what is kept in pinned host memory; it is copied while layers run and comes back one layer ahead.
            Nothing happens to tensors on the CPU.
        compress: "fp8" (e4m3) or "int8", with an fp32 scale for every 128 elements: layers' inputs that require a
            gradient take about half of bfloat16's bytes. The re-run then starts from an input off by half a step, and
            the gradient is off too: with fp8 about as far as bfloat16 is from float32, with int8 more where activations
            have outliers, as those of trained models do; see docs/checkpointing.md.
        strict: Raise `AttentionRerunError` where a kept layer runs no `pyeff.attention`, or where the backward pass
            would run it again; if False, it runs, and `attention_runs` tells.

    Returns:
        `Checkpoints`: a context manager whose end, like `remove()`, restores the model.

    Raises:
        TypeError, ValueError: For options that make no sense, layers that are not found or lie in each other, a model
            whose attention does not go through transformers' registry, or that has gradient checkpointing switched on.
            In the forward pass: `ValueError` for attention dropout, and `UnsupportedMaskError`, one too, for a mask
            that cannot be honoured.

    Layers given a transformers cache drop it while gradients are wanted, as transformers does. In a compiled model the
    layers run outside the graph; with `fullgraph=True` the compiler says so.

    Cost: one more forward pass of the layers without attention. Chen et al. 2016, arXiv:1604.06174; Li et al. 2024,
    "DistFlashAttn", arXiv:2310.03294.

    >>> import torch, pyeff
    >>> class Layer(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.qkv, self.out = torch.nn.Linear(64, 192), torch.nn.Linear(64, 64)
    ...     def forward(self, x):
    ...         q, k, v = self.qkv(x).unflatten(-1, (3, 2, 32)).unbind(-3)
    ...         return x + self.out(pyeff.attention(q, k, v).flatten(-2))
    >>> model = torch.nn.Sequential(Layer(), Layer())
    >>> with pyeff.checkpoint(model, layers=["0", "1"]) as checkpoints:
    ...     model(torch.randn(2, 8, 64, requires_grad=True)).sum().backward()
    >>> checkpoints.attention_runs["1"]
    AttentionRuns(forward=1, rerun=1, computed=1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if keep not in ("attention", "nothing"):
        raise ValueError(f"keep must be 'attention' or 'nothing', got {keep!r}")
    if compress not in (None, "fp8", "int8"):
        raise ValueError(f"compress must be None, 'fp8' or 'int8', got {compress!r}")
    for name, value in (("offload", offload), ("strict", strict)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}")
    found = find_layers(model, layers)
    refuse_nested(found)
    for name, layer in found.items():
        if isinstance(layer.__dict__.get("forward"), _CheckpointedForward):
            raise ValueError(f"layer {name!r} is checkpointed already: call remove() on what checkpoint returned")
        refuse_gradient_checkpointing(name, layer)
    return Checkpoints(model, found, keep=keep, offload=offload, compress=compress, strict=strict)


class Checkpoints:
    """The checkpointed layers of a model, and their removal. Make it with `checkpoint`."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        *,
        keep: Keep,
        offload: bool,
        compress: Compression | None,
        strict: bool,
    ) -> None:
        self.layers = tuple(layers)
        """Names of the layers."""
        self.attention_runs = {name: AttentionRuns() for name in layers}
        """Layer -> `AttentionRuns` since the start: nothing ran twice where `computed` equals `forward`."""
        self._undo: list[Any] = []
        offloading = Offload() if offload else None
        if keep == "attention":
            self._undo += replace_attention(model, layers)
        for name, layer in layers.items():
            forward = _CheckpointedForward(
                name, layer, self.attention_runs[name], keep == "attention", strict, compress, offloading
            )
            forward.install()
            self._undo.append(forward.remove)

    def remove(self) -> None:
        """Restore the model; called again, it does nothing. Graphs made before can still be differentiated."""
        while self._undo:
            self._undo[-1]()
            self._undo.pop()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.remove()


class _CheckpointedForward:
    """Stands in for the `forward` of a layer: hooks of the module, such as those of FSDP, stay around it."""

    def __init__(
        self,
        name: str,
        layer: nn.Module,
        runs: AttentionRuns,
        keeps: bool,
        strict: bool,
        compression: Compression | None,
        offload: Offload | None,
    ) -> None:
        self.name, self.layer, self.runs, self.keeps, self.strict = name, layer, runs, keeps, strict
        self.compression, self.offload = compression, offload
        self.had_own = "forward" in layer.__dict__
        self.forward = layer.forward
        functools.update_wrapper(self, self.forward)

    def install(self) -> None:
        self.layer.forward = self
        # What torch.nn.DataParallel calls: its replicas would share this object, and with it the first one's weights.
        self.layer.__dict__["_replicate_for_data_parallel"] = self.refuse_replicas

    def refuse_replicas(self) -> nn.Module:
        raise RuntimeError(
            f"layer {self.name!r} is checkpointed, and torch.nn.DataParallel cannot copy it to several devices: use "
            "DistributedDataParallel or fully_shard, show it one device, or remove() the checkpoints"
        )

    def remove(self) -> None:
        if self.layer.__dict__.get("forward") is not self:
            raise RuntimeError(f"layer {self.name!r} got another forward since it was checkpointed: undo that first")
        del self.layer.__dict__["_replicate_for_data_parallel"]
        if self.had_own:
            self.layer.forward = self.forward
        else:
            del self.layer.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return self._run(args, kwargs)

    @torch.compiler.disable(reason="checkpointed layers run outside compiled graphs")
    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_gradient_checkpointing(self.name, self.layer)
        if self.keeps and self.strict and torch._C._current_graph_task_id() != -1:
            raise AttentionRerunError(
                f"layer {self.name!r} runs again in a backward pass, attention with it: another checkpoint encloses "
                "it; remove that one"
            )
        args, kwargs = without_caches(self.layer, args, kwargs)
        # torch keeps its function's arguments where hooks and devices are known, and keywords in a closure.
        names = [name for name, value in kwargs.items() if isinstance(value, Tensor) and value.requires_grad]
        own = {name: value for name, value in kwargs.items() if name not in names}
        given = [kwargs[name] for name in names]

        weights: list[tuple[str, Tensor, int]] = []

        def run(*values: Any) -> Any:
            if weights:
                self.refuse_other_weights(weights)
            else:
                weights.extend(_versions(self.layer))
            return self.forward(*values[len(names) :], **dict(zip(names, values, strict=False)), **own)

        values = (*given, *args)
        inputs = [t for t in values if isinstance(t, Tensor) and t.requires_grad and t.is_floating_point()]
        kept = _KeptAttention(self)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            return kept.filled(), _Replay(kept)

        with self._storing(inputs):
            options: dict[str, Any] = {"context_fn": contexts} if self.keeps else {}
            result = run_checkpointed(run, *values, use_reentrant=False, **options)
            kept.save()
        return result

    def refuse_other_weights(self, before: list[tuple[str, Tensor, int]]) -> None:
        """What autograd says of weights that it saved, and cannot of those that are read again."""
        now = {name: (weight, version) for name, weight, version in _versions(self.layer)}
        for name, weight, version in before:
            found, found_version = now.get(name, (None, 0))
            if found is not weight or found_version != version:
                raise RuntimeError(
                    f"layer {self.name!r} runs again in the backward pass, and its {name} is no longer what it was in "
                    "the forward pass: change weights after the backward pass, and remove() the checkpoints where "
                    "torch.func.functional_call puts others in their place"
                )

    def _storing(self, inputs: list[Tensor]) -> AbstractContextManager[Any]:
        if self.compression is None and self.offload is None:
            return contextlib.nullcontext()
        storing = Storing(inputs, self.compression, self.offload)
        return torch.autograd.graph.saved_tensors_hooks(storing.pack, storing.unpack)


def _versions(layer: nn.Module) -> list[tuple[str, Tensor, int]]:
    return [(name, p, p._version) for name, p in layer.named_parameters() if not p.is_inference()]


class _KeptAttention:
    """out and lse of one forward pass of a layer, outside the checkpointed function.

    They are saved in a node of their own, so that hooks on saved tensors see them, and so that writing to them later is
    noticed.
    """

    def __init__(self, owner: _CheckpointedForward) -> None:
        self.owner = owner
        self.calls: list[tuple[Any, ...]] = []
        self.tensors: list[Tensor] = []
        self.versions: list[int] = []
        self.node: Any = None

    @contextlib.contextmanager
    def filled(self) -> Iterator[None]:
        with forward_by(self.compute):
            yield

    def compute(self, q: Tensor, k: Tensor, v: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
        out, lse = FORWARD(q, k, v, *options)
        self.owner.runs.forward += 1
        self.owner.runs.computed += 1
        self.calls.append(_call(q, k, options))
        # Not the tensors themselves, which will own this graph.
        self.tensors += [out.detach(), lse.detach()]
        self.versions += [out._version, lse._version]
        return out, lse

    def save(self) -> None:
        if not self.owner.keeps:
            return
        if not self.calls and self.owner.strict:
            raise AttentionRerunError(
                f"layer {self.owner.name!r} ran no pyeff.attention, so that whatever attention it has would run again "
                "in the backward pass: call pyeff.attention in it, name other layers, or checkpoint with keep='nothing'"
            )
        if [t._version for t in self.tensors] != self.versions:
            raise RuntimeError(
                f"layer {self.owner.name!r} writes to what attention returned, which is kept: copy it first, or "
                "checkpoint with keep='nothing'"
            )
        if self.tensors:
            root = torch.empty(0, requires_grad=True)
            self.node = _Saved.apply(root, *self.tensors).grad_fn
        self.tensors = []

    def saved(self) -> tuple[Tensor, ...]:
        tensors: tuple[Tensor, ...] = self.node.saved_tensors
        return tensors


class _Replay:
    """One re-run: the calls of attention in their order, answered by what was kept. Entered once for each backward."""

    def __init__(self, kept: _KeptAttention) -> None:
        self.kept = kept
        self.contexts: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        saved = self.kept.saved() if self.kept.calls else ()
        position = iter(range(len(self.kept.calls)))
        context = forward_by(lambda *arguments: self.answer(saved, next(position, None), *arguments))
        context.__enter__()
        self.contexts.append(context)

    def __exit__(self, *error: Any) -> None:
        self.contexts.pop().__exit__(*error)

    def answer(
        self, saved: Sequence[Tensor], index: int | None, q: Tensor, k: Tensor, v: Tensor, *options: Any
    ) -> tuple[Tensor, Tensor]:
        owner = self.kept.owner
        owner.runs.rerun += 1
        if index is not None and self.kept.calls[index] == _call(q, k, options):
            out, lse = saved[2 * index : 2 * index + 2]
            return out.detach(), lse.detach()
        if owner.strict:
            reason = (
                f"more often than in the forward pass ({len(self.kept.calls)} times)"
                if index is None
                else "with other shapes or options than in the forward pass"
            )
            raise AttentionRerunError(
                f"layer {owner.name!r} calls attention {reason} when it runs again in the backward pass: what it does "
                "must depend on its arguments alone"
            )
        owner.runs.computed += 1
        return FORWARD(q, k, v, *options)


class _Saved(torch.autograd.Function):
    """Holds tensors as a node of autograd holds them; never differentiated."""

    @staticmethod
    def forward(ctx: Any, root: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("nothing leads here")


def _call(q: Tensor, k: Tensor, options: tuple[Any, ...]) -> tuple[Any, ...]:
    """What two calls of attention have in common when the one's results are the other's."""
    packed, packed_k = options[:2]
    borders = [None if t is None else tuple(t.shape) for t in (packed, packed_k)]
    return (q.shape, k.shape, q.dtype, *borders, *options[2:])


__all__ = ["AttentionRerunError", "AttentionRuns", "Checkpoints", "Keep", "checkpoint"]
