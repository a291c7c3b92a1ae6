"""Muon: steps along the orthogonalised momentum of a matrix, kept in 8 bits."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyeff.optim.directions import DirectionPlan
from pyeff.optim.engine import Optimizer8bit
from pyeff.optim.sharding import as_part, is_distributed, part_of
from pyeff.reference.optimizer_step import OptimizerRule

# Jordan's: the steepest at zero of those quintics that keep singular values near one.
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ADJUSTMENTS = (None, "original", "match_rms_adamw")


def newton_schulz(
    m: Tensor, *, steps: int = 5, coefficients: Sequence[float] = NS_COEFFICIENTS, eps: float = 1e-7
) -> Tensor:
    """U V^T of a matrix m = U S V^T [R, C], but for singular values that end between about 0.7 and 1.2.

    x_0 = m / |m|_F, x <- a x + (b x x^T + c (x x^T)^2) x, in bf16 on a GPU and in the dtype of m on a CPU. A matrix of
    zeros stays one. Raises ValueError unless m is a matrix, TypeError unless its elements are floating point. Cost:
    steps (4 s^2 l + 2 s^3) FLOPs with s the shorter side and l the longer one.

    Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024).

    >>> u = newton_schulz(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    >>> bool((torch.linalg.svdvals(u) > 0.6).all() and (torch.linalg.svdvals(u) < 1.3).all())
    True
    """
    if m.ndim != 2:
        raise ValueError(f"m must be a matrix; got shape {tuple(m.shape)}")
    if not m.is_floating_point():
        raise TypeError(f"m must be floating point; got {m.dtype}")
    a, b, c = coefficients
    x = m / torch.linalg.vector_norm(m, dtype=torch.float64).clamp_min(eps).to(m.dtype)
    if m.is_cuda:
        x = x.bfloat16()
    tall = m.shape[0] > m.shape[1]
    if tall:
        x = x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(m.dtype)


@dataclass(frozen=True)
class MuonRule(OptimizerRule):
    """SGD's options, of which Muon's momentum is one, and Muon's own."""

    ns_coefficients: tuple[float, ...] = NS_COEFFICIENTS
    ns_steps: int = 5
    ns_eps: float = 1e-7
    adjust_lr_fn: str | None = None

    def ratio(self, rows: int, columns: int) -> float:
        """What lr is multiplied by for a matrix of this shape."""
        if self.adjust_lr_fn == "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        return math.sqrt(max(1.0, rows / columns)) if columns else 1.0


class MuonPlan(DirectionPlan):
    """The orthogonalised momentum; of a matrix split among processes that of the whole."""

    def direction(self, i: int, rule: OptimizerRule, lr: float | Tensor, norm: Tensor | None) -> Tensor:  # noqa: D102
        assert isinstance(rule, MuonRule)
        g, whole = self.gradient(i, rule, norm), self.whole[i]
        m = self.momentum(i, g, rule, norm)
        if rule.nesterov:
            m.lerp_(g, 1.0 - rule.beta1)
        del g
        if is_distributed(whole):
            m = as_part(m, whole, whole.shape).full_tensor()  # type: ignore[attr-defined]
        d = newton_schulz(m, steps=rule.ns_steps, coefficients=rule.ns_coefficients, eps=rule.ns_eps)
        return part_of(d.mul_(rule.ratio(*m.shape)), whole)


class Muon8bit(Optimizer8bit):
    """Muon whose momentum takes one byte: 1 + 4 / block_size bytes of state per parameter instead of 4.

    For matrices [R, C]; torch.optim.Muon's update, decay decoupled:

        m <- momentum m + (1 - momentum) g
        d <- newton_schulz((1 - momentum) g + momentum m, or m without nesterov)
        p <- p (1 - lr weight_decay) - lr ratio d

    params: matrices, fp32 or bf16, or groups of them. Give embeddings, the head, vectors and convolutions to
    `AdamW8bit`. ratio is max(1, R / C)^0.5 with adjust_lr_fn=None or "original", and 0.2 max(R, C)^0.5, by which steps
    are as large as AdamW's and its lr and decay serve, with "match_rms_adamw". ns_coefficients, ns_steps and eps are
    those of `newton_schulz`, which runs in bf16 on a GPU and in fp32 on a CPU (torch's in bf16 on both).

    Other options as those of `AdamW8bit`, described at `Optimizer8bit`; offload is not among them. A NaN in a gradient
    makes the whole matrix NaN, as in torch: skip_nonfinite or clip_norm skip such a step. A matrix split by FSDP2 is
    orthogonalised as a whole: its momentum is gathered from all processes, fp32, and each does the same products, so a
    step has the same bits at any number of them. Under `GradientRelease` matrices are stepped in the backward.

    Raises TypeError for parameters or gradients that are sparse or neither fp32 nor bf16, ValueError for parameters
    that are no matrices and hyperparameters out of range. Cost: ns_steps (4 s^2 l + 2 s^3) FLOPs a matrix of sides
    s <= l, and memory for 12 bytes (CPU: 16) per parameter of the largest one while it is stepped (estimates).

    Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024); Liu et al., Muon is Scalable for LLM
    Training (2025).

    >>> import torch
    >>> from pyeff.optim import AdamW8bit, Muon8bit
    >>> model = torch.nn.Linear(64, 256)
    >>> muon = Muon8bit([model.weight], lr=1e-3, adjust_lr_fn="match_rms_adamw")
    >>> adamw = AdamW8bit([model.bias], lr=1e-3)
    >>> model(torch.ones(1, 64)).sum().backward()
    >>> muon.step()
    >>> muon.state[model.weight]["momentum_buffer_code"].dtype
    torch.uint8
    """

    _rule, _coupled, _moments, _directed = "sgd", False, ("momentum_buffer",), MuonPlan

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
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
                "weight_decay": weight_decay,
                "momentum": momentum,
                "nesterov": nesterov,
                "ns_coefficients": ns_coefficients,
                "eps": eps,
                "ns_steps": ns_steps,
                "adjust_lr_fn": adjust_lr_fn,
            },
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=False,
        )

    def _rule_of(self, group: dict[str, Any], lr: float) -> MuonRule:
        return MuonRule(
            **vars(super()._rule_of(group, lr)),
            ns_coefficients=tuple(group["ns_coefficients"]),
            ns_steps=group["ns_steps"],
            ns_eps=float(group["eps"]),
            adjust_lr_fn=group["adjust_lr_fn"],
        )

    def _check_group(self, group: dict[str, Any], *, read_lr: bool = True) -> None:
        coefficients, steps = group["ns_coefficients"], group["ns_steps"]
        three = isinstance(coefficients, (tuple, list)) and len(coefficients) == 3
        if not three or not all(isinstance(x, numbers.Real) for x in coefficients):
            raise ValueError(f"ns_coefficients must be three numbers; got {coefficients!r}")
        if not all(math.isfinite(x) for x in coefficients):
            raise ValueError(f"ns_coefficients must be finite; got {coefficients!r}")
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"ns_steps must be a whole number; got {steps!r}")
        if not 0 <= steps < 100:
            raise ValueError(f"ns_steps must be in [0, 100); got {steps}")
        if group["adjust_lr_fn"] not in ADJUSTMENTS:
            raise ValueError(
                f"adjust_lr_fn must be None, 'original' or 'match_rms_adamw'; got {group['adjust_lr_fn']!r}"
            )
        super()._check_group(group, read_lr=read_lr)

    def _check_parameter(self, p: Tensor, where: str, group: dict[str, Any]) -> None:
        super()._check_parameter(p, where, group)
        if p.ndim != 2:
            raise ValueError(
                f"{where} has shape {tuple(p.shape)}, and Muon8bit steps matrices only; give it to AdamW8bit"
            )
