"""What a run begins with and has come to, in words, and the trained model on the disk."""

from __future__ import annotations

import math
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from pyeff.errors import UserError
from pyeff.governor import format_amount, paired_gain
from pyeff.train.config import RunConfig
from pyeff.train.evaluate import summarize_losses
from pyeff.train.job import Job
from pyeff.train.meter import Meter
from pyeff.train.model import _quiet
from pyeff.train.state import FirstRefresh, State, Trend


def save_model(job: Job, out: Path) -> None:
    """Write the averaged weights (of LoRA: the adapters) to ``out/model``, where transformers and peft can load them.

    Raises `UserError` where they cannot be written.
    """
    final, partial = out / "model", out / ".partial-model"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with job.ema.applied(), _quiet():
            job.model.save_pretrained(str(partial))
        job.loaded.tokenizer.save_pretrained(str(partial))
    except Exception as error:  # safetensors and the file system raise their own
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"the trained model could not be written to {final} ({error}): make room, then --resume {out} "
            "goes on from the last checkpoint"
        ) from error
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)


def beginning(job: Job, *, train_flops_per_token: float) -> dict[str, Any]:
    """The fields of a run's ``start`` event: what it was asked, what it found, and what that will cost."""
    task, budget = job.task, job.meter.budget
    return {
        "config": job.config.model_dump(mode="json"),
        "budget": {"amount": budget.amount, "unit": budget.unit, "text": str(budget)},
        "policy": job.config.policy,
        "model": {
            "name": job.config.model,
            "parameters": job.loaded.parameters,
            "trainable": sum(parameter.numel() for parameter in job.parameters.values()),
        },
        "pool": {
            "samples": len(task.pool),
            "tokens": task.pool.tokens,
            "by_source": dict(Counter(sample.source for sample in task.pool.samples)),
            "removed": task.removed,
            "dropped": task.dropped,
        },
        "target": {"anchors": len(task.anchors), "holdout": len(task.holdout), "selection": len(task.target)},
        "estimates": job.estimates(train_flops_per_token),
        "memory": job.step_shape.to_dict(),
        "threads": torch.get_num_threads(),
    }


def ending(
    config: RunConfig,
    state: State,
    meter: Meter,
    *,
    anchors: list[float],
    holdout: list[float],
    exact: dict[str, Any] | None,
) -> dict[str, Any]:
    """The fields of a run's ``end`` event: ledger, what judged it before and after, and that in a sentence."""
    gain = paired_gain(state.holdout_before, holdout)
    before, after = summarize_losses(state.holdout_before), summarize_losses(holdout)
    scatter = config.governor_config.trajectory_log_sd
    paid, why = selection_paid(state.first_refresh, anchors, spent=meter.spent, log_scatter=scatter)
    spent = format_amount(meter.spent, meter.budget.unit)
    sentence = (
        f"{state.steps} steps and {spent} took the holdout loss from {before.loss:.3f} to "
        f"{after.loss:.3f} (gain {gain.mean:.3f} ± {gain.standard_error:.3f})"
    )
    answered = None
    if exact is not None and state.exact_before is not None:
        answered = {"before": state.exact_before["correct"], "after": exact["correct"], "total": exact["total"]}
        sentence += f" and exact match from {answered['before']} to {answered['after']} of {answered['total']}"
    return {
        "ledger": {
            row["field"]: {name: row[name] for name in ("flops", "seconds", "tokens", "joules")}
            for row in meter.ledger.table()
            if row["field"] != "total"
        },
        "holdout": {
            "before": before.loss,
            "after": after.loss,
            "gain": gain.mean,
            "standard_error": gain.standard_error,
        },
        "exact_match": answered,
        "decisions": dict(state.decisions),
        "selection_paid": paid,
        "sentence": f"{sentence}. {why}",
    }


def selection_paid(
    first: FirstRefresh | None, anchors: list[float], *, spent: float, log_scatter: float
) -> tuple[bool | None, str]:
    """A run's own estimate: gain since the first selection against what the same budget unselected would give.

    What the latter would be is bracketed by two extrapolations of the gains before the selection (see `Trend`),
    over the training done since and the training that scoring displaced. Nothing is claimed inside the
    bracket or within two standard errors of it. Only a second run without selection measures it.

    ``spent`` is the whole budget used; rates of neighbouring checks scatter by a factor of exp(``log_scatter``).
    """
    if first is None:
        return None, "The pool was never scored, so selection neither cost nor paid anything."
    gain = paired_gain(first.anchors, anchors)
    moved = "rose" if gain.mean < 0 else "fell"
    since = f"Since the selection the anchor loss {moved} by {abs(gain.mean):.3f} ± {gain.standard_error:.3f}"
    if first.trend is None:
        return None, f"{since}; what it would have done without cannot be told from the few checks before."
    low, high = Trend(*first.trend).expected(first.trained, spent - first.trained)
    scatter = math.exp(log_scatter)
    # No loss falls below zero.
    low, high = low / scatter, min(high * scatter, first.loss)
    text = f"{since}; going on as before, the same budget without scoring would have given {low:.3f} to {high:.3f}"
    margin = 2 * gain.standard_error
    if low - margin <= gain.mean <= high + margin:
        return None, f"{text}: whether selection paid cannot be told from this run alone."
    paid = gain.mean > high
    return paid, f"{text}: by this estimate selection {'paid' if paid else 'did not pay'}."
