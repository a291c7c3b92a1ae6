"""The optimizers stand in for torch's, train as well, and resume bit for bit."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_as_accurate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyeff.ops._optimizer_plan import StepPlan
from pyeff.ops._optimizer_states import decode_moment
from pyeff.ops.global_norm import global_norm
from pyeff.optim import Adam8bit, AdamW8bit, Lion8bit, Optimizer8bit, SGD8bit
from pyeff.reference.optimizer_step import CODE, MASTERS
from pyeff.train.checkpoint import join_tensors, split_tensors


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 5))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(64, 24, generator=generator)
    return x, (x[:, :5] + x[:, 5:10]).argmax(1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
    """Steps on batches of these numbers; the mean loss of the last ten."""
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / len(losses[-10:])


def assert_same_run(a: tuple[nn.Module, Optimizer8bit], b: tuple[nn.Module, Optimizer8bit]) -> None:
    for p, q in zip(a[0].parameters(), b[0].parameters(), strict=True):
        assert torch.equal(p, q)
        left, right = a[1].state[p], b[1].state[q]
        assert left.keys() == right.keys()
        for name, value in left.items():
            same = torch.equal(value, right[name]) if isinstance(value, Tensor) else value == right[name]
            assert same, name


def through_safetensors(state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    tree, tensors = split_tensors(state_dict)
    save_file(tensors, folder / "optimizer.safetensors")
    (folder / "optimizer.json").write_text(json.dumps(tree))
    return join_tensors(
        json.loads((folder / "optimizer.json").read_text()), load_file(folder / "optimizer.safetensors")
    )


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


PAIRS = [
    (AdamW8bit, torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    (Adam8bit, torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "nesterov": True}),
    (SGD8bit, torch.optim.SGD, {"lr": 1e-2, "momentum": 0.5, "dampening": 0.25}),
]


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


# ---------------------------------------------------------------------------------------------------------- foreign


@pytest.mark.parametrize(("ours", "theirs", "options"), PAIRS)
def test_states_of_torchs_optimizers_are_read(ours: Any, theirs: Any, options: dict[str, Any]) -> None:
    """In fp32 nothing is lost: the next step is torch's to the rounding. In 8 bits, moments are rounded once."""
    model = network()
    optimizer = theirs(model.parameters(), **options)
    train(model, optimizer, range(5))
    for states in ("fp32", "8bit"):
        twin = copy.deepcopy(model)
        loaded = ours(twin.parameters(), states=states)
        loaded.load_state_dict(optimizer.state_dict())
        assert loaded.param_groups[0]["lr"] == options["lr"]
        peer_model = copy.deepcopy(model)
        peer = theirs(peer_model.parameters(), **options)
        peer.load_state_dict(optimizer.state_dict())
        train(peer_model, peer, range(5, 6))
        train(twin, loaded, range(5, 6))
        for before, p, q in zip(model.parameters(), twin.parameters(), peer_model.parameters(), strict=True):
            step = (q - before).abs().max()
            # Roundings of the weight and the step; a code is within 1/16 of a moment, a quotient of two within 1/8.
            bound = 16 * torch.finfo(torch.float32).eps * (q.abs() + step) if states == "fp32" else step / 8
            assert ((p - q).abs() <= bound).all()


