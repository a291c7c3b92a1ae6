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
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyeff._files import OnlyProcess
from pyeff.data import DataOrder, PackedBatch, label_positions
from pyeff.errors import UserError
from pyeff.governor import Ledger, paired_gain
from pyeff.governor.log import DecisionLog
from pyeff.governor.policy import Action, GovernorPolicy, Observation, UniformPolicy
from pyeff.scoring import PoolScores, cosine_similarity
from pyeff.selection import Selection, select
from pyeff.train import checkpoint as checkpoints
from pyeff.train.config import RunConfig
from pyeff.train.directory import changed_key, end_event, stored_config
from pyeff.train.evaluate import summarize_losses, summed_loss
from pyeff.train.events import Event, EventLog, Observer
from pyeff.train.job import Job
from pyeff.train.model import _quiet
from pyeff.train.state import FirstRefresh, State, Trend, trend

_EXAMPLES = 12


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
        self.model, self.task, self.parameters = job.model, job.task, job.parameters
        self.optimizer, self.ema = job.optimizer, job.ema
        self.order = DataOrder(len(job.task.pool), job.config.seed, lengths=job.task.pool.lengths)
        self.policy = (GovernorPolicy if job.config.policy == "governor" else UniformPolicy)(job.config.governor_config)
        self.state = State()
        self.observers = tuple(observers)

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
        self.job.refuse_small_budget()
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
        pool, budget = self.task.pool, self.meter.budget
        self._emit(
            "start",
            config=self.config.model_dump(mode="json"),
            budget={"amount": budget.amount, "unit": budget.unit, "text": str(budget)},
            policy=self.config.policy,
            model={
                "name": self.config.model,
                "parameters": self.job.loaded.parameters,
                "trainable": sum(parameter.numel() for parameter in self.parameters.values()),
            },
            pool={
                "samples": len(pool),
                "tokens": pool.tokens,
                "by_source": dict(Counter(sample.source for sample in pool.samples)),
                "removed": self.task.removed,
                "dropped": self.task.dropped,
            },
            target={
                "anchors": len(self.task.anchors),
                "holdout": len(self.task.holdout),
                "selection": len(self.task.target),
            },
            estimates=self.job.estimates(),
            memory=self.job.step_shape.to_dict(),
            threads=torch.get_num_threads(),
        )
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
        reserve = self._final_reserve()
        plateau_end = self.meter.budget.amount - self._cooldown_amount() - reserve
        # The first step comes before any check: it was promised to fit.
        due = state.steps > 0 and self.meter.spent >= min(state.next_check, plateau_end)
        if state.phase == "train" and due:
            check = self.meter.price("eval", flops=self.job.flops["anchors"])
            if self.meter.fits(check, reserve=reserve):
                self._check()
            else:
                self._enter_cooldown(early=False)
            return True
        micro_batches, tokens, flops = self.job.next_batch(self.order)
        price = self.meter.price(state.phase, flops=flops, tokens=tokens)
        over = state.phase == "cooldown" and self.meter.spent + price > state.cooldown_end
        if over or not self.meter.fits(price, reserve=reserve):
            if state.steps == 0:
                raise UserError(f"the budget {self.meter.budget} is too small for one step")
            if not state.reason:
                state.reason = "the budget is spent"
            return False
        self._step(micro_batches, price)
        if self.meter.spent >= state.next_checkpoint:
            self._save()
        return True

    def _step(self, micro_batches: Sequence[PackedBatch], price: float) -> None:
        config, state = self.config, self.state
        # What is random in a step (dropout) depends on its number alone, not on what was drawn before.
        torch.manual_seed(config.seed * 2**31 + state.steps)
        self.model.train()
        lr = self._learning_rate(price)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        answers = sum(int(label_positions(batch).targets.numel()) for batch in micro_batches)
        loss = 0.0
        for batch in micro_batches:
            where = label_positions(batch)
            part = summed_loss(self.model, batch, where) / answers
            part.backward()
            loss += float(part.detach())
            self.meter.charge(
                state.phase,
                flops=self.meter.train(batch.tokens, batch.tokens**2, int(where.targets.numel())),
                tokens=batch.tokens,
            )
        grad_norm = float(nn.utils.clip_grad_norm_(self.parameters.values(), config.optimizer.clip))
        if not math.isfinite(loss):
            raise self._not_finite(f"the loss became {loss}")
        if not math.isfinite(grad_norm):
            raise self._not_finite(f"the gradient norm became {grad_norm}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        state.steps += 1
        self.meter.charge(state.phase)
        self._emit(
            "step",
            step=state.steps,
            phase=state.phase,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=sum(batch.tokens for batch in micro_batches),
            fraction=self.meter.spent / self.meter.budget.amount,
        )

    def _learning_rate(self, price: float) -> float:
        settings, state = self.config.optimizer, self.state
        factor = 1.0
        if state.steps < settings.warmup_steps:
            factor = (state.steps + 1) / (settings.warmup_steps + 1)
        if state.phase == "cooldown" and self.config.cooldown > 0:
            # At the middle of the step about to be made: the last one still moves.
            span = state.cooldown_end - state.cooldown_start
            done = (self.meter.spent + price / 2 - state.cooldown_start) / span if span > 0 else 1.0
            factor *= 1 - math.sqrt(min(max(done, 0.0), 1.0))
        return settings.lr * factor

    def _not_finite(self, what: str) -> UserError:
        found = checkpoints.complete_checkpoints(self.out / "checkpoints")
        good = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
        return UserError(
            f"{what} at step {self.state.steps + 1}; {good}; a lower optimizer.lr "
            f"(now {self.config.optimizer.lr:g}) usually helps"
        )

    def _check_interval(self) -> float:
        return self.config.governor_config.check_every * self.meter.budget.amount

    def _check(self) -> None:
        state, meter = self.state, self.meter
        now = self._evaluate("anchors")
        observation = Observation(
            step=state.steps,
            spent=meter.spent,
            budget=meter.budget.amount,
            unit=meter.unit,
            anchors_before=state.anchors,
            anchors_now=now,
            spent_before=state.anchors_at,
            refresh_cost=meter.price("score", flops=self.job.refresh_flops()),
            cooldown_cost=self._cooldown_amount() + self._final_reserve(),
            scored_at=state.scored_at,
            refreshes_done=state.refreshes,
            loss_finite=True,
            overhead=meter.ledger.overhead_spent(meter.unit),
        )
        decision = self.policy.decide(observation)
        self.decisions.append(decision)
        record = decision.to_dict()
        state.decisions[decision.action.value] = state.decisions.get(decision.action.value, 0) + 1
        self._emit("decision", **record)
        state.history.append((observation.spent - state.scoring_spent, summarize_losses(now).loss))
        state.anchors, state.anchors_at = now, observation.spent
        if decision.action is Action.REFRESH:
            self._refresh()
        elif decision.action is Action.COOLDOWN:
            left = meter.budget.amount - meter.spent - observation.cooldown_cost
            self._enter_cooldown(early=left >= self._check_interval())
        state.next_check = meter.spent + self._check_interval()
        if decision.action is Action.REFRESH:
            # The dearest single piece of a run: it is not paid twice.
            self._save()

    def _enter_cooldown(self, *, early: bool) -> None:
        """Anneal over all that is left, or when training is stopped early only over the reserve."""
        state, meter = self.state, self.meter
        left = max(meter.budget.amount - meter.spent - self._final_reserve(), 0.0)
        state.phase = "cooldown"
        state.cooldown_start = meter.spent
        state.cooldown_end = meter.spent + (min(self._cooldown_amount(), left) if early else left)
        state.reason = "training stopped paying" if early else "the budget is spent"

    def _refresh(self) -> None:
        """Score the pool with the averaged weights, select, and train on the selection from here on."""
        config, state = self.config, self.state
        before = self.meter.ledger.entry("score")
        spent_before = self.meter.spent
        pool = self.job.score("pool")
        target = self.job.score("target")
        after = self.meter.ledger.entry("score")
        similarity = cosine_similarity(pool.embeddings, target.embeddings)
        summary = {
            name: {"mean": float(np.nanmean(v)), "min": float(np.nanmin(v)), "max": float(np.nanmax(v))}
            for name, v in {**pool.fields, "target_similarity": similarity.max(axis=1)}.items()
            if not np.isnan(v).all()
        }
        self._emit(
            "score",
            step=state.steps,
            samples=len(self.task.pool),
            flops=after.flops - before.flops,
            seconds=after.seconds - before.seconds,
            summary=summary,
        )
        selection = select(
            pool.fields,
            score=config.selector.score,
            keep=config.selector.keep,
            drop_hardest=config.selector.drop_hardest,
            similarity=similarity,
            seed=config.seed * 2**20 + state.refreshes,
        )
        self.order.set_indices(selection.indices.tolist())
        if state.refreshes == 0:
            before_it = trend(state.history)
            state.first_refresh = FirstRefresh(
                trained=spent_before - state.scoring_spent,
                loss=summarize_losses(state.anchors).loss,
                trend=None if before_it is None else [before_it.rate, before_it.decay],
                cost=self.meter.spent - spent_before,
                anchors=state.anchors,
            )
        state.refreshes += 1
        state.scoring_spent += self.meter.spent - spent_before
        state.scored_at = self.meter.spent
        self._emit(
            "select",
            step=state.steps,
            selector=config.selector.score,
            kept=int(selection.indices.size),
            of=len(self.task.pool),
            by_source=self._by_source(selection),
            examples=self._examples(selection, pool),
        )

    def _by_source(self, selection: Selection) -> dict[str, list[int]]:
        samples = self.task.pool.samples
        total = Counter(sample.source for sample in samples)
        kept = Counter(samples[i].source for i in selection.indices)
        return {source: [kept[source], count] for source, count in sorted(total.items())}

    def _examples(self, selection: Selection, pool: PoolScores) -> list[dict[str, Any]]:
        """Some kept and some left out, spread over the ranking, with what they were scored."""
        kept = set(selection.indices.tolist())
        ranked: list[int] = np.argsort(-selection.values, kind="stable").tolist()
        chosen: list[int] = []
        for members in ([i for i in ranked if i in kept], [i for i in ranked if i not in kept]):
            count = min(_EXAMPLES // 2, len(members))
            chosen += [members[j * (len(members) - 1) // max(count - 1, 1)] for j in range(count)]
        examples = []
        for i in chosen:
            sample = self.task.pool.samples[i]
            examples.append(
                {
                    "id": sample.id,
                    "source": sample.source,
                    "prompt": sample.prompt,
                    "answer": sample.answer,
                    "score": float(selection.values[i]),
                    "nll": float(pool.fields["nll"][i]),
                    "kept": i in kept,
                }
            )
        return examples

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
            self._save_model()
            meter.charge("eval")
        gain = paired_gain(state.holdout_before, holdout)
        before, after = summarize_losses(state.holdout_before), summarize_losses(holdout)
        paid, why = self._selection_paid(anchors)
        sentence = (
            f"{state.steps} steps and {meter.budget} took the holdout loss from {before.loss:.3f} to "
            f"{after.loss:.3f} (gain {gain.mean:.3f} ± {gain.standard_error:.3f})"
        )
        if exact is not None and state.exact_before is not None:
            sentence += (
                f" and exact match from {state.exact_before['correct']} to {exact['correct']} of {exact['total']}"
            )
        ledger = {
            row["field"]: {name: row[name] for name in ("flops", "seconds", "tokens", "joules")}
            for row in meter.ledger.table()
            if row["field"] != "total"
        }
        end = self._emit(
            "end",
            step=state.steps,
            reason=state.reason,
            ledger=ledger,
            holdout={
                "before": before.loss,
                "after": after.loss,
                "gain": gain.mean,
                "standard_error": gain.standard_error,
            },
            exact_match=None
            if exact is None or state.exact_before is None
            else {
                "before": state.exact_before["correct"],
                "after": exact["correct"],
                "total": exact["total"],
            },
            decisions=dict(state.decisions),
            selection_paid=paid,
            sentence=f"{sentence}. {why}",
        )
        self.events.sync()
        result = {**end, "config": self.config.model_dump(mode="json")}
        checkpoints.write_text_atomic(self.out / "result.json", json.dumps(result, indent=1))
        return RunResult(self.out, state.reason, state.steps, end)

    def _selection_paid(self, anchors: list[float]) -> tuple[bool | None, str]:
        """The run's own estimate: gain since the first selection against what the same budget unselected would give.

        What the latter would be is bracketed by two extrapolations of the gains before the selection (see `Trend`),
        over the training done since and the training that scoring displaced. Nothing is claimed inside the
        bracket or within two standard errors of it. Only a second run without selection measures it.
        """
        first = self.state.first_refresh
        if first is None:
            return None, "The pool was never scored, so selection neither cost nor paid anything."
        gain = paired_gain(first.anchors, anchors)
        since = f"Since the selection the anchor loss fell by {gain.mean:.3f} ± {gain.standard_error:.3f}"
        if first.trend is None:
            return None, f"{since}; what it would have done without cannot be told from the few checks before."
        more = self.meter.spent - first.trained
        low, high = Trend(*first.trend).expected(first.trained, more)
        # Rates of neighbouring checks scatter by this factor; and no loss falls below zero.
        scatter = math.exp(self.config.governor_config.trajectory_log_sd)
        low, high = low / scatter, min(high * scatter, first.loss)
        text = f"{since}; going on as before, the same budget without scoring would have given {low:.3f} to {high:.3f}"
        margin = 2 * gain.standard_error
        if low - margin <= gain.mean <= high + margin:
            return None, f"{text}: whether selection paid cannot be told from this run alone."
        paid = gain.mean > high
        return paid, f"{text}: by this estimate selection {'paid' if paid else 'did not pay'}."

    def _save_model(self) -> None:
        """Write the averaged weights (of LoRA: the adapters) where transformers and peft can load them."""
        final = self.out / "model"
        partial = self.out / ".partial-model"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with self.ema.applied(), _quiet():
                self.model.save_pretrained(str(partial))
            self.job.loaded.tokenizer.save_pretrained(str(partial))
        except Exception as error:  # safetensors and the file system raise their own
            shutil.rmtree(partial, ignore_errors=True)
            raise UserError(
                f"the trained model could not be written to {final} ({error}): make room, then --resume {self.out} "
                "goes on from the last checkpoint"
            ) from error
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)

    # ---- events and checkpoints

    def _emit(self, kind: str, **fields: Any) -> Event:
        return self.events.emit(kind, spent=self.meter.spent, **fields)

    def _checkpoint_interval(self) -> float:
        return self.config.checkpoint_every * self.meter.budget.amount

    def _save(self) -> None:
        state, meter = self.state, self.meter
        # The loss would show it one step later, when the last good checkpoint might be gone.
        if not all(math.isfinite(float(p.detach().sum(dtype=torch.float32))) for p in self.parameters.values()):
            raise self._not_finite("a weight became inf or nan")
        state.saved_at = state.steps
        # From here, not from the last one due: after a scoring pass the next is a full interval away.
        state.next_checkpoint = meter.spent + self._checkpoint_interval()
        self.events.sync()
        optimizer, moments = checkpoints.split_tensors(self.optimizer.state_dict())
        groups: dict[str, dict[str, Tensor]] = {
            "weights": {name: parameter.data for name, parameter in self.parameters.items()},
            "ema": self.ema.averages,
            "optimizer": moments,
        }
        content = {
            "format": 1,
            "state": state.to_dict(),
            "ledger": meter.ledger.state_dict(),
            "order": self.order.state_dict(),
            "policy": self.policy.state_dict(),
            "optimizer": optimizer,
            "ema_steps": self.ema.steps,
            "events": self.events.offset,
            "decisions": sum(state.decisions.values()),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        before = meter.ledger.entry(state.phase).seconds
        try:
            size = checkpoints.save_checkpoint(self.out / "checkpoints", state.steps, groups, content)
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
        checkpoints.load_into(path / "weights.safetensors", {name: p.data for name, p in self.parameters.items()})
        checkpoints.load_into(path / "ema.safetensors", self.ema.averages)
        moments = checkpoints.load_tensors(path / "optimizer.safetensors")
        self.optimizer.load_state_dict(checkpoints.join_tensors(content["optimizer"], moments))
        for parameter, moment in self.optimizer.state.items():
            # torch's fused AdamW trusts these shapes, and would write out of bounds.
            for name in ("exp_avg", "exp_avg_sq"):
                if name in moment and (moment[name].shape, moment[name].dtype) != (parameter.shape, parameter.dtype):
                    raise ValueError(
                        f"{name} is {moment[name].dtype} {tuple(moment[name].shape)}, "
                        f"expected {parameter.dtype} {tuple(parameter.shape)}"
                    )
        self.ema.steps = content["ema_steps"]
        self.order.load_state_dict(content["order"])
        self.policy.load_state_dict(content["policy"])
        self.state = State.from_dict(content["state"])
        self.events.truncate_to(content["events"])
        self.decisions.truncate_to(content["decisions"])
        ledger = Ledger()
        ledger.load_state_dict(content["ledger"])
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
