"""Sketches and dots of single samples' gradients, from one backward pass, equal those taken one sample at a time."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from observed_models import MODELS, gradient_of, loss_sum, model_named, padded_batch, sample_of
from torch import Tensor, nn

import pyeff
from pyeff.ops.sketch_grads import AdamWDirection

EPS = torch.finfo(torch.float32).eps
SKETCH = pyeff.Sketch(192, seed=5)
FACTORED = pyeff.FactoredSketch(5, 3, seed=2)


def grads_of_samples(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter's gradients [samples, ...], one sample at a time."""
    model = copy.deepcopy(model)
    samples = range(next(iter(batch.values())).shape[0])
    grads = [gradient_of(model, loss_sum(model, sample_of(batch, s))) for s in samples]
    return {name: torch.stack([g[name] for g in grads]) for name in grads[0]}


def reference_of(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in model.named_parameters()}


def stepped(model: nn.Module) -> torch.optim.Optimizer:
    """An optimizer with moments as after three steps, whatever the model's dtype."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.8, 0.95), eps=1e-4)
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        m, v = (torch.randn(parameter.shape, generator=generator).to(parameter.dtype) for _ in range(2))
        optimizer.state[parameter] = {"step": torch.tensor(3.0), "exp_avg": m, "exp_avg_sq": v.square()}
    return optimizer


def directions_of(model: nn.Module, optimizer: torch.optim.Optimizer, frozen: bool) -> dict[str, AdamWDirection]:
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        moments = state["exp_avg"].double(), state["exp_avg_sq"].double()
        found[name] = AdamWDirection(*moments, 3, (0.8, 0.95), 1e-4, frozen=frozen)
    return found


def assert_close(actual: Tensor, exact: Tensor, peer: Tensor, what: str) -> None:
    budget = 4 * (peer.double() - exact).abs().max() + 4 * EPS * exact.abs().max()
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{what}: error {error:.2e}, granted {budget:.2e}"


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in MODELS), ("gpt2", torch.float64), ("mixtral", torch.float64)],
)
def test_sketches_and_dots_are_those_of_single_samples(name: str, dtype: torch.dtype) -> None:
    batch = padded_batch()
    exact, peer = (grads_of_samples(model_named(name, d), batch) for d in (torch.float64, torch.float32))
    model = model_named(name, dtype)
    reference = reference_of(model)
    with pyeff.observe(model, sketch=SKETCH, reference=reference) as seen:
        loss_sum(model, batch).backward()
    assert seen.unobserved == {}
    assert seen.sketches.dtype == seen.dots.dtype == torch.float32
    assert seen.sketch_header["variant"] == "gradient"
    assert_close(seen.sketches, SKETCH(exact, batch_dims=1), SKETCH(peer, batch_dims=1), "sketches")

    def dots(grads: dict[str, Tensor]) -> Tensor:
        return torch.stack([(g * reference[n].to(g.dtype)).flatten(1).sum(1) for n, g in grads.items()]).sum(0)

    assert_close(seen.dots, dots(exact), dots(peer), "dots")
    norms = torch.stack([g.flatten(1).square().sum(1) for g in exact.values()]).sum(0).sqrt()
    peer_norms = torch.stack([g.flatten(1).square().sum(1) for g in peer.values()]).sum(0).sqrt()
    assert_close(seen.grad_norms, norms, peer_norms, "norms")


TIED = ("llama tied", "qwen2", "gemma2", "gpt2", "bert")


@pytest.mark.parametrize("variant", ["adamw", "adamw-frozen"])
@pytest.mark.parametrize("name", [name for name in MODELS if name not in TIED])
def test_sketches_of_directions_are_those_of_single_samples(name: str, variant: str) -> None:
    batch = padded_batch()
    model = model_named(name)
    optimizer = stepped(model)
    exact = grads_of_samples(model, batch)
    directions = directions_of(model, optimizer, variant == "adamw-frozen")
    with pyeff.observe(model, sketch=SKETCH, optimizer=optimizer, variant=variant, gradient=False) as seen:
        loss_sum(model, batch).backward()
    assert seen.sketch_header["variant"] == variant
    wanted = SKETCH(exact, batch_dims=1, directions=directions)
    assert_close(seen.sketches, wanted, wanted, "sketches")


def test_a_tied_embedding_is_refused_where_the_map_is_not_linear() -> None:
    model, batch = model_named("llama tied"), padded_batch()
    with (
        pytest.raises(pyeff.UnobservableError, match="embedding and head at once"),
        pyeff.observe(model, sketch=SKETCH, optimizer=stepped(model)),
    ):
        loss_sum(model, batch).backward()


def test_packed_and_padded_samples_have_the_same_sketches() -> None:
    model = model_named("llama")
    padded = padded_batch(3, 6)
    lengths = padded["attention_mask"].sum(1).tolist()
    packed = {
        "input_ids": torch.cat([row[:n] for row, n in zip(padded["input_ids"], lengths, strict=True)])[None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
    }
    pairs = list(zip(padded["labels"], lengths, strict=True))
    labels = torch.cat([torch.cat([row[1:n], row.new_tensor([-100])]) for row, n in pairs])
    sketches = []
    with pyeff.observe(model, sketch=SKETCH) as seen:
        loss_sum(model, padded).backward()
    sketches.append(seen.sketches)
    model.zero_grad()
    with pyeff.observe(model, sketch=SKETCH) as seen:
        logits = model(**packed, use_cache=False).logits[0]
        (nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100) / 16).backward()
    sketches.append(seen.sketches)
    assert sketches[0].shape == sketches[1].shape == (3, SKETCH.dim)
    assert_close(sketches[1], sketches[0].double(), sketches[0], "sketches")


def test_convolutions_are_sketched() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.Flatten(1), nn.Linear(3 * 15, 5)
    ).double()
    x, y = torch.randn(3, 2, 6, 6).double(), torch.tensor([0, 3, 1])
    exact = []
    for s in range(3):
        model.zero_grad()
        nn.functional.cross_entropy(model(x[s : s + 1]), y[s : s + 1], reduction="sum").backward()
        exact.append({n: p.grad.clone() for n, p in model.named_parameters()})
    model.zero_grad()
    with pyeff.observe(model, sketch=SKETCH) as seen:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    wanted = SKETCH({n: torch.stack([e[n] for e in exact]) for n in exact[0]}, batch_dims=1)
    assert_close(seen.sketches, wanted, wanted, "sketches")


class Head(nn.Module):
    """A head whose loss is either fused or composed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, targets: Tensor, fused: bool) -> Tensor:
        hidden = self.table(input_ids)
        if fused:
            return pyeff.linear_cross_entropy(
                hidden, self.head.weight, targets, bias=self.head.bias, softcap=3.0, reduction="sum"
            )
        logits = 3.0 * torch.tanh(self.head(hidden) / 3.0)
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("wanted", ["sketch", "adamw", "factored", "reference"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("classes", [3, 128], ids=["panels", "one panel"])
def test_a_head_that_never_stores_its_logits_is_sketched_by_panels(
    wanted: str, tied: bool, classes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("pyeff.observation.head")
    monkeypatch.setattr(module, "_LEAST_CLASSES", classes)
    monkeypatch.setattr(module, "_PIECE_BYTES", 1)
    torch.manual_seed(0)
    model = Head().double()
    if tied:
        model.head.weight = model.table.weight
    ids, targets = torch.randint(0, 11, (3, 4)), torch.randint(0, 11, (3, 4))
    targets[1, 2] = -100
    options: dict[str, object] = {
        "sketch": {"sketch": SKETCH},
        "adamw": {"sketch": SKETCH, "optimizer": stepped(model), "variant": "adamw-frozen" if tied else "adamw"},
        "factored": {"sketch": FACTORED},
        "reference": {"reference": reference_of(model)},
    }[wanted]
    found = []
    for fused in (True, False):
        model.zero_grad()
        with pyeff.observe(model, **options) as seen:
            model(ids, targets, fused).backward()
        grads = [p.grad for p in model.parameters()]
        found.append([seen.dots if wanted == "reference" else seen.sketches, seen.grad_norms, *grads])
    for of_fused, composed in zip(*found, strict=True):
        assert_close(of_fused, composed.double(), composed, "what a head adds")


def test_what_was_not_asked_for_is_not_there_and_bad_requests_are_named() -> None:
    model = nn.Linear(3, 2)
    with pyeff.observe(model) as seen:
        model(torch.ones(2, 3)).sum().backward()
    for attribute in ("sketches", "dots", "sketch_header"):
        with pytest.raises(RuntimeError, match="observe"):
            getattr(seen, attribute)
    with pytest.raises(TypeError, match="sketch must be"):
        pyeff.observe(model, sketch=8)
    with pytest.raises(ValueError, match="reference names 'head'"):
        pyeff.observe(model, reference={"head": torch.ones(2)})
    with pytest.raises(ValueError, match="shape"):
        pyeff.observe(model, reference={"bias": torch.ones(3)})
    with pytest.raises(ValueError, match="optimizer keeps no"):
        pyeff.observe(model, sketch=SKETCH, optimizer=torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="pass a sketch"):
        pyeff.observe(model, optimizer=torch.optim.AdamW(model.parameters()))


class Turned(nn.Module):
    """A layer by a multiple of a transposed parameter, and an offset by a part of one."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.weight, self.offset, self.part = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(8)), part

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, 3.0 * self.weight.t())
        return y + (self.offset[:6] if self.part else self.offset.view(4, 2)[:, 0].sum())


def test_sketches_are_of_the_parameter_and_not_of_what_a_layer_was_given() -> None:
    torch.manual_seed(0)
    model, x = Turned(part=False).double(), torch.randn(3, 4).double()
    model.offset.requires_grad_(False)
    reference = {"weight": torch.randn(4, 6).double()}
    exact = []
    for s in range(3):
        model.zero_grad()
        model(x[s : s + 1]).square().sum().backward()
        exact.append(model.weight.grad.clone())
    exact = torch.stack(exact)
    with pyeff.observe(model, sketch=SKETCH, reference=reference) as seen:
        model(x).square().sum().backward()
    wanted = SKETCH({"weight": exact}, batch_dims=1)
    assert_close(seen.sketches, wanted, wanted, "sketches")
    dots = (exact * reference["weight"]).sum((1, 2))
    assert_close(seen.dots, dots, dots, "dots")


def test_a_part_of_a_vector_is_refused_by_name() -> None:
    model, x = Turned(part=True), torch.randn(3, 4)
    with (
        pytest.raises(pyeff.UnobservableError, match="offset: a part of it"),
        pyeff.observe(model, sketch=SKETCH),
    ):
        model(x).square().sum().backward()


@pytest.mark.parametrize("name", MODELS)
def test_factored_sketches_of_every_matrix_are_those_of_single_samples(name: str) -> None:
    batch = padded_batch()
    exact, peer = (
        FACTORED(grads_of_samples(model_named(name, d), batch), batch_dims=1) for d in (torch.float64, torch.float32)
    )
    model = model_named(name, torch.float32)
    with pyeff.observe(model, sketch=FACTORED) as seen:
        loss_sum(model, batch).backward()
    assert seen.layer_sketches.keys() == exact.keys()
    for parameter, sketches in seen.layer_sketches.items():
        assert_close(sketches, exact[parameter], peer[parameter], parameter)
    together = torch.cat([seen.layer_sketches[n].flatten(1) for n in sorted(exact)], 1)
    assert torch.equal(seen.sketches, together)
    assert seen.sketch_header == {**FACTORED.header, "variant": "gradient", "parameters": sorted(exact)}


def test_factored_sketches_of_convolutions_and_of_what_is_chosen_later() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.Flatten(2), nn.Conv1d(4, 3, 2), nn.Flatten(1), nn.Linear(45, 5)
    )
    x = torch.randn(3, 2, 6, 6)
    exact, peer = {}, {}
    for dtype, grads in ((torch.float64, exact), (torch.float32, peer)):
        plain = copy.deepcopy(model).to(dtype)
        of_samples = [gradient_of(plain, plain(x[s : s + 1].to(dtype)).square().sum()) for s in range(3)]
        grads |= FACTORED({n: torch.stack([g[n] for g in of_samples]) for n in of_samples[0]}, batch_dims=1)
    for options in ({}, {"gradient": False}, {"defer": True, "norms": False}):
        with pyeff.observe(model, sketch=FACTORED, **options) as seen:
            model(x).square().sum().backward()
        for parameter, sketches in seen.layer_sketches.items():
            assert_close(sketches, exact[parameter], peer[parameter], parameter)


def test_a_factored_sketch_sees_no_optimizer() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="which a factored sketch does not see"):
        pyeff.observe(model, sketch=FACTORED, optimizer=torch.optim.AdamW(model.parameters()))
    with pyeff.observe(model, sketch=SKETCH) as seen:
        model(torch.ones(2, 3)).sum().backward()
    with pytest.raises(RuntimeError, match="FactoredSketch"):
        seen.layer_sketches


def trained(states: str) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, Tensor]]:
    """A model after three steps, its optimizer, and three samples' gradients."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(11, 70), nn.LayerNorm(70), nn.Linear(70, 9), nn.Tanh(), nn.Linear(9, 11))
    ids = torch.randint(0, 11, (3, 4))
    options = {"lr": 1e-2, "betas": (0.8, 0.95)}
    optimizer = (
        torch.optim.AdamW(model.parameters(), **options)
        if states == "torch"
        else pyeff.optim.AdamW8bit(model.parameters(), states=states, **options)
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()
    shares = [gradient_of(model, model(ids[s : s + 1]).square().sum()) for s in range(3)]
    return model, optimizer, {"ids": ids} | {n: torch.stack([g[n] for g in shares]) for n in shares[0]}


@pytest.mark.parametrize("variant", ["adamw", "adamw-frozen"])
@pytest.mark.parametrize("states", ["torch", "fp32", "8bit"])
def test_any_adamw_s_states_map_what_is_sketched(states: str, variant: str) -> None:
    model, optimizer, grads = trained(states)
    ids = grads.pop("ids")
    with pyeff.observe(model, sketch=SKETCH, optimizer=optimizer, variant=variant) as seen:
        model(ids).square().sum().backward()
    assert seen.sketch_header["variant"] == variant
    directions = pyeff.optimizer_directions(model, optimizer, variant=variant)
    for name, parameter in model.named_parameters():
        # Against what the optimizer itself says of its states: what it keeps, or as it decodes it.
        state = optimizer.state[parameter]
        if states == "8bit":
            decoded = pyeff.ops.OptimizerStates.zeros([parameter])
            decoded.first, decoded.first_scale = [state["exp_avg_code"]], [state["exp_avg_scale"]]
            decoded.second, decoded.second_scale = [state["exp_avg_sq_code"]], [state["exp_avg_sq_scale"]]
            state = dict(zip(("exp_avg", "exp_avg_sq"), decoded.decode(0), strict=True))
        assert torch.equal(directions[name].exp_avg, state["exp_avg"])
        assert torch.equal(directions[name].exp_avg_sq, state["exp_avg_sq"])
        assert directions[name].step == 3
    exact = {n: g.double() for n, g in grads.items()}
    wide = {
        n: AdamWDirection(d.exp_avg.double(), d.exp_avg_sq.double(), d.step, d.betas, d.eps, frozen=d.frozen)
        for n, d in directions.items()
    }
    wanted = SKETCH(exact, batch_dims=1, directions=wide)
    # A small second moment magnifies the rounding of gradients: the peer's are those of another order of sums.
    peer = SKETCH({n: g * (1 + EPS) for n, g in grads.items()}, batch_dims=1, directions=directions)
    assert_close(seen.sketches, wanted, peer, "sketches")


def test_a_reference_in_the_optimizer_s_space() -> None:
    model, optimizer, grads = trained("8bit")
    ids, reference = grads.pop("ids"), {n: torch.randn_like(p) for n, p in model.named_parameters()}
    directions = pyeff.optimizer_directions(model, optimizer, variant="adamw-frozen")
    with pyeff.observe(model, reference={n: directions[n](r) for n, r in reference.items()}) as seen:
        model(ids).square().sum().backward()

    def dots(dtype: torch.dtype) -> Tensor:
        return torch.stack(
            [(directions[n](g.to(dtype)) * reference[n].to(dtype)).flatten(1).sum(1) for n, g in grads.items()]
        ).sum(0)

    assert_close(seen.dots, dots(torch.float64), dots(torch.float32), "dots")


def test_optimizers_without_second_moments_are_refused() -> None:
    model = nn.Linear(70, 2)
    for optimizer in (
        pyeff.optim.Lion8bit(model.parameters()),
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    ):
        model(torch.ones(2, 70)).sum().backward()
        optimizer.step()
        with pytest.raises(ValueError, match="optimizer keeps no exp_avg and exp_avg_sq of weight"):
            pyeff.observe(model, sketch=SKETCH, optimizer=optimizer)
    with pytest.raises(ValueError, match="variant must be"):
        pyeff.optimizer_directions(model, optimizer, variant="adam")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (torch.optim.NAdam, "got NAdam"),
        (torch.optim.RAdam, "got RAdam"),
        (lambda parameters: torch.optim.AdamW(parameters, amsgrad=True), "with amsgrad=True"),
        (lambda parameters: torch.optim.Adam(parameters, maximize=True), "with maximize=True"),
    ],
)
def test_optimizers_that_step_otherwise_from_the_same_moments_are_refused(make: Any, words: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match=words):
        pyeff.observe(model, sketch=SKETCH, optimizer=optimizer)


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain, self.linear = nn.Parameter(torch.tensor(0.5)), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * self.linear(x)


def test_a_scalar_parameter_has_its_dot() -> None:
    model, x = Gain(), torch.randn(4, 3)
    with pyeff.observe(model, sketch=SKETCH, reference={"gain": torch.tensor(2.0)}) as seen:
        model(x).sum().backward()
    exact, peer = (
        (2 * nn.functional.linear(x.to(d), model.linear.weight.to(d), model.linear.bias.to(d))).sum(1)
        for d in (torch.float64, torch.float32)
    )
    assert_close(seen.dots, exact, peer, "dots")
