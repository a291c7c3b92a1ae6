"""Simulated worlds whose laws are known: what training is worth, how selections fade, what the sensors show.

Units: FLOPs are counted in "units"; the four budgets are 1, 2.5, 6.3 and 16 of them. x is the *effective training*
done, in units of training on the pool at the plateau's rate. The annealed loss is an offset power law of it,

    L(x) = E + A (w(x) + x0)^-alpha,

w being the identity, or a stall that is made up for later (the fake plateau). Spending dC at relative learning rate eta
on a selection of age a adds dx = m g(eta) dC:

    m = (1 + (rho - 1) f(a / tau)) exp(-max(a / U - 1, 0) / 15.4)

with rho that of the moment of scoring, f exponential, a step, or hyperbolic, and the last factor what repeating a
selection of U FLOPs' worth of examples is worth (Muennighoff et al., 2023). g(eta) = eta^(1/2) on a plateau; a linear
schedule has the tuned peak at which it does as much in total as plateau and cooldown do, to within a per cent.

Before the anneal a loss stands above L(x) by an excess in proportion to the rate, large for raw and small for averaged
weights, and wanders about it. Every run of a world is one draw of all parameters from its seed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BUDGETS = (1.0, 2.5, 6.3, 16.0)
SELECTORS = ("cheap", "middle", "dear")
SOURCES = ("web", "books", "code")
ANCHORS = 64
# Noise is drawn for this many checks; later ones start over.
CHECKS = 32
# Muennighoff et al.'s R*: repetitions after which a repeated token is worth 1 / e.
REPEAT = 15.387756
# Integral of g over a budget: a plateau of 0.8, then a cooldown of 0.2 at 8 / 15 on average.
WSD_TOTAL = 0.8 + 0.2 * 8 / 15
EVAL_FLOPS = 0.0005

# What families differ in. The last four are the negative controls.
FAMILIES = ("fading", "step", "slow", "late", "repeat", "shock", "harmful")
CONTROLS = ("iid", "shuffled", "tenfold", "plateau")


@dataclass(frozen=True)
class Worlds:
    """Parameters of R runs of one family; arrays are [R], with selectors [R, S], sources [R, K], anchors [R, N].

    Args:
        family: its name.
        seeds: of the runs.
        floor: E. scale: A. power: alpha. offset: x0.
        stall: x at which a stall begins and ends, [R, 2]; equal where there is none.
        ratio: rho of each selector for a trained model. early: rho for an untrained one. ripening: spend in which it
            goes from one to the other.
        decay: tau. unique: U. cost: of scoring, before a shock.
        shock_at: spend after which scoring costs ``shock`` times as much.
        quality: worth of a source, 1 on average over the pool. shares: of the pool.
        source_law: floor, scale and power of each source's own loss, [R, K, 3].
        excess: of raw and averaged losses at the plateau's rate, [R, 2].
        wander: of raw and averaged losses, in units of an interval's gain, [R, 2].
        sample_noise: of an anchor's loss at one check, beside its own level and slope, in units of an interval's gain.
        control_noise: relative error of the control arm's ratio at one check.
        linear_edge: what a linear schedule does in total, relative to the plateau.
    """

    family: str
    seeds: tuple[int, ...]
    floor: Array
    scale: Array
    power: Array
    offset: Array
    stall: Array
    ratio: Array
    early: Array
    ripening: Array
    decay: Array
    unique: Array
    cost: Array
    shock_at: Array
    shock: Array
    quality: Array
    shares: Array
    source_law: Array
    excess: Array
    wander: Array
    sample_noise: Array
    control_noise: Array
    linear_edge: Array

    @property
    def shape(self) -> str:
        """f, how an advantage fades."""
        return {"step": "step", "slow": "hyperbolic"}.get(self.family, "exponential")

    def loss(self, x: Array) -> Array:
        """L(x), the annealed loss, for x [R, ...]."""
        reached = self._warped(x) + _column(self.offset, x)
        return _column(self.floor, x) + _column(self.scale, x) * reached ** -_column(self.power, x)

    def _warped(self, x: Array) -> Array:
        low, high = _column(self.stall[:, 0], x), _column(self.stall[:, 1], x)
        # A twentieth of the pace in the stall, and caught up over as long again.
        slow = low + 0.05 * (x - low)
        caught = low + 0.05 * (high - low) + 1.95 * (x - high)
        return np.where((x <= low) | (x >= 2 * high - low), x, np.where(x < high, slow, caught))

    def costs(self, spent: Array) -> Array:
        """Cost of scoring with each selector at this spend [R] -> [R, S]."""
        return self.cost * np.where(spent >= self.shock_at, self.shock, 1.0)[:, None]

    def advantage(self, scored_at: Array, age: Array) -> Array:
        """m of each selector, scored at this spend and of this age, [R, ...] -> [R, S, ...]."""
        extra = (slice(None), slice(None), *(None,) * (age.ndim - 1))
        ripe = np.clip(scored_at[:, None] / self.ripening[extra], 0.0, 1.0)
        ratio = self.early[extra] + (self.ratio - self.early)[extra] * ripe
        past = age[:, None] / self.decay[extra]
        if self.shape == "step":
            fading = (past < 1.0).astype(np.float64)
        elif self.shape == "hyperbolic":
            fading = 1.0 / (1.0 + past)
        else:
            fading = np.exp(-past)
        repeated = np.maximum(age[:, None] / self.unique[extra] - 1.0, 0.0)
        return (1.0 + (ratio - 1.0) * fading) * np.exp(-repeated / REPEAT)

    def mixture_ratio(self, weights: Array) -> Array:
        """m of a mixture [R, K] -> [R]: sum_k q_k p_k (w_k / p_k)^(1/2), which is 1 on the pool."""
        return (self.quality * np.sqrt(weights * self.shares)).sum(axis=1)


def linear_pace(progress: Array) -> Array:
    """g of a linear schedule at this share of the budget, its peak tuned: its mean over a budget is WSD_TOTAL."""
    return 1.5 * WSD_TOTAL * np.sqrt(np.maximum(1.0 - progress, 0.0))


def cooldown_pace(progress: Array) -> Array:
    """g in a cooldown at 1 - sqrt(progress)."""
    return np.sqrt(np.maximum(1.0 - np.sqrt(progress), 0.0))


def _column(values: Array, like: Array) -> Array:
    return values.reshape(len(values), *(1,) * (like.ndim - 1))


def generator(family: str, seed: int, purpose: int = 0) -> np.random.Generator:
    """The random stream of one run, the same for every policy."""
    return np.random.default_rng([seed, zlib.crc32(family.encode()), purpose])


def draw(family: str, seeds: range, *, held_out: bool = False) -> Worlds:
    """Draw the runs of a family.

    Args:
        family: of FAMILIES or CONTROLS.
        seeds: one run each.
        held_out: whether from the parameters that results are reported on; they are not those of development: selectors
            are a third dearer, their worth spreads wider, advantages fade over other spans and sensors are noisier.
    """
    if family not in FAMILIES + CONTROLS:
        raise ValueError(f"family must be one of {', '.join(FAMILIES + CONTROLS)}, got {family!r}")
    rows = [_draw_run(family, seed, held_out) for seed in seeds]
    arrays = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]}
    return Worlds(family=family, seeds=tuple(seeds), **arrays)


def _draw_run(family: str, seed: int, held_out: bool) -> dict[str, object]:
    random = generator(family, seed)
    S, K = len(SELECTORS), len(SOURCES)

    def spread(median: object, log_sd: float, size: int | None = None) -> NDArray[np.float64]:
        return np.asarray(median) * np.exp(log_sd * random.standard_normal(size))

    wide = 0.45 if held_out else 0.35
    # The dearer a selector, the better it is on average; but each may be of no use, or harm.
    ratio = np.clip(spread([1.2, 1.5, 1.8], wide, S), 0.5, 5.0)
    decay = np.clip(spread(1.5 if held_out else 2.0, 0.7, S), 0.1, 40.0)
    cost = spread([0.02, 0.08, 0.3], 0.4, S) * (4 / 3 if held_out else 1.0)
    unique = np.full(S, 1e9)
    early, ripening = ratio.copy(), np.full(S, 1e-9)
    shock_at, shock = 1e9, 1.0
    stall = np.zeros(2)
    quality = np.clip(spread(1.0, 0.5, K), 0.2, 4.0)
    shares = random.dirichlet(np.full(K, 4.0))
    start = spread(0.5, 0.3)
    when = random.uniform(0.5, 2.0)
    if family == "late":
        early, ripening = 1 - 0.3 * (ratio - 1), np.full(S, float(spread(1.0, 0.5)))
    elif family == "repeat":
        unique = spread([1.0, 0.6, 0.3], 0.4, S)
    elif family == "shock":
        shock_at, shock = float(when), float(spread(4.0 if random.random() < 0.5 else 0.25, 0.2))
    elif family == "harmful":
        ratio = np.clip(spread(0.8, 0.15, S), 0.4, 0.98)
        early = ratio.copy()
    elif family in ("iid", "shuffled"):
        ratio, early, quality = np.ones(S), np.ones(S), np.ones(K)
        if family == "shuffled":  # a random subset of its size: nothing but repetition
            unique = spread([1.0, 0.6, 0.3], 0.4, S)
    elif family == "tenfold":
        cost = 10 * cost
    elif family == "plateau":
        ratio, early = np.ones(S), np.ones(S)
        stall = np.array([0.3, 0.6]) * float(spread(1.0, 0.5))
    quality = quality / (quality * shares).sum()
    return {
        "floor": random.uniform(1.5, 3.0),
        "scale": spread(1.5, 0.2),
        "power": random.uniform(0.3, 0.8),
        "offset": start,
        "stall": stall,
        "ratio": ratio,
        "early": early,
        "ripening": ripening,
        "decay": decay,
        "unique": unique,
        "cost": cost,
        "shock_at": shock_at,
        "shock": shock,
        "quality": quality,
        "shares": shares,
        "source_law": np.stack([random.uniform(1, 3, K), random.uniform(0.5, 2, K), random.uniform(0.2, 0.6, K)], 1),
        "excess": np.array([0.15, 0.03]) * float(spread(1.0, 0.3)),
        "wander": np.array([1.0, 0.25]) * float(spread(1.3 if held_out else 1.0, 0.3)),
        "sample_noise": spread(1.0, 0.3),
        "control_noise": spread(0.35 if held_out else 0.25, 0.3),
        "linear_edge": 1 + 0.01 * random.standard_normal(),
    }
