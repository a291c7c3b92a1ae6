"""The governor in a loop of your own: count, check when due, decide, anneal, and end."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pyeff.governor.budget import Budget, parse_price
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Advantage
from pyeff.governor.drift import DriftReading
from pyeff.governor.failsafe import decide_safely, log_safely
from pyeff.governor.ledger import Ledger
from pyeff.governor.log import DecisionLog
from pyeff.governor.observation import (
    Action,
    Arm,
    BatchSize,
    Decision,
    MemoryMode,
    Observation,
    Selector,
    _plain_fields,
    _read_fields,
    checked_offers,
)
from pyeff.governor.policy import GovernorPolicy
from pyeff.governor.reading import amount_of, losses_of, whole_numbers

_VERSION = 3
# Amounts of a state, and those that may be None.
_KNOWN = ("previous_at", "next_check", "last_price", "check_cost")
_MAYBE = ("scored_at", "cooldown_start")


class Governor:
    """Spend a budget in any training loop.

    After every optimizer step tell it what the step cost (:meth:`step`). Every ``check_every`` of the budget it
    evaluates the anchors and returns a :class:`Decision`; otherwise None. Do what the decision asks, multiply the
    learning rate by :attr:`lr_factor`, and end when :attr:`done`.

    >>> losses = iter([[2.0 - 0.1 * i, 3.0 - 0.2 * i] for i in range(40)])
    >>> governor = Governor("1000 tokens", anchors=lambda: next(losses))
    >>> while not governor.done:
    ...     loss = 1.0  # one optimizer step at your learning rate times governor.lr_factor
    ...     decision = governor.step(tokens=10, loss=loss)
    >>> governor.steps, governor.ledger.spent("tokens")
    (100, 1000.0)

    Args:
        budget: such as "4e13F", "30m" or "1M tokens", or a :class:`Budget`.
        anchors: returns the losses of the same held-out samples in the same order, best under averaged weights.
        price: what must be returned for going on, in nats: a number per unit of the budget, or text such as
            "0.01 per PF" or "0.02 for 10%" (what one would give for a tenth more budget). None: the budget is paid for
            and is spent whole.
        flops_per_token: of a training step; needed for a FLOP budget unless each :meth:`step` says its own.
        anchor_flops: of one evaluation of the anchors.
        selectors: what REFRESH may run, each with its cost in the budget's unit; empty: REFRESH is never asked for.
        clusters: the document of each anchor, where several come from one.
        control: whether the loop draws control batches (:func:`is_control_batch`) while a selection is in use and
            offers their ``advantage``. The first selection then comes one check earlier.
        cooldown: share of the budget that the anneal takes.
        config: settings; by default those of :class:`GovernorConfig` with ``overhead_cap`` 5 %
            and ``last_interval`` 0.1.
        log: path of ``decisions.jsonl``; None keeps no log.
        anchor_ids: names of the anchors' samples, and ``holdout_ids`` of those a result is reported on: they must
            not overlap, or the governor is judged by what it steers by.
        holdout_ids: see ``anchor_ids``.
        clock: seconds from any start; replaced in tests.

    A check that cannot be measured (a clock that ran backwards, anchors that changed in number, are no numbers or not
    those that ``clusters`` names, a loss that is not finite) decides nothing: the schedule goes on and the reason is in
    the log. What ``anchors`` raises is yours and is passed on.

    Raises TypeError for a budget that is none, and ValueError for one smaller than its reserve, anchors in the holdout,
    selectors of one name, and settings out of range. Cost: a decision takes a few milliseconds, beside the anchors'
    evaluation.
    """

    def __init__(
        self,
        budget: str | Budget,
        *,
        anchors: Callable[[], Sequence[float]],
        price: float | str | None = None,
        flops_per_token: float | None = None,
        anchor_flops: float = 0.0,
        selectors: Sequence[Selector] = (),
        clusters: Sequence[int] = (),
        control: bool = False,
        cooldown: float = 0.2,
        config: GovernorConfig | None = None,
        log: str | Path | None = None,
        anchor_ids: Iterable[Hashable] = (),
        holdout_ids: Iterable[Hashable] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.budget = budget if isinstance(budget, Budget) else Budget.parse(budget)
        if not callable(anchors):
            raise TypeError(f"anchors must be a function that returns losses, got {type(anchors).__name__}")
        if not 0 <= cooldown < 1:
            raise ValueError(f"cooldown must be at least 0 and below 1, got {cooldown!r}")
        if both := set(anchor_ids) & set(holdout_ids):
            raise ValueError(
                f"anchor_ids and holdout_ids must not overlap, {len(both)} are in both, such as {next(iter(both))!r}"
            )
        self.config = config or GovernorConfig(overhead_cap=0.05, last_interval=0.1)
        self.price = parse_price(price, self.budget) if isinstance(price, str) else price
        if self.price is not None and not (math.isfinite(self.price) and self.price >= 0):
            raise ValueError(f"price must be finite and not negative, got {self.price!r}")
        for name, value in (("anchor_flops", anchor_flops), ("flops_per_token", flops_per_token or 0.0)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and not negative, got {value!r}")
        self.cooldown = cooldown
        reserve = cooldown * self.budget.amount + (anchor_flops if self.budget.unit == "flops" else 0.0)
        if reserve >= self.budget.amount:
            raise ValueError(f"the budget {self.budget} is smaller than the {reserve:.3g} kept for its end")
        self.ledger = Ledger()
        self.policy = GovernorPolicy(self.config)
        self.log = None if log is None else DecisionLog(log)
        self.steps = 0
        self._anchors, self._clusters = anchors, whole_numbers("clusters", clusters)
        self._control = control
        self._flops_per_token, self._anchor_flops = flops_per_token, anchor_flops
        self._selectors = checked_offers("selectors", selectors)
        self._clock = clock
        self._mark = clock()
        self._took: dict[str, float] = {}  # by each selector, the last time
        self._previous: tuple[float, ...] = ()
        self._previous_at = 0.0
        self._next_check = self.config.check_every * self.budget.amount
        self._scored_at: float | None = None
        self._selector: str | None = None
        self._refreshes = 0
        self._cooldown_start: float | None = None
        self._finite, self._problem = True, ""
        self._paid = self._last_price = 0.0
        self._check_cost = anchor_flops if self.budget.unit == "flops" else 0.0
        self._arms: tuple[Arm, ...] = ()
        self._batch: BatchSize | None = None
        self._modes: tuple[MemoryMode, ...] = ()
        self._advantage: Advantage | None = None
        self._drift: tuple[DriftReading, ...] = ()

    @property
    def spent(self) -> float:
        """Spent so far, in the budget's unit."""
        return self.ledger.spent(self.budget.unit)

    @property
    def has_selectors(self) -> bool:
        """Whether REFRESH may be asked for."""
        return bool(self._selectors)

    @property
    def cooling(self) -> bool:
        """Whether the anneal has begun."""
        return self._cooldown_start is not None

    @property
    def done(self) -> bool:
        """Whether the budget, or the cooldown that ends it early, has no room for one more step like the last."""
        return self.steps > 0 and self.spent + self._last_price > self._end

    @property
    def lr_factor(self) -> float:
        """What to multiply the learning rate of the next step by: 1, and 1 - sqrt(progress) in the cooldown."""
        if self._cooldown_start is None or self.cooldown == 0:
            return 1.0
        span = self._end - self._cooldown_start
        # At the middle of the step to come: the last one still moves.
        done = (self.spent + self._last_price / 2 - self._cooldown_start) / span if span > 0 else 1.0
        return 1.0 - math.sqrt(min(max(done, 0.0), 1.0))

    def step(
        self,
        *,
        tokens: int = 0,
        flops: float | None = None,
        loss: float | None = None,
        joules: float | None = None,
    ) -> Decision | None:
        """Charge one optimizer step, and decide when a check is due.

        Args:
            tokens: trained on.
            flops: of the step; None is ``flops_per_token`` x ``tokens``.
            loss: of the step, if it is at hand: one that is not finite keeps the next check from deciding.
            joules: of the step.

        Raises ValueError where a FLOP budget cannot be charged for want of ``flops``.
        """
        if flops is None:
            if self._flops_per_token is None and self.budget.unit == "flops":
                raise ValueError("flops must be given for a budget in FLOPs, here or as flops_per_token")
            flops = (self._flops_per_token or 0.0) * tokens
        before = self.spent
        self.charge("cooldown" if self.cooling else "train", flops=flops, tokens=tokens, joules=joules)
        self.steps += 1
        price = self.spent - before
        # Of time the lesser of two: a process that was paused once would else end far from its budget's end.
        paused = self.budget.unit == "seconds" and self.steps > 1
        self._last_price, self._paid = min(price, self._paid) if paused else price, price
        if not self._last_price and self.steps == 1 and self.budget.unit != "seconds":
            raise ValueError(f"{self.budget.unit} of a step must be more than 0, or the budget never ends")
        if loss is not None and not math.isfinite(loss):
            self._finite = False
        if self.cooling or self.spent < min(self._next_check, self._plateau_end):
            return None
        return self._check()

    def start_clock(self) -> None:
        """Count seconds from now on; what came before (loading) is charged to no field."""
        self._mark = self._clock()

    def charge(self, field: str, *, flops: float = 0.0, tokens: int = 0, joules: float | None = None) -> None:
        """Charge other work (eval, score, probe) with the seconds since the last charge."""
        now, before = self._clock(), self.spent
        seconds = now - self._mark
        if not 0 <= seconds < math.inf:  # nan among them
            self._problem, seconds = "the clock ran backwards", 0.0
        self.ledger.charge(field, flops=flops, seconds=seconds, tokens=tokens, joules=joules)
        self._mark = now
        if field not in ("train", "cooldown"):  # an interval is one of training
            self._next_check += self.spent - before

    def scored(self, selector: str | None = None, *, flops: float = 0.0, tokens: int = 0) -> None:
        """Say that the pool was scored and a selection is in use, and charge it. Call it after a REFRESH.

        What took more FLOPs than the selector declared is offered at what it took from then on; of seconds a pause of
        the process would count for good.
        """
        before = self.spent
        self.charge("score", flops=flops, tokens=tokens)
        if self.budget.unit == "flops":
            self._took[selector or ""] = self.spent - before
        self._scored_at, self._selector = self.spent, selector
        self._refreshes += 1

    def offer(
        self,
        *,
        arms: Sequence[Arm] | None = None,
        batch: BatchSize | None = None,
        memory_modes: Sequence[MemoryMode] | None = None,
        selectors: Sequence[Selector] | None = None,
        advantage: Advantage | None = None,
        drift: Sequence[DriftReading] = (),
    ) -> None:
        """Say what else could be done, and what was measured; arguments left out stay as they were.

        ``advantage`` and ``drift`` are measurements and serve the next check only; of two by one detector the later
        counts.

        Raises TypeError for what is of another kind, and ValueError for two offers of one name.
        """
        for name, value, kind in (("batch", batch, BatchSize), ("advantage", advantage, Advantage)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"{name} must be of {kind.__name__}, got {type(value).__name__}")
        readings = {reading.detector: reading for reading in (*self._drift, *checked_offers("drift", drift))}
        new_arms = self._arms if arms is None else checked_offers("arms", arms)
        new_modes = self._modes if memory_modes is None else checked_offers("memory_modes", memory_modes)
        self._selectors = self._selectors if selectors is None else checked_offers("selectors", selectors)
        self._arms, self._modes = new_arms, new_modes
        self._batch = batch or self._batch
        self._advantage = advantage or self._advantage
        self._drift = tuple(readings.values())

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-able; with the same loop a governor that loads it goes on as this one would."""
        return {
            "version": _VERSION,
            "budget": str(self.budget),
            "ledger": self.ledger.state_dict(),
            "policy": self.policy.state_dict(),
            "steps": self.steps,
            "previous": [loss if math.isfinite(loss) else str(loss) for loss in self._previous],
            "previous_at": self._previous_at,
            "next_check": self._next_check,
            "scored_at": self._scored_at,
            "selector": self._selector,
            "took": dict(self._took),
            "refreshes": self._refreshes,
            "cooldown_start": self._cooldown_start,
            "finite": self._finite,
            "problem": self._problem,
            "last_price": self._last_price,
            "check_cost": self._check_cost,
            "advantage": None if self._advantage is None else asdict(self._advantage),
            "drift": [_plain_fields(reading) for reading in self._drift],
            "decisions": None if self.log is None else len(self.log),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace the state, and cut the log to the decisions it had then.

        Offers (arms, batch, memory modes, selectors) are not part of it: make them again.

        Raises ValueError for a state of another version or another budget.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION:
            found = state.get("version") if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"state must be of version {_VERSION}, got {found!r}")
        if other := set(state) ^ set(self.state_dict()):
            raise ValueError(f"state must be what state_dict returned, with other keys are {sorted(map(str, other))}")
        if state["budget"] != str(self.budget):
            raise ValueError(f"state belongs to a budget of {state['budget']}, this governor has {self.budget}")
        ledger, policy = Ledger(), GovernorPolicy(self.config)
        try:
            ledger.load_state_dict(state["ledger"])
            policy.load_state_dict(state["policy"])
            previous = tuple(float(loss) for loss in state["previous"])
            maybe = {name: None if state[name] is None else amount_of(name, state[name]) for name in _MAYBE}
            known = {name: amount_of(name, state[name]) for name in _KNOWN}
            advantage = None if state["advantage"] is None else Advantage(**state["advantage"])
            drift = tuple(_read_fields(DriftReading, reading) for reading in state["drift"])
            took = {str(name): amount_of("took", value) for name, value in state["took"].items()}
            steps, refreshes = whole_numbers("steps and refreshes", (state["steps"], state["refreshes"]))
            if min(steps, refreshes) < 0 or not isinstance(state["finite"], bool):
                raise ValueError("steps and refreshes must not be negative, and finite must be True or False")
            if not isinstance(state["problem"], str) or not isinstance(state["selector"], str | None):
                raise ValueError("problem and selector must be text")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise ValueError(f"state must be what state_dict returned: {error}") from error
        if self.log is not None and state["decisions"] is not None:
            self.log.truncate_to(state["decisions"])
        # Nothing is changed by a state that cannot be used.
        self.ledger, self.policy = ledger, policy
        self.steps, self._refreshes = steps, refreshes
        self._previous, self._previous_at, self._next_check = previous, known["previous_at"], known["next_check"]
        self._scored_at, self._cooldown_start = maybe["scored_at"], maybe["cooldown_start"]
        self._selector, self._finite, self._problem = state["selector"], state["finite"], state["problem"]
        self._took = took
        self._last_price = self._paid = known["last_price"]
        self._check_cost, self._advantage, self._drift = known["check_cost"], advantage, drift
        self._mark = self._clock()

    @property
    def _plateau_end(self) -> float:
        return self.budget.amount * (1 - self.cooldown)

    @property
    def _end(self) -> float:
        if self._cooldown_start is None:
            return self.budget.amount
        # Stopped early, the anneal takes the same share of the whole; at the end, what is left.
        if self._cooldown_start + self.config.check_every * self.budget.amount >= self._plateau_end:
            return self.budget.amount
        return self._cooldown_start / (1 - self.cooldown)

    def _check(self) -> Decision:
        before, overhead = self._previous, self.ledger.overhead_spent(self.budget.unit)
        cap = math.inf if self.config.overhead_cap is None else self.config.overhead_cap * self.budget.amount
        now: tuple[float, ...] = ()
        if overhead + self._check_cost > cap:
            self._problem = "the overhead cap has no room to evaluate the anchors"
        else:
            now, problem = losses_of(self._anchors())
            self.charge("eval", flops=self._anchor_flops)
            self._check_cost = self.ledger.overhead_spent(self.budget.unit) - overhead
            if not problem and len(now) < 2:
                problem = f"a gain takes at least 2 anchors, and there are {len(now)}"
            elif not problem and before and len(now) != len(before):
                problem = f"the anchors were {len(before)} samples and are {len(now)}"
            elif not problem and self._clusters and len(now) != len(self._clusters):
                problem = f"clusters name the documents of {len(self._clusters)} anchors, and there are {len(now)}"
            if problem:
                self._problem, now = problem, ()
        self._next_check = self.spent + self.config.check_every * self.budget.amount
        before = before if now else ()
        decision = decide_safely(
            self.policy,
            Observation(
                step=self.steps,
                spent=self.spent,
                budget=self.budget.amount,
                unit=self.budget.unit,
                anchors_before=before,
                anchors_now=now,
                spent_before=self._previous_at,
                # Without a selector there is nothing to buy, at any price that can be paid.
                refresh_cost=self.budget.amount,
                cooldown_cost=self.cooldown * self.budget.amount,
                scored_at=self._scored_at,
                refreshes_done=self._refreshes,
                loss_finite=self._finite,
                clusters=self._clusters if now else (),
                overhead=self.ledger.overhead_spent(self.budget.unit),
                price=self.price,
                selectors=[replace(s, cost=max(s.cost, self._took.get(s.name or "", 0.0))) for s in self._selectors],
                selector=self._selector,
                arms=self._arms,
                batch=self._batch,
                memory_modes=self._modes,
                advantage=self._advantage,
                drift=self._drift,
                control=self._control,
                problem=self._problem or None,
                check_cost=self._check_cost,
            ),
        )
        if self.log is not None:
            log_safely(self.log, decision)
        self._previous, self._previous_at = now, self.spent
        self._finite, self._problem, self._advantage, self._drift = True, "", None, ()
        if decision.action is Action.COOLDOWN:
            self._cooldown_start = self.spent
        elif decision.action is Action.SWITCH:  # whatever was selected is left
            self._selector = self._scored_at = None
        return decision