def test_states_of_bitsandbytes_are_read(tmp_path: Path) -> None:
    """Its layout written by hand: uint8 codes into a table of 256, times one absmax for each 256 elements."""
    torch.manual_seed(0)
    large, small = nn.Parameter(torch.randn(5, 1000)), nn.Parameter(torch.randn(10))
    signed, unsigned = torch.linspace(-1, 1, 256), torch.linspace(0, 1, 256)
    codes1, codes2 = (torch.randint(0, 256, (5, 1000), dtype=torch.uint8) for _ in range(2))
    absmax1, absmax2 = torch.rand(20), torch.rand(20)
    hidden = {
        "state1": codes1,
        "state2": codes2,
        "qmap1": signed,
        "qmap2": unsigned,
        "absmax1": absmax1,
        "absmax2": absmax2,
    }
    plain = {"state1": torch.randn(10), "state2": torch.rand(10)}
    group = {"params": [0, 1], "lr": 0.5, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.3, "alpha": 0.0}
    saved = {
        "state": {0: {"step": 7, "__bnb_optimizer_quant_state__": hidden}, 1: {"step": 7, **plain}},
        "param_groups": [group],
    }
    blocks = torch.arange(5000) // 256
    expected_m = (signed[codes1.long()].view(-1) * absmax1[blocks]).view(5, 1000)
    expected_v = (unsigned[codes2.long()].view(-1) * absmax2[blocks]).view(5, 1000)
    exact = AdamW8bit([large, small], states="fp32")
    exact.load_state_dict(saved)
    assert torch.equal(exact.state[large]["exp_avg"], expected_m)
    assert torch.equal(exact.state[large]["exp_avg_sq"], expected_v)
    assert torch.equal(exact.state[small]["exp_avg_sq"], plain["state2"])
    assert exact.state[large]["step"] == 7
    assert exact.state[large]["beta_powers"].tolist() == [0.8**7, 0.9**7]
    assert [exact.param_groups[0][name] for name in ("lr", "betas", "eps", "weight_decay")] == [
        0.5,
        (0.8, 0.9),
        1e-6,
        0.3,
    ]
    coded = AdamW8bit([large, small])
    coded.load_state_dict(saved)
    decoded = decode_moment(coded.state[large]["exp_avg_code"], coded.state[large]["exp_avg_scale"], 256)
    scale = coded.state[large]["exp_avg_scale"].repeat_interleave(256, dim=1)[:, :1000]
    assert ((decoded - expected_m).abs() <= scale / 16).all()
    del hidden["absmax2"]
    with pytest.raises(ValueError, match="qmap2 and absmax2"):
        AdamW8bit([large, small]).load_state_dict(saved)


def test_foreign_states_that_mean_something_else_are_refused() -> None:
    model = network()
    with pytest.raises(ValueError, match="amsgrad"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.AdamW(model.parameters(), amsgrad=True), model)
        )
    with pytest.raises(ValueError, match="weight decay in the gradient"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)
        )
    with pytest.raises(ValueError, match="has no exp_avg"):
        AdamW8bit(model.parameters()).load_state_dict(
            saved_by(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model)
        )


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("master", MASTERS)
@pytest.mark.parametrize("states", ["8bit", "fp32"])
@pytest.mark.parametrize("cls", [Adam8bit, AdamW8bit, Lion8bit, SGD8bit])
def test_every_optimizer_resumes_bit_for_bit(cls: Any, states: str, master: str, tmp_path: Path) -> None:
    model = network().bfloat16()
    options = {"lr": 1e-2, "states": states, "master": master, "clip_norm": 0.5}
    optimizer = cls(model.parameters(), **options)

    def run(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            for i, p in enumerate(model.parameters()):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).bfloat16()
            optimizer.step()

    run(model, optimizer, range(3))
    resumed = copy.deepcopy(model)
    fresh = cls(resumed.parameters(), **options | {"lr": 0.5})
    fresh.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path))
    run(model, optimizer, range(3, 6))
    run(resumed, fresh, range(3, 6))
    assert_same_run((model, optimizer), (resumed, fresh))


def test_resume_through_safetensors_is_bitwise(tmp_path: Path) -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters(), lr=1e-2)
    train(model, optimizer, range(5))
    resumed = copy.deepcopy(model)
    fresh = AdamW8bit(resumed.parameters(), lr=0.7)
    fresh.load_state_dict(through_safetensors(optimizer.state_dict(), tmp_path))
    assert fresh.param_groups[0]["lr"] == 1e-2
    assert fresh.param_groups[0]["betas"] == (0.9, 0.999)
    assert_same_run((model, optimizer), (resumed, fresh))
    train(model, optimizer, range(5, 10))
    train(resumed, fresh, range(5, 10))
    assert_same_run((model, optimizer), (resumed, fresh))


