"""Settings of the governor."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, fields

from pyeff.governor.belief import RATIO_LIMITS


@dataclass(frozen=True)
class GovernorConfig:
    """Settings of the governor, each with the reason for its default.

    Args:
        check_every: share of the budget between checks. 5 %: some fifteen decisions before the cooldown, and
            an anchor evaluation that costs a hundredth of an interval stays at 1 % of the budget.
        warmup: share of the budget spent before the pool may be scored. Scores of an untrained model say
            nothing about the trained one; 5 % is one check.
        prior_gain_ratio: rho0, how many times faster the anchors improve on a fresh selection than on the
            whole pool, before this run has said anything. 2 with ``prior_decay`` 0.5 and a cooldown of 0.2
            buys a first scoring of up to 27 % of the budget and none dearer; set 1 to refuse every selection.
        prior_log_sd: standard deviation of log rho0. log 2: from no gain at all to fourfold within one.
        prior_decay: tau, share of the budget over which a selection's advantage falls to 1/e. Half: scores of
            averaged weights go stale over a good part of a short run, not within a few checks.
        trajectory_log_sd: scatter of a measured log gain ratio beyond the anchors' sampling error: the path
            of the weights is one draw, and gains of neighbouring checks commonly differ by half.
        slowing: p in "without a refresh the rate of gain goes on as (training done)^-p", before the run has
            shown its own. 0 is a loss falling on a straight line, 1 one falling with the logarithm of
            training; half lies between, where a short run of a pretrained model is.
        slowing_sd: standard deviation of p: from 0 to 1 within one. The run's own checks before a refresh
            narrow it.
        response_checks: checks over which a refresh is judged. Two: the first after a switch still sees
            averaged weights from before it.
        min_dwell: checks between two refreshes, so that one is judged (``response_checks``) before the next is bought;
            a check with a reading of the control arm is judged at once.
        overfit_checks: m, successive checks with the whole confidence interval of the gain below zero that
            end the run early. Three at 95 %: by sampling error alone once in 64 000.
        deadband: the expected return must exceed the cost by this share; 10 % keeps rounding-size advantages
            from moving anything.
        confidence: of the interval on the gain.
        decay_log_sd: standard deviation of log tau, learned from the control arm where there is one. log 2: twice or
            half within one.
        require_alarm: whether a second REFRESH also needs an alarm of a drift detector. Off: the pay-back rule alone
            decides, which already knows how old a selection is.
        overhead_cap: share of the budget that evaluation, scoring and probes may take together. What the checks to
            come will cost is kept; a REFRESH or PROBE must fit into the rest. None: no cap but what pays.
        deviations: h, how many standard errors another arm, batch or memory mode must be better by, beside the
            ``deadband``. One, since ``window`` asks for it twice.
        window: successive checks on which the same SWITCH, BATCH or MEMORY must be best before it is made.
        stop_checks: successive checks on which training must not be worth its price before a priced run ends early.
        stop_probability: delta: not worth it means P(rate of gain > price) < delta. One half weighs both errors alike;
            less asks to be surer, and stops later than pays.
        rearm: by how much the rate must exceed the price, with that probability, to start the count again.
        last_interval: share of an interval that must be left before the cooldown for it to begin. 1: only whole ones,
            for a loop whose checks come at fixed intervals. One that checks at the plateau's end as well, as
            `pyeff.Governor` does, sets 0.1: else evaluations, which make intervals longer, cost it the last one.
        batch_ratio: kappa: the batch may be doubled below kappa times the noise scale's lower bound, and halved above
            1 / kappa times its upper one.

    Raises ValueError for a value out of range.
    """

    check_every: float = 0.05
    warmup: float = 0.05
    prior_gain_ratio: float = 2.0
    prior_log_sd: float = math.log(2.0)
    prior_decay: float = 0.5
    trajectory_log_sd: float = 0.5
    slowing: float = 0.5
    slowing_sd: float = 0.5
    response_checks: int = 2
    min_dwell: int = 2
    overfit_checks: int = 3
    deadband: float = 0.1
    confidence: float = 0.95
    decay_log_sd: float = math.log(2.0)
    require_alarm: bool = False
    overhead_cap: float | None = None
    deviations: float = 1.0
    window: int = 2
    stop_checks: int = 3
    stop_probability: float = 0.5
    rearm: float = 1.25
    batch_ratio: float = 0.5
    last_interval: float = 1.0

    def __post_init__(self) -> None:
        def require(name: str, holds: bool, expected: str) -> None:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")

        # Numbers of NumPy and torch become Python's own, which a log can hold.
        for item in fields(self):
            value = getattr(self, item.name)
            if item.type != "bool":
                require(item.name, not isinstance(value, bool), "a number")
            if item.type in ("float", "float | None"):
                if type(value) not in (int, float) and hasattr(value, "__float__"):
                    object.__setattr__(self, item.name, float(value))
            elif item.type == "int" and hasattr(value, "__index__"):
                object.__setattr__(self, item.name, operator.index(value))
        for name in ("response_checks", "min_dwell", "overfit_checks", "window", "stop_checks"):
            value = getattr(self, name)
            require(name, isinstance(value, int) and value >= 1, "an integer >= 1")
        require("check_every", 0 < self.check_every < 1, "between 0 and 1")
        require("warmup", 0 <= self.warmup < 1, "at least 0 and below 1")
        require("confidence", 0 < self.confidence < 1, "between 0 and 1")
        low, high = RATIO_LIMITS
        require("prior_gain_ratio", low <= self.prior_gain_ratio <= high, f"between {low:g} and {high:g}")
        require("prior_decay", math.isfinite(self.prior_decay) and self.prior_decay > 0, "positive")
        require("stop_probability", 0 < self.stop_probability <= 0.5, "above 0 and at most 0.5")
        require("batch_ratio", 0 < self.batch_ratio <= 1, "above 0 and at most 1")
        require("last_interval", 0 < self.last_interval <= 1, "above 0 and at most 1")
        require("rearm", math.isfinite(self.rearm) and self.rearm >= 1, "at least 1")
        require("require_alarm", isinstance(self.require_alarm, bool), "True or False")
        cap = self.overhead_cap
        require("overhead_cap", cap is None or 0 < cap <= 1, "above 0 and at most 1, or None")
        for name in (
            "slowing_sd",
            "trajectory_log_sd",
            "decay_log_sd",
        ):  # precisions of the forecast are their inverse squares
            require(name, math.isfinite(getattr(self, name)) and getattr(self, name) > 0, "positive")
        for name in ("prior_log_sd", "slowing", "deadband", "deviations"):
            require(name, math.isfinite(getattr(self, name)) and getattr(self, name) >= 0, "not negative")
