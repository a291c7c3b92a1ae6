"""Sketches: one definition on every implementation, and inner products as theory says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from backends import Backend, on_every, quiet_interpreter
from fresh_process import outputs_at_every_level
from oracle import assert_as_accurate
from torch import Tensor

import pyeff
from pyeff.ops.sketch_grads import OPERATION, AdamWDirection, matrix_shape
from pyeff.reference.sketch_grads import places, signs, word

pytestmark = quiet_interpreter


class SketchBackend(Backend):
    def __call__(self, grads: Tensor, *args: object, **options: object) -> Tensor:
        return pyeff.sketch_grads(grads.to(self.device), *args, **options, impl=self.impl).cpu()


def moments(rows: int, columns: int, *, frozen: bool = False, device: str = "cpu") -> AdamWDirection:
    m, v = torch.randn(rows, columns, device=device), torch.rand(rows, columns, device=device)
    return AdamWDirection(m, v, step=3, betas=(0.9, 0.99), eps=1e-6, frozen=frozen)


# (dim, samples, rows, columns, first row): cells cut at every side, rows narrower than a vector, sums that go round.
SHAPES = [
    (128, 2, 9, 130, 3),
    (300, 5, 5, 64, 0),
    (1000, 1, 40, 7, 29),
    (2048, 3, 70, 65, 31),
    (8192, 1, 3, 200, 126),
]


@on_every(SketchBackend)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation_gives_the_same_sketch(backend: SketchBackend, shape: tuple[int, ...]) -> None:
    dim, samples, rows, columns, first_row = shape
    sketch, grads = pyeff.Sketch(dim, seed=1), torch.randn(samples, rows, columns)
    exact = pyeff.sketch_grads(grads.double(), sketch, "w", first_row=first_row)
    peer = pyeff.sketch_grads(grads, sketch, "w", first_row=first_row, impl="reference")
    assert_as_accurate(backend(grads, sketch, "w", first_row=first_row), exact, peer)


@on_every(SketchBackend)
@pytest.mark.parametrize("frozen", [False, True])
def test_every_implementation_maps_by_adamw(backend: SketchBackend, frozen: bool) -> None:
    sketch, grads = pyeff.Sketch(200, seed=2, density=2), torch.randn(3, 6, 70)
    direction = moments(6, 70, frozen=frozen)
    there = AdamWDirection(
        *(t.to(backend.device) for t in (direction.exp_avg, direction.exp_avg_sq)), 3, (0.9, 0.99), 1e-6, frozen=frozen
    )
    b1, b2, t = 0.9, 0.99, 3
    g, m, v = grads.double(), direction.exp_avg.double(), direction.exp_avg_sq.double()
    if frozen:
        step = g / ((v / (1 - b2**t)).sqrt() + 1e-6)
    else:
        m, v = (b1 * m + (1 - b1) * g) / (1 - b1 ** (t + 1)), (b2 * v + (1 - b2) * g * g) / (1 - b2 ** (t + 1))
        step = m / (v.sqrt() + 1e-6)
    exact = pyeff.sketch_grads(step, sketch, "w")
    peer = pyeff.sketch_grads(direction(grads), sketch, "w", impl="reference")
    assert_as_accurate(backend(grads, sketch, "w", direction=there), exact, peer, multiple=4.0)


@on_every(SketchBackend)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_gradients_are_sketched_as_the_numbers_they_are(backend: SketchBackend, dtype: torch.dtype) -> None:
    grads, sketch = torch.randn(2, 10, 66).to(dtype), pyeff.Sketch(256)
    exact = pyeff.sketch_grads(grads.double(), sketch, "w")
    assert_as_accurate(backend(grads, sketch, "w"), exact, pyeff.sketch_grads(grads.float(), sketch, "w"))


@on_every(SketchBackend)
def test_rows_add_up_and_strides_do_not_matter(backend: SketchBackend) -> None:
    grads, sketch = torch.randn(2, 12, 40), pyeff.Sketch(150, seed=5)
    exact = pyeff.sketch_grads(grads.double(), sketch, "w")
    parts = backend(grads[:, :5], sketch, "w") + backend(grads[:, 5:], sketch, "w", first_row=5)
    assert_as_accurate(parts, exact, pyeff.sketch_grads(grads, sketch, "w", impl="reference"))
    turned = grads.mT.contiguous().mT
    assert torch.equal(backend(turned, sketch, "w"), backend(grads, sketch, "w"))


@on_every(SketchBackend)
def test_what_is_not_finite_stays_in_its_sample(backend: SketchBackend) -> None:
    grads, sketch = torch.randn(3, 8, 20), pyeff.Sketch(100)
    clean = backend(grads, sketch, "w")
    grads[1, 2, 3], grads[1, 4, 4] = math.nan, math.inf
    spoiled = backend(grads, sketch, "w")
    assert spoiled[1].isnan().sum() == 1
    assert spoiled[1].isinf().sum() == 1
    assert torch.equal(spoiled[[0, 2]], clean[[0, 2]])


@on_every(SketchBackend)
@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 0, 4), (2, 4, 0)], ids=str)
def test_nothing_sketches_to_zero(backend: SketchBackend, shape: tuple[int, ...]) -> None:
    assert torch.equal(backend(torch.zeros(shape), pyeff.Sketch(100), "w"), torch.zeros(shape[0], 100))


def test_the_cpu_gives_the_same_bits_at_every_level_and_with_any_number_of_threads() -> None:
    code = """
