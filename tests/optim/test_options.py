"""What is written into `param_groups` after an optimizer was made: looked at before it is used."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pyeff.optim import AdamW8bit, GradientRelease, Lion8bit, Optimizer8bit, SGD8bit


def two_groups(cls: Any = AdamW8bit, *, steps: int = 1, **options: Any) -> tuple[list[nn.Parameter], Optimizer8bit]:
    params = [nn.Parameter(torch.ones(300)) for _ in range(2)]
    optimizer = cls([{"params": [p]} for p in params], **options)
    for _ in range(steps):
        take_step(params, optimizer)
    return params, optimizer


def take_step(params: list[nn.Parameter], optimizer: Optimizer8bit) -> None:
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()


def values(params: list[nn.Parameter], optimizer: Optimizer8bit) -> list[Tensor]:
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


WRONG = [
    (AdamW8bit, "lr", float("nan"), ValueError, "lr must be >= 0 and finite; got nan"),
    (AdamW8bit, "lr", -1.0, ValueError, "lr must be >= 0 and finite"),
    (AdamW8bit, "lr", float("inf"), ValueError, "lr must be >= 0 and finite"),
    (AdamW8bit, "lr", "0.1", TypeError, "lr must be a number; got '0.1'"),
    (AdamW8bit, "lr", None, TypeError, "lr must be a number; got None"),
    (AdamW8bit, "lr", torch.tensor(-1.0), ValueError, "lr must be >= 0 and finite"),
    (AdamW8bit, "lr", torch.ones(2), ValueError, "lr must be a number or a tensor of one element"),
    (AdamW8bit, "betas", (0.9, 1.0), ValueError, r"betas must be two numbers in \[0, 1\)"),
    (Lion8bit, "betas", [0.9], ValueError, r"betas must be two numbers in \[0, 1\)"),
    (AdamW8bit, "eps", -1.0, ValueError, "eps must be >= 0"),
    (AdamW8bit, "weight_decay", float("nan"), ValueError, "weight_decay must be >= 0"),
    (AdamW8bit, "weight_decay", torch.ones(2), ValueError, "weight_decay must be a number or a tensor of one element"),
    (AdamW8bit, "clip_norm", 0.0, ValueError, "clip_norm must be > 0"),
    (AdamW8bit, "skip_nonfinite", "yes", TypeError, "skip_nonfinite must be True or False"),
    (AdamW8bit, "seed", -1, ValueError, "seed must be an integer"),
    (SGD8bit, "momentum", 1.5, ValueError, "momentum must be a number in"),
    (SGD8bit, "dampening", 2.0, ValueError, "dampening must be in"),
]


@pytest.mark.parametrize(("cls", "name", "value", "error", "match"), WRONG)
def test_an_option_that_became_wrong_is_refused_before_any_group_steps(
    cls: Any, name: str, value: Any, error: Any, match: str
) -> None:
    params, optimizer = two_groups(cls)
    good = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    before = values(params, optimizer)
    for _ in range(2):  # not only where it is new
        with pytest.raises(error, match=match):
            take_step(params, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, values(params, optimizer), strict=True))
    optimizer.param_groups[1][name] = good
    take_step(params, optimizer)
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


def test_a_list_of_betas_and_a_tensor_lr_are_looked_at_where_they_were_written_into() -> None:
    params, optimizer = two_groups(betas=[0.9, 0.99], lr=torch.tensor(0.1))
    optimizer.param_groups[0]["betas"][1] = 1.0
    with pytest.raises(ValueError, match=r"betas must be two numbers"):
        take_step(params, optimizer)
    optimizer.param_groups[0]["betas"][1] = 0.99
    optimizer.param_groups[0]["lr"].fill_(torch.nan)
    with pytest.raises(ValueError, match="lr must be >= 0 and finite"):
        take_step(params, optimizer)


FIXED = [
    ("block_size", 64),
    ("block_size", 0),
    ("states", "fp32"),
    ("master", "none"),
    ("offload", True),
    ("code", "x"),
]


@pytest.mark.parametrize(("name", "value"), FIXED)
def test_what_states_were_made_for_cannot_change_after_the_first_step(name: str, value: Any) -> None:
    params, optimizer = two_groups()
    before = optimizer.param_groups[1][name]
    optimizer.param_groups[1][name] = value
    with pytest.raises(ValueError, match=rf"{name} of group 1 was {before!r} .* cannot become {value!r}"):
        take_step(params, optimizer)
    # Nor where the optimizer was copied, or continues from a state_dict.
    optimizer.param_groups[1][name] = before
    copied, continued = copy.deepcopy(optimizer), AdamW8bit([{"params": [p]} for p in params])
    continued.load_state_dict(optimizer.state_dict())
    for made in (copied, continued):
        own = [p for group in made.param_groups for p in group["params"]]
        take_step(own, made)
        made.param_groups[1][name] = value
        with pytest.raises(ValueError, match="cannot become"):
            take_step(own, made)


def test_before_the_first_step_they_can() -> None:
    params, optimizer = two_groups(steps=0)
    optimizer.param_groups[1] |= {"block_size": 64, "states": "fp32", "master": "none"}
    take_step(params, optimizer)
    assert optimizer.state[params[1]].keys() == {"exp_avg", "exp_avg_sq", "step", "beta_powers"}
    params, optimizer = two_groups(steps=0)
    optimizer.param_groups[1]["block_size"] = 100
    with pytest.raises(ValueError, match="block_size must be one of"):
        take_step(params, optimizer)


def test_options_are_looked_at_inside_the_backward_too() -> None:
    p = nn.Parameter(torch.ones(300))
    optimizer = AdamW8bit([p])
    with GradientRelease(optimizer) as release:
        release.backward(lambda: p.sum())
        before = p.detach().clone()
        optimizer.param_groups[0]["lr"] = float("nan")
        with pytest.raises(ValueError, match="lr must be >= 0"):
            release.backward(lambda: p.sum())
        optimizer.param_groups[0]["lr"] = 1e-3
        for name, value in (("clip_norm", 1.0), ("skip_nonfinite", True)):
            off = optimizer.param_groups[0][name]
            optimizer.param_groups[0][name] = value
            with pytest.raises(ValueError, match="give clip_norm to GradientRelease"):
                release.backward(lambda: p.sum())
            optimizer.param_groups[0][name] = off
        assert torch.equal(p, before)
        release.backward(lambda: p.sum())
    assert optimizer.state[p]["step"] == 2


def test_groups_that_were_put_in_by_hand_are_looked_at() -> None:
    params, optimizer = two_groups()
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "lr": -1.0}
    with pytest.raises(ValueError, match="lr must be >= 0"):
        take_step(params, optimizer)


def test_what_a_scheduler_writes_beside_the_options_need_not_be_in_a_state_dict() -> None:
    params, optimizer = two_groups()
    continued = AdamW8bit([{"params": [p]} for p in params])
    torch.optim.lr_scheduler.LinearLR(continued, total_iters=10)
    assert "initial_lr" in continued.param_groups[0]
    continued.load_state_dict(optimizer.state_dict())
    take_step(params, continued)
    assert continued.state[params[0]]["step"] == 2


# ---- steps that are skipped


def test_a_skipped_step_counts_once_whichever_groups_have_gradients() -> None:
    params, optimizer = two_groups(steps=0, skip_nonfinite=True)
    for having in ([0], [1], [0, 1]):
        optimizer.zero_grad()
        for i in having:
            params[i].grad = torch.full_like(params[i], torch.inf)
        optimizer.step()
    assert optimizer.skipped_steps == 3
    assert all(group["skipped_steps"] == 3 for group in optimizer.param_groups)
    late = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [late]})
    late.grad = torch.full_like(late, torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 4
    saved = optimizer.state_dict()
    assert all(group["skipped_steps"] == 4 for group in saved["param_groups"])
    # A file of tensors that share memory could not be written.
    assert len({group["skipped_steps"].data_ptr() for group in saved["param_groups"]}) == 3
    optimizer.step()
    assert all(group["skipped_steps"] == 4 for group in saved["param_groups"])
    assert copy.deepcopy(optimizer).skipped_steps == 5


@pytest.mark.parametrize("clip", ["two-pass"])
def test_a_skipped_step_inside_the_backward_counts_once(clip: str) -> None:
    params, optimizer = two_groups(steps=0)
    with GradientRelease(optimizer, clip_norm=1.0, clip=clip) as release:
        for having in ([0], [1], [0, 1]):
            release.backward(lambda having=having: sum(params[i].sum() for i in having) * torch.inf)
    assert optimizer.skipped_steps == 3


def test_groups_of_another_optimizer_do_not_bring_its_count() -> None:
    params, optimizer = two_groups(steps=0, skip_nonfinite=True)
    other = AdamW8bit([dict(group) for group in optimizer.param_groups])
    params[0].grad = torch.full_like(params[0], torch.nan)
    optimizer.step()
    assert (optimizer.skipped_steps, other.skipped_steps) == (1, 0)


def test_counts_of_groups_that_were_saved_apart_are_read_as_the_largest() -> None:
    params, optimizer = two_groups(skip_nonfinite=True)
    saved = optimizer.state_dict()
    for group, count in zip(saved["param_groups"], (2, torch.tensor(5)), strict=True):
        group["skipped_steps"] = count
    optimizer.load_state_dict(saved)
    assert optimizer.skipped_steps == 5
    params[0].grad.fill_(torch.nan)
    optimizer.step()
    assert optimizer.skipped_steps == 6
