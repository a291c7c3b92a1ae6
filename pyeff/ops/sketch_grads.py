"""Sketches: linear maps of named tensors to a few thousand numbers, defined by hashing and stored nowhere."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from pyeff import reference as _reference
from pyeff._extension import extension
from pyeff.ops._dispatch import Operation

Kind = Literal["balanced", "countsketch", "rademacher"]
VERSION = 1
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_VECTOR_COLUMNS = 64
_MOST_DIM = (1 << 31) - (1 << 13)


@dataclass(frozen=True)
class AdamWDirection:
    """The direction AdamW would step in after one gradient g of a parameter, from the parameter's moments:

        variant "adamw":         m^ / (sqrt(v^) + eps),  m^ = (b1 m + (1 - b1) g) / (1 - b1^(t+1)),
                                                         v^ = (b2 v + (1 - b2) g^2) / (1 - b2^(t+1))
        variant "adamw-frozen":  g / (sqrt(v / (1 - b2^t)) + eps)

    `exp_avg` m and `exp_avg_sq` v have the parameter's shape; `step` is t, the number of steps they have seen. The
    first is the feature of training samples in Xia et al. 2024, "LESS", arXiv:2402.04333; eps stands outside the root
    and both moments are bias-corrected. The second is linear in g.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.exp_avg.shape != self.exp_avg_sq.shape:
            raise ValueError(
                f"exp_avg_sq must have the shape of exp_avg, {tuple(self.exp_avg.shape)}, "
                f"got {tuple(self.exp_avg_sq.shape)}"
            )
        if self.step < self.frozen:
            raise ValueError(f"step must be at least {int(self.frozen)}, got {self.step}")

    @property
    def variant(self) -> str:
        """Its name in results."""
        return "adamw-frozen" if self.frozen else "adamw"

    @property
    def coefficients(self) -> list[float]:
        """k1, t1, k2, t2 and eps of (k1 m + t1 g) / (sqrt(k2 v + t2 g^2) + eps)."""
        (b1, b2), t = self.betas, self.step + (not self.frozen)
        first, second = -math.expm1(t * math.log(b1)) if b1 else 1.0, -math.expm1(t * math.log(b2)) if b2 else 1.0
        if self.frozen:
            return [0.0, 1.0, 1.0 / second, 0.0, self.eps]
        return [b1 / first, (1.0 - b1) / first, b2 / second, (1.0 - b2) / second, self.eps]

    @property
    def momentum(self) -> Tensor | None:
        """m, where the direction depends on it."""
        return None if self.frozen else self.exp_avg

    def __call__(self, grad: Tensor) -> Tensor:
        """The direction [..., *shape] after each of the gradients [..., *shape], in float32 or float64."""
        return _reference.adamw_step(grad, self.momentum, self.exp_avg_sq, *self.coefficients)

    def rows(self, first: int, count: int) -> AdamWDirection:
        """That of some rows of a matrix."""
        some = slice(first, first + count)
        return AdamWDirection(
            self.exp_avg[some], self.exp_avg_sq[some], self.step, self.betas, self.eps, frozen=self.frozen
        )

    def taken(self, rows: Tensor) -> AdamWDirection:
        """That of the rows of a matrix with these indices."""
        m, v = self.exp_avg[rows], self.exp_avg_sq[rows]
        return AdamWDirection(m, v, self.step, self.betas, self.eps, frozen=self.frozen)

    def viewed(self, rows: int, columns: int) -> AdamWDirection:
        """That of the same parameter as a matrix."""
        m, v = (moment.reshape(rows, columns) for moment in (self.exp_avg, self.exp_avg_sq))
        return AdamWDirection(m, v, self.step, self.betas, self.eps, frozen=self.frozen)


