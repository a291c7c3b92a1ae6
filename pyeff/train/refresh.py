"""Score the pool with the averaged weights, select, and say what was selected."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from pyeff.scoring import PoolScores, cosine_similarity
from pyeff.selection import Selection, select
from pyeff.train.evaluate import summarize_losses
from pyeff.train.state import FirstRefresh, trend

if TYPE_CHECKING:
    from pyeff.data import EncodedSamples
    from pyeff.train.course import Course

_EXAMPLES = 12


def refresh(course: Course, *, checks_left: int, emit: Callable[..., Any]) -> None:
    """Let a run train on a new selection from here on; ``emit`` is given the events of it.

    ``checks_left`` is how many checks the rest of the budget has room for.
    """
    job, state = course.job, course.state
    config, meter = job.config, job.meter
    before, spent_before = meter.ledger.entry("score"), meter.spent
    pool = job.score("pool")
    target = job.score("target")
    after = meter.ledger.entry("score")
    similarity = cosine_similarity(pool.embeddings, target.embeddings)
    emit(
        "score",
        step=state.steps,
        samples=len(job.task.pool),
        flops=after.flops - before.flops,
        seconds=after.seconds - before.seconds,
        summary={
            name: {"mean": float(np.nanmean(v)), "min": float(np.nanmin(v)), "max": float(np.nanmax(v))}
            for name, v in {**pool.fields, "target_similarity": similarity.max(axis=1)}.items()
            if not np.isnan(v).all()
        },
    )
    selection = select(
        pool.fields,
        score=config.selector.score,
        keep=config.selector.keep,
        drop_hardest=config.selector.drop_hardest,
        similarity=similarity,
        seed=config.seed * 2**20 + state.refreshes,
    )
    course.order.set_indices(selection.indices.tolist())
    if state.refreshes == 0:
        before_it = trend(state.history)
        state.first_refresh = FirstRefresh(
            trained=spent_before - state.scoring_spent,
            loss=summarize_losses(state.anchors).loss,
            trend=None if before_it is None else [before_it.rate, before_it.decay],
            cost=meter.spent - spent_before,
            anchors=state.anchors,
        )
    state.refreshes += 1
    state.scoring_spent += meter.spent - spent_before
    state.scored_at = meter.spent
    course.control.selection_made(checks_left=checks_left)
    emit(
        "select",
        step=state.steps,
        selector=config.selector.score,
        kept=int(selection.indices.size),
        of=len(job.task.pool),
        by_source=_by_source(job.task.pool, selection),
        examples=_examples(job.task.pool, selection, pool),
        control=course.control.description,
    )


def _by_source(pool: EncodedSamples, selection: Selection) -> dict[str, list[int]]:
    total = Counter(sample.source for sample in pool.samples)
    kept = Counter(pool.samples[i].source for i in selection.indices)
    return {source: [kept[source], count] for source, count in sorted(total.items())}


def _examples(pool: EncodedSamples, selection: Selection, scores: PoolScores) -> list[dict[str, Any]]:
    """Some kept and some left out, spread over the ranking, with what they were scored."""
    kept = set(selection.indices.tolist())
    ranked: list[int] = np.argsort(-selection.values, kind="stable").tolist()
    chosen: list[int] = []
    for members in ([i for i in ranked if i in kept], [i for i in ranked if i not in kept]):
        count = min(_EXAMPLES // 2, len(members))
        chosen += [members[j * (len(members) - 1) // max(count - 1, 1)] for j in range(count)]
    examples = []
    for i in chosen:
        sample = pool.samples[i]
        examples.append(
            {
                "id": sample.id,
                "source": sample.source,
                "prompt": sample.prompt,
                "answer": sample.answer,
                "score": float(selection.values[i]),
                "nll": float(scores.fields["nll"][i]),
                "kept": i in kept,
            }
        )
    return examples
