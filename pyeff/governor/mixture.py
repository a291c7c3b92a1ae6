"""Mixtures over the sources of a pool that follow what training shows: an ADO-like rule and a CADS-S-like one.

Both are baselines as much as tools: they steer by marginal loss and know no cost of selection, no uncertainty and (ADO)
no budget. A mixture is a frozen value; ``observed`` returns the next one.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

# A law with four coefficients says something from here on.
_LAW_POINTS = 6
_KEPT_POINTS = 64


def _shares(names: Sequence[str], prior: Mapping[str, float]) -> dict[str, float]:
    if not names:
        raise ValueError("names must hold at least one source, got none")
    for name in names:
        if name not in prior:
            raise ValueError(f"prior must have a share of every source, {name!r} has none")
        if not (math.isfinite(prior[name]) and prior[name] > 0):
            raise ValueError(f"prior must be positive and finite, got {prior[name]!r} for {name!r}")
    total = math.fsum(prior[name] for name in names)
    return {name: prior[name] / total for name in names}


def _floored(shares: Mapping[str, float], floor: float) -> dict[str, float]:
    """At least ``floor`` each, or an equal part where there are too many for that; the sum is 1."""
    floor = min(floor, 1 / len(shares))
    rest = 1 - floor * len(shares)
    total = math.fsum(shares.values())
    return {name: floor + rest * share / total for name, share in shares.items()}


@dataclass(frozen=True)
class AdoMixture:
    """Draw from each source in proportion to how fast its loss still falls (after Jiang et al., ADO, ICLR 2025).

    The training losses of source k are fitted by L_k(n) = E_k + A_k (n + n_k)^-a_k, n being the examples trained on in
    all. The target is prior_k c_k^(1/2) (-dL_k/dn), c_k being the running mean of the source's own share: what it is
    credited with. The weights are 0.9 x the mean of all targets so far + 0.1 x the last one, at least ``floor``.

    Args:
        names: of the sources.
        prior: relative sizes, > 0; the weights until every source has ``6`` losses.
        floor: least weight of a source.
        refit_every: checks between two fits of the laws.

    >>> AdoMixture(("books", "code"), prior={"books": 3, "code": 1}).weights
    {'books': 0.75, 'code': 0.25}

    Cost: a law's fit per source, 4 ms, at every ``refit_every``-th check.
    """

    names: tuple[str, ...]
    prior: Mapping[str, float]
    floor: float = 0.01
    refit_every: int = 3
    checks: int = 0
    seen: float = 0.0
    curves: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    credit: Mapping[str, float] = field(default_factory=dict)
    mean_target: Mapping[str, float] = field(default_factory=dict)
    last_target: Mapping[str, float] = field(default_factory=dict)
    targets: int = 0

    def __post_init__(self) -> None:
        _shares(self.names, self.prior)

    @property
    def weights(self) -> dict[str, float]:
        """Probability of each source; they sum to 1."""
        if not self.targets:
            return _shares(self.names, self.prior)
        mixed = {name: 0.9 * self.mean_target[name] + 0.1 * self.last_target[name] for name in self.names}
        return _floored(mixed, self.floor)

    def observed(
        self, *, counts: Mapping[str, float], losses: Mapping[str, float], rate: float | None = None
    ) -> AdoMixture:
        """Take in what was trained on since the last check: examples and mean loss by source.

        ``rate`` is not used; it lets both rules be called alike.
        """
        from pyeff.governor.laws import fit_offset_power_law

        seen = self.seen + math.fsum(counts.values())
        curves = dict(self.curves)
        for name, loss in losses.items():
            if math.isfinite(loss):
                curves[name] = (*curves.get(name, ()), (seen, loss))[-_KEPT_POINTS:]
        weights = self.weights
        credit = {name: 0.9 * self.credit.get(name, weights[name]) + 0.1 * weights[name] for name in self.names}
        grown = replace(self, checks=self.checks + 1, seen=seen, curves=curves, credit=credit)
        if grown.checks % self.refit_every or any(len(curves.get(name, ())) < _LAW_POINTS for name in self.names):
            return grown
        shares, speeds, step = _shares(self.names, self.prior), {}, 0.01 * seen
        for name in self.names:
            law = fit_offset_power_law([x for x, _ in curves[name]], [loss for _, loss in curves[name]])
            speeds[name] = shares[name] * math.sqrt(credit[name]) * max(law.gain(seen, seen + step) / step, 0.0)
        total = math.fsum(speeds.values())
        if not (math.isfinite(total) and total > 0):
            return grown
        target = {name: speed / total for name, speed in speeds.items()}
        n = self.targets + 1
        mean = {name: self.mean_target.get(name, 0.0) * (n - 1) / n + target[name] / n for name in self.names}
        return replace(grown, mean_target=mean, last_target=target, targets=n)


@dataclass(frozen=True)
class CadsMixture:
    """Learn the sources' probabilities from the rate of gain by a score-function gradient (after CADS-S, NeurIPS 2025).

    The logits are l; an interval is trained with softmax(l + sigma z), z standard normal. With the interval's gain per
    unit of budget r and its running mean and deviation b and s,

        l += step (r - b) / s  z,

    the gradient of the expected rate of a Gaussian policy over logits, with a baseline. Only the rate of held-out
    losses enters, so no source is favoured for having a high loss. The paper's penalty form is not public; this
    keeps its estimator, per source.

    Args:
        names: of the sources.
        prior: relative sizes, > 0, of which the logits start as logarithms.
        sigma: how far an interval's mixture strays.
        step: of the gradient.
        floor: least weight of a source.
        seed: of z, which is a function of (seed, number of the check).
    """

    names: tuple[str, ...]
    prior: Mapping[str, float]
    sigma: float = 0.5
    step: float = 0.3
    floor: float = 0.01
    seed: int = 0
    checks: int = 0
    logits: tuple[float, ...] | None = None
    baseline: float = 0.0
    spread: float = 0.0
    rates: int = 0

    def __post_init__(self) -> None:
        shares = _shares(self.names, self.prior)
        if self.logits is None:
            object.__setattr__(self, "logits", tuple(math.log(shares[name]) for name in self.names))

    @property
    def weights(self) -> dict[str, float]:
        """Probability of each source in the interval to come; they sum to 1."""
        assert self.logits is not None
        moved = [each + self.sigma * z for each, z in zip(self.logits, self._noise(), strict=True)]
        top = max(moved)
        shares = {name: math.exp(each - top) for name, each in zip(self.names, moved, strict=True)}
        return _floored(shares, self.floor)

    def observed(
        self, *, counts: Mapping[str, float], losses: Mapping[str, float], rate: float | None = None
    ) -> CadsMixture:
        """Take in the held-out rate of gain of the interval that :attr:`weights` was used for.

        ``counts`` and ``losses`` are not used; they let both rules be called alike. None as rate teaches nothing.
        """
        assert self.logits is not None
        logits, n = self.logits, self.rates
        if rate is not None and math.isfinite(rate):
            if n and self.spread > 0:
                score = max(min((rate - self.baseline) / self.spread, 3.0), -3.0)
                logits = tuple(each + self.step * score * z for each, z in zip(self.logits, self._noise(), strict=True))
            # Rates fall as training goes on: a baseline with a short memory follows.
            baseline = rate if not n else 0.7 * self.baseline + 0.3 * rate
            deviation = abs(rate - self.baseline) if n else abs(rate) / 2
            spread = deviation if not self.spread else 0.7 * self.spread + 0.3 * deviation
            return replace(self, checks=self.checks + 1, logits=logits, baseline=baseline, spread=spread, rates=n + 1)
        return replace(self, checks=self.checks + 1)

    def _noise(self) -> list[float]:
        draw = random.Random(f"{self.seed} {self.checks}")
        return [draw.gauss(0.0, 1.0) for _ in self.names]
