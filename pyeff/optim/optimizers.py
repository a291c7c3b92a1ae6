"""AdamW, Adam, Lion and SGD with momentum over 8-bit states, drop-ins for torch's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from pyeff.optim.engine import Optimizer8bit


class AdamW8bit(Optimizer8bit):
    """AdamW whose two moments take one byte each: 2 + 8 / block_size bytes of state per parameter instead of 8.

    The update is torch.optim.AdamW's, decay first, computed in fp32; between steps m and sqrt(v) are kept as 8-bit
    codes relative to the largest of their block:

        p <- p (1 - lr weight_decay)
        m <- beta1 m + (1 - beta1) g,    v <- beta2 v + (1 - beta2) g^2
        p <- p - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

    params: fp32 or bf16 tensors, or groups of them that may set every option for themselves. lr: a float or a
    one-element tensor. The options after `weight_decay` and everything else is described at `Optimizer8bit`.

    Raises TypeError for parameters or gradients that are sparse or neither fp32 nor bf16, ValueError for
    hyperparameters out of range.

    Dettmers et al., 8-bit Optimizers via Block-wise Quantization (2022).

    >>> import torch
    >>> from pyeff.optim import AdamW8bit
    >>> model = torch.nn.Linear(256, 64)
    >>> optimizer = AdamW8bit(model.parameters(), lr=1e-3)
    >>> model(torch.ones(1, 256)).sum().backward()
    >>> optimizer.step()
    >>> optimizer.state[model.weight]["exp_avg_code"].dtype
    torch.uint8
    """

    _rule, _coupled, _moments = "adam", False, ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        block_size: int = 256,
        states: str = "8bit",
        master: str = "stochastic",
        seed: int = 0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=offload,
        )


class Adam8bit(Optimizer8bit):
    """`AdamW8bit` with weight decay in the gradient, g <- g + weight_decay p, as torch.optim.Adam has it.

    Options and errors as there.

    >>> import torch
    >>> from pyeff.optim import Adam8bit
    >>> p = torch.nn.Parameter(torch.ones(4))
    >>> p.grad = torch.ones(4)
    >>> Adam8bit([p], lr=0.1).step()
    >>> print(f"{p[0].item():.2f}")
    0.90
    """

    _rule, _coupled, _moments = "adam", True, ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        states: str = "8bit",
        master: str = "stochastic",
        seed: int = 0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=offload,
        )


class Lion8bit(Optimizer8bit):
    """Lion, the sign of an interpolated momentum, with one byte of state: 1 + 4 / block_size bytes per parameter.

        p <- p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)
        m <- beta2 m + (1 - beta2) g

    Options and errors as those of `AdamW8bit`; lr is usually 3 to 10 times smaller and weight_decay as much larger. A
    NaN gradient makes its weight NaN; an infinite one has a sign.

    Chen et al., Symbolic Discovery of Optimization Algorithms (2023).

    >>> import torch
    >>> from pyeff.optim import Lion8bit
    >>> p = torch.nn.Parameter(torch.ones(4))
    >>> p.grad = torch.tensor([2.0, -0.1, 0.0, 5.0])
    >>> Lion8bit([p], lr=0.5).step()
    >>> p.tolist()
    [0.5, 1.5, 1.0, 0.5]
    """

    _rule, _coupled, _moments = "lion", False, ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        block_size: int = 256,
        states: str = "8bit",
        master: str = "stochastic",
        seed: int = 0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(
            params,
            {"lr": lr, "betas": betas, "weight_decay": weight_decay},
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=offload,
        )


class SGD8bit(Optimizer8bit):
    """SGD with momentum, whose buffer takes one byte: 1 + 4 / block_size bytes of state per parameter.

        g <- g + weight_decay p
        m <- momentum m + (1 - dampening) g     (the first time m <- g)
        p <- p - lr m,  with nesterov p <- p - lr (g + momentum m)

    torch.optim.SGD's formula and order. momentum: in [0, 1). Other options and errors as those of `AdamW8bit`.

    >>> import torch
    >>> from pyeff.optim import SGD8bit
    >>> p = torch.nn.Parameter(torch.ones(4))
    >>> p.grad = torch.ones(4)
    >>> SGD8bit([p], lr=0.5).step()
    >>> p.tolist()
    [0.5, 0.5, 0.5, 0.5]
    """

    _rule, _coupled, _moments = "sgd", True, ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        block_size: int = 256,
        states: str = "8bit",
        master: str = "stochastic",
        seed: int = 0,
        clip_norm: float | None = None,
        skip_nonfinite: bool = False,
        offload: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "dampening": dampening,
                "weight_decay": weight_decay,
                "nesterov": nesterov,
            },
            block_size=block_size,
            states=states,
            master=master,
            seed=seed,
            clip_norm=clip_norm,
            skip_nonfinite=skip_nonfinite,
            offload=offload,
        )
