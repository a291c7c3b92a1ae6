"""Keep a training going where a check's numbers make no decision."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace

from pyeff.governor.log import DecisionLog
from pyeff.governor.observation import Decision, Observation, Policy


def decide_safely(policy: Policy, observation: Observation) -> Decision:
    """Take the decision of one check; where that cannot be taken or written down, one that keeps the schedule.

    What a sensor or an offer says may be finite and yet too large to square or to divide by. The policy then forgets
    the check, and is asked again without measurements and offers and with the reason as the observation's ``problem``.

    Raises what the policy raises for an observation that contradicts the ones before. Cost: two more JSON texts.
    """
    before = policy.state_dict()
    try:
        decision = policy.decide(observation)
        json.dumps([decision.to_dict(), policy.state_dict()], allow_nan=False)
    except (ValueError, ArithmeticError) as error:
        policy.load_state_dict(before)
        return policy.decide(
            replace(
                observation,
                anchors_before=(),
                anchors_now=(),
                clusters=(),
                selectors=(),
                # A selector that is not offered is not asked for: at this price there is nothing to buy.
                refresh_cost=observation.budget,
                arms=(),
                batch=None,
                memory_modes=(),
                advantage=None,
                drift=(),
                check_cost=0.0,
                control_cost=0.0,
                problem=f"its numbers make no decision ({error})",
            )
        )
    return decision


def log_safely(log: DecisionLog, decision: Decision) -> None:
    """Append a decision; where the disk refuses it, warn and go on without this line."""
    try:
        log.append(decision)
    except OSError as error:
        warnings.warn(
            f"the decision of step {decision.step} is not in the log {log.path}: {error}", RuntimeWarning, stacklevel=4
        )
