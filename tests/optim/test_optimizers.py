"""The optimizers stand in for torch's and train as well."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_runs import PAIRS, assert_same_run, batch, network, through_safetensors, train
from oracle import assert_as_accurate
from torch import Tensor, nn

from pyeff.ops._optimizer_plan import StepPlan
from pyeff.ops.global_norm import global_norm
from pyeff.optim import Adam8bit, AdamW8bit, Lion8bit, SGD8bit
from pyeff.reference.optimizer_step import MASTERS

# -------------------------------------------------------------------------------------------------------- training


def test_training_ends_within_the_spread_of_seeds_of_torch() -> None:
    """The mean loss over seeds differs from AdamW's by less than seeds make AdamW differ from itself."""
    ours, theirs = [], []
    for seed in range(4):
        for cls, losses in ((AdamW8bit, ours), (torch.optim.AdamW, theirs)):
            model = network(seed)
            losses.append(train(model, cls(model.parameters(), lr=3e-3), range(200)))
    untrained = nn.functional.cross_entropy(network()(batch(0)[0]), batch(0)[1]).item()
    assert max(theirs) < untrained / 2, "the task must be learned for this to mean anything"
    assert abs(sum(ours) - sum(theirs)) / 4 <= max(theirs) - min(theirs)


def test_first_step_is_torchs() -> None:
    """Before anything has been stored in 8 bits the two differ by rounding alone."""
    a, b = network(), network()
    for cls, model in ((AdamW8bit, a), (torch.optim.AdamW, b)):
        train(model, cls(model.parameters(), lr=1e-2, weight_decay=0.3), range(1))
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        # A handful of roundings of the weight, and of the step of at most lr.
        bound = 4 * torch.finfo(torch.float32).eps * (q.abs() + 1e-2)
        assert ((p - q).abs() <= bound).all()


