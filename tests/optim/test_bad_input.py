"""What cannot be stepped is refused before anything changes, and what moved is followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optimizer_runs import network, saved_by
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pyeff.optim import AdamW8bit, SGD8bit


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