def test_resume_of_bf16_parameters_keeps_bytes_bytes() -> None:
    model = network().bfloat16()
    optimizer = AdamW8bit(model.parameters())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    other = copy.deepcopy(model)
    fresh = AdamW8bit(other.parameters())
    fresh.load_state_dict(optimizer.state_dict())
    assert_same_run((model, optimizer), (other, fresh))


def test_loaded_states_are_copies() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(2))
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    fresh = AdamW8bit(copy.deepcopy(model).parameters())
    fresh.load_state_dict(saved)
    for p in fresh.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    fresh.step()
    assert all(
        torch.equal(value, kept["state"][i][name])
        for i, state in saved["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    )


def test_state_dict_names_its_code_and_holds_only_tensors_and_plain_values() -> None:
    model = network()
    optimizer = AdamW8bit(model.parameters())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["code"] == CODE
    json.dumps(split_tensors(saved)[0])


def saved_by(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
    train(model, optimizer, range(2))
    return copy.deepcopy(optimizer.state_dict())


def other_code(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["code"] = "another"


def other_shape(saved: dict[str, Any]) -> None:
    saved["state"][0]["exp_avg_code"] = torch.zeros(7, dtype=torch.uint8)


def other_dtype(saved: dict[str, Any]) -> None:
    saved["state"][1]["exp_avg_sq_scale"] = saved["state"][1]["exp_avg_sq_scale"].bfloat16()


def missing(saved: dict[str, Any]) -> None:
    del saved["state"][2]["beta_powers"]


def fewer_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] = []


def fewer_parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


def nonsense(path: str, value: Any) -> Any:
    """Damage by writing a value that has the right type and no meaning."""

    def damage(saved: dict[str, Any]) -> None:
        name, key = path.split(".")
        where = saved["param_groups"][0] if name == "group" else saved["state"][1]
        where[key] = value(where[key]) if callable(value) else value

    return damage


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (other_code, "in code 'another'"),
        (other_shape, "exp_avg_code must be"),
        (other_dtype, "exp_avg_sq_scale must be"),
        (missing, "lacks beta_powers"),
        (fewer_groups, "has 0 param_groups"),
        (fewer_parameters, "has 5 parameters"),
        (lambda saved: saved.pop("param_groups"), "must be a dict with the keys"),
        (lambda saved: saved["state"].update({99: saved["state"][0]}), "belongs to no parameter"),
        (nonsense("group.lr", -1.0), "lr must be >= 0"),
        (nonsense("group.lr", float("nan")), "lr must be >= 0"),
        (nonsense("group.betas", [0.9, 1.5]), "betas must be"),
        (nonsense("group.betas", 0.9), "betas must be"),
        (nonsense("group.eps", -1.0), "eps must be >= 0"),
        (nonsense("group.weight_decay", float("inf")), "weight_decay must be >= 0"),
        (nonsense("group.clip_norm", -2.0), "clip_norm must be > 0"),
        (nonsense("group.seed", "a"), "seed must be"),
        (nonsense("group.lr", "fast"), "lr must be a number"),
        (nonsense("group.lr", None), "lr must be a number"),
        (nonsense("group.weight_decay", "0.1"), "weight_decay must be a number"),
        (nonsense("group.skip_nonfinite", "yes"), "skip_nonfinite must be True or False"),
        (nonsense("group.skipped_steps", -1), "skipped_steps must be a whole number"),
        (nonsense("group.skipped_steps", "many"), "skipped_steps must be a whole number"),
        (lambda saved: saved.update(param_groups=[3]), "param_groups must be a list of dicts"),
        (lambda saved: saved["param_groups"][0].pop("params"), "param_groups must be a list of dicts"),
        (lambda saved: saved["state"].update({0: 5}), "state must be a dict of dicts"),
        (nonsense("group.master", "fp32"), "has master fp32"),
        (nonsense("group.states", "fp32"), "has states fp32"),
        (nonsense("state.step", lambda x: x - 100), "step must be a whole number"),
        (nonsense("state.step", lambda x: x + 0.5), "step must be a whole number"),
        (nonsense("state.step", lambda x: x * float("nan")), "step must be a whole number"),
        (nonsense("state.step", 3), "step must be torch.float64"),
        (nonsense("state.beta_powers", lambda x: x + 1), "beta_powers must be in"),
        (nonsense("state.exp_avg_scale", lambda x: x - 1), "exp_avg_scale must be finite and >= 0"),
        (nonsense("state.exp_avg_sq_scale", lambda x: x * float("inf")), "exp_avg_sq_scale must be finite"),
    ],
)
def test_states_that_do_not_fit_are_refused_and_change_nothing(damage: Any, match: str) -> None:
    model = network()
    saved = saved_by(AdamW8bit(model.parameters()), model)
    damage(saved)
    optimizer = AdamW8bit(model.parameters(), lr=0.5)
    train(model, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=match) as error:
        optimizer.load_state_dict(saved)
    assert "\n" not in str(error.value)
    assert str(optimizer.state_dict()) == str(before)


def test_another_block_size_and_another_optimizer_are_refused() -> None:
    model = network()
    saved = saved_by(AdamW8bit(model.parameters(), block_size=64), model)
    with pytest.raises(ValueError, match="build it with block_size=64"):
        AdamW8bit(model.parameters()).load_state_dict(saved)
    saved = saved_by(SGD8bit(model.parameters()), model)
    with pytest.raises(ValueError, match="lacks betas"):
        AdamW8bit(model.parameters()).load_state_dict(saved)
    saved = saved_by(torch.optim.Adagrad(model.parameters()), model)
    with pytest.raises(ValueError, match="in code None"):
        AdamW8bit(model.parameters()).load_state_dict(saved)


# ------------------------------------------------------------------------------------------------------------ errors


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 2))
    optimizer = AdamW8bit([p, q])
    p.grad, q.grad = torch.ones(4), torch.ones(4, 2).to_sparse()
    with pytest.raises(TypeError, match="sparse"):
        optimizer.step()
    assert torch.equal(p, torch.ones(4))