def test_groups_keep_their_own_options_and_schedules() -> None:
    model = network()
    frozen, moving = list(model[0].parameters()), list(model[2].parameters())
    optimizer = AdamW8bit([{"params": frozen, "lr": 0.0}, {"params": moving, "weight_decay": 0.0}], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = copy.deepcopy(model)
    train(model, optimizer, range(1))
    assert torch.equal(model[0].weight, before[0].weight)
    first = (model[2].weight - before[2].weight).abs().max()
    schedule.step()
    assert optimizer.param_groups[1]["lr"] == 5e-3
    middle = copy.deepcopy(model)
    train(model, optimizer, range(1))
    second = (model[2].weight - middle[2].weight).abs().max()
    assert 0 < second < first


def test_a_tensor_lr_is_the_number_it_holds() -> None:
    a, b = network(), network()
    first, second = AdamW8bit(a.parameters(), lr=0.125), AdamW8bit(b.parameters(), lr=torch.tensor(0.125))
    train(a, first, range(3))
    train(b, second, range(3))
    assert_same_run((a, first), (b, second))


def test_closure_runs_with_gradients_and_returns_its_loss() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW8bit([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert (p < 1.0).all()


def test_parameters_without_gradients_are_skipped_and_catch_up() -> None:
    """Each counts its own steps, so a late one starts with its own bias correction."""
    p, q = nn.Parameter(torch.ones(300)), nn.Parameter(torch.ones(300))
    optimizer = AdamW8bit([p, q], lr=0.1, weight_decay=0.0)
    p.grad = torch.ones(300)
    optimizer.step()
    assert torch.equal(q, torch.ones(300))
    assert q not in optimizer.state
    alone = p.detach().clone()
    p.grad, q.grad = None, torch.ones(300)
    optimizer.step()
    assert torch.equal(p, alone)
    assert torch.equal(q, alone)
    p.grad = q.grad = torch.ones(300)
    optimizer.step()
    assert torch.equal(q, p)
    assert [optimizer.state[x]["step"] for x in (p, q)] == [2, 2]


def test_one_call_serves_a_whole_group(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(StepPlan, "step", lambda self, *args, **options: calls.append(len(self.params)))
    model = network()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(2))
    assert calls == [6, 6]


def test_mixed_dtypes_empty_and_strided_parameters_in_one_group() -> None:
    torch.manual_seed(0)
    data = [
        torch.randn(33, 70),
        torch.randn(33, 70).bfloat16(),
        torch.randn(0, 4),
        torch.randn(70, 33).T,
        torch.randn(()),
    ]
    together = [nn.Parameter(x.clone()) for x in data]
    options = {"lr": 1e-2, "master": "ecc8"}
    # Without names, random bits would depend on the place in the list.
    optimizer = AdamW8bit([(str(i), p) for i, p in enumerate(together)], **options)
    alone = [nn.Parameter(x.clone()) for x in data]
    separate = [AdamW8bit([(str(i), p)], **options) for i, p in enumerate(alone)]
    for _ in range(3):
        for p, q in zip(together, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        for one in separate:
            one.step()
    for before, p, q in zip(data, together, alone, strict=True):
        assert torch.equal(p, q)
        assert p.stride() == before.clone().stride()
        assert p.numel() == 0 or not torch.equal(p, before)


def test_betas_may_change_between_steps() -> None:
    """The corrections for bias are products of the betas that were, not powers of the one that is."""
    p = nn.Parameter(torch.zeros(4))
    optimizer = AdamW8bit([p], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    p.grad = torch.ones(4)
    optimizer.step()
    optimizer.param_groups[0]["betas"] = (0.75, 0.875)
    optimizer.step()
    state = optimizer.state[p]
    assert state["beta_powers"].tolist() == [0.5 * 0.75, 0.5 * 0.875]
    assert torch.allclose(p, torch.full((4,), -2.0), atol=8 * torch.finfo(torch.float32).eps, rtol=0)


# ------------------------------------------------------------------------------------------------- against torch


def lion(p: Tensor, g: Tensor, m: Tensor, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
    """The paper's algorithm, in the precision of its arguments."""
    direction = (betas[0] * m + (1 - betas[0]) * g).sign()
    p.copy_(p * (1 - lr * weight_decay) - lr * direction)
    m.copy_(betas[1] * m + (1 - betas[1]) * g)


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_fp32_states_are_torchs_optimizer_to_the_rounding(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """50 steps on the same gradients: as near to float64 as torch's own fp32 is."""
    torch.manual_seed(0)
    start = torch.randn(3000)
    grads = [torch.randn(3000) * torch.exp(torch.randn(3000)) for _ in range(50)]
    runs = {}
    for name, cls, dtype, extra in (
        ("ours", ours, torch.float32, {"states": "fp32"}),
        ("torch", theirs, torch.float32, {"foreach": False}),
        ("exact", theirs, torch.float64, {"foreach": False}),
    ):
        p = nn.Parameter(start.to(dtype, copy=True))
        optimizer = cls([p], **options, **extra)
        for g in grads:
            p.grad = g.to(dtype, copy=True)
            optimizer.step()
        runs[name] = p.detach(), optimizer.state[p]
    assert_as_accurate(runs["ours"][0], runs["exact"][0], runs["torch"][0])
    for moment in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
        if moment in runs["exact"][1]:
            ours_m, exact_m, torch_m = (runs[name][1][moment] for name in ("ours", "exact", "torch"))
            assert_as_accurate(ours_m, exact_m, torch_m, what=moment)


def test_fp32_states_are_lions_formula_to_the_rounding() -> None:
    torch.manual_seed(0)
    start = torch.randn(3000)
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    exact_p, exact_m, peer_p, peer_m = start.double(), torch.zeros(3000).double(), start.clone(), torch.zeros(3000)
    p = nn.Parameter(start.clone())
    optimizer = Lion8bit([p], states="fp32", **options)
    clear = torch.ones(3000, dtype=torch.bool)
    for _ in range(50):
        g = torch.randn(3000)
        # A direction that vanishes but for its rounding has no sign to agree on.
        direction = 0.9 * exact_m + 0.1 * g.double()
        clear &= direction.abs() > 8 * torch.finfo(torch.float32).eps * (0.9 * exact_m.abs() + 0.1 * g.abs())
        p.grad = g
        optimizer.step()
        lion(exact_p, g.double(), exact_m, **options)
        lion(peer_p, g, peer_m, **options)
    assert clear.double().mean() > 0.99
    assert_as_accurate(p.detach()[clear], exact_p[clear], peer_p[clear])
    assert_as_accurate(optimizer.state[p]["exp_avg"], exact_m, peer_m)


@pytest.mark.parametrize("cls", [Adam8bit, Lion8bit, SGD8bit])
def test_others_train_within_the_spread_of_seeds_of_their_fp32_selves(cls: Any) -> None:
    lr = {Adam8bit: 3e-3, Lion8bit: 3e-4, SGD8bit: 1e-1}[cls]
    losses: dict[str, list[float]] = {"8bit": [], "fp32": []}
    for seed in range(3):
        for states, found in losses.items():
            model = network(seed)
            found.append(train(model, cls(model.parameters(), lr=lr, states=states), range(100)))
    untrained = nn.functional.cross_entropy(network()(batch(0)[0]), batch(0)[1]).item()
    assert max(losses["fp32"]) < untrained * 0.9, "the task must be learned for this to mean anything"
    assert abs(sum(losses["8bit"]) - sum(losses["fp32"])) / 3 <= max(losses["fp32"]) - min(losses["fp32"])


def test_clip_norm_is_torchs_clipping_and_leaves_gradients_alone() -> None:
    """On gradients whose norms go up and down around it: as near to float64 as torch in fp32 is."""
    torch.manual_seed(0)
    start = [torch.randn(30, 70), torch.randn(70)]
    grads = [[torch.randn_like(x) * size for x in start] for size in (1.0, 0.01, 10.0, 0.1)]
    clip_norm = 0.3 * sum(g.square().sum() for g in grads[0]).sqrt().item()
    runs = {}
    for name, dtype in (("ours", torch.float32), ("torch", torch.float32), ("exact", torch.float64)):
        params = [nn.Parameter(x.to(dtype, copy=True)) for x in start]
        optimizer: torch.optim.Optimizer
        if name == "ours":
            groups = [{"params": [p]} for p in params]  # the norm is that of all groups
            optimizer = AdamW8bit(groups, lr=1.0, states="fp32", clip_norm=clip_norm)
        else:
            optimizer = torch.optim.AdamW(params, lr=1.0, foreach=False)
        for step in grads:
            for p, g in zip(params, step, strict=True):
                p.grad = g.to(dtype, copy=True)
            if name != "ours":
                torch.nn.utils.clip_grad_norm_(params, clip_norm, foreach=False)
            optimizer.step()
            if name == "ours":
                assert all(torch.equal(p.grad, g) for p, g in zip(params, step, strict=True))
        runs[name] = torch.cat([p.detach().flatten() for p in params])
    assert_as_accurate(runs["ours"], runs["exact"], runs["torch"])


def test_clipping_in_8_bits_is_a_step_with_gradients_that_are_already_clipped() -> None:
    a, b = network(), network()
    ours = AdamW8bit([{"params": a[0].parameters()}, {"params": a[2:].parameters()}], clip_norm=0.1)
    theirs = AdamW8bit(b.parameters())
    for step in range(3):
        for model in (a, b):
            model.zero_grad()
            nn.functional.cross_entropy(model(batch(step)[0]), batch(step)[1]).backward()
        norm = global_norm([p.grad for p in b.parameters()]).item()
        assert norm > 0.1, "there must be something to clip"
        factor = torch.tensor(0.1 / (norm + 1e-6))  # in float64, rounded once
        for p in b.parameters():
            p.grad *= factor
        ours.step()
        theirs.step()
    assert_same_run((a, ours), (b, theirs))


def test_a_step_with_a_bad_gradient_is_skipped_as_a_whole_and_counted(tmp_path: Path) -> None:
    for options in ({"skip_nonfinite": True}, {"clip_norm": 1.0}):
        model = network()
        optimizer = AdamW8bit([{"params": model[0].parameters()}, {"params": model[2:].parameters()}], **options)
        train(model, optimizer, range(2))
        before = copy.deepcopy((model, optimizer.state_dict()))
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        model[4].bias.grad[1] = torch.nan
        optimizer.step()
        model[4].bias.grad[1] = torch.inf
        optimizer.step()
        assert optimizer.skipped_steps == 2
        for p, q in zip(model.parameters(), before[0].parameters(), strict=True):
            assert torch.equal(p, q)
        for key, state in before[1]["state"].items():
            assert all(torch.equal(value, optimizer.state_dict()["state"][key][name]) for name, value in state.items())
        fresh = AdamW8bit([{"params": model[0].parameters()}, {"params": model[2:].parameters()}], **options)
        fresh.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path))
        assert fresh.skipped_steps == 2


def test_a_skipped_step_is_counted_where_the_first_group_has_no_gradients() -> None:
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = AdamW8bit([{"params": [p]} for p in params], skip_nonfinite=True)
    params[1].grad = torch.full((3,), torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(params[1], torch.ones(3))


@pytest.mark.parametrize("master", MASTERS)
def test_bf16_training_is_as_good_as_fp32_unless_masters_are_left_out(master: str) -> None:
    """At a learning rate whose steps are below a bf16's last place."""
    losses = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        torch.manual_seed(0)
        p = nn.Parameter(torch.full((4096,), 1.0, dtype=dtype))
        optimizer = AdamW8bit([p], lr=1e-4, weight_decay=0.0, master=master)
        for _ in range(300):
            p.grad = p.detach() - 0.5
            optimizer.step()
        losses[name] = (p.detach().double() - 0.5).mean().item()
    moved, fraction = 0.5 - losses["fp32"], (0.5 - losses["bf16"]) / (0.5 - losses["fp32"])
    # A step is lr m / sqrt(v), and both are means of gradients that fall from 0.5 by as much as the weight moves. All
    # elements of a block are its largest, whose codes have no error but fp32's.
    assert abs(moved / (300 * 1e-4) - 1) <= 0.5 / (0.5 - moved) - 1
    if master == "none":
        assert fraction == 0.0
        return
    place = 2.0**-8  # of a bf16 between 0.5 and 1
    # Gradients are taken at the bf16 weight, half a place off, which is in m and in sqrt(v).
    bound = 2 * (place / 2) / (0.5 - moved)
    if master == "stochastic":
        # 300 choices between neighbours, an element; six deviations of the mean.
        bound += 6 * (300 * 1e-4 * place / 4096) ** 0.5 / moved
    else:
        bound += place / 2 / moved  # what is looked at is the bf16 of the weight that is kept
    if master == "ecc8":
        bound += 6 * (300 / 4 / 4096) ** 0.5 * place / 256 / moved  # 300 roundings at random to the byte's place
    assert abs(fraction - 1) <= bound


def test_the_default_keeps_weight_decay_in_bf16() -> None:
    p = nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    optimizer = AdamW8bit([p], lr=1e-3, weight_decay=1e-2)
    for _ in range(500):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    exact = (1 - 1e-5) ** 500
    # As many roundings with the variance of a two-valued choice; six deviations of the mean.
    deviation = (500 * 1e-5 * 2**-8 / 10_000) ** 0.5
    assert abs(p.double().mean().item() - exact) <= 6 * deviation


def test_replicas_and_names_give_the_same_random_bits() -> None:
    def run(optimizer: AdamW8bit, p: nn.Parameter) -> Tensor:
        for _ in range(3):
            p.grad = torch.full_like(p, 1e-3)
            optimizer.step()
        return p.detach()

    def fresh() -> nn.Parameter:
        return nn.Parameter(torch.linspace(-1, 1, 5000).bfloat16())

    p, q, r = fresh(), fresh(), fresh()
    assert torch.equal(run(AdamW8bit([p]), p), run(AdamW8bit([q]), q))
    assert not torch.equal(p, run(AdamW8bit([r], seed=1), r))
    # A name tells a parameter wherever it stands in the list.
    other, p, q = fresh(), fresh(), fresh()
    assert torch.equal(run(AdamW8bit([("w", p)]), p), run(AdamW8bit([("other", other), ("w", q)]), q))


def test_gradients_that_move_and_states_that_are_replaced_are_followed() -> None:
    """A plan is kept between steps; what it does not keep must not be trusted."""
    a, b = network(), network()
    kept, fresh = AdamW8bit(a.parameters()), AdamW8bit(b.parameters())
    for step in range(6):
        for model in (a, b):
            for p in model.parameters():
                generator = torch.Generator().manual_seed(step)
                g = torch.randn(p.shape, generator=generator)
                p.grad = g
                if step == 3 and p.ndim == 2:
                    p.grad = g.T.contiguous().T
                if step == 4 and p is model[0].bias:
                    p.grad = None
        kept.step()
        restarted = AdamW8bit(b.parameters())
        restarted.load_state_dict(fresh.state_dict())
        fresh = restarted
        fresh.step()
        assert_same_run((a, kept), (b, fresh))


def test_gradients_are_not_kept_alive_between_steps() -> None:
    """Their memory is what the next backward needs."""
    model = network()
    optimizer = AdamW8bit(model.parameters(), clip_norm=1.0)
    for step in range(2):
        train(model, optimizer, range(step, step + 1))
        model[2].weight.grad = model[2].weight.grad.T.contiguous().T
        optimizer.step()
        grads = [weakref.ref(p.grad) for p in model.parameters()]
        model.zero_grad()
        assert not any(grad() is not None for grad in grads)


def test_copies_and_pickles_of_an_optimizer_go_on_alike() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters(), clip_norm=1.0)
    train(model, optimizer, range(2))
    twin_model, twin = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin_model, twin, range(2, 4))
    assert_same_run((model, optimizer), (twin_model, twin))
