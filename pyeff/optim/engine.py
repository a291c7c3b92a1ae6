"""What the optimizers over 8-bit states share: options, states, one call a step, saving and loading."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import (
    OptimizerStates,
    check_parameter,
    state_shapes,
)
from pyeff.ops.global_norm import global_norm
from pyeff.optim.calls import Call, Plans
from pyeff.optim.convert import converted_state
from pyeff.optim.directions import DirectionPlan
from pyeff.optim.host_states import HostStates
from pyeff.optim.options import LAYOUT, SeenOptions, check_group
from pyeff.optim.pieces import OFFLOADED
from pyeff.optim.saved import device_of, restore
from pyeff.optim.sharding import (
    check_split,
    is_distributed,
    local,
    placed,
)
from pyeff.reference.optimizer_step import AT_RANDOM, CODE, OptimizerRule


class Optimizer8bit(torch.optim.Optimizer):
    """Options and behaviour that `AdamW8bit`, `Adam8bit`, `Lion8bit`, `SGD8bit`, `Muon8bit` and `Adafactor8bit` share.

    block_size: 64 to 2048, a power of two. states: "8bit", or "fp32" for moments as torch keeps them (and their
    memory), which makes the step torch's to a few roundings.

    master: how a **bf16 parameter** remembers changes below 2^-9 of itself (fp32 parameters need nothing):
    "stochastic" (default) rounds up or down at random with the right mean, by bits that depend on `seed`, the
    parameter (its name where the optimizer was given names, else its place), its step and the element alone, so that
    replicas and resumed runs agree; "ecc8" keeps the next eight bits of each weight in a byte, together a weight of 24
    bits, rounded by the same random bits; "fp32" keeps a twin; "none" rounds to nearest, which loses weight decay
    altogether. The twin or byte belongs to the weight: load weights before the optimizer takes its first step, or
    together with its state.

    clip_norm: scale the gradients of the group so that the norm of all gradients of the optimizer is at most this, as
    torch.nn.utils.clip_grad_norm_ does, without changing the gradients themselves. With clip_norm or
    skip_nonfinite=True in any group, a step whose gradients hold a NaN or Inf is skipped as a whole and counted in
    `skipped_steps`. Without, such a gradient makes its weight NaN, as in torch, and touches no other weight. The norm
    costs one more read of the gradients.

    All parameters of a group on a device are updated by one call of the compiled extension whatever their dtypes (on a
    GPU: one launch after a tiny one for the scalars; nothing waits for the device); `Muon8bit` and `Adafactor8bit` make
    one or two for each. With `lr` a CUDA tensor a step can be captured in a CUDA graph, after one step outside it
    (theirs was not tried). Parameters without a gradient are skipped and keep their own count of steps.

    offload: keep the states of parameters on a GPU in the host's pinned memory, where they take none of the device's
    but two slots of at most 32 MiB (or one row). A step brings them in buckets, the next while one is stepped and goes
    back, with the same bits; each byte of state crosses the bus once each way, 2.03 per parameter, which then is what
    a step costs. Look at `state` through `state_dict`, which waits until all are back. Not for CUDA graphs. Parameters
    on a CPU have their states beside them anyway: nothing changes.

    Parameters may be DTensors that are replicated or split along dimension 0 (FSDP2): blocks run along rows, so a step
    and a resumed checkpoint have the same bits at any number of processes (clip_norm: to the rounding of the norm). A
    split that cuts a block, which for vectors is likely, raises ValueError: give vectors a group with states="fp32".

    Options in `param_groups` may be written between steps, as schedulers do; a step looks at those that changed before
    it changes anything (an lr on a GPU is not waited for). block_size, states, master, offload and code are what states
    were made for and cannot change after them.

    `state_dict` holds tensors and plain values only, names its code and continues bit for bit in a fresh optimizer.
    `load_state_dict` also reads the states of torch's and bitsandbytes' optimizers of the same rule, and refuses,
    before anything changes, states of another rule, code, layout or shape and numbers that make no sense.
    """

    _rule: ClassVar[str]
    _coupled: ClassVar[bool]
    _moments: ClassVar[tuple[str, ...]]
    _numbers: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay", "momentum", "dampening", "clip_norm")
    _directed: ClassVar[type[DirectionPlan] | None] = None  # what takes the steps where the kernel alone cannot
    _host_states: HostStates

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        block_size: int,
        states: str,
        master: str,
        seed: int,
        clip_norm: float | None,
        skip_nonfinite: bool,
        offload: bool,
    ) -> None:
        self._forget_plans()
        defaults |= {
            "block_size": block_size,
            "states": states,
            "master": master,
            "seed": seed,
            "clip_norm": clip_norm,
            "skip_nonfinite": skip_nonfinite,
            "offload": offload,
            "code": CODE,
        }
        self._seen_options = SeenOptions()
        self._check_group(defaults)
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        self._host_states.settle()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget_plans()
        self._options_are_seen()

    def _forget_plans(self) -> None:
        """The next step looks at everything anew."""
        if hasattr(self, "_host_states"):
            self._host_states.settle()
        self._plans = Plans(self)
        self._host_states = HostStates(self)

    # -------------------------------------------------------------------------------------------------- options

    def _rule_of(self, group: dict[str, Any], lr: float) -> OptimizerRule:
        beta1, beta2 = group["betas"] if "betas" in group else (group["momentum"], 0.0)
        clip_norm = group["clip_norm"]
        return OptimizerRule(
            self._rule,
            lr=lr,
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group.get("eps", 0.0)),
            weight_decay=float(group["weight_decay"]),
            dampening=float(group.get("dampening", 0.0)),
            clip_norm=math.inf if clip_norm is None else float(clip_norm),
            seed=group["seed"],
            block_size=group["block_size"],
            coded=group["states"] == "8bit",
            coupled=self._coupled,
            nesterov=bool(group.get("nesterov", False)),
        )

    def _check_group(self, group: dict[str, Any], *, read_lr: bool = True) -> None:
        """TypeError or ValueError naming the first option that cannot be; read_lr: wait for one that is on a GPU."""
        check_group(self, group, read_lr=read_lr)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with options of their own; nothing is added if one of them does not fit."""
        params = param_group["params"]
        if not isinstance(params, Tensor):
            params = param_group["params"] = list(params)
            if len({id(p[1] if isinstance(p, tuple) else p) for p in params}) != len(params):
                # torch warns; here both entries would be written at once, by different threads.
                raise ValueError("params must be different tensors; one of them is given twice")
        self._forget_plans()
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            self._check_parameters(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        # Groups taken from another optimizer bring its count along.
        self._count_skipped_in(self.param_groups[0]["skipped_steps"] if len(self.param_groups) > 1 else None)
        self._options_are_seen()

    def _check_parameters(self, index: int) -> None:
        """TypeError or ValueError for the first parameter of a group that cannot be stepped with its options."""
        group = self.param_groups[index]
        for i, p in enumerate(group["params"]):
            self._check_parameter(p, f"params[{i}] of group {index}", group)

    def _check_parameter(self, p: Tensor, where: str, group: dict[str, Any]) -> None:
        check_parameter(p, where)
        if is_distributed(p):
            at_random = group["master"] in AT_RANDOM and p.dtype == torch.bfloat16
            in_blocks = group["states"] == "8bit"
            check_split(p, where, block_size=group["block_size"], in_blocks=in_blocks, at_random=at_random)

    def _options_are_seen(self) -> None:
        self._seen_options = SeenOptions()
        for index in range(len(self.param_groups)):
            self._seen_options.note(self, index)

    def check_options(self) -> None:
        """Look at options in `param_groups` that were written since the last step, as `step` does.

        Raises TypeError or ValueError for one that is out of range, and ValueError for a block_size, states, master,
        offload or code that changed after states were made. An lr on a GPU is not waited for.
        """
        for index in range(len(self.param_groups)):
            self._seen_options.check(self, index)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because gradients were not finite; waits for the device."""
        return int(self.param_groups[0]["skipped_steps"]) if self.param_groups else 0

    def _count_skipped_in(self, count: Tensor | None) -> Tensor:
        """Count skipped steps in this tensor: all groups hold the same one, because a step is skipped by all."""
        if count is None:
            count = torch.zeros((), dtype=torch.int64, device=device_of(self.param_groups[0]))
        for group in self.param_groups:
            group["skipped_steps"] = count
        return count

    # ----------------------------------------------------------------------------------------------------- step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step; `closure` reevaluates the model and returns the loss, which is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Everything is looked at before anything is changed.
        self.check_options()
        calls = [call for index, group in enumerate(self.param_groups) for call in self._plans.calls(index, group)]
        norms = self._norms(calls)
        for i, call in enumerate(calls):
            self._take(call, norms.get(call.device), call.group["clip_norm"], counts_skipped=i == 0)
        return loss

    def _take(self, call: Call, norm: Tensor | None, clip_norm: float | None, *, counts_skipped: bool) -> None:
        lr: float | Tensor = call.group["lr"]
        tensor: Tensor | None = None
        if isinstance(lr, Tensor) and lr.is_cuda:
            # Read on the device, whatever its type: nothing waits for the number.
            tensor, lr = lr.to(call.device, torch.float32), 0.0
        count: Tensor | None = None
        if counts_skipped and norm is not None:
            count = call.group["skipped_steps"]
            if count.device != call.device:
                # Parameters were moved, or those on the first one's device have no gradients this time.
                count = self._count_skipped_in(count.to(call.device))
        call.plan.step(
            self._rule_of({**call.group, "clip_norm": clip_norm}, float(lr)),
            norm=norm,
            lr=tensor,
            skipped=count,
        )
        call.plan.release_grads()

    @torch.no_grad()
    def step_parameter(
        self,
        index: int,
        place: int,
        *,
        norm: Tensor | None = None,
        clip_norm: float | None = None,
        counts_skipped: bool = True,
    ) -> None:
        """Take a step of parameter `place` of group `index` alone, with the bits that `step` has for it.

        For steps inside a backward (`GradientRelease`). norm: float64 scalar on the parameter's device, of all
        gradients; needed by clip_norm, which takes the place of the group's. If the norm is not finite nothing is
        changed, and `skipped_steps` goes up if counts_skipped. A parameter without a gradient takes no step.
        """
        self._seen_options.check(self, index)
        for call in self._plans.calls(index, self.param_groups[index], only=place):
            self._take(call, norm, clip_norm, counts_skipped=counts_skipped)

    def _norms(self, calls: list[Call]) -> dict[torch.device, Tensor]:
        """The norm of all gradients on each device that has some, if a group asks for it."""
        asked = any(group["skip_nonfinite"] or group["clip_norm"] is not None for group in self.param_groups)
        if not (asked and calls):
            return {}
        # Parts of parameters are added up over the processes that hold the others; the order is the same on each.
        grads: dict[tuple[torch.device, tuple[Any, ...]], list[Tensor]] = {}
        for call in calls:
            for grad, groups in zip(call.plan.grads, call.shard_groups, strict=True):
                grads.setdefault((call.device, groups), []).append(grad)
        norms = []
        for (_, groups), some in grads.items():
            norm = global_norm(some)
            if groups:
                norm.square_()
                for group in groups:
                    torch.distributed.all_reduce(norm, group=group)
                norm.sqrt_()
            norms.append(norm)
        total = norms[0]
        if len(norms) > 1:
            total = torch.stack([norm.to(total.device) for norm in norms]).square().sum().sqrt()
        return {device: total.to(device) for device, _ in grads}

    # --------------------------------------------------------------------------------------------------- states

    def _names(self, group: dict[str, Any]) -> list[str | None]:
        """Names in `state`, in the order of `OptimizerStates.lists`; None where this layout has nothing."""
        names: list[str | None] = []
        for moment in (*self._moments, None)[:2]:
            if moment is None:
                names += [None, None]
            elif group["states"] == "8bit":
                names += [f"{moment}_code", f"{moment}_scale"]
            else:
                names += [moment, None]
        names.append({"ecc8": "master_error", "fp32": "master"}.get(group["master"]))
        return [*names, "step", "beta_powers" if self._rule == "adam" else None]

    def _shapes(self, p: Tensor, group: dict[str, Any]) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
        """Shape and dtype of each state of `_names`."""
        return state_shapes(p, rule=self._rule, **{name: group[name] for name in LAYOUT})

    def _fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The states of a parameter that has taken no step."""
        layout = {name: group[name] for name in LAYOUT}
        # States that are not to live on the device are not made there either.
        own = local(p).detach().cpu() if self._host_states.has(p, group) else local(p)
        lists = OptimizerStates.zeros([own], rule=self._rule, **layout).lists()
        for counts in lists[OFFLOADED:]:
            counts[:] = [count.to(p.device) for count in counts]
        named = zip(self._names(group), lists, self._shapes(p, group), strict=True)
        return {name: placed(name, one[0], p, expected[0]) for name, one, expected in named if name and expected}

    def _converted_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any], where: str) -> dict[str, Any]:
        return converted_state(self, state, p, group, where)

    def state_dict(self) -> dict[str, Any]:
        """States and options, as torch's; waits until states in host memory are those of the last step."""
        self._host_states.settle()
        found: dict[str, Any] = super().state_dict()
        for group in found["param_groups"]:
            group["skipped_steps"] = group["skipped_steps"].clone()  # each its own, which can be saved and loaded alone
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict`: of this optimizer bit for bit, of torch's or bitsandbytes' of the same rule.

        Foreign moments are read as fp32 and stored in this optimizer's states (in 8 bits they are rounded once);
        hyperparameters come along, everything foreign optimizers do not have stays as it is here. The tensors are
        copied. Raises ValueError, before anything is changed, for states in another rule, code, layout or shape, and
        for numbers out of range.
        """
        restore(self, state_dict, super().load_state_dict)
        self._options_are_seen()
