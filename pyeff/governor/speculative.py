"""Speculative decoding: what it saves in time and what it costs in arithmetic (Leviathan et al., 2023).

A draft model proposes gamma tokens, the target checks them in one pass of gamma + 1 positions and keeps a prefix; the
pass itself always yields one more token. With alpha the probability that one proposal is accepted (independent of
the others) a pass emits

    n = 1 + alpha + ... + alpha^gamma = (1 - alpha^(gamma + 1)) / (1 - alpha)

tokens on average. Latency falls, FLOPs rise: a governor that counts one of them alone always or never speculates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


def tokens_per_pass(acceptance: float, draft_length: int) -> float:
    """Return n, the mean tokens a target pass emits, the one it always yields included.

    Args:
        acceptance: alpha in [0, 1].
        draft_length: gamma >= 0.

    >>> tokens_per_pass(0.5, 2)
    1.75
    """
    _check(acceptance, draft_length)
    return math.fsum(acceptance**i for i in range(draft_length + 1))


@dataclass(frozen=True)
class Speculation:
    """What a draft length does.

    Args:
        draft_length: gamma.
        tokens_per_pass: n.
        speedup: of latency: n / (gamma c + 1), c the draft's time per token over the target's.
        arithmetic: FLOPs per token emitted over those of plain decoding: (gamma c' + gamma + 1) / n, c' the draft's
            FLOPs per token over the target's.
    """

    draft_length: int
    tokens_per_pass: float
    speedup: float
    arithmetic: float

    def flops(self, target_per_token: float) -> float:
        """Return the FLOPs per emitted token where plain decoding takes ``target_per_token``."""
        return self.arithmetic * target_per_token


def speculation(
    acceptance: float, draft_length: int, *, draft_time: float, draft_flops: float | None = None
) -> Speculation:
    """Work out one draft length.

    Args:
        acceptance: alpha in [0, 1]; with a posterior, give its lower credible bound.
        draft_length: gamma >= 0; 0 is plain decoding.
        draft_time: c >= 0.
        draft_flops: c' >= 0; None takes c.

    Raises ValueError for arguments out of range. It assumes that a pass of gamma + 1 positions takes as long as one
    of a single position, which holds while decoding is bound by memory and ends as the batch grows.
    """
    emitted = tokens_per_pass(acceptance, draft_length)
    draft_flops = draft_time if draft_flops is None else draft_flops
    for name, value in (("draft_time", draft_time), ("draft_flops", draft_flops)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return Speculation(
        draft_length,
        emitted,
        emitted / (draft_length * draft_time + 1),
        (draft_length * draft_flops + draft_length + 1) / emitted,
    )


def best_speculation(
    acceptance: float, *, draft_time: float, draft_flops: float | None = None, longest: int = 32
) -> Speculation:
    """Return the draft length up to ``longest`` with the lowest latency; plain decoding unless alpha > c.

    >>> best = best_speculation(0.8, draft_time=0.1)
    >>> best.draft_length, round(best.speedup, 2), round(best.arithmetic, 2)
    (6, 2.47, 1.92)
    """
    lengths = (
        speculation(acceptance, length, draft_time=draft_time, draft_flops=draft_flops) for length in range(longest + 1)
    )
    return max(lengths, key=lambda found: found.speedup)


def _check(acceptance: float, draft_length: int) -> None:
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance must lie between 0 and 1, got {acceptance!r}")
    if isinstance(draft_length, bool) or not isinstance(draft_length, int) or draft_length < 0:
        raise ValueError(f"draft_length must be an integer >= 0, got {draft_length!r}")