@pytest.mark.parametrize("way", ["sparse", "fp16", "complex"])
def test_gradients_of_other_kinds_are_refused_inside_the_backward_too(way: str) -> None:
    p, q = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 2))
    optimizer = AdamW8bit([p, q], skip_nonfinite=True)
    p.grad = torch.ones(4)
    bad = {"sparse": torch.ones(4, 2).to_sparse(), "fp16": torch.ones(4, 2).half(), "complex": torch.ones(4, 2) + 0j}[
        way
    ]
    q.data = q.data.to(bad.dtype)  # torch itself refuses a gradient of another type
    q.grad = bad
    q.data = torch.ones(4, 2)
    for step in (optimizer.step, lambda: optimizer.step_parameter(0, 1)):
        with pytest.raises(TypeError, match="takes dense fp32 or bf16 gradients"):
            step()
    assert torch.equal(p, torch.ones(4))
    assert not optimizer.state[q]


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("momentum", 1.0, "momentum must be a number in"),
        ("momentum", "high", "momentum must be a number"),
        ("dampening", 2.0, "dampening must be in"),
        ("nesterov", "no", "nesterov must be True or False"),
    ],
)
def test_options_of_sgd_that_mean_nothing_are_refused_when_they_are_loaded(name: str, value: Any, match: str) -> None:
    model = network()
    optimizer = SGD8bit(model.parameters(), lr=0.1)
    saved = saved_by(SGD8bit(model.parameters(), lr=0.2), model)
    saved["param_groups"][0][name] = value
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert not optimizer.state


