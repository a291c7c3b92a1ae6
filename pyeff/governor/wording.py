"""Decisions in a sentence, with their numbers."""

from __future__ import annotations

from collections.abc import Mapping

from pyeff.governor.account import State
from pyeff.governor.budget import format_amount
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Fading
from pyeff.governor.gates import refresh_key, refresh_keys
from pyeff.governor.observation import Action, Observation
from pyeff.governor.payback import PayBack
from pyeff.governor.signals import PairedGain


def progress_of(gain: PairedGain | None, observation: Observation) -> str:
    """Say what the anchors gained since the last check."""
    if gain is None:
        return "no gain has been measured yet"
    spent = format_amount(observation.spent - observation.spent_before, observation.unit)
    return f"the anchors gained {gain.mean:.3g} ± {gain.standard_error:.2g} nats over the last {spent}"


def why_anneal(blocked: Mapping[str, str], left: float, observation: Observation, gain: PairedGain | None) -> str:
    """Say why the anneal begins where going on is closed."""
    left_text = format_amount(left, observation.unit)
    return f"Anneal: {blocked['CONTINUE']}, {left_text} away; {progress_of(gain, observation)}."


def reason_of(
    config: GovernorConfig,
    observation: Observation,
    gain: PairedGain | None,
    weighed: PayBack,
    action: Action,
    blocked: Mapping[str, str],
    *,
    left: float,
    fading: Fading,
    selector: str,
    state: State,
    key: str,
    argument: str | None,
    value: float,
) -> str:
    """Say why this action was taken."""

    def amount(value: float) -> str:
        return format_amount(value, observation.unit)

    progress = progress_of(gain, observation)
    if action is Action.COOLDOWN:
        if "CONTINUE" in blocked:
            return why_anneal(blocked, left, observation, gain)
        if observation.price is not None and state.falling_back < config.overfit_checks:
            return (
                f"Anneal: on {state.below_price} checks in a row training returned less than its price of "
                f"{observation.price * observation.budget:.3g} nats for the whole budget; {progress}."
            )
        return f"Anneal early: {state.falling_back} checks in a row the anchors got worse for sure; {progress}."
    if "COOLDOWN" in blocked:
        return f"Go on as planned: {blocked['COOLDOWN']}, so nothing is decided on it."
    if action not in (Action.CONTINUE, Action.REFRESH):
        doing = {Action.SWITCH: "Switch to", Action.BATCH: "Batch", Action.PROBE: "Probe", Action.MEMORY: "Memory mode"}
        return f"{doing[action]} {argument}: worth {amount(value)} of the {amount(left)} left; {progress}."
    refused = [blocked.get(each) for each in refresh_keys(observation)]
    if action is Action.CONTINUE and all(refused):
        return f"Go on: {progress}; no refresh: {refused[0]}."
    offered = {refresh_key(each): each.cost for each in observation.selectors}
    cost = offered.get(selector, observation.refresh_cost)
    price = amount(cost)
    if weighed.cost != cost:
        price += f", worth {amount(weighed.cost)} of unselected training,"
    weights = (
        f"scoring the pool costs {price} and should return {amount(weighed.benefit)} in the {amount(left)} left "
        f"before the cooldown (gain ratio {fading.gain_ratio:.2f}, fading over {amount(fading.decay)})"
    )
    if action is Action.REFRESH:
        return f"Refresh{'' if argument is None else f' by {argument}'}: {weights}; {progress}."
    short = (
        f", not {config.deadband:.0%} more"
        if weighed.cost < weighed.benefit <= (1 + config.deadband) * weighed.cost
        else ""
    )
    which = "" if len(offered) < 2 else f" ({selector})"
    waits = f"; {blocked[selector]}" if selector in blocked else ""
    return f"Go on: {weights}{which}{short}{waits}; {progress}."
