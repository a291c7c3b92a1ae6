"""AdamW8bit stands in for torch.optim.AdamW, trains as well, and resumes bit for bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyeff.optim.adamw8bit as module
from pyeff.optim import AdamW8bit
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


def assert_same_run(a: tuple[nn.Module, AdamW8bit], b: tuple[nn.Module, AdamW8bit]) -> None:
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
    monkeypatch.setattr(module, "step", lambda params, *args, **options: calls.append(len(params)))
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
    optimizer = AdamW8bit(together, lr=1e-2)
    alone = [nn.Parameter(x.clone()) for x in data]
    separate = [AdamW8bit([p], lr=1e-2) for p in alone]
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
    assert (state["beta1_power"], state["beta2_power"]) == (0.5 * 0.75, 0.5 * 0.875)
    assert torch.allclose(p, torch.full((4,), -2.0), atol=8 * torch.finfo(torch.float32).eps, rtol=0)


# ---------------------------------------------------------------------------------------------------------- resuming


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
    assert saved["param_groups"][0]["code"] == module.CODE
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
    del saved["state"][2]["beta2_power"]


def fewer_groups(saved: dict[str, Any]) -> None:
    saved["param_groups"] = []


def fewer_parameters(saved: dict[str, Any]) -> None:
    saved["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (other_code, "in code 'another'"),
        (other_shape, "exp_avg_code must be"),
        (other_dtype, "exp_avg_sq_scale must be"),
        (missing, "lacks beta2_power"),
        (fewer_groups, "has 0 param_groups"),
        (fewer_parameters, "has 5 parameters"),
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
    saved = saved_by(torch.optim.AdamW(model.parameters()), model)
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


def test_states_that_no_longer_fit_their_parameter_are_noticed() -> None:
    p = nn.Parameter(torch.ones(600))
    optimizer = AdamW8bit([p])
    p.grad = torch.ones(600)
    optimizer.step()
    optimizer.param_groups[0]["block_size"] = 64
    with pytest.raises(ValueError, match="another shape, device or block_size"):
        optimizer.step()
    optimizer.param_groups[0]["block_size"] = 256
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
