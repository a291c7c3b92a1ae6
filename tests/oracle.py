"""How close is close enough: computed from what the same precision can give, never typed."""

from __future__ import annotations

import torch


def assert_as_accurate(
    actual: torch.Tensor,
    exact: torch.Tensor,
    peer: torch.Tensor,
    *,
    multiple: float = 2.0,
    what: str = "result",
) -> None:
    """The error against float64 is at most `multiple` times that of a same-precision torch computation.

    One rounding of the output type at the size of the largest exact value is granted on top, so that a peer that
    happens to be exact does not demand the impossible. NaN must stand where it stands in `exact`, and so must
    infinities with their sign.
    """
    exact = exact.double()
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN in the wrong places"
    infinite = exact.isinf()
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{what}: infinities differ"
    finite = exact.isfinite()
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    peer_error = (peer.double() - exact)[finite].abs().nan_to_num(0.0).max().item()
    rounding = torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    budget = multiple * peer_error + rounding
    assert error <= budget, f"{what}: error {error:.3e} exceeds {budget:.3e} (peer's error {peer_error:.3e})"