def test_states_that_no_longer_fit_their_parameter_are_noticed() -> None:
    p = nn.Parameter(torch.ones(600))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(600)
    optimizer.step()
    p.data, p.grad = torch.ones(700), None
    p.grad = torch.ones(700)
    with pytest.raises(ValueError, match="another shape, device or block_size"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"lr": -1e-3}, "lr must be >= 0"),
        ({"lr": torch.ones(2)}, "lr must be a number or a tensor of one element"),
        ({"betas": (1.0, 0.9)}, "betas must be"),
        ({"eps": -1.0}, "eps must be >= 0"),
        ({"weight_decay": float("nan")}, "weight_decay must be >= 0"),
        ({"block_size": 100}, "block_size must be one of"),
        ({"states": "4bit"}, "states must be"),
        ({"master": "bf16"}, "master must be"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0"),
        ({"seed": 1.5}, "seed must be"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], match: str) -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=match):
        AdamW8bit([p], **options)
    optimizer = AdamW8bit([nn.Parameter(torch.ones(4))])
    with pytest.raises(ValueError, match=match):
        optimizer.add_param_group({"params": [p], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64])
def test_parameters_of_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match="dense fp32 or bf16"):
        AdamW8bit([nn.Parameter(torch.ones(4, dtype=dtype))])


def test_a_parameter_in_two_groups_is_refused() -> None:
    p = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW8bit([{"params": [p]}, {"params": [p]}])


def test_a_gradient_made_before_its_parameter_changed_size_is_refused():
    for before, after in ((10, 5000), (5000, 10)):
        p = nn.Parameter(torch.ones(before))
        p.grad = torch.ones(before)
        p.data = torch.ones(after)
        with pytest.raises(ValueError, match=f"has a gradient of shape .{before}"):
            AdamW8bit([p]).step()
        assert torch.equal(p, torch.ones(after))


@pytest.mark.parametrize("name", ["exp_avg_code", "exp_avg_scale", "exp_avg_sq_code", "exp_avg_sq_scale"])
@pytest.mark.parametrize("damage", ["shorter", "another dtype", "expanded"])
def test_a_state_that_was_edited_never_reaches_the_kernel(name: str, damage: str):
    p = nn.Parameter(torch.ones(1000))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(1000)
    optimizer.step()
    state = optimizer.state[p]
    state[name] = {
        "shorter": state[name][:1],
        "another dtype": state[name].to(torch.float16),
        "expanded": state[name][:1].expand(state[name].shape),
    }[damage]
    before = p.detach().clone()
    with pytest.raises(ValueError, match="made for another shape"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_graph_that_saw_the_weights_before_the_step_cannot_run_backward():
    p = nn.Parameter(torch.ones(300))
    loss = (p * p).sum()
    p.grad = torch.ones(300)
    AdamW8bit([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_parameter_given_twice_is_refused():
    p = nn.Parameter(torch.ones(300))
    with pytest.raises(ValueError, match="twice"):
        AdamW8bit([p, p])


# ----------------------------------------------------------------------------------------------------------- the GPU


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [Adam8bit, AdamW8bit, Lion8bit, SGD8bit])
def test_gpu_trains_with_the_bits_of_the_cpu(cls: Any) -> None:
    """Parameters of both dtypes and several groups, clipped, from the same gradients."""
    there, here = network().cuda(), network()
    for model in (there, here):
        model[2].bfloat16()
    options = {"lr": 1e-2, "clip_norm": 0.5}
    optimizers = [
        cls([{"params": model[0].parameters()}, {"params": model[2:].parameters(), "weight_decay": 0.1}], **options)
        for model in (there, here)
    ]
    for step in range(5):
        for i, (p, q) in enumerate(zip(there.parameters(), here.parameters(), strict=True)):
            g = torch.randn(q.shape, generator=torch.Generator().manual_seed(100 * step + i)).to(q.dtype)
            p.grad, q.grad = g.cuda(), g
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(there.parameters(), here.parameters(), strict=True):
        assert torch.equal(p.cpu(), q)
        for name, value in optimizers[1].state[q].items():
            assert torch.equal(optimizers[0].state[p][name].cpu(), value)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_captured_step_is_the_step_with_the_lr_of_the_moment(dtype: torch.dtype) -> None:
    a, b = network().cuda(), network().cuda()
    lr = torch.tensor(1e-2, device="cuda", dtype=dtype)
    captured = AdamW8bit(a.parameters(), lr=lr, clip_norm=1.0)
    plain = AdamW8bit(b.parameters(), lr=1e-2, clip_norm=1.0)

    def gradients(model: nn.Module, step: int) -> None:
        for i, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i)).cuda()
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    gradients(a, 0)
    captured.step()
    gradients(a, 1)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(4):
        gradients(b, step)
        plain.param_groups[0]["lr"] = rate = torch.tensor(1e-2 / (step + 1)).item()
        if step > 0:
            gradients(a, step)
            lr.fill_(rate)
            if step == 2:
                for model in (a, b):
                    model[0].bias.grad[0] = torch.nan
            graph.replay()
        plain.step()
    torch.cuda.synchronize()
    assert captured.skipped_steps == plain.skipped_steps == 1
    assert_same_run((a, captured), (b, plain))


