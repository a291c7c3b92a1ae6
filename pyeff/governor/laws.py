"""Laws of the loss: fitted to a run to say what the next training will return, or taken from the literature as priors.

Fits are by variable projection: for given exponents and offsets the other coefficients follow from linear least
squares, so only two or three numbers are searched, on a grid and then by Levenberg-Marquardt steps from its best point.
The search has no start to be unlucky with, draws nothing at random and takes a few milliseconds.

A fit says little about its own error: the intervals of such laws, taken from residuals, cover far less than they
promise. Calibrate predictions with `pyeff.governor.calibration.Conformal`.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Array = NDArray[np.float64]
_Linear = Callable[[_Array, _Array, _Array], tuple[_Array, _Array]]

_STEPS = 40
_NUDGE = 1e-5
_TINY = 1e-300
_DAMPINGS = (1e-14, 1e-11, 1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


@dataclass(frozen=True)
class OffsetPowerLaw:
    """L(x) = E + A (x + x0)^-alpha, with x the training done in any one unit.

    Args:
        floor: E, nats.
        scale: A >= 0.
        offset: x0 >= 0, in the unit of x: the training a start from better than nothing is worth.
        exponent: alpha > 0.
        residual_sd: root mean square of the weighted residuals, nats.
    """

    floor: float
    scale: float
    offset: float
    exponent: float
    residual_sd: float = 0.0

    def __call__(self, x: float) -> float:
        """Return the loss after x of training."""
        return self.floor + self.scale * (x + self.offset) ** -self.exponent

    def gain(self, start: float, end: float) -> float:
        """Return L(start) - L(end); the floor, the least certain number of a fit, cancels."""
        return self.scale * ((start + self.offset) ** -self.exponent - (end + self.offset) ** -self.exponent)

    def rate(self, x: float) -> float:
        """Return -dL/dx, the marginal gain per unit of training."""
        return self.scale * self.exponent * (x + self.offset) ** (-self.exponent - 1)


@dataclass(frozen=True)
class RectifiedLaw:
    """L(x) = (B / (x0 + x^beta) + E)^alpha: flat until x^beta reaches x0, then a power law (Lin et al., 2024).

    Fine-tuning often begins so; a plain power law reads the flat part as the end of learning.

    Args:
        scale: B >= 0.
        learned: x0 > 0, what pre-training has already learned of the task, in units of x^beta.
        inner: beta > 0.
        floor: E >= 0.
        outer: alpha > 0.
        residual_sd: root mean square of the weighted residuals, nats.
    """

    scale: float
    learned: float
    inner: float
    floor: float
    outer: float
    residual_sd: float = 0.0

    def __call__(self, x: float) -> float:
        """Return the loss after x of training."""
        return float((self.scale / (self.learned + x**self.inner) + self.floor) ** self.outer)

    def gain(self, start: float, end: float) -> float:
        """Return L(start) - L(end)."""
        return self(start) - self(end)


@dataclass(frozen=True)
class AnnealShape:
    """How fast the loss gives back what a fall of the learning rate has earned.

    G(eta, s) = 1 - (C eta^-gamma s + 1)^-beta, s the sum of learning rates since the fall: the shape of the
    multi-power law (Luo et al., 2025, arXiv:2503.12811). The default is its fit for 100 M parameters; those for 25 M
    and 400 M differ by a few per cent. C carries the unit of the learning rate (AdamW's).
    """

    speed: float = 2.132
    rate_exponent: float = 0.655
    exponent: float = 0.598

    def earned(self, rates: Sequence[float]) -> _Array:
        """Return sum over falls k of (eta_{k-1} - eta_k) G(eta_k, S_k(t)) after each step t, S_k = sum of lr from k on.

        A rise of the rate counts negatively. Steps at rate 0 learn nothing: G is 1 in the limit and taken as 0.
        Cost: steps x changes of the rate.
        """
        eta = _rates(rates)
        progress = np.cumsum(eta)
        result = np.zeros_like(progress)
        for k in np.flatnonzero(np.diff(eta)) + 1:
            if eta[k] == 0:
                continue
            since = progress[k:] - progress[k - 1]
            shape = 1 - (self.speed * eta[k] ** -self.rate_exponent * since + 1) ** -self.exponent
            result[k:] += (eta[k - 1] - eta[k]) * shape
        return result


@dataclass(frozen=True)
class ScheduleLaw:
    """L(t) = E + A (S(t) + S0)^-alpha - M sum_k (eta_{k-1} - eta_k) G(eta_k, S_k(t)), S(t) = sum of lr up to t.

    Progress is indexed by the sum of learning rates, and what an anneal earns is a term of its own: a plateau's curve
    does not show it. With M from the multi-power law's published fits this is that law.

    Args:
        plateau: the law without annealing, x = S.
        anneal: M >= 0, nats per unit of learning rate; 0 where the fitted part of the run had no fall of the rate to
            learn it from.
        shape: G.
    """

    plateau: OffsetPowerLaw
    anneal: float
    shape: AnnealShape = AnnealShape()

    def __call__(self, rates: Sequence[float]) -> _Array:
        """Return the loss after each step of a schedule, from its first learning rate on."""
        progress = np.cumsum(_rates(rates))
        plateau = self.plateau
        power = plateau.scale * (progress + plateau.offset) ** -plateau.exponent
        return np.asarray(plateau.floor + power - self.anneal * self.shape.earned(rates))


def fit_offset_power_law(
    x: Sequence[float], losses: Sequence[float], *, standard_errors: Sequence[float] | None = None
) -> OffsetPowerLaw:
    """Fit :class:`OffsetPowerLaw` by least squares with E >= 0 and A >= 0.

    Searched: x0 / max(x) from 1e-4 to 10, both ends included, and alpha from 0.02 to 4. Errors of neighbouring checks
    are correlated; the fit takes them as independent.

    Args:
        x: training done at each check, not negative; at least 4 different.
        losses: mean loss at each [n], finite.
        standard_errors: of each, positive; None weighs all alike.

    Raises ValueError for input that does not fit the above. Cost: about 2 ms for 50 checks.

    >>> true = OffsetPowerLaw(1.5, 2.0, 10.0, 0.4)
    >>> x = [float(i) for i in range(1, 40)]
    >>> round(fit_offset_power_law(x, [true(each) for each in x]).gain(40, 80) / true.gain(40, 80), 2)
    1.0
    """
    places, values, weights = _curve(x, losses, standard_errors)
    return _fit_power(places, lambda basis, linear: linear(basis, values, weights))


def fit_rectified_law(
    x: Sequence[float], losses: Sequence[float], *, standard_errors: Sequence[float] | None = None
) -> RectifiedLaw:
    """Fit :class:`RectifiedLaw`; arguments and errors as for :func:`fit_offset_power_law`, losses positive.

    For given alpha, beta and x0, L^(1/alpha) is linear in E and B; its weights are those that make its squared error
    that of L to first order. Cost: about 10 ms for 50 checks.
    """
    places, values, weights = _curve(x, losses, standard_errors)
    if not (values > 0).all():
        raise ValueError(f"losses must be positive for a rectified law, got {float(values.min())!r}")
    unit = float(places.max())
    scaled = places / unit

    def solve(points: _Array, linear: _Linear) -> tuple[_Array, _Array]:
        outer, inner, learned = (np.exp(points[:, i : i + 1]) for i in range(3))
        basis = 1 / (learned + scaled[None, :] ** inner)
        powered = values[None, :] ** (1 / outer)
        local = weights[None, :] * (outer * values[None, :] ** (1 - 1 / outer)) ** 2
        coefficients, _ = linear(basis, powered, local)
        fitted = np.maximum(coefficients[:, :1] + coefficients[:, 1:] * basis, 0) ** outer
        return coefficients, np.sqrt(weights) * (values - fitted)

    logs, (floor, scale), error = _project(
        [(math.log(0.1), math.log(3)), (math.log(0.1), math.log(4)), (math.log(1e-3), math.log(10))],
        solve,
        sizes=(7, 9, 11),
    )
    outer, inner, learned = (math.exp(each) for each in logs)
    back = unit**inner
    return RectifiedLaw(scale * back, learned * back, inner, floor, outer, math.sqrt(error))


def fit_schedule_law(
    rates: Sequence[float],
    steps: Sequence[int],
    losses: Sequence[float],
    *,
    standard_errors: Sequence[float] | None = None,
    shape: AnnealShape | None = None,
) -> ScheduleLaw:
    """Fit :class:`ScheduleLaw` to losses seen after some of a run's steps.

    Args:
        rates: learning rate of every step so far, not negative [steps].
        steps: how many steps had been made at each check, 1 to len(rates), rising [n].
        losses: mean loss at each [n].
        standard_errors: of each; None weighs all alike.
        shape: of the anneal's return; its three numbers are not fitted, M is.

    Raises ValueError for input that does not fit the above.
    """
    eta = _rates(rates)
    index = np.asarray(steps, dtype=np.int64) - 1
    if index.size and (index.min() < 0 or index.max() >= len(eta) or (np.diff(index) <= 0).any()):
        raise ValueError(f"steps must rise from at least 1 to at most {len(eta)}, got {list(steps)}")
    shape = shape or AnnealShape()
    places, values, weights = _curve(np.cumsum(eta)[index].tolist(), losses, standard_errors)
    earned = shape.earned(rates)[index]
    plain = ScheduleLaw(_fit_power(places, lambda basis, linear: linear(basis, values, weights)), 0.0, shape)
    average = float((weights * earned).sum())
    centred = earned - average
    spread = float((weights * centred**2).sum())
    if spread == 0:
        return plain
    # The annealing term is projected out of both sides first (Frisch and Waugh), so the search stays two-dimensional.
    share = float((weights * centred * values).sum()) / spread

    def shares(basis: _Array) -> _Array:
        return np.asarray((weights * centred * basis).sum(axis=1) / spread)

    rest = values - share * centred
    law = _fit_power(places, lambda basis, linear: linear(basis - shares(basis)[:, None] * centred, rest, weights))
    at_checks = (places + law.offset) ** -law.exponent
    anneal = law.scale * float(shares(at_checks[None, :])[0]) - share
    if anneal <= 0:
        return plain
    return ScheduleLaw(dataclasses.replace(law, floor=law.floor + anneal * average), anneal, shape)


def mean_gain(laws: Sequence[Callable[[float], float]], start: float, end: float) -> tuple[float, float]:
    """Return the mean over laws of L(start) - L(end), and their standard deviation (0 for one law).

    Which form fits best so far says little about which predicts best; their spread is a lower bound of the error.
    """
    if not laws:
        raise ValueError("laws must be at least one law, got none")
    gains = [law(start) - law(end) for law in laws]
    mean = math.fsum(gains) / len(gains)
    if len(gains) == 1:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / (len(gains) - 1))


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A N^-alpha + B D^-beta, N parameters and D tokens, C = 6 N D FLOPs (Hoffmann et al., 2022).

    A prior for how fast gains shrink. Its absolute losses belong to one tokenizer and one corpus. Its methods raise
    ValueError for parameters, tokens and FLOPs that are not finite and positive.

    >>> tokens_per_parameter = [round(d / n) for n, d in map(EPOCH.optimum, (1e18, 1e21, 5.8e23))]
    >>> tokens_per_parameter
    [26, 22, 18]
    """

    floor: float
    parameter_scale: float
    token_scale: float
    parameter_exponent: float
    token_exponent: float

    def __call__(self, parameters: float, tokens: float) -> float:
        """Return the loss of this many parameters after this many different tokens."""
        _check_positive(parameters=parameters, tokens=tokens)
        by_size = self.parameter_scale * parameters**-self.parameter_exponent
        return self.floor + by_size + self.token_scale * tokens**-self.token_exponent

    def optimum(self, flops: float) -> tuple[float, float]:
        """Return the parameters and tokens with the lowest loss for this many FLOPs.

        N* = G (C/6)^(beta / (alpha + beta)), D* = C / 6 N*, G = (alpha A / beta B)^(1 / (alpha + beta)): there
        alpha A N^-alpha = beta B D^-beta.
        """
        _check_positive(flops=flops)
        a, b = self.parameter_exponent, self.token_exponent
        ratio = (a * self.parameter_scale / (b * self.token_scale)) ** (1 / (a + b))
        parameters = ratio * (flops / 6) ** (b / (a + b))
        return parameters, flops / 6 / parameters

    def gain_per_efold(self, tokens: float) -> float:
        """Return -dL / d ln C at fixed N: beta B D^-beta, nats per e-fold of training."""
        _check_positive(tokens=tokens)
        return self.token_exponent * self.token_scale * tokens**-self.token_exponent

    def frontier_gain_per_efold(self, flops: float) -> float:
        """Return -dL / d ln C with N chosen best: alpha beta / (alpha + beta) (A N^-alpha + B D^-beta).

        Equal to :meth:`gain_per_efold` at the optimum.
        """
        parameters, tokens = self.optimum(flops)
        a, b = self.parameter_exponent, self.token_exponent
        return a * b / (a + b) * (self(parameters, tokens) - self.floor)

    def rate(self, parameters: float, tokens: float) -> float:
        """Return -dL/dC at fixed N, nats per FLOP."""
        _check_positive(parameters=parameters, tokens=tokens)
        return self.gain_per_efold(tokens) / (6 * parameters * tokens)


# As printed in the text of Hoffmann et al. The rounding matters: at 5.8e23 FLOPs it asks for 93 tokens a parameter.
HOFFMANN_ROUNDED = Chinchilla(1.69, 406.4, 410.7, 0.34, 0.28)
# The same fit at the precision of their TeX source.
HOFFMANN = Chinchilla(math.exp(0.5267228), math.exp(6.0073404), math.exp(6.0179186), 0.33917, 0.28491)
# Besiroglu et al., 2024, arXiv:2404.10102: the same data fitted again. The default prior.
EPOCH = Chinchilla(1.817, 482.01, 2085.43, 0.348, 0.366)


@dataclass(frozen=True)
class DataConstrained:
    """Chinchilla's law where tokens and parameters in excess are worth less and less (Muennighoff et al., 2023).

    L = E + A N'^-alpha + B D'^-beta, D' = U + U R* (1 - exp(-R / R*)), U unique tokens, R = D / U - 1 repetitions;
    N' likewise with U_N = min(N, N optimal for U). It cannot express a loss that rises with repetition, and R* was
    found to be unstable: take its trend, not its digits.

    >>> round(MUENNIGHOFF(6.34e9, 242e9, 25e9), 5)
    2.22564
    """

    law: Chinchilla
    token_decay: float
    parameter_decay: float

    def __call__(self, parameters: float, tokens: float, unique_tokens: float) -> float:
        """Return the loss after ``tokens`` drawn from ``unique_tokens`` different ones.

        Raises ValueError for amounts that are not finite and positive.
        """
        _check_positive(parameters=parameters, tokens=tokens, unique_tokens=unique_tokens)
        law = self.law
        unique = min(unique_tokens, tokens)
        a, b = law.parameter_exponent, law.token_exponent
        fitting = (a * law.parameter_scale / (b * law.token_scale) * unique**b) ** (1 / a)
        return law(
            _worth(parameters, min(parameters, fitting), self.parameter_decay), _worth(tokens, unique, self.token_decay)
        )

    def effective_share(self, epochs: float) -> float:
        """Return D' / D after this many epochs (>= 1): what a token of them was worth on average."""
        return _worth(epochs, 1.0, self.token_decay) / epochs

    def repetition_discount(self, epochs: float) -> float:
        """Return dD'/dD = exp(-R / R*), what the next token is worth after this many epochs (>= 1).

        Multiply the expected rate of gain on a small selected subset by it.
        """
        return math.exp(-max(epochs - 1, 0.0) / self.token_decay)


MUENNIGHOFF = DataConstrained(
    Chinchilla(math.exp(0.6254804), math.exp(6.255414), math.exp(7.3049974), 0.3526596, 0.3526596),
    token_decay=15.387756,
    parameter_decay=5.309743,
)


def _check_positive(**amounts: float) -> None:
    for name, amount in amounts.items():
        if not (math.isfinite(amount) and amount > 0):
            raise ValueError(f"{name} must be positive and finite, got {amount!r}")


def _worth(amount: float, unique: float, decay: float) -> float:
    return unique + unique * decay * -math.expm1(-(amount / unique - 1) / decay)


def _rates(rates: Sequence[float]) -> _Array:
    eta = np.asarray(rates, dtype=np.float64)
    if eta.ndim != 1 or not eta.size or not np.isfinite(eta).all() or (eta < 0).any():
        raise ValueError("rates must be learning rates, one a step, finite and not negative")
    return eta


def _curve(
    x: Sequence[float], losses: Sequence[float], standard_errors: Sequence[float] | None
) -> tuple[_Array, _Array, _Array]:
    places, values = np.asarray(x, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    errors = np.ones_like(values) if standard_errors is None else np.asarray(standard_errors, dtype=np.float64)
    if places.ndim != 1 or places.shape != values.shape or places.shape != errors.shape:
        raise ValueError(
            f"x, losses and standard_errors must be of one length, "
            f"got {places.shape}, {values.shape} and {errors.shape}"
        )
    if not (np.isfinite(places).all() and np.isfinite(values).all() and np.isfinite(errors).all()):
        raise ValueError("x, losses and standard_errors must be finite")
    if (places < 0).any() or (errors <= 0).any():
        raise ValueError("x must not be negative, and standard_errors must be positive")
    if len(np.unique(places)) < 4:
        raise ValueError(f"a law with four coefficients needs 4 different x, got {len(np.unique(places))}")
    weights = errors**-2
    return places, values, np.asarray(weights / weights.sum())


def _level_and_slope(basis: _Array, values: _Array, weights: _Array) -> tuple[_Array, _Array]:
    """Least squares of values = E + A basis, A >= 0, for every row: ([rows, 2], weighted residuals [rows, n])."""
    total = weights.sum(axis=-1)
    mean_b = (weights * basis).sum(axis=1) / total
    mean_v = (weights * values).sum(axis=-1) / total
    centred = basis - mean_b[:, None]
    spread = (weights * centred**2).sum(axis=1)
    slope = np.divide((weights * centred * values).sum(axis=1), spread, out=np.zeros_like(spread), where=spread > 0)
    return _fitted(mean_v - np.maximum(slope, 0) * mean_b, slope, basis, values, weights)


def _slope(basis: _Array, values: _Array, weights: _Array) -> tuple[_Array, _Array]:
    """The same with E = 0."""
    slope = (weights * basis * values).sum(axis=1) / (weights * basis**2).sum(axis=1)
    return _fitted(np.zeros_like(slope), slope, basis, values, weights)


def _fitted(level: _Array, slope: _Array, basis: _Array, values: _Array, weights: _Array) -> tuple[_Array, _Array]:
    slope = np.maximum(slope, 0)
    residuals = values - level[:, None] - slope[:, None] * basis
    return np.stack([level, slope], axis=1), np.sqrt(weights) * residuals


def _project(
    box: Sequence[tuple[float, float]],
    solve: Callable[[_Array, _Linear], tuple[_Array, _Array]],
    *,
    sizes: Sequence[int],
) -> tuple[list[float], tuple[float, float], float]:
    """Search with a free E, and again with E = 0 where that came out negative: neither problem has a kink."""
    axes = [np.linspace(start, end, size) for (start, end), size in zip(box, sizes, strict=True)]
    grid = np.asarray(list(itertools.product(*axes)))
    free = _search(box, lambda points: solve(points, _level_and_slope), grid)
    if free[1][0] >= 0:
        return free
    return _search(box, lambda points: solve(points, _slope), np.vstack([grid, free[0]]))


def _search(
    box: Sequence[tuple[float, float]], solve: Callable[[_Array], tuple[_Array, _Array]], points: _Array
) -> tuple[list[float], tuple[float, float], float]:
    """Take Levenberg-Marquardt steps on the projected residuals from the best of the points, inside the box.

    ``solve`` gives coefficients [rows, 2] and weighted residuals [rows, n] for rows of points. Returns (point,
    coefficients, squared error).
    """
    low, high = (np.asarray(side) for side in zip(*box, strict=True))
    coefficients, residuals = solve(points)
    at = int(np.argmin((residuals**2).sum(axis=1)))
    point, found, residual = points[at], coefficients[at], residuals[at]
    nudges = _NUDGE * np.eye(len(box))
    for _ in range(_STEPS):
        nudged = solve(np.concatenate([point + nudges, point - nudges]))[1]
        slopes = (nudged[: len(box)] - nudged[len(box) :]) / (2 * _NUDGE)  # [dimensions, n]
        # The valleys of these problems are long, curved and narrow: the singular values keep what a normal matrix
        # would square away, and several dampings are tried at once.
        left, sizes_of, right = np.linalg.svd(slopes, full_matrices=False)
        along = right @ residual
        steps = [
            left @ (along * sizes_of / (sizes_of**2 + damping * sizes_of[0] ** 2 + _TINY)) for damping in _DAMPINGS
        ]
        trials = np.clip(point - np.asarray(steps), low, high)
        coefficients, residuals = solve(trials)
        errors = (residuals**2).sum(axis=1)
        at, now = int(np.argmin(errors)), float((residual**2).sum())
        if not errors[at] < now:
            break
        point, found, residual = trials[at], coefficients[at], residuals[at]
    return point.tolist(), (float(found[0]), float(found[1])), float((residual**2).sum())


def _fit_power(places: _Array, solve: Callable[[_Array, _Linear], tuple[_Array, _Array]]) -> OffsetPowerLaw:
    """Search offset and exponent; ``solve`` gives E, A and the residuals for rows of (x + x0)^-alpha."""
    unit = float(places.max())
    scaled = places / unit

    def basis(points: _Array) -> _Array:
        offset, exponent = np.exp(points[:, :1]), np.exp(points[:, 1:])
        return np.asarray((scaled[None, :] + offset) ** -exponent)

    (log_offset, log_exponent), (floor, scale), error = _project(
        [(math.log(1e-4), math.log(10)), (math.log(0.02), math.log(4))],
        lambda points, linear: solve(basis(points), linear),
        sizes=(15, 15),
    )
    exponent = math.exp(log_exponent)
    return OffsetPowerLaw(
        floor=floor,
        scale=scale * unit**exponent,
        offset=math.exp(log_offset) * unit,
        exponent=exponent,
        residual_sd=math.sqrt(error),
    )
