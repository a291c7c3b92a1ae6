"""Adafactor: second moments by rows and columns, and a first moment in 8 bits if there is to be one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import check_memory, master_of
from pyeff.ops.global_norm import global_norm
from pyeff.optim.directions import LAST, MOMENT, SECOND, SECOND_SCALE, STEP, DirectionPlan
from pyeff.optim.engine import Optimizer8bit
from pyeff.optim.sharding import is_distributed, local, placed, shard_groups
from pyeff.reference.optimizer_step import OptimizerRule

_EPS1 = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class AdafactorRule(OptimizerRule):
    """SGD's options, of which the first moment's beta1 is one, and Adafactor's own."""

    beta2_decay: float = -0.8
    eps1: float = _EPS1
    eps2: float = 1e-3
    d: float = 1.0
    relative_step: bool = True
    scale_parameter: bool = True


class AdafactorPlan(DirectionPlan):
    """The gradient over the root of its factored second moment, clipped, perhaps averaged, and scaled to the weight."""

    def direction(self, i: int, rule: OptimizerRule, lr: float | Tensor, norm: Tensor | None) -> Tensor:  # noqa: D102
        assert isinstance(rule, AdafactorRule)
        p, g = self.params[i], self.gradient(i, rule, norm)
        if self.whole[i].numel() == 0:
            return g
        step = self.states[i][STEP]
        assert step is not None
        step = step + 1.0
        taken = None if norm is None else norm.isfinite()
        u = self._second_moment(i, g, step.pow(rule.beta2_decay).float(), rule.eps1, taken)
        u = u.clamp_(min=rule.eps1**2).rsqrt_().mul_(g)
        size = (self._rms(i, u) / rule.d).clamp_min(1.0).reciprocal()
        if self.states[i][MOMENT] is not None:
            u, size = self.momentum(i, u.mul_(size), rule, norm), torch.ones_like(size)
        if rule.relative_step:
            size = size * (step.rsqrt() / lr).clamp_max(1.0).float()
        if rule.scale_parameter:
            size = size * self._rms(i, p).clamp_min(rule.eps2)
        return u.mul_(size)  # one pass for all of them

    def _second_moment(self, i: int, g: Tensor, weight: Tensor, eps1: float, taken: Tensor | None) -> Tensor:
        """Its estimate for every element; the states go on where the step is taken."""

        def updated(state: Tensor, new: Tensor) -> Tensor:
            new = state.lerp(new, weight)
            state.copy_(new if taken is None else torch.where(taken, new, state))
            return new

        rows, columns, variance = (self.states[i][kind] for kind in (SECOND, SECOND_SCALE, LAST))
        if variance is not None:
            return updated(variance, g.square())
        assert rows is not None
        assert columns is not None
        along_rows, along_columns = (torch.linalg.vector_norm(g, dim=k, keepdim=True).square_() for k in (-1, -2))
        count = self.whole[i].shape[-2]
        if g.ndim == 2:  # of more dimensions a split leaves those that are factored whole
            along_columns = self._over_processes(i, along_columns)
        row, column = updated(rows, along_rows.div_(g.shape[-1])), updated(columns, along_columns.div_(count))
        mean = row.sum(-2, keepdim=True)
        if g.ndim == 2:
            mean = self._over_processes(i, mean)
        return (row * column).div_(mean.div_(count).clamp_(min=eps1))

    def _rms(self, i: int, x: Tensor) -> Tensor:
        """Of parameter i as a whole."""
        size = global_norm([x])  # torch's in fp32 is off by 1 % at 2^24 elements on a CPU
        if is_distributed(self.whole[i]):
            size = self._over_processes(i, size.square_()).sqrt_()
        return (size / math.sqrt(self.whole[i].numel())).float()

    def _over_processes(self, i: int, x: Tensor) -> Tensor:
        """The sum of what the processes have that hold the parts of parameter i."""
        for group in shard_groups(self.whole[i]):
            torch.distributed.all_reduce(x, group=group)
        return x


