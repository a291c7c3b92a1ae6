"""A tensor without memory of its own is refused before anything changes, and never crashes the process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from pyeff.ops import OptimizerRule, OptimizerStates, global_norm, optimizer_step
from pyeff.optim import AdamW8bit, Muon8bit, Optimizer8bit

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
SIZE = 300


class Wrapper(Tensor):
    """As a quantised tensor is: the shape and dtype of a tensor, and its numbers somewhere else."""

    @staticmethod
    def __new__(cls, inside: Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)

    def __init__(self, inside: Tensor) -> None:
        self.inside = inside

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*(x.inside if isinstance(x, Wrapper) else x for x in args), **(kwargs or {}))


def freed(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


# What a gradient can be that has a shape and no numbers.
LOST: dict[str, Callable[[], Tensor]] = {
    "freed": lambda: freed(torch.ones(SIZE)),
    "a view of freed memory": lambda: [x := torch.ones(2, SIZE), x[1], freed(x)][1],
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(SIZE)),
    "zeros of forward differentiation": lambda: torch._efficientzerotensor(SIZE),
    "a wrapper": lambda: Wrapper(torch.ones(SIZE)),
}


def stepped(**options: Any) -> tuple[list[nn.Parameter], Optimizer8bit]:
    """Two groups that have taken a step, so that one could go on without the other."""
    params = [nn.Parameter(torch.zeros(SIZE)) for _ in range(2)]
    optimizer = AdamW8bit([{"params": [p]} for p in params], **options)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    return params, optimizer


def assert_refused(
    params: list[nn.Parameter], optimizer: Optimizer8bit, match: str, step: Callable[[], Any] | None = None
) -> None:
    def everything() -> list[Tensor]:
        states = [value for p in params for value in optimizer.state[p].values()]
        return [x.clone() for x in [params[0].detach(), *states] if x.untyped_storage().data_ptr()]

    before = everything()
    with pytest.raises(ValueError, match=match):
        (step or optimizer.step)()
    assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}], ids=str)
@pytest.mark.parametrize("way", LOST)
def test_a_gradient_without_memory_is_refused_before_any_group_has_stepped(way: str, options: dict[str, Any]) -> None:
    params, optimizer = stepped(**options)
    params[1].grad = LOST[way]()
    assert_refused(params, optimizer, rf"a gradient of shape \({SIZE},\) on cpu has no memory")
    params[1].grad = torch.ones(SIZE)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]


def test_a_gradient_that_was_freed_where_it_lay_is_noticed() -> None:
    params, optimizer = stepped()
    freed(params[1].grad)
    assert_refused(params, optimizer, "a gradient of .* has no memory")


@pytest.mark.parametrize("transform", [torch.func.grad, torch.vmap])
def test_a_gradient_inside_a_transform_is_refused(transform: Any) -> None:
    params, optimizer = stepped()

    def f(x: Tensor) -> Tensor:
        params[1].grad = x
        optimizer.step()
        return x.sum()

    x = torch.ones(3, SIZE) if transform is torch.vmap else torch.ones(SIZE)
    assert_refused(params, optimizer, "a gradient of .* has no memory", lambda: transform(f)(x))


@pytest.mark.parametrize("what", ["a parameter", "a state"])
def test_a_parameter_or_state_without_memory_is_refused(what: str) -> None:
    params, optimizer = stepped()
    freed(params[1] if what == "a parameter" else optimizer.state[params[1]]["exp_avg_sq_code"])
    # A state is looked at when a plan is made; the first of each parameter in every step.
    optimizer._forget_plans()
    assert_refused(params, optimizer, f"{what} of .* has no memory")


@pytest.mark.parametrize("name", ["momentum_buffer_code", "momentum_buffer_scale", "master"])
def test_a_smaller_state_in_the_place_of_one_is_refused(name: str) -> None:
    p = nn.Parameter(torch.zeros(4, SIZE, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    optimizer = Muon8bit([p], master="fp32")
    optimizer.step()
    state = optimizer.state[p]
    state[name].data = state[name][:1].clone()
    before = p.detach().clone()
    with pytest.raises(ValueError, match="were made for another shape"):
        optimizer.step()
    assert torch.equal(p, before)


def test_memory_of_a_state_that_got_another_stays_until_the_plan_goes() -> None:
    """The kernel has its address."""
    params, optimizer = stepped()
    state = optimizer.state[params[0]]["exp_avg_sq_code"]
    memory = StorageWeakRef(state.untyped_storage())
    state.data = torch.zeros_like(state)
    optimizer.step()
    assert not memory.expired()
    optimizer._forget_plans()
    assert memory.expired()


@pytest.mark.parametrize("master", ["stochastic", "fp32"])
def test_a_parameter_that_was_freed_before_its_first_step_is_refused(master: str) -> None:
    p = nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    freed(p)
    with pytest.raises(ValueError, match=r"a parameter of .* has no memory"):
        AdamW8bit([p], master=master).step()


def test_a_wrapped_parameter_is_refused() -> None:
    p = Wrapper(torch.ones(SIZE))
    p.grad = torch.ones(SIZE)
    with pytest.raises(ValueError, match=r"a parameter of .* has no memory"):
        AdamW8bit([p]).step()


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_code"])
def test_a_state_dict_that_was_freed_is_refused(name: str) -> None:
    params, optimizer = stepped()
    theirs = torch.optim.AdamW(params) if name == "exp_avg" else optimizer
    theirs.step()
    saved = theirs.state_dict()
    freed(saved["state"][0][name])
    with pytest.raises(ValueError, match=rf"state\[0\]: {name} of .* has no memory"):
        AdamW8bit([{"params": [p]} for p in params] if theirs is optimizer else params).load_state_dict(saved)


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("what", ["a parameter", "a gradient", "a state"])
def test_the_operation_refuses_them_too(what: str, impl: str) -> None:
    p, g = torch.ones(SIZE), torch.ones(SIZE)
    states = OptimizerStates.zeros([p])
    freed({"a parameter": p, "a gradient": g, "a state": states.second[0]}[what])
    with pytest.raises(ValueError, match=f"{what} of .* has no memory"):
        optimizer_step([p], [g], states, OptimizerRule("adam", lr=0.1), impl=impl)
    assert states.steps[0] == 0


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_norm_refuses_them_too(impl: str) -> None:
    with pytest.raises(ValueError, match=r"a tensor of .* has no memory"):
        global_norm([torch.ones(3), freed(torch.ones(SIZE))], impl=impl)


def test_an_expanded_parameter_is_refused_before_its_states_change() -> None:
    params, optimizer = stepped()
    params[1].data = torch.ones(1).expand(SIZE)
    assert_refused(params, optimizer, "is expanded: elements share memory")


def test_a_weight_whose_sign_torch_keeps_beside_it_is_stepped_with_it() -> None:
    p, q = nn.Parameter(torch.ones(SIZE)), nn.Parameter(-torch.ones(SIZE))
    p.data = torch._neg_view(torch.ones(SIZE))
    assert p.is_neg()
    for x in (p, q):
        x.grad = torch.ones(SIZE)
        AdamW8bit([x]).step()
    assert torch.equal(p.detach(), q.detach())