@dataclass(frozen=True)
class Sketch:
    """A linear map of a collection of named tensors to R^dim that keeps inner products in expectation.

        <sketch(u), sketch(v)> = <u, v> in the mean over seeds, with a variance of at most
        (|u|^2 |v|^2 + <u, v>^2 - 2 sum_i u_i^2 v_i^2) / dim

    for "rademacher" and "countsketch" exactly, for "balanced" at most. It is defined by hashing (seed, the tensor's
    name, the element's index) and stored nowhere: the same numbers, up to the rounding of their sums, for every batch
    size, order and device. docs/sketches.md gives the definition, version 1.

    Kinds:

    - "balanced": cells of up to 8192 elements (128 rows of 64 columns) are laid into the sketch at a hashed rotation,
      each element with a hashed sign of its own. Within a cell nothing collides. One read, no atomics.
    - "countsketch": a hashed place and a hashed sign for every element (Charikar et al. 2002).
    - "rademacher": every element goes everywhere, with hashed signs / sqrt(dim): 2 n dim FLOPs. To compare with.

    `density`, a divisor of `dim`, places every element that many times, once in each of so many sketches of dim /
    density numbers: a sparse Johnson-Lindenstrauss transform (Kane & Nelson 2014). The variance stays, large errors
    become rarer, the cost rises.

    A tensor of two or three dimensions is the matrix of its last one; of more, the matrix of its first; of one, it is
    rows of 64.

    Raises `ValueError` for a `dim`, `density` or `kind` there is not, `TypeError` for arguments of a wrong type.

    >>> import torch, pyeff
    >>> sketch = pyeff.Sketch(256, seed=1)
    >>> grads = {"weight": torch.ones(3, 5), "bias": torch.ones(3)}
    >>> sketch(grads).square().sum()  # 18 ones: none of them collided
    tensor(18.)
    >>> sketch.header == pyeff.Sketch(256, seed=2).header
    False
    """

    dim: int
    seed: int = 0
    kind: Kind = "balanced"
    density: int = 1

    def __init__(self, dim: int, *, seed: int = 0, kind: Kind = "balanced", density: int = 1) -> None:
        for name, value in {"dim": dim, "seed": seed, "density": density}.items():
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
        if not 1 <= dim <= _MOST_DIM:
            raise ValueError(f"dim must be from 1 to {_MOST_DIM}, got {dim}")
        if kind not in get_args(Kind):
            raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
        if density < 1 or dim % density or (density > 1 and kind == "rademacher"):
            raise ValueError(f"density must divide dim, {dim}, and be 1 for 'rademacher', got {density}")
        fields: dict[str, Any] = {"dim": dim, "seed": seed, "kind": kind, "density": density}
        for name, field in fields.items():
            object.__setattr__(self, name, field)

    @property
    def header(self) -> dict[str, Any]:
        """What two sketches must agree in to be compared; plain numbers and strings, for a file."""
        return {
            "format": "pyeff.Sketch",
            "version": VERSION,
            "kind": self.kind,
            "dim": self.dim,
            "seed": self.seed,
            "density": self.density,
        }

    def keys(self, name: str) -> list[int]:
        """The keys of the hashes of a tensor, one for each of `density` sketches, as signed 64-bit integers."""
        return _keys(self.seed, self.density, name)

    def __call__(
        self,
        named_tensors: Mapping[str, Tensor],
        *,
        batch_dims: int = 0,
        directions: Mapping[str, AdamWDirection] | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """The sketch [*batch, dim] of named tensors [*batch, *shape], whose `batch_dims` first dimensions are a batch.

        `directions` maps a tensor to AdamW's direction before it is sketched. float32, or float64 where all are.
        """
        if not isinstance(named_tensors, Mapping):
            raise TypeError(f"named_tensors must map names to tensors, got {type(named_tensors).__name__}")
        if not named_tensors:
            raise ValueError("named_tensors is empty: there is nothing to sketch")
        if isinstance(batch_dims, bool) or not isinstance(batch_dims, int):
            raise TypeError(f"batch_dims must be an int, got {type(batch_dims).__name__}")
        if batch_dims < 0:
            raise ValueError(f"batch_dims must not be negative, got {batch_dims}")
        total: Tensor | None = None
        batch: torch.Size | None = None
        for name, tensor in named_tensors.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"named_tensors[{name!r}] must be a tensor, got {type(tensor).__name__}")
            if tensor.ndim < batch_dims or (batch is not None and tensor.shape[:batch_dims] != batch):
                raise ValueError(
                    f"named_tensors[{name!r}] must begin with {batch_dims} batch dimensions"
                    f"{'' if batch is None else f', {tuple(batch)}'}, got shape {tuple(tensor.shape)}"
                )
            batch = tensor.shape[:batch_dims]
            direction = None if directions is None else directions.get(name)
            samples = tensor.reshape(math.prod(batch), *tensor.shape[batch_dims:])
            found = self.of(name, samples, direction=direction, impl=impl)
            total = found if total is None else total + found.to(total.device)
        assert total is not None
        assert batch is not None
        return total.view(*batch, self.dim)

    def of(self, name: str, grads: Tensor, *, direction: AdamWDirection | None = None, impl: str = "auto") -> Tensor:
        """The sketches [S, dim] of S tensors [S, *shape] of one name."""
        shape = tuple(grads.shape[1:])
        if direction is not None and tuple(direction.exp_avg_sq.shape) != shape:
            raise ValueError(
                f"the moments of {name!r} must have its shape, {shape}, got {tuple(direction.exp_avg_sq.shape)}"
            )
        rows, columns = matrix_shape(shape)
        if len(shape) > 1:
            matrices = grads.reshape(grads.shape[0], rows, columns)
            direction = None if direction is None else direction.viewed(rows, columns)
            return sketch_grads(matrices, self, name, direction=direction, impl=impl)
        # A vector: whole rows, and the rest of it as a row of fewer columns.
        flat, whole = grads.reshape(grads.shape[0], math.prod(shape)), math.prod(shape) // columns
        total: Tensor | None = None
        for begin, n, width in ((0, whole, columns), (whole * columns, 1, math.prod(shape) - whole * columns)):
            if n == 0 or width == 0:
                continue
            part = slice(begin, begin + n * width)
            of_part = None
            if direction is not None:
                m, v = (t.reshape(-1)[part].view(n, width) for t in (direction.exp_avg, direction.exp_avg_sq))
                of_part = AdamWDirection(m, v, direction.step, direction.betas, direction.eps, frozen=direction.frozen)
            matrices = flat[:, part].unflatten(1, (n, width))
            found = sketch_grads(matrices, self, name, first_row=begin // columns, direction=of_part, impl=impl)
            total = found if total is None else total + found
        return total if total is not None else grads.new_zeros(grads.shape[0], self.dim, dtype=_wide(grads.dtype))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns a tensor of this shape is sketched as."""
    if len(shape) < 2:
        return -(-math.prod(shape) // _VECTOR_COLUMNS), _VECTOR_COLUMNS
    if len(shape) < 4:
        return math.prod(shape[:-1]), shape[-1]
    return shape[0], math.prod(shape[1:])


@functools.lru_cache(maxsize=4096)
def _keys(seed: int, density: int, name: str) -> list[int]:
    texts = (f"pyeff.Sketch {VERSION}\0{seed}\0{copy}\0{name}" for copy in range(density))
    digests = (hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts)
    return [int.from_bytes(digest, "little", signed=True) for digest in digests]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def sketch_grads(
    grads: Tensor,
    sketch: Sketch,
    name: str,
    *,
    first_row: int = 0,
    direction: AdamWDirection | None = None,
    impl: str = "auto",
) -> Tensor:
    """The sketches [S, dim] of S matrices, or of some rows of them.

        sketches[s, j] = sum over the elements (r, c) that go to j of sign(r, c) direction(grads[s])[r, c]

    Shapes and dtypes: `grads` [S, rows, columns], float16, bfloat16, float32 or float64, of any strides: the rows from
    `first_row` on of the parameter called `name`, whose sketch is the sum over its rows; a `direction` whose moments
    are [rows, columns]. float32, summed in float32; for float64 float64, by the reference implementation.

    `impl`: "auto" takes the first that can run of "triton" (GPU), "cpu" (C++) and "reference" (plain torch); an
    explicit one runs or raises `RuntimeError` with the reason. Only "balanced" has kernels. Each gives the same bits in
    every run on the same device, on the CPU for any number of threads. Not differentiable. Under `torch.compile` one
    operator of the graph.

    Raises `TypeError` or `ValueError` for bad arguments.

    Cost: one read of `grads` (and of the moments) for each of `density`. Memory beside the result: at most 16 of it on
    the CPU. Rows that are not contiguous, and float16 on the CPU, are copied first.

    >>> import torch, pyeff
    >>> grads = torch.eye(4).expand(2, 4, 4)
    >>> pyeff.ops.sketch_grads(grads, pyeff.Sketch(16), "weight").abs().sum(1)
    tensor([4., 4.])
    """
    if not isinstance(grads, Tensor):
        raise TypeError(f"grads must be a tensor, got {type(grads).__name__}")
    if not isinstance(sketch, Sketch):
        raise TypeError(f"sketch must be a pyeff.Sketch, got {type(sketch).__name__}")
    if grads.ndim != 3:
        raise ValueError(f"grads must be [samples, rows, columns], got shape {tuple(grads.shape)}")
    if grads.dtype not in _FLOATS:
        raise TypeError(f"grads must be float16, bfloat16, float32 or float64, got {grads.dtype}")
    if first_row < 0:
        raise ValueError(f"first_row must not be negative, got {first_row}")
    if direction is not None:
        if direction.exp_avg_sq.shape != grads.shape[1:]:
            raise ValueError(
                f"direction must have moments of shape {tuple(grads.shape[1:])}, got "
                f"{tuple(direction.exp_avg_sq.shape)}"
            )
        if direction.exp_avg_sq.device != grads.device:
            raise ValueError(
                f"direction must be on the device of grads, {grads.device}, and is on {direction.exp_avg_sq.device}"
            )
    flat = ParameterSketch(sketch, name, first_row, direction).flat
    with torch.no_grad(), torch.autocast(grads.device.type, enabled=False):
        return _OP(grads, *flat, impl)


@dataclass(frozen=True)
class ParameterSketch:
    """The sketch of one parameter's gradient: of the rows from `first_row` on, perhaps mapped by `direction` first.

    What an operation needs to sketch a gradient where it is formed; `sketch_grads` has the definition.
    """

    sketch: Sketch
    name: str
    first_row: int = 0
    direction: AdamWDirection | None = None

    @property
    def variant(self) -> str:
        """The map's name in results: "gradient", "adamw" or "adamw-frozen"."""
        return "gradient" if self.direction is None else self.direction.variant

    @property
    def flat(self) -> FlatSketch:
        """The same as an operator's arguments."""
        direction, sketch = self.direction, self.sketch
        return FlatSketch(
            self.first_row,
            sketch.dim,
            sketch.keys(self.name),
            sketch.kind,
            None if direction is None else direction.momentum,
            None if direction is None else direction.exp_avg_sq,
            [] if direction is None else direction.coefficients,
        )


class FlatSketch(NamedTuple):
    """A `ParameterSketch` as numbers and tensors."""

    first_row: int
    dim: int
    keys: list[int]
    kind: str
    exp_avg: Tensor | None
    exp_avg_sq: Tensor | None
    coefficients: list[float]

    def rows(self, first: int, count: int) -> FlatSketch:
        """That of some of its rows."""
        m, v = (None if t is None else t[first : first + count] for t in (self.exp_avg, self.exp_avg_sq))
        return self._replace(first_row=self.first_row + first, exp_avg=m, exp_avg_sq=v)

    def of(self, grads: Tensor, impl: str = "auto") -> Tensor:
        """The sketches [S, dim] of matrices [S, rows, columns]."""
        return _run(grads, *self, impl)


def sketch_limits(impl: str, grads: Tensor, kind: str) -> str | None:
    """Why an implementation cannot sketch `grads`, or None."""
    if impl == "reference":
        return None
    if kind != "balanced":
        return f"only 'balanced' sketches have kernels, and this one is {kind!r}"
    if grads.dtype == torch.float64:
        return "it computes in float32, and grads are float64"
    return None


def _limits(impl: str, grads: Tensor, sketch: Sketch, *_: object, **__: object) -> str | None:
    return sketch_limits(impl, grads, sketch.kind)


OPERATION = Operation("sketch_grads", ("triton", "cpu", "reference"), _limits)
# By kind and device alone: the operator knows a kind where the public function has a Sketch.
_CHOICE = Operation("sketch_grads", OPERATION.implementations, sketch_limits)


def _run(
    grads: Tensor,
    first_row: int,
    dim: int,
    keys: list[int],
    kind: str,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: list[float],
    impl: str,
) -> Tensor:
    chosen = _CHOICE.explain(grads, kind, impl=impl).impl
    if chosen == "reference":
        if exp_avg_sq is not None:
            grads = _reference.adamw_step(grads, exp_avg, exp_avg_sq, *coefficients)
        row = torch.arange(first_row, first_row + grads.shape[1], device=grads.device)
        return _reference.sketch_rows(grads, row, dim, keys, kind=kind)
    if grads.stride(2) != 1 and grads.shape[2] != 1:
        grads = grads.contiguous()
    m, v = (None if t is None else t.to(torch.float32).contiguous() for t in (exp_avg, exp_avg_sq))
    if chosen == "triton":
        from pyeff.triton_kernels.sketch_grads import sketch_grads as kernels

        numbers = {"coefficients": coefficients} if coefficients else {}
        return kernels(grads, dim, keys, first_row=first_row, exp_avg=m, exp_avg_sq=v, **numbers)
    return _on_cpu(grads, first_row, dim, keys, m, v, coefficients)


def _on_cpu(
    grads: Tensor,
    first_row: int,
    dim: int,
    keys: list[int],
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: list[float],
) -> Tensor:
    if grads.dtype == torch.float16:
        grads = grads.to(torch.float32)
    samples, rows, columns = grads.shape
    part = dim // len(keys)
    out = torch.zeros(len(keys), samples, part, dtype=torch.float32)
    keep_first, take_first, keep_second, take_second, eps = coefficients or (0.0, 1.0, 1.0, 0.0, 0.0)
    for key, of_key in zip(keys, out, strict=True):
        extension().sketch_grads(
            x=grads.data_ptr(),
            bf16=grads.dtype == torch.bfloat16,
            samples=samples,
            rows=rows,
            columns=columns,
            sample_stride=grads.stride(0),
            row_stride=grads.stride(1),
            first_row=first_row,
            key=key & 0xFFFFFFFFFFFFFFFF,
            dim=part,
            scale=len(keys) ** -0.5,
            exp_avg=0 if exp_avg is None else exp_avg.data_ptr(),
            exp_avg_sq=0 if exp_avg_sq is None else exp_avg_sq.data_ptr(),
            keep_first=keep_first,
            take_first=take_first,
            keep_second=keep_second,
            take_second=take_second,
            eps=eps,
            out=of_key.data_ptr(),
            threads=torch.get_num_threads(),
        )
    return out.transpose(0, 1).reshape(samples, dim)


def _fake(
    grads: Tensor,
    first_row: int,
    dim: int,
    keys: list[int],
    kind: str,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: list[float],
    impl: str,
) -> Tensor:
    return grads.new_empty((grads.shape[0], dim), dtype=_wide(grads.dtype))


torch.library.define(
    "pyeff::sketch_grads",
    "(Tensor grads, SymInt first_row, SymInt dim, int[] keys, str kind, Tensor? exp_avg, Tensor? exp_avg_sq, "
    "float[] coefficients, str impl) -> Tensor",
)
torch.library.impl("pyeff::sketch_grads", ("cpu", "cuda"), _run)
torch.library.register_fake("pyeff::sketch_grads", _fake)
_OP = torch.ops.pyeff.sketch_grads.default
