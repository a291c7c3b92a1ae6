"""The governor as a contender, through its public interface, and its ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pyeff.governor import Action, Arm, GovernorConfig, GovernorPolicy, Observation, Selector

from .policies import POOL, Base, Forecast, Move, Setup, View

# What pyeff.Governor sets by default.
OVERHEAD_CAP, LAST_INTERVAL = 0.05, 0.1


@dataclass(frozen=True)
class Ablation:
    """What is taken away from the governor.

    Args:
        uncertainty: False: measurements are believed as if exact and at once.
        damping: False: no deadband, no dwell, no window.
        pay_back: False: the governor is told that selections cost nothing, and is charged for them.
        averaged: False: anchors are evaluated under the raw weights.
        control_arm: False: no control batches and no advantages.
        free_selection: True: selections are charged nothing.
    """

    uncertainty: bool = True
    damping: bool = True
    pay_back: bool = True
    averaged: bool = True
    control_arm: bool = True
    free_selection: bool = False


ABLATIONS = {
    "governor-no-uncertainty": Ablation(uncertainty=False),
    "governor-no-damping": Ablation(damping=False),
    "governor-no-pay-back": Ablation(pay_back=False),
    "governor-raw-weights": Ablation(averaged=False),
    "governor-no-control": Ablation(control_arm=False),
    "governor-free": Ablation(free_selection=True),
}


class Governed(Base):
    """`pyeff.governor.GovernorPolicy` under the settings of `pyeff.Governor`.

    Args:
        setup: of the run.
        name: in tables.
        config: settings; by default those of `pyeff.Governor`.
        ablation: what is taken away.
        control: share of control batches.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        name: str = "governor",
        config: GovernorConfig | None = None,
        ablation: Ablation | None = None,
        control: float = 0.05,
    ) -> None:
        super().__init__(setup)
        self.name = name
        self.ablation = ablation = ablation or Ablation()
        config = config or GovernorConfig(overhead_cap=OVERHEAD_CAP, last_interval=LAST_INTERVAL)
        if not ablation.damping:
            config = replace(config, deadband=0.0, min_dwell=1, window=1, response_checks=1)
        if not ablation.uncertainty:
            config = replace(config, deviations=0.0, trajectory_log_sd=1e-3, slowing_sd=1e-3)
        self.check_every = config.check_every
        self.needs = frozenset({"anchors"}) if ablation.averaged else frozenset({"raw"})
        self.control = control if ablation.control_arm else 0.0
        self.free_selection = ablation.free_selection
        self.policy = GovernorPolicy(config)
        self.previous: tuple[float, ...] = ()
        self.previous_at = 0.0
        self.overhead = 0.0  # until the last check, and what it then went on to score

    def decide(self, view: View) -> Move:
        ablation = self.ablation
        now = tuple(view.anchors if ablation.averaged else view.raw_anchors)
        advantage = view.advantage
        if not ablation.uncertainty:
            now = (sum(now) / len(now),) * len(now)
            advantage = None if advantage is None else replace(advantage, standard_error=1e-3)
        known = ablation.pay_back and not ablation.free_selection
        decision = self.policy.decide(
            Observation(
                step=view.step,
                spent=view.spent,
                budget=view.budget,
                unit="flops",
                anchors_before=self.previous,
                anchors_now=now,
                spent_before=self.previous_at,
                refresh_cost=view.budget,
                cooldown_cost=view.reserve,
                scored_at=view.scored_at,
                refreshes_done=view.refreshes,
                loss_finite=view.finite,
                overhead=view.overhead,
                check_cost=max(view.overhead - self.overhead, 0.0),
                selectors=[Selector(name, cost if known else 0.0) for name, cost in view.costs.items()],
                selector=view.selector,
                arms=self._ways_back(view),
                control=view.control_cost is not None and self.control > 0,
                control_cost=(view.control_cost or 0.0) if self.control > 0 else 0.0,
                batch=view.batch,
                advantage=advantage,
                drift=view.drift,
            )
        )
        self.previous, self.previous_at = now, view.spent
        self.overhead = view.overhead
        if decision.action is Action.REFRESH and not ablation.free_selection:
            self.overhead += view.costs[str(decision.argument)]
        promise = decision.estimates.get("forecast")
        return Move(
            decision.action,
            decision.argument,
            forecast=None if promise is None else Forecast(promise["rate"], promise["low"], promise["high"]),
            record={"step": decision.step, "key": decision.key, "reason": decision.reason, "values": decision.values},
        )

    def _ways_back(self, view: View) -> list[Arm]:
        """Offer the way back to the pool; the governor knows how fast it is from the control batches."""
        return [] if view.selector is None else [Arm(POOL, 1.0, 1.0)]


def placebo_rate(refreshes: list[int]) -> float:
    """The governor's mean number of scorings in a run, which `baselines.Placebo` repeats at random."""
    return sum(refreshes) / len(refreshes) if refreshes else 1.0
