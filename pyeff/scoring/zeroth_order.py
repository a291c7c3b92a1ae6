"""A gradient's component along one random direction, from forward passes alone: CoLM's published feature."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def zeroth_order_slopes(
    losses: Callable[[], Tensor], parameter: nn.Parameter, *, epsilon: float = 1e-3, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The slope of each sample's loss along one random direction of a parameter, and the direction.

        c_s = (L_s(W + epsilon z) - L_s(W - epsilon z)) / (2 epsilon),   z ~ N(0, 1) from the seed

    The feature of the publication is c_s z, of rank 1: distances between samples are |c_i - c_j| |z|, points on a line,
    so ``slopes[:, None]`` chooses as it does. `pyeff.selection.colm` takes exact gradients too: this is the peer.

    Args:
        losses: Runs the model and returns the samples' losses [S]; called twice, and must draw no random numbers.
        parameter: Moved in place and put back bit for bit; the weight of the last value projection in CoLM.
        epsilon: 1e-3 in the published code. Losses in bfloat16 do not see so small a step.
        seed: Of torch's generator on the CPU: the same direction on every device.

    Returns slopes [S] and z, of the parameter's shape and dtype.

    Cost: two forward passes, and a copy of the parameter.

    Nguyen et al., 2025, arXiv:2407.19580.

    >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
    >>> slopes, z = zeroth_order_slopes(lambda: torch.stack([3 * weight[0], weight[0] ** 2]), weight)
    >>> (slopes / z).round(decimals=1).tolist()
    [3.0, 4.0]
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    drawn = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
    z = drawn.to(parameter.device, parameter.dtype)
    kept = parameter.detach().clone()
    try:
        parameter.add_(z, alpha=epsilon)
        above = losses()
        parameter.copy_(kept).add_(z, alpha=-epsilon)
        below = losses()
    finally:
        parameter.copy_(kept)
    if above.ndim != 1:
        raise ValueError(f"losses must return one loss for each sample, [S], got shape {tuple(above.shape)}")
    wide = torch.promote_types(above.dtype, torch.float32)
    return (above.to(wide) - below.to(wide)) / (2 * epsilon), z