@pytest.mark.gpu
def test_gpu_optimizer_does_not_synchronise() -> None:
    model = network().cuda()
    optimizer = AdamW8bit(model.parameters(), lr=torch.tensor(1e-3, device="cuda"), clip_norm=1.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2**31 + 4097])
def test_more_than_32_bits_of_elements(size: int) -> None:
    """The last elements take the step the first ones take."""
    if torch.cuda.mem_get_info()[0] < 7 * size:
        pytest.skip("needs 14 GB of GPU memory")
    p = nn.Parameter(torch.ones(size, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    AdamW8bit([p], lr=0.5, weight_decay=0.0, master="none").step()
    assert torch.equal(p[:5000], p[-5000:])
    assert p[-1] == 0.5


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_memory_that_was_freed_or_never_there_is_refused_and_states_that_moved_are_followed():
    def stepped() -> tuple[nn.Parameter, AdamW8bit]:
        p = nn.Parameter(torch.zeros(300))
        p.grad = torch.ones_like(p)
        optimizer = AdamW8bit([p])
        optimizer.step()
        return p, optimizer

    for freed in ("a parameter", "a state"):
        p, optimizer = stepped()
        (p if freed == "a parameter" else optimizer.state[p]["exp_avg_code"]).untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{freed} of .* has no memory"):
            optimizer.step()
    with FakeTensorMode(), pytest.raises(ValueError, match="no memory"):
        stepped()
    # By `.data`, as states are offloaded by hand: the tensors are the same, their memory is another.
    (p, optimizer), (q, undisturbed) = stepped(), stepped()
    for state in optimizer.state[p].values():
        state.data = state.data.clone()
    for _ in range(3):
        optimizer.step()
        undisturbed.step()
    for name, state in optimizer.state[p].items():
        assert torch.equal(state, undisturbed.state[q][name])


def test_a_gradient_whose_sign_torch_keeps_beside_it_is_read_with_it():
    p = nn.Parameter(torch.zeros(8))
    p.grad = torch._neg_view(torch.arange(8.0))
    assert p.grad.is_neg()
    assert p.grad.is_contiguous()
    SGD8bit([p], lr=1.0).step()
    assert torch.equal(p.detach(), torch.arange(8.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_parameter_whose_data_became_of_another_dtype_is_refused_before_anything_changes(dtype):
    p = nn.Parameter(torch.ones(300))
    p.grad = torch.ones_like(p)
    optimizer = AdamW8bit([p])
    optimizer.step()
    p.data = p.data.to(dtype)
    before = p.detach().clone()
    with pytest.raises(TypeError, match=f"dense fp32 or bf16 tensors; got {dtype}"):
        optimizer.step()
    assert torch.equal(p.detach(), before)


def test_states_of_the_same_parameters_in_another_order_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    named = list(model.named_parameters())
    optimizer = AdamW8bit(named)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    other = AdamW8bit([*named[2:], *named[:2]])
    with pytest.raises(ValueError, match=r"another order: place 0 is '0\.weight' there and '1\.weight' here"):
        other.load_state_dict(optimizer.state_dict())
    # Other names, such as those of a wrapped model, are of the same parameters in their order.
    wrapped = AdamW8bit([(f"module.{name}", p) for name, p in named])
    wrapped.load_state_dict(optimizer.state_dict())
    assert torch.equal(wrapped.state[named[0][1]]["exp_avg_code"], optimizer.state[named[0][1]]["exp_avg_code"])
