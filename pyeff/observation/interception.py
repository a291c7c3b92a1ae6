"""Puts observed layers in the place of torch's own wherever a watched parameter is used."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from pyeff.observation.convolution import ObservedConvolution, geometry_of
from pyeff.observation.head import ObservedHead
from pyeff.observation.layers import (
    ObservedBroadcast,
    ObservedEmbedding,
    ObservedLinear,
    ObservedNorm,
    ObservedScale,
    ObservedShift,
)
from pyeff.observation.recording import Kind, Use
from pyeff.observation.rows import Rows, UnknownRows
from pyeff.ops.linear_cross_entropy import check_leading, linear_cross_entropy, reduced

if TYPE_CHECKING:
    from pyeff.observation.observer import GradientObservation


class Ref(NamedTuple):
    """A watched parameter, or a tensor made of one and nothing else: `scale` times its entries, plus a number."""

    name: str
    scale: float = 1.0
    transposed: bool = False
    reshaped: bool = False
    part: bool = False


class Interception(TorchFunctionMode):
    """While active, replaces the calls of torch that an observed layer stands for."""

    def __init__(self, observation: GradientObservation) -> None:
        super().__init__()
        self.observation = observation
        self._aliases: dict[int, tuple[weakref.ref[Tensor], Ref]] = {}
        self._fixed_ids = {id(t) for t in (*observation.model.parameters(), *observation.model.buffers())}
        self._fixed: dict[int, weakref.ref[Tensor]] = {}
        self._sampled: Tensor | None = None
        self._moved: dict[int, weakref.ref[Tensor]] = {}

    def leave(self) -> None:
        """Leave this mode, whichever modes were entered after it."""
        entered = _get_current_function_mode_stack()
        if self not in entered:  # of another thread: there it does nothing any more
            return
        above = [_pop_mode() for _ in range(len(entered) - entered.index(self))][:-1]
        for mode in reversed(above):
            _push_mode(mode)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand a call to its observed layer, if it has one and uses a watched parameter."""
        kwargs = kwargs or {}
        if not self.observation.is_open:
            return func(*args, **kwargs)
        handler = _HANDLERS.get(func)
        if not torch.is_grad_enabled():
            return handler(self, func, *args, **kwargs) if handler in _BACKWARD else func(*args, **kwargs)
        result = func(*args, **kwargs) if handler is None else handler(self, func, *args, **kwargs)
        if self._moved or func in _MOVES:
            self._follow(func, args, kwargs, result)
        if not self.observation.in_forward or (args and isinstance(args[0], Tensor) and not self.is_fixed(args[0])):
            return result
        if result is not self._sampled and isinstance(result, Tensor | tuple | list) and self._all_fixed(args, kwargs):
            for t in (result,) if isinstance(result, Tensor) else result:
                if isinstance(t, Tensor):
                    self._fixed[id(t)] = weakref.ref(t, functools.partial(_forget, self._fixed, id(t)))
        self._sampled = None
        return result

    def is_fixed(self, t: Tensor) -> bool:
        """Whether the model made a tensor of parameters, buffers and numbers alone, so that it holds no samples.

        What was made where this mode does not look (a custom function, a checkpoint, under no_grad) is taken to hold
        them.
        """
        if id(t) in self._fixed_ids:
            return True
        known = self._fixed.get(id(t))
        return known is not None and known() is t

    def _follow(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Notice results as long as the batch whose dimension 0 does not count its samples."""
        if not (self.observation.in_forward and isinstance(result, Tensor) and args):
            return
        batch = self.observation.current_forward().batch
        if batch.packed is not None or batch.samples < 2 or result.shape[:1] != (batch.samples,):
            return
        move = _MOVES.get(func)
        if move is None:
            # Of several tensors that were stacked, one taken out again has its samples first.
            moved = result.ndim >= max((t.ndim for t in args if isinstance(t, Tensor)), default=0) and any(
                isinstance(t, Tensor) and t.shape[:2] == result.shape[:2] and self.is_moved(t) for t in args
            )
        elif isinstance(args[0], Tensor):
            moved = self.is_moved(args[0]) != move(result, *args, **kwargs)
        else:
            moved = move(result, *args, **kwargs)
        if moved:
            self._moved[id(result)] = weakref.ref(result, functools.partial(_forget, self._moved, id(result)))

    def is_moved(self, t: Tensor) -> bool:
        """Whether dimension 0 of a tensor is known to count something else than samples."""
        known = self._moved.get(id(t))
        return known is not None and known() is t

    def _all_fixed(self, args: Iterable[Any], kwargs: dict[str, Any]) -> bool:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                if not self.is_fixed(value):
                    return False
            elif isinstance(value, tuple | list) and not self._all_fixed(value, {}):
                return False
        return True

    def sampled(self, t: Tensor) -> Tensor:
        """Say that the result of this call holds samples although nothing it was made of does."""
        self._sampled = t
        return t

    def ref(self, t: Any) -> Ref | None:
        """The parameter behind a tensor."""
        if not isinstance(t, Tensor) or not t.requires_grad:
            return None
        known = self.observation.parameters.get(id(t))
        if known is not None:
            return Ref(known[0])
        alias = self._aliases.get(id(t))
        return alias[1] if alias is not None and alias[0]() is t else None

    def alias(self, t: Tensor, ref: Ref) -> Tensor:
        """Remember what a tensor was made of, for as long as it lives."""
        if self.observation.parameters.get(id(t)) is None:
            key = id(t)
            self._aliases[key] = (weakref.ref(t, functools.partial(_forget, self._aliases, key)), ref)
        return t

    def use(
        self, ref: Ref | None, kind: Kind, x: Tensor, leading: int, size: int, *, repeated: bool = False
    ) -> Use | None:
        """A use of a parameter by a layer with input `x`, whose first `leading` dimensions are rows.

        `repeated` says that x is the parameter itself, repeated for each sample. None when the rows cannot be told
        apart by sample; the parameter is then refused.
        """
        if ref is None:
            return None
        observation = self.observation
        replays = _replays()
        if self.is_moved(x):
            reason = "does not keep the samples: its dimension 0 was moved or summed"
            observation.refuse(ref.name, f"its layer's input of shape {tuple(x.shape)} {reason}")
            return None
        if (
            kind != "embedding"
            and not repeated
            and self.is_fixed(x)
            and observation.current_forward().batch.samples != 1
        ):
            observation.refuse(ref.name, f"its layer's input of shape {tuple(x.shape)} does not depend on the batch")
            return None
        # The layers of a replay compute no gradient; they must only be the ones of the forward pass, whichever it was.
        forwards = observation.pending_forwards() if replays else [observation.current_forward()]
        for forward in forwards:
            try:
                rows = forward.batch.rows(tuple(x.shape[:leading]), x.device)
            except UnknownRows as error:
                reason = f"its layer's input of shape {tuple(x.shape)} does not keep the samples: {error}"
                continue
            # Gradients of two parts do not add up entry by entry: no size means that a second use is refused.
            use = Use(forward, ref.name, kind, rows, ref.scale, 0 if ref.part else size, ref.transposed)
            if not replays:
                forward.register(use)
            return use
        if not replays:
            observation.refuse(ref.name, reason)
        return None

    def expert_uses(self, tensors: dict[str, Any], x: Tensor) -> tuple[dict[str, Use | None], Rows | None]:
        """The uses of the parameters of stacked experts fed from the tokens `x` [N, d], and the samples of these."""
        uses = {name: self.use(self.ref(t), "linear", x, 1, 0) for name, t in tensors.items()}
        return uses, next((use.rows for use in uses.values() if use is not None), None)


def _forget(known: dict[int, Any], key: int, _: weakref.ref[Tensor]) -> None:
    known.pop(key, None)


def _replays() -> bool:
    """Whether a checkpoint repeats, for its saved tensors alone, what the forward pass has registered already."""
    if torch._C._current_graph_task_id() == -1:
        return False
    node = torch._C._current_autograd_node()
    return getattr(node, "_forward_cls", None) is not torch.utils.checkpoint.CheckpointFunction


def _of_view(result: Tensor, input: Tensor, *args: Any, **kwargs: Any) -> bool:
    # A view that keeps dimension 0 keeps its stride.
    return result.stride()[:1] != input.stride()[:1]


def _of_sum(result: Tensor, input: Tensor, dim: Any = None, *args: Any, **kwargs: Any) -> bool:
    dims = dim if isinstance(dim, tuple | list) else (dim,)
    return 0 in dims or -input.ndim in dims


def _of_stack(result: Tensor, tensors: Any, dim: int = 0, **kwargs: Any) -> bool:
    return dim in (0, -result.ndim)


# Whether a call takes the samples out of dimension 0 of what it is given, or, where they were not there, into it.
_MOVES: dict[Any, Callable[..., bool]] = {torch.stack: _of_stack}
for _name in ("transpose", "permute", "swapaxes", "swapdims", "movedim", "moveaxis", "t"):
    _MOVES |= {getattr(torch, _name): _of_view, getattr(Tensor, _name): _of_view}
_MOVES[vars(torch._C.TensorBase)["T"].__get__] = _of_view
for _name in ("sum", "mean", "amax", "amin", "prod", "logsumexp"):
    _MOVES |= {getattr(torch, _name): _of_sum, getattr(Tensor, _name): _of_sum}

Handler = Callable[..., Any]
_TRANSPOSES = [vars(torch._C.TensorBase)[name].__get__ for name in ("T", "mT")]
_HANDLERS: dict[Any, Handler] = {}
_BACKWARD: set[Handler] = set()


def _handles(*functions: Any) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(functions, handler))
        return handler

    return register


@_handles(F.linear)
def _linear(mode: Interception, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return _product(mode, lambda: func(input, weight, bias), input, weight, bias, False)


@_handles(torch.addmm, Tensor.addmm)
def _addmm(mode: Interception, func: Any, input: Tensor, mat1: Tensor, mat2: Tensor, **options: Any) -> Tensor:
    if options or input.ndim != 1:
        return func(input, mat1, mat2, **options)
    return _product(mode, lambda: func(input, mat1, mat2), mat1, mat2, input, True)


@_handles(torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
def _matmul(mode: Interception, func: Any, input: Tensor, other: Tensor, **options: Any) -> Tensor:
    if options or other.ndim != 2:
        return func(input, other, **options)
    return _product(mode, lambda: func(input, other), input, other, None, True)


def _product(
    mode: Interception, plain: Callable[[], Tensor], x: Tensor, w: Tensor, b: Tensor | None, transposed: bool
) -> Tensor:
    w_ref, b_ref = mode.ref(w), mode.ref(b)
    if (w_ref is None and b_ref is None) or mode.ref(x) is not None or w.ndim != 2 or x.ndim < 1:
        return plain()
    if w_ref is not None and w_ref.reshaped:
        return plain()
    w_use = mode.use(w_ref, "linear", x, x.ndim - 1, w.numel())
    b_use = mode.use(b_ref, "vector", x, x.ndim - 1, b.numel()) if b is not None else None
    if w_use is None and b_use is None:
        return plain()
    return ObservedLinear.apply(x, w, b, transposed, w_use, b_use)


@_handles(linear_cross_entropy)
def _head(
    mode: Interception,
    func: Any,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    w_ref, b_ref = mode.ref(weight), mode.ref(bias)
    w_use = b_use = None
    if mode.ref(hidden) is None and (w_ref is None or not (w_ref.reshaped or w_ref.transposed)):
        check_leading(hidden, targets)
        w_use = mode.use(w_ref, "linear", hidden, hidden.ndim - 1, weight.numel())
        # Its samples' gradients are never formed, so those of a second use could not be added: no size.
        b_use = mode.use(b_ref, "vector", hidden, hidden.ndim - 1, 0)
    if w_use is None and b_use is None:
        return func(hidden, weight, targets, bias=bias, softcap=softcap, ignore_index=ignore_index, reduction=reduction)
    losses = ObservedHead.apply(hidden, weight, bias, targets, softcap, ignore_index, w_use, b_use)
    return reduced(losses, targets, ignore_index, reduction)


@_handles(F.embedding)
def _embedding(
    mode: Interception,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    def plain() -> Tensor:
        return func(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    ref = mode.ref(weight)
    if ref is None or max_norm is not None or scale_grad_by_freq or sparse or ref.reshaped or ref.transposed:
        return plain()
    if padding_idx is None:
        padding_idx = -1
    elif padding_idx < 0:
        padding_idx += weight.shape[0]
    batch = mode.observation.current_forward().batch
    samples = None
    if batch.packed is None and batch.samples > 1:
        if input.shape[:1] == (batch.samples,) and not _tells_samples(mode, input):
            mode.observation.refuse(
                ref.name, f"indices of shape {tuple(input.shape)} may be {batch.samples} samples or as many positions"
            )
            return plain()
        # One row of positions, read by every sample: autograd would add the samples up before the table is reached.
        one_row = (input.ndim == 2 and input.shape[0] == 1) or (input.ndim == 1 and input.shape == batch.leading[1:])
        samples = batch.samples if one_row else None
    shape = input if samples is None else input.reshape(1, -1).expand(samples, -1)
    use = mode.use(ref, "embedding", shape, shape.ndim, weight.numel())
    if use is None:
        return plain()
    use.ids = shape.reshape(-1)
    result = ObservedEmbedding.apply(weight, input, padding_idx, samples, use)
    return result if samples is None else mode.sampled(result)


def _tells_samples(mode: Interception, ids: Tensor) -> bool:
    # As many indices in dimension 0 as there are samples. Are these the samples? Not certainly, if the model made them
    # without looking at the batch: a table of relative positions is square.
    batch = mode.observation.current_forward().batch
    if mode.is_fixed(ids):
        return mode.observation.is_input_shape(ids.shape) and ids.shape[1:2] != (batch.samples,)
    return ids.ndim > 1 or batch.leading[1:] != (batch.samples,)


def _last_dimensions(x: Tensor, w: Tensor) -> int | None:
    """How many leading dimensions of x are rows when w broadcasts over all of them and over nothing else."""
    shape = tuple(w.shape)
    if w.numel() == 1:
        return x.ndim
    while shape and shape[0] == 1:
        shape = shape[1:]
    rows = x.ndim - len(shape)
    return rows if rows > 0 and tuple(x.shape[rows:]) == shape and w.ndim <= x.ndim else None


def _elementwise(mode: Interception, layer: Any, plain: Callable[[], Tensor], a: Any, b: Any) -> Tensor | None:
    a_ref, b_ref = mode.ref(a), mode.ref(b)
    if (a_ref is None) == (b_ref is None):
        return None
    x, w, ref = (b, a, a_ref) if a_ref is not None else (a, b, b_ref)
    if not isinstance(x, Tensor) or x.ndim == 0:
        return None
    rows = _last_dimensions(x, w)
    if rows is None:
        return None
    use = mode.use(ref, "vector", x, rows, w.numel())
    return None if use is None else layer.apply(x, w, use)


@_handles(torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply)
def _mul(mode: Interception, func: Any, input: Any, other: Any, **options: Any) -> Tensor:
    if options:
        return func(input, other, **options)
    result = _elementwise(mode, ObservedScale, lambda: func(input, other), input, other)
    if result is not None:
        return result
    result = func(input, other)
    for tensor, factor in ((input, other), (other, input)):
        ref = mode.ref(tensor)
        if ref is not None and isinstance(factor, int | float):
            mode.alias(result, ref._replace(scale=ref.scale * factor))
    return result


@_handles(torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
def _add(mode: Interception, func: Any, input: Any, other: Any, **options: Any) -> Tensor:
    if options:
        return func(input, other, **options)
    result = _elementwise(mode, ObservedShift, lambda: func(input, other), input, other)
    if result is not None:
        return result
    result = func(input, other)
    for tensor, summand in ((input, other), (other, input)):
        ref = mode.ref(tensor)
        if ref is not None and isinstance(summand, int | float):
            mode.alias(result, ref)
    return result


@_handles(Tensor.expand)
def _expand(mode: Interception, func: Any, input: Tensor, *sizes: Any, **options: Any) -> Tensor:
    ref = mode.ref(input)
    result = func(input, *sizes, **options)
    if ref is None or input.ndim == 0 or input.shape[0] != 1 or result.ndim != input.ndim:
        return result
    batch = mode.observation.current_forward().batch
    if batch.packed is not None or result.shape[0] != batch.samples:
        return result
    use = mode.use(ref, "vector", result, 1, input.numel(), repeated=True)
    return mode.sampled(result if use is None else ObservedBroadcast.apply(input, result.shape, use))


@_handles(F.layer_norm)
def _layer_norm(
    mode: Interception,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _norm(
        mode, lambda: func(input, normalized_shape, weight, bias, eps), input, normalized_shape, weight, bias, eps, True
    )


@_handles(F.rms_norm)
def _rms_norm(
    mode: Interception,
    func: Any,
    input: Tensor,
    normalized_shape: Any,
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    return _norm(
        mode, lambda: func(input, normalized_shape, weight, eps), input, normalized_shape, weight, None, eps, False
    )


def _norm(
    mode: Interception,
    plain: Callable[[], Tensor],
    x: Tensor,
    shape: Any,
    w: Tensor | None,
    b: Tensor | None,
    eps: float | None,
    center: bool,
) -> Tensor:
    w_ref, b_ref = mode.ref(w), mode.ref(b)
    if w_ref is None and b_ref is None:
        return plain()
    rows = x.ndim - len(tuple(shape))
    w_use = mode.use(w_ref, "vector", x, rows, w.numel()) if w is not None else None
    b_use = mode.use(b_ref, "vector", x, rows, b.numel()) if b is not None else None
    if w_use is None and b_use is None:
        return plain()
    return ObservedNorm.apply(x, w, b, tuple(shape), eps, center, w_use, b_use)


@_handles(F.batch_norm)
def _batch_norm(
    mode: Interception,
    func: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if training or running_mean is None or running_var is None:  # statistics of the batch mix its samples
        return func(input, running_mean, running_var, weight, bias, training, momentum, eps)

    def layer(w: Tensor | None, b: Tensor | None) -> Tensor:
        return func(input, running_mean, running_var, w, b, training, momentum, eps)

    return _by_channel(mode, layer, input, weight, bias)


@_handles(F.group_norm)
def _group_norm(
    mode: Interception,
    func: Any,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    return _by_channel(mode, lambda w, b: func(input, num_groups, w, b, eps), input, weight, bias)


def _by_channel(
    mode: Interception,
    layer: Callable[[Tensor | None, Tensor | None], Tensor],
    x: Tensor,
    w: Tensor | None,
    b: Tensor | None,
) -> Tensor:
    """`layer(gain, offset)` of x [samples, C, ...]: without them it keeps the samples apart, and then come these."""
    w_ref, b_ref = mode.ref(w), mode.ref(b)
    if w_ref is None and b_ref is None:
        return layer(w, b)
    normalised = layer(None, None)
    y = normalised.movedim(1, -1).to(torch.promote_types(normalised.dtype, torch.float32))
    # What is known of x holds for y, which is new.
    seen = x if mode.is_moved(x) or mode.is_fixed(x) else y
    w_use = mode.use(w_ref, "vector", seen, y.ndim - 1, w.numel()) if w is not None else None
    b_use = mode.use(b_ref, "vector", seen, y.ndim - 1, b.numel()) if b is not None else None
    if w_use is None and b_use is None:
        return layer(w, b)
    if w is not None:
        y = y * w if w_use is None else ObservedScale.apply(y, w, w_use)
    if b is not None:
        y = y + b if b_use is None else ObservedShift.apply(y, b, b_use)
    # Laid out as the layer's own result, which may be viewed.
    return torch.empty_like(normalised).copy_(y.movedim(-1, 1))


@_handles(torch.conv1d, torch.conv2d)
def _convolution(
    mode: Interception,
    func: Any,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    w_ref, b_ref = mode.ref(weight), mode.ref(bias)
    geometry = geometry_of(weight, stride, padding, dilation, groups)
    if (w_ref is None and b_ref is None) or geometry is None or input.ndim != weight.ndim:
        return func(input, weight, bias, stride, padding, dilation, groups)
    w_use = mode.use(w_ref, "linear", input, 1, weight.numel())
    b_use = mode.use(b_ref, "vector", input, 1, bias.numel()) if bias is not None else None
    if w_use is None and b_use is None:
        return func(input, weight, bias, stride, padding, dilation, groups)
    return ObservedConvolution.apply(input, weight, bias, func, geometry, w_use, b_use)


@_handles(Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type_as, Tensor.contiguous)
def _cast(mode: Interception, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    ref = mode.ref(input)
    result = func(input, *args, **kwargs)
    return result if ref is None else mode.alias(result, ref)


@_handles(
    Tensor.t,
    torch.t,
    vars(torch._C.TensorBase)["T"].__get__,
    vars(torch._C.TensorBase)["mT"].__get__,
    Tensor.transpose,
    torch.transpose,
)
def _transpose(mode: Interception, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    ref = mode.ref(input)
    result = func(input, *args, **kwargs)
    if ref is None or input.ndim != 2:
        return result
    return mode.alias(result, ref._replace(transposed=not ref.transposed))


@_handles(Tensor.__getitem__)
def _getitem(mode: Interception, func: Any, input: Tensor, index: Any) -> Tensor:
    ref = mode.ref(input)
    result = func(input, index)
    indices = index if isinstance(index, tuple) else (index,)
    if ref is None or not all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in indices):
        return result
    return mode.alias(result, ref._replace(reshaped=True, part=True))


@_handles(Tensor.unsqueeze, torch.unsqueeze, Tensor.view, Tensor.reshape)
def _reshape(mode: Interception, func: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    ref = mode.ref(input)
    result = func(input, *args, **kwargs)
    return result if ref is None else mode.alias(result, ref._replace(reshaped=True))


@_handles(Tensor.backward)
def _tensor_backward(
    mode: Interception,
    func: Any,
    input: Tensor,
    gradient: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    _run_backward(mode, (input,), (gradient,), retain_graph, create_graph, inputs)


@_handles(torch.autograd.backward)
def _autograd_backward(
    mode: Interception,
    func: Any,
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    grad_variables: Any = None,
    inputs: Any = None,
) -> None:
    tensors = (tensors,) if isinstance(tensors, Tensor | GradientEdge) else tuple(tensors)
    if grad_tensors is None:
        grad_tensors = (None,) * len(tensors)
    elif isinstance(grad_tensors, Tensor):
        grad_tensors = (grad_tensors,)
    _run_backward(mode, tensors, grad_tensors, retain_graph, create_graph, inputs)


def _run_backward(
    mode: Interception, tensors: Any, gradients: Any, retain_graph: bool | None, create_graph: bool, inputs: Any
) -> None:
    mode.observation.before_backward(tensors)
    edges = [_edge(t) for t in tensors]
    if inputs is not None:
        inputs = [_edge(t) for t in ((inputs,) if isinstance(inputs, Tensor | GradientEdge) else inputs)]
    # Checkpoints repeat their forward pass in here and must find the same layers. Torch leaves the mode while it
    # handles a call; given edges in place of tensors, it does not call back for the same one.
    with mode.observation.hooks_waiting(), mode:
        torch.autograd.backward(edges, gradients, retain_graph, create_graph, inputs=inputs)
    mode.observation.after_backward()


def _edge(t: Any) -> Any:
    if isinstance(t, Tensor) and not t.requires_grad:
        raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")
    return get_gradient_edge(t) if isinstance(t, Tensor) else t


_BACKWARD.update({_tensor_backward, _autograd_backward})
