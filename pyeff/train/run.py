"""The training loop: spend a budget, look at the anchors every so often, and do what the policy decides.

    start    read, check, price everything; evaluate the model as it is
    train    constant rate; at each check evaluate the anchors and ask the policy:
             CONTINUE, REFRESH (score the pool, select, train on the selection) or COOLDOWN
    cooldown rate to zero as 1 - sqrt(progress) over what is left but for the final evaluation
    end      evaluate, save the averaged weights, report

Every random choice is a function of (seed, step) or (seed, epoch), every price a formula, and every state is
in the checkpoint: with a FLOP or token budget and the same number of threads, a run that was killed at any
moment and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyeff._files import OnlyProcess
from pyeff.errors import UserError
from pyeff.governor import Ledger
from pyeff.governor.failsafe import decide_safely
from pyeff.governor.log import DecisionLog
from pyeff.governor.policy import Action, Observation
from pyeff.train import checkpoint as checkpoints
from pyeff.train.batches import StepBatch
from pyeff.train.config import RunConfig
from pyeff.train.course import Course
from pyeff.train.directory import changed_key, end_event, stored_config
from pyeff.train.evaluate import summarize_losses
from pyeff.train.events import Event, EventLog, Observer
from pyeff.train.job import Job
from pyeff.train.refresh import refresh
from pyeff.train.result import beginning, ending, save_model
from pyeff.train.schedule import learning_rate
from pyeff.train.state import State


@dataclass(frozen=True)
class RunResult:
    """A finished run: where it is, why it ended, and the ``end`` event that says the rest."""

    out: Path
    reason: str
    steps: int
    end: Event


def train_run(
    config: RunConfig | None = None, *, observers: Iterable[Observer] = (), resume: Path | None = None
) -> RunResult:
    """Train a model under a budget and write everything that happened to ``config.out``.

    ``resume`` is the directory of a run that was interrupted: it goes on from the newest complete
    checkpoint with the configuration it was started with (``config`` must be that or None). A finished run
    is not touched. ``observers`` are called with each event (see `pyeff.train.events`).

    The budget counts from the first evaluation: loading the model and reading the data are not charged. Before
    each step, scoring pass and evaluation its price is known; with a FLOP or token budget nothing is begun
    that does not fit, with a time budget the last one may overrun by what it takes longer than expected.

    Raises `UserError` for everything a user can put right, before any budget is spent where it can be known,
    and when a loss is not finite (the last good checkpoint is named).
    """
    if resume is not None:
        resume = Path(resume)
        stored = stored_config(resume)
        if config is not None and (changed := changed_key(config, stored)):
            raise UserError(f"{resume} was started with another {changed}: a run resumes with its own configuration")
        config = stored
        out = resume
    elif config is None:
        raise ValueError("config must be given unless a run is resumed")
    else:
        out = config.out
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a null byte, half a surrogate pair
        raise UserError(f"the directory {str(out)!r} cannot be made: {error}") from error
    try:
        with OnlyProcess(out):
            if resume is not None and (end := end_event(out)) is not None:
                return RunResult(out, end["reason"], end["step"], end)
            if resume is None and (out / "config.yaml").exists():
                raise UserError(
                    f"{out} already holds a run: continue it with --resume {out}, or choose another directory"
                )
            return _Run(Job(config, out), observers).go(resume=resume is not None)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk that holds {out} is full: free some space, then continue with --resume {out}"
            ) from error
        if error.errno is None:
            raise
        raise UserError(f"{error.filename or out} cannot be read or written: {error.strerror}") from error


class _Run:
    """One run from its configuration to its end."""

    def __init__(self, job: Job, observers: Iterable[Observer]) -> None:
        self.job, self.config, self.out, self.meter = job, job.config, job.out, job.meter
        self.course = Course(job)
        self.observers = tuple(observers)

    @property
    def state(self) -> State:
        """Replaced when a checkpoint is taken up."""
        return self.course.state

    def _final_reserve(self) -> float:
        """What the evaluations at the end will cost, and with a time budget the writing of the result."""
        if self.meter.unit == "seconds":
            # The same was done before the first step; a checkpoint and the model are written besides.
            return self.state.evaluation_seconds + 2 * self.state.checkpoint_seconds
        return self.meter.price("eval", flops=self.job.evaluation_flops())

    def _cooldown_amount(self) -> float:
        return self.config.cooldown * self.meter.budget.amount

    # ---- the course of a run

    def go(self, *, resume: bool) -> RunResult:
        """Run to the end; the directory is this process's alone."""
        checkpoints.remove_partial(self.out / "checkpoints")
        checkpoints.remove_partial(self.out)
        flops, tokens = self.course.first_price()
        self.job.refuse_small_budget(flops=flops, tokens=tokens)
        self.course.batches.check()
        self.job.refuse_full_disk()
        self.events = EventLog(self.out / "events.jsonl", self.observers)
        self.decisions = DecisionLog(self.out / "decisions.jsonl")
        try:
            found = checkpoints.newest_checkpoint(self.out / "checkpoints") if resume else None
            if found is not None:
                self._restore_or_refuse(*found)
            else:
                self._begin(resumed=resume)
            while self._next():
                pass
            return self._finish()
        finally:
            self.events.close()

    def _begin(self, *, resumed: bool) -> None:
        checkpoints.write_text_atomic(self.out / "config.yaml", self.config.to_yaml())
        self.events.truncate_to(0)
        self.decisions.truncate_to(0)
        if resumed:
            self.meter.lost_since(Ledger())
        self._emit("start", **beginning(self.job, train_flops_per_token=self.course.batches.flops_per_token()))
        if resumed:
            self._emit("resume", step=0, discarded_seconds=self.meter.ledger.entry("discarded").seconds)
        self.meter.start_clock()
        self.state.holdout_before = self._evaluate("holdout")
        self.state.anchors = self._evaluate("anchors")
        self.state.exact_before = self._exact_match("start")
        self.state.evaluation_seconds = self.meter.ledger.entry("eval").seconds
        self.state.anchors_at = self.meter.spent
        self.state.history.append((self.meter.spent, summarize_losses(self.state.anchors).loss))
        self.state.next_check = self.meter.spent + self._check_interval()
        self.state.next_checkpoint = self._checkpoint_interval()
        if self.meter.unit == "seconds" and not self.meter.fits(0.0, reserve=self._final_reserve()):
            raise UserError(
                f"the budget {self.meter.budget} is too small: evaluating before training took "
                f"{self.meter.spent:.1f} s and is needed again at the end"
            )

    def _next(self) -> bool:
        """Do the next thing that is due; False when training is over."""
        state = self.state
        if state.trained_out:
            return False
        reserve = self._final_reserve()
        plateau_end = self.meter.budget.amount - self._cooldown_amount() - reserve
        # The first step comes before any check: it was promised to fit.
        due = state.steps > 0 and self.meter.spent >= min(state.next_check, plateau_end)
        if state.phase == "train" and due:
            if self.meter.fits(self._check_price(), reserve=reserve):
                self._check()
            else:
                self._enter_cooldown(early=False)
            return True
        order = self.course.control.order_of(state.steps, self.course.order)
        batch = self.course.batches.draw(order, state.steps)
        price = self.meter.price(state.phase, flops=batch.flops, tokens=batch.tokens)
        over = state.phase == "cooldown" and self.meter.spent + price > state.cooldown_end
        if over or not self.meter.fits(price, reserve=reserve):
            if state.steps == 0:
                raise UserError(f"the budget {self.meter.budget} is too small for one step")
            if not state.reason:
                state.reason = "the budget is spent"
            state.trained_out = True
            return False
        self._step(batch, price)
        if self.meter.spent >= state.next_checkpoint:
            self._save()
        return True

    def _step(self, batch: StepBatch, price: float) -> None:
        config, state, job, batches = self.config, self.state, self.job, self.course.batches
        # What is random in a step (dropout) depends on its number alone, not on what was drawn before.
        torch.manual_seed(config.seed * 2**31 + state.steps)
        job.model.train()
        lr = learning_rate(config, state, spent=self.meter.spent, price=price)
        for group in job.optimizer.param_groups:
            group["lr"] = lr
        chosen_for = batches.tally.spent(self.meter.unit)
        done = batches.backward(batch, step=state.steps, phase=state.phase, lr=lr)
        if state.scored_at is not None:
            self.course.control.measure(state.steps, age=self.meter.spent - state.scored_at)
        grad_norm = float(nn.utils.clip_grad_norm_(job.parameters.values(), config.optimizer.clip))
        if not math.isfinite(done.loss):
            raise self._not_finite(f"the loss became {done.loss}")
        if not math.isfinite(grad_norm):
            raise self._not_finite(f"the gradient norm became {grad_norm}")
        job.optimizer.step()
        job.optimizer.zero_grad(set_to_none=True)
        job.ema.update()
        state.steps += 1
        self.meter.charge(state.phase)
        chosen = {}
        if done.chosen is not None:
            scored = batches.tally.spent(self.meter.unit) - chosen_for
            chosen = {"kept": len(done.chosen), "candidates": len(batch.drawn), "scored": scored}
        self._emit(
            "step",
            step=state.steps,
            phase=state.phase,
            loss=done.loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=done.tokens,
            fraction=self.meter.spent / self.meter.budget.amount,
            **chosen,
        )

    def _not_finite(self, what: str) -> UserError:
        found = checkpoints.complete_checkpoints(self.out / "checkpoints")
        good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return UserError(
            f"{what} at step {self.state.steps + 1}; {good}; a lower optimizer.lr "
            f"(now {self.config.optimizer.lr:g}) usually helps"
        )

    def _check_price(self) -> float:
        return self.meter.price("eval", flops=self.job.flops["anchors"]) + self.course.control.price

    def _overhead(self) -> float:
        # Choosing within batches is part of what a step costs, and no overhead that the policy could save.
        unit = self.meter.unit
        return max(self.meter.ledger.overhead_spent(unit) - self.course.batches.tally.spent(unit), 0.0)

    def _checks_left(self, cooldown: float) -> int:
        return math.ceil(max(self.meter.budget.amount - cooldown - self.meter.spent, 0.0) / self._check_interval())

    def _check_interval(self) -> float:
        return self.config.governor_config.check_every * self.meter.budget.amount

    def _check(self) -> None:
        state, meter = self.state, self.meter
        cap = self.config.governor_config.overhead_cap
        # As `pyeff.Governor` does: what has no room is left out, and the schedule goes on.
        seen = cap is None or self._overhead() + self._check_price() <= cap * meter.budget.amount
        now = self._evaluate("anchors") if seen else []
        drift = self.course.control.look() if seen else None
        cooldown = self._cooldown_amount() + self._final_reserve()
        checks_left = self._checks_left(cooldown)
        observation = Observation(
            step=state.steps,
            spent=meter.spent,
            budget=meter.budget.amount,
            unit=meter.unit,
            anchors_before=state.anchors if seen else (),
            anchors_now=now,
            spent_before=state.anchors_at,
            refresh_cost=meter.price("score", flops=self.job.refresh_flops()),
            cooldown_cost=cooldown,
            scored_at=state.scored_at,
            refreshes_done=state.refreshes,
            loss_finite=True,
            overhead=self._overhead(),
            check_cost=self._check_price(),
            price=self.config.parsed_price,
            control=not self.course.control.hindrance(checks_left=checks_left),
            control_cost=self.course.control.cost(checks_left=checks_left),
            advantage=self.course.control.reading(),
            drift=() if drift is None else (drift,),
            problem=None if seen else "the overhead cap has no room to evaluate the anchors",
        )
        decision = decide_safely(self.course.policy, observation)
        self.decisions.append(decision)
        record = decision.to_dict()
        state.decisions[decision.action.value] = state.decisions.get(decision.action.value, 0) + 1
        self._emit("decision", **record, **self._batch_selection())
        if seen:
            state.history.append((observation.spent - state.scoring_spent, summarize_losses(now).loss))
        state.anchors, state.anchors_at = now, observation.spent
        if decision.action is Action.REFRESH:
            refresh(self.course, checks_left=self._checks_left(cooldown), emit=self._emit)
        elif decision.action is Action.COOLDOWN:
            left = meter.budget.amount - meter.spent - cooldown
            self._enter_cooldown(early=left >= self._check_interval())
        state.next_check = meter.spent + self._check_interval()
        if decision.action is Action.REFRESH:
            # The dearest single piece of a run: it is not paid twice.
            self._save()

    def _batch_selection(self) -> dict[str, Any]:
        report = self.course.batches.report()
        return {} if report is None else {"batch_selection": report}

    def _enter_cooldown(self, *, early: bool) -> None:
        """Anneal over all that is left, or when training is stopped early only over the reserve."""
        state, meter = self.state, self.meter
        left = max(meter.budget.amount - meter.spent - self._final_reserve(), 0.0)
        state.phase = "cooldown"
        state.cooldown_start = meter.spent
        state.cooldown_end = meter.spent + (min(self._cooldown_amount(), left) if early else left)
        stopped = "the anchors got worse" if self.config.price is None else "training stopped paying"
        state.reason = stopped if early else "the budget is spent"

    # ---- evaluation

    def _evaluate(self, name: str) -> list[float]:
        losses = self.job.losses(name)
        summary = summarize_losses(losses)
        self._emit(
            "evaluate",
            step=self.state.steps,
            set=name,
            weights="ema",
            loss=summary.loss,
            standard_error=summary.standard_error,
            losses=losses,
        )
        return losses

    def _exact_match(self, when: str) -> dict[str, Any] | None:
        result = self.job.exact_match()
        if result is not None:
            self._emit("exact_match", step=self.state.steps, when=when, **result)
        return result

    # ---- the end

    def _finish(self) -> RunResult:
        state, meter = self.state, self.meter
        if state.saved_at != state.steps:
            self._save()
        anchors = self._evaluate("anchors")
        holdout = self._evaluate("holdout")
        exact = self._exact_match("end")
        if self.config.save_model:
            save_model(self.job, self.out)
            meter.charge("eval")
        fields = ending(self.config, state, meter, anchors=anchors, holdout=holdout, exact=exact)
        end = self._emit("end", step=state.steps, reason=state.reason, **fields, **self._batch_selection())
        self.events.sync()
        result = {**end, "config": self.config.model_dump(mode="json")}
        checkpoints.write_text_atomic(self.out / "result.json", json.dumps(result, indent=1))
        return RunResult(self.out, state.reason, state.steps, end)

    # ---- events and checkpoints

    def _emit(self, kind: str, **fields: Any) -> Event:
        return self.events.emit(kind, spent=self.meter.spent, **fields)

    def _checkpoint_interval(self) -> float:
        return self.config.checkpoint_every * self.meter.budget.amount

    def _save(self) -> None:
        state, meter = self.state, self.meter
        # The loss would show it one step later, when the last good checkpoint might be gone.
        if not self.course.is_finite():
            raise self._not_finite("a weight became inf or nan")
        state.saved_at = state.steps
        # From here, not from the last one due: after a scoring pass the next is a full interval away.
        state.next_checkpoint = meter.spent + self._checkpoint_interval()
        self.events.sync()
        before = meter.ledger.entry(state.phase).seconds
        try:
            size = self.course.save(self.out / "checkpoints", events=self.events.offset)
        except checkpoints.NoSpaceError as error:
            self._emit("warning", message=f"no checkpoint at step {state.steps}: {error}")
            return
        meter.charge(state.phase)
        state.checkpoint_seconds = max(state.checkpoint_seconds, meter.ledger.entry(state.phase).seconds - before)
        self._emit("checkpoint", step=state.steps, bytes=size)

    def _restore_or_refuse(self, path: Path, content: dict[str, Any]) -> None:
        from safetensors import SafetensorError

        try:
            self._restore(path, content)
        except UserError:
            raise
        except (SafetensorError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise UserError(
                f"the checkpoint {path} does not fit this run or is damaged ({type(error).__name__}: {error}); "
                "delete it to go on from the one before"
            ) from error

    def _restore(self, path: Path, content: dict[str, Any]) -> None:
        ledger = self.course.load(path, content)
        self.events.truncate_to(content["events"])
        self.decisions.truncate_to(content["decisions"])
        lost_before = ledger.entry("discarded").seconds
        self.meter.lost_since(ledger)
        lost = self.meter.ledger.entry("discarded").seconds - lost_before
        self._emit("resume", step=self.state.steps, discarded_seconds=lost)
        if content["threads"] != torch.get_num_threads():
            self._emit(
                "warning",
                message=f"the run used {content['threads']} threads before and {torch.get_num_threads()} now: "
                "it goes on correctly, but not bit for bit",
            )