class Adafactor8bit(Optimizer8bit):
    """Adafactor: a second moment of O(rows + columns) numbers, and a first one of a byte per parameter, or none.

    torch.optim.Adafactor's update, with an optional first moment (torch has none):

        b <- t^beta2_decay,    R <- (1 - b) R + b mean(g^2, -1),    C <- (1 - b) C + b mean(g^2, -2)
        V <- R C / max(mean(R, -2), eps1)                                (vectors: V <- (1 - b) V + b g^2)
        U <- g / max(sqrt(V), eps1),    U <- U / max(1, RMS(U) / d)
        m <- beta1 m + (1 - beta1) U    in place of U, if beta1 is not None
        p <- p (1 - lr weight_decay) - max(eps2, RMS(p)) min(lr, t^-0.5) U

    params: fp32 or bf16 tensors, or groups of them; of more than two dimensions the last two are factored. R and C are
    fp32, and so is V of a vector. eps: (eps1, eps2); eps1=None is the eps of fp32 (torch: of the parameter's dtype).
    relative_step=False leaves out t^-0.5, scale_parameter=False the size of p: with both, U is multiplied by lr alone.
    The first moment is corrected for no bias, as in the paper's code; whether there is one cannot change once there are
    states.

    Other options as those of `AdamW8bit`, described at `Optimizer8bit`; offload is not among them: there is little to
    offload. `load_state_dict` reads states of torch.optim.Adafactor; a first moment then starts from zero.

    Of a parameter split by FSDP2 each process keeps its rows' moments and all columns', whose sums and sizes are added
    up over the processes: other numbers of them agree to the rounding of these sums, and go on from each other's
    checkpoints.

    Raises TypeError for parameters or gradients that are sparse or neither fp32 nor bf16, ValueError for
    hyperparameters out of range. Cost: about twenty passes over a parameter by torch's kernels, and memory for 12 bytes
    per parameter of the largest one while it is stepped (estimates).

    Shazeer and Stern, Adafactor: Adaptive Learning Rates with Sublinear Memory Cost (2018).

    >>> import torch
    >>> from pyeff.optim import Adafactor8bit
    >>> model = torch.nn.Linear(64, 256)
    >>> optimizer = Adafactor8bit(model.parameters(), lr=1e-2, beta1=0.9)
    >>> model(torch.ones(1, 64)).sum().backward()
    >>> optimizer.step()
    >>> state = optimizer.state[model.weight]
    >>> state["row_var"].shape, state["col_var"].shape, state["exp_avg_code"].dtype
    (torch.Size([256, 1]), torch.Size([1, 64]), torch.uint8)
    """

    _rule, _coupled, _moments, _directed = "sgd", False, ("exp_avg",), AdafactorPlan
    _numbers = ("lr", "weight_decay", "beta1", "beta2_decay", "d", "clip_norm")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        beta1: float | None = None,
        relative_step: bool = True,
        scale_parameter: bool = True,
        block_size: int = 256,
        states: str = "8bit",
        master: str = "stochastic",
        seed: int = 0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "beta2_decay": beta2_decay,
                "eps": eps,
                "d": d,
                "weight_decay": weight_decay,
                "beta1": beta1,
                "relative_step": relative_step,
                "scale_parameter": scale_parameter,
            },
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=False,
        )

    def _rule_of(self, group: dict[str, Any], lr: float) -> AdafactorRule:
        eps1, eps2 = group["eps"]
        as_sgd = {**group, "momentum": 0.0 if group["beta1"] is None else group["beta1"], "eps": eps2}
        return AdafactorRule(
            **vars(super()._rule_of(as_sgd, lr)),
            beta2_decay=float(group["beta2_decay"]),
            eps1=_EPS1 if eps1 is None else float(eps1),
            eps2=float(eps2),
            d=float(group["d"]),
            relative_step=group["relative_step"],
            scale_parameter=group["scale_parameter"],
        )

    def _check_group(self, group: dict[str, Any], *, read_lr: bool = True) -> None:
        for name in ("relative_step", "scale_parameter"):
            if group[name] not in (True, False):
                raise TypeError(f"{name} must be True or False; got {group[name]!r}")
        eps = group["eps"]
        two = isinstance(eps, (tuple, list)) and len(eps) == 2
        if not two or not all(isinstance(x, numbers.Real) for x in eps[eps[0] is None :]):
            raise ValueError(f"eps must be two numbers, of which the first may be None; got {eps!r}")
        beta1 = group["beta1"]
        if isinstance(beta1, (float, int, Tensor)) and not 0.0 <= beta1 < 1.0:
            raise ValueError(f"beta1 must be in [0, 1), or None for no first moment; got {beta1!r}")
        super()._check_group(group, read_lr=read_lr)
        rule = self._rule_of(group, 0.0)
        if not 0.0 < rule.eps1 < math.inf:
            raise ValueError(f"eps must be > 0 and finite, or None, in the first place; got {eps!r}")
        if not -math.inf < rule.beta2_decay <= 0.0:
            raise ValueError(f"beta2_decay must be <= 0 and finite; got {group['beta2_decay']!r}")
        if not 1.0 <= rule.d < math.inf:
            raise ValueError(f"d must be >= 1 and finite; got {group['d']!r}")

    def _names(self, group: dict[str, Any]) -> list[str | None]:
        code, scale, _, _, master, step, _ = super()._names(group)
        if group["beta1"] is None:
            code = scale = None
        return [code, scale, "row_var", "col_var", master, step, "variance"]

    def _shapes(self, p: Tensor, group: dict[str, Any]) -> list[tuple[tuple[int, ...], torch.dtype] | None]:
        shapes = super()._shapes(p, group)
        if group["beta1"] is None:
            shapes[:2] = [None, None]
        shape = tuple(p.shape)
        if len(shape) > 1:
            shapes[SECOND] = ((*shape[:-1], 1), torch.float32)
            shapes[SECOND_SCALE] = ((*shape[:-2], 1, shape[-1]), torch.float32)
        else:
            shapes[LAST] = (shape, torch.float32)
        return shapes

    def _fresh(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        own, found = local(p), {}
        for name, mine, whole in zip(self._names(group), self._shapes(own, group), self._shapes(p, group), strict=True):
            if name is None or mine is None or whole is None:
                continue
            shape, dtype = mine
            is_master = name.startswith("master")
            part = master_of(own, group["master"]) if is_master else torch.zeros(shape, dtype=dtype, device=p.device)
            found[name] = placed(name, part, p, whole[0])
        return found

    def _converted_state(self, state: dict[str, Any], p: Tensor, group: dict[str, Any], where: str) -> dict[str, Any]:
        new: dict[str, Any] = self._fresh(p, group)
        for name in ("row_var", "col_var", "variance", "step"):
            if name not in new:
                continue
            value = state.get(name)
            if isinstance(value, bool) or not isinstance(value, (Tensor, float, int)):
                raise ValueError(f"{where} lacks {name}; it was not written by torch.optim.Adafactor")
            value = torch.as_tensor(value).detach()
            check_memory([value], f"{where}: {name}")
            new[name] = value.to(new[name].dtype)
        return new