import hashlib, torch, pyeff
torch.manual_seed(0)
grads, m, v = torch.randn(2, 700, 300), torch.randn(700, 300), torch.rand(700, 300)
found = []
for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    for direction in (None, pyeff.AdamWDirection(m, v, 2)):
        for x in (grads, grads.bfloat16()):
            sketch = pyeff.sketch_grads(x, pyeff.Sketch(1000), "w", direction=direction, impl="cpu")
            found.append(hashlib.sha256(sketch.numpy().tobytes()).hexdigest())
assert found[:4] == found[4:8] == found[8:]
print(found[:4])
"""
    assert len(outputs_at_every_level(code)) == 1


def test_the_definition_is_that_of_version_1() -> None:
    # Files written by an earlier release must stay comparable: these words may change only with the version.
    sketch = pyeff.Sketch(1000, seed=7)
    assert sketch.header["version"] == 1
    key = sketch.keys("layers.0.weight")[0]
    row, column = torch.tensor([0, 5, 1 << 40]), torch.tensor([0, 3, 77])
    words = [word(key, purpose, row, column).tolist() for purpose in (0, 1, 2, 3)]
    assert (key, words) == GOLDEN
    json.dumps(sketch.header)


GOLDEN = (
    6129385712756136185,
    [
        [2163550614, 3616714939, 1253569209],
        [898543193, 1732165030, 4215258479],
        [79824687, 3764767848, 1593182188],
        [4191813333, 727034336, 3266660499],
    ],
)


def test_batches_vectors_and_names_are_one_map() -> None:
    tensors = {"a": torch.randn(2, 3, 7, 5), "b": torch.randn(2, 3, 100), "c": torch.randn(2, 3)}
    sketch = pyeff.Sketch(512, seed=3)
    whole = sketch(tensors, batch_dims=2)
    assert whole.shape == (2, 3, 512)
    single = sketch({name: t[1, 2] for name, t in tensors.items()})
    # Not a bit need differ: a sample's sums do not depend on its neighbours.
    assert torch.equal(single, whole[1, 2])
    assert torch.equal(sketch(dict(reversed(tensors.items())), batch_dims=2).sign(), whole.sign())
    other = sketch({"d" if name == "a" else name: t for name, t in tensors.items()}, batch_dims=2)
    assert not torch.equal(other, whole)


def test_parameters_without_elements_and_batches_without_samples_sketch_to_nothing() -> None:
    sketch, weight = pyeff.Sketch(16), torch.ones(2, 3)
    assert torch.equal(sketch({"w": weight, "none": torch.ones(0, 3), "no": torch.ones(0)}), sketch({"w": weight}))
    assert sketch({"w": torch.ones(0, 2, 3), "b": torch.ones(0, 3), "s": torch.ones(0)}, batch_dims=1).shape == (0, 16)


def test_a_vector_is_rows_of_64_and_a_kernel_of_convolution_one_row_an_output() -> None:
    assert matrix_shape((130,)) == (3, 64)
    assert matrix_shape((4, 5, 6)) == (20, 6)
    assert matrix_shape((8, 3, 2, 2)) == (8, 12)
    sketch, x = pyeff.Sketch(128), torch.randn(130)
    padded = torch.nn.functional.pad(x, (0, 62)).view(1, 3, 64)
    assert_as_accurate(
        sketch({"b": x}),
        pyeff.sketch_grads(padded.double(), sketch, "b")[0],
        pyeff.sketch_grads(padded, sketch, "b")[0],
    )


# Statistics


def hot(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    left, right = torch.randn(rows, 2, generator=generator), torch.randn(columns, 2, generator=generator)
    left[::29] *= 30
    right[::17] *= 50
    return left @ right.T


VECTORS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "gaussian": lambda r, c, g: torch.randn(r, c, generator=g),
    "heavy-tailed": lambda r, c, g: torch.randn(r, c, generator=g) / torch.rand(r, c, generator=g).sqrt().clamp(0.03),
    "sparse": lambda r, c, g: torch.randn(r, c, generator=g) * (torch.rand(r, c, generator=g) < 0.01),
    "constant": lambda r, c, g: torch.ones(r, c),
    "alternating": lambda r, c, g: (1.0 - 2.0 * (torch.arange(r * c) % 2)).view(r, c),
    "one-hot": lambda r, c, g: torch.eye(r * c)[r * c // 3].view(r, c) if r * c < 5000 else _one_hot(r, c),
    "periodic": lambda r, c, g: torch.sin(torch.arange(r * c) * (2 * math.pi / 64)).view(r, c),
    "hot rows and columns": hot,
    "hot column": lambda r, c, g: torch.randn(r, 1, generator=g) * (torch.arange(c) == 5),
    "hot row": lambda r, c, g: (torch.arange(r) == 5)[:, None] * torch.randn(c, generator=g),
}


def _one_hot(rows: int, columns: int) -> Tensor:
    x = torch.zeros(rows, columns)
    x[rows // 3, columns // 2] = 1.0
    return x


# (kind, density, dim, rows, columns, seeds)
SKETCHES = [
    ("balanced", 1, 512, 256, 96, 1000),
    ("balanced", 4, 512, 64, 96, 400),
    ("countsketch", 1, 64, 48, 40, 400),
    ("rademacher", 1, 32, 16, 16, 400),
]


@pytest.mark.parametrize("case", SKETCHES, ids=lambda case: f"{case[0]} x {case[1]}")
def test_inner_products_have_the_mean_and_variance_of_theory(case: tuple[str, int, int, int, int, int]) -> None:
    kind, density, dim, rows, columns, seeds = case
    generator = torch.Generator().manual_seed(0)
    # <u, u> and <u, v> for each kind of vector; v is u and noise.
    u = torch.stack([make(rows, columns, generator) for make in VECTORS.values()])
    v = u + 0.5 * u.abs().mean((1, 2), keepdim=True) * torch.randn(u.shape, generator=generator)
    both = torch.cat([u, v])
    products = []
    for seed in range(seeds):
        found = pyeff.sketch_grads(both, pyeff.Sketch(dim, seed=seed, kind=kind, density=density), "w").double()
        su, sv = found.chunk(2)
        products.append(torch.stack([(su * su).sum(1), (su * sv).sum(1)]))
    products = torch.stack(products)  # [seeds, 2, vectors]

    u, v = u.double().flatten(1), v.double().flatten(1)
    for pair, (a, b) in enumerate(((u, u), (u, v))):
        exact = (a * b).sum(1)
        spread = a.square().sum(1) * b.square().sum(1) + exact.square() - 2 * (a * b).square().sum(1)
        # All pairs of distinct elements collide with probability 1 / dim; the balanced kind's in one cell never do.
        theory = spread / dim
        found = products[:, pair]
        variance = found.var(0)
        error = ((found - found.mean(0)).pow(4).mean(0) - variance.square()).clamp(min=0).sqrt() / math.sqrt(seeds)
        rounding = torch.finfo(torch.float32).eps * a.norm(dim=1) * b.norm(dim=1)
        for i, name in enumerate(VECTORS):
            off = abs(found[:, i].mean() - exact[i])
            assert off <= 5 * (theory[i] / seeds).sqrt() + 8 * rounding[i], f"{name}: mean off by {off}"
            slack = 5 * error[i] + (8 * rounding[i]) ** 2
            assert variance[i] <= theory[i] + slack, f"{name}: {variance[i] / theory[i]} x count-sketch's variance"
            if seeds >= 1000:  # fewer could not tell
                assert variance[i] <= 1.2 * theory[i] + (8 * rounding[i]) ** 2, f"{name}: {variance[i] / theory[i]}"
            if kind != "balanced":
                assert variance[i] >= theory[i] - slack, f"{name}: {variance[i] / theory[i]} x theory"


def test_signs_and_rotations_are_fair_and_independent() -> None:
    row, column = torch.arange(512)[:, None], torch.arange(512)[None, :]
    s = signs(pyeff.Sketch(64).keys("w")[0], row, column).double()
    bound = 6 * math.sqrt(s.numel())
    assert abs(s.sum()) <= bound
    for shift in ((1, 0), (0, 1), (1, 1), (32, 0), (0, 16), (32, 32)):
        moved = s.roll(shift, (0, 1))
        assert abs((s * moved).sum()) <= bound, shift
        # Affine hashes pass the above and fail for products of four.
        assert abs((s * moved * s.roll((3, 5), (0, 1)) * moved.roll((3, 5), (0, 1))).sum()) <= bound, shift
    where = places(pyeff.Sketch(64).keys("w")[0], "balanced", 64, row, column)
    rotations = where[:, ::64].flatten()
    counts = torch.bincount(rotations, minlength=64).double()
    expected = rotations.numel() / 64
    assert ((counts - expected) ** 2 / expected).sum() <= 63 + 6 * math.sqrt(2 * 63)


# Contract


def test_torch_accepts_the_operator() -> None:
    sketch = pyeff.Sketch(100)
    args = (torch.randn(2, 4, 6), 0, 100, sketch.keys("w"), "balanced", None, None, [], "reference")
    torch.library.opcheck(torch.ops.pyeff.sketch_grads.default, args)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: pyeff.Sketch(0), ValueError, "dim"),
        (lambda: pyeff.Sketch(2.5), TypeError, "dim"),
        (lambda: pyeff.Sketch(4, kind="dense"), ValueError, "kind"),
        (lambda: pyeff.Sketch(4, density=3), ValueError, "density"),
        (lambda: pyeff.Sketch(4)({}), ValueError, "named_tensors"),
        (lambda: pyeff.Sketch(4)([torch.ones(2)]), TypeError, "named_tensors"),
        (lambda: pyeff.Sketch(4)({"a": torch.ones(2), "b": torch.ones(3)}, batch_dims=1), ValueError, "batch"),
        (lambda: pyeff.Sketch(4)({"a": torch.ones(2)}, batch_dims=-1), ValueError, "batch_dims"),
        (lambda: pyeff.Sketch(4)({"a": torch.ones(2)}, batch_dims=0.5), TypeError, "batch_dims"),
        (lambda: pyeff.sketch_grads(torch.ones(2, 3), pyeff.Sketch(4), "w"), ValueError, "grads"),
        (lambda: pyeff.sketch_grads(torch.ones(1, 2, 3).int(), pyeff.Sketch(4), "w"), TypeError, "grads"),
        (lambda: pyeff.sketch_grads(torch.ones(1, 2, 3), 4, "w"), TypeError, "sketch"),
        (lambda: pyeff.sketch_grads(torch.ones(1, 2, 3), pyeff.Sketch(4), "w", first_row=-1), ValueError, "first_row"),
        (
            lambda: pyeff.sketch_grads(torch.ones(1, 2, 3), pyeff.Sketch(4), "w", direction=moments(3, 2)),
            ValueError,
            "direction",
        ),
        (lambda: AdamWDirection(torch.ones(2), torch.ones(2), 0, frozen=True), ValueError, "step"),
    ],
)
def test_bad_arguments_are_named(make: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_only_balanced_sketches_have_kernels() -> None:
    grads, sketch = torch.ones(1, 2, 3), pyeff.Sketch(4, kind="countsketch")
    assert OPERATION.explain(grads, sketch, "w").impl == "reference"
    with pytest.raises(RuntimeError, match="countsketch"):
        pyeff.sketch_grads(grads, sketch, "w", impl="cpu")
