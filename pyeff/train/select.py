"""Choose a subset of a pool from scores or features on disk: what `pyeff select` does."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pyeff._files import write_atomic, write_text_atomic
from pyeff.data import Sample, load_samples
from pyeff.errors import UserError
from pyeff.scoring import Features, TargetSimilarities, read_features, read_scores
from pyeff.scoring.scores import SampleId, arrow
from pyeff.scoring.store import texts_at
from pyeff.scoring.work import texts_fingerprint
from pyeff.selection import (
    ScoreMatrix,
    SelectionPayBack,
    balanced,
    bids,
    boltzmann,
    by_group,
    facility_location,
    kmeans,
    kmeans_flops,
    per_sample,
    round_robin,
    top_k,
    uniform,
)
from pyeff.selection.matrix import finite_rows
from pyeff.train.select_config import OF_TARGETS, SelectConfig, SelectDataConfig, TrainingCost

SUBSET, REPORT = "subset.parquet", "selection.json"


@dataclass(frozen=True)
class Chosen:
    """A subset, what it was chosen by, and whether that pays.

    ``ids`` in the order chosen. ``undefined`` samples had no finite score; ``left_out`` ones have a holdout's prompt.
    ``flops`` and ``seconds`` are those of the scores or features and of the rule. ``pay_back`` by unit; without the
    training's cost, its ``full`` is 0.
    """

    ids: list[SampleId]
    samples: int
    method: str
    rule: str
    undefined: int
    left_out: int
    flops: int
    seconds: float
    by_source: dict[str, tuple[int, int]]
    pay_back: dict[str, SelectionPayBack]
    priced: bool
    path: Path


def select_samples(config: SelectConfig, *, force: bool = False) -> Chosen:
    """Choose the subset of a configuration and write it to its ``out`` directory.

    ``subset.parquet`` holds rank, index, id and score of the chosen, in the order chosen; with ``data.pool`` their
    texts stand in ``subset.jsonl``, which `pyeff run` reads; ``selection.json`` holds the settings, costs and pay-back.
    Each is written in one step. ``force`` replaces an earlier selection at ``out``.

    Raises `UserError` for whatever cannot be used: no such scores, samples without a score, k larger than the pool,
    scores that are all alike, a target that overlaps the holdout, a pool of other samples.
    """
    _check_out(config.out, force)
    pool = _Pool.read(config)
    allowed = pool.allowed()
    usable = int(np.count_nonzero(allowed & pool.finite))
    n = len(pool.ids)
    k = config.k if config.k is not None else max(1, round(float(config.keep or 0) * n))
    if k > n:
        raise UserError(f"k is {k}, but the pool has {n} samples")
    if k > usable:
        raise UserError(
            f"{k} samples are asked for, but only {usable} of {n} can be chosen: {n - int(pool.finite.sum())} have no "
            f"finite score and {n - int(allowed.sum())} share a prompt with the holdout"
        )
    started = time.perf_counter()
    try:
        rows, values = _apply(config, pool, allowed & pool.finite, k)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error
    seconds = pool.seconds + time.perf_counter() - started
    training = config.training or TrainingCost()
    pay_back = {
        unit: SelectionPayBack(cost, full or 0.0, k / n, training.random_fraction)
        for unit, cost, full in (("flops", float(pool.flops), training.flops), ("seconds", seconds, training.seconds))
    }
    chosen = Chosen(
        ids=[pool.ids[row] for row in rows],
        samples=n,
        method=pool.method,
        rule=config.rule,
        undefined=n - int(pool.finite.sum()),
        left_out=n - int(allowed.sum()),
        flops=pool.flops,
        seconds=seconds,
        by_source=pool.by_source(rows),
        pay_back=pay_back,
        priced=training.flops is not None or training.seconds is not None,
        path=config.out,
    )
    _write(config, pool, chosen, rows, values)
    return chosen


class _Pool:
    """What is known of every sample: ids, values or features, texts, and what finding out cost."""

    ids: list[SampleId]
    index: NDArray[np.int64]
    finite: NDArray[np.bool_]
    values: NDArray[np.float64] | None = None
    features: Features | None = None
    matrix: ScoreMatrix | None = None
    texts: list[Sample] | None = None
    held_out: frozenset[str] = frozenset()
    method: str = ""
    flops: int = 0
    seconds: float = 0.0

    @classmethod
    def read(cls, config: SelectConfig) -> _Pool:
        pool = cls()
        methods = []
        if config.features is not None:
            pool.features = features = read_features(config.features)
            pool.ids, pool.index = features.ids, features.index
            methods.append(features.method)
            pool.flops, pool.seconds = features.flops, features.seconds
            if config.targets is not None:
                targets = read_features(config.targets)
                pool.flops += targets.flops
                pool.seconds += targets.seconds
                started = time.perf_counter()
                try:
                    pool.matrix = TargetSimilarities(
                        features, targets, cosine=config.cosine, center=config.center, device=config.device
                    )
                except (ValueError, RuntimeError) as error:
                    raise UserError(str(error)) from error
                pool.seconds += time.perf_counter() - started
            elif config.rule in OF_TARGETS:
                pool.matrix = features
            started = time.perf_counter()
            if config.scores is None and pool.matrix is not None:
                pool.values = per_sample(pool.matrix, reduction=config.reduction)
            pool.finite = finite_rows(features) if pool.values is None else np.isfinite(pool.values)
            pool.seconds += time.perf_counter() - started
            if pool.matrix is not None:
                pool.flops += (
                    2 * features.shape[1] * len(features) * pool.matrix.shape[1] * (config.targets is not None)
                )
        if config.scores is not None:
            scores = read_scores(config.scores)
            if len(scores) == 0:
                raise UserError(f"{config.scores} holds no scores")
            methods.append(scores.method)
            values = scores.values
            if pool.features is None:
                pool.ids, pool.index = scores.ids, np.array(scores.table["index"].to_numpy(), dtype=np.int64)
                pool.finite = np.isfinite(values)
                pool.values = values
            else:
                where = {name: place for place, name in enumerate(scores.ids)}
                missing = next((name for name in pool.ids if name not in where), None)
                if missing is not None:
                    raise UserError(f"{config.scores} has no score of {missing!r}, of which there are features")
                pool.values = values[[where[name] for name in pool.ids]]
                pool.finite &= np.isfinite(pool.values)
            pool.flops += scores.flops
            pool.seconds += scores.seconds
        if not pool.ids:
            raise UserError(f"{config.features} holds no features")
        pool.method = " and ".join(dict.fromkeys(methods))
        if config.data is not None:
            pool._read_texts(config.data, config.features or config.scores)
        return pool

    def _read_texts(self, data: SelectDataConfig, scored: Path | None) -> None:
        by_id = {sample.id: sample for sample in load_samples(data.pool)}
        missing = next((name for name in self.ids if name not in by_id), None)
        if missing is not None:
            raise UserError(f"data.pool has no sample {missing!r}, which has a score: name the pool that was scored")
        self.texts = [by_id[str(name)] for name in self.ids]
        # Ids may be numbers of rows, which say nothing of what stands in them.
        known = None if scored is None else texts_at(scored)
        if known not in (None, texts_fingerprint([self.texts[row] for row in np.argsort(self.index)])):
            raise UserError(f"data.pool holds other texts than {scored} was made of: score the pool as it is now")
        target = load_samples(data.target) if data.target else []
        holdout = load_samples(data.holdout) if data.holdout else []
        refuse_overlap(target, holdout)
        self.held_out = frozenset(sample.prompt for sample in holdout)

    def allowed(self) -> NDArray[np.bool_]:
        """Samples that share no prompt with the holdout."""
        if self.texts is None:
            return np.ones(len(self.ids), dtype=bool)
        return np.array([sample.prompt not in self.held_out for sample in self.texts])

    def by_source(self, rows: Sequence[int]) -> dict[str, tuple[int, int]]:
        """Chosen and all samples of each source."""
        if self.texts is None:
            return {}
        sources = [sample.source for sample in self.texts]
        kept = [sources[row] for row in rows]
        return {name: (kept.count(name), sources.count(name)) for name in sorted(set(sources))}


def refuse_overlap(target: Sequence[Sample], holdout: Sequence[Sample], *, kind: str = "holdout") -> None:
    """Raise `UserError` where a target's prompt stands in the holdout: choosing by it would be training on it.

    ``kind`` is what the message calls a set that judges.
    """
    prompts = {sample.prompt: sample.id for sample in holdout}
    for sample in target:
        if sample.prompt in prompts:
            raise UserError(
                f"target sample {sample.id!r} has the prompt of {kind} sample {prompts[sample.prompt]!r}, which "
                "would no longer judge the selection"
            )


def _apply(
    config: SelectConfig, pool: _Pool, usable: NDArray[np.bool_], k: int
) -> tuple[list[int], NDArray[np.float64]]:
    """Rows chosen, in order, and the value of every sample."""
    undefined = np.full(len(pool.ids), np.nan)
    values = undefined if pool.values is None else pool.values
    if config.rule == "random":
        values = undefined
        ranked = np.empty(len(pool.ids))
        # Ranks of a draw, so that quotas may take the first of each source.
        ranked[uniform(len(pool.ids), len(pool.ids), seed=config.seed)] = -np.arange(len(pool.ids))
    else:
        ranked = -values if config.order == "smallest" else values
    if config.rule in ("top_k", "boltzmann") and k < usable.sum() and np.ptp(values[usable]) == 0:
        raise UserError(f"all samples have the score {values[usable][0]:g}: there is nothing to choose by")
    ranked = np.where(usable, ranked, np.nan)
    if config.rule == "boltzmann":
        # One draw of the pool, of which each source gives the first: drawn apart by one seed, sources would draw alike.
        drawn = boltzmann(ranked, len(ranked), temperature=config.temperature, seed=config.seed)
        ranked = np.full(len(ranked), np.nan)
        ranked[drawn] = -np.arange(len(drawn))
    if config.rule in ("top_k", "boltzmann", "random"):

        def choose(members: NDArray[np.int64], quota: int) -> NDArray[np.int64]:
            return top_k(ranked[members], quota)

        if config.quotas is None:
            rows = choose(np.arange(len(pool.ids)), k)
        else:
            assert pool.texts is not None
            rows = by_group([s.source for s in pool.texts], k, choose, how=config.quotas, usable=usable)
        return rows.tolist(), values
    assert pool.features is not None
    if config.rule == "kmeans_balanced":
        clusters = min(100, k) if config.clusters is None else config.clusters
        labels = np.where(usable, kmeans(pool.features, clusters, seed=config.seed), -1)
        pool.flops += kmeans_flops(*pool.features.shape, clusters)
        return balanced(
            labels, k, values=ranked if pool.values is not None else None, seed=config.seed
        ).tolist(), values
    matrix = pool.matrix
    if matrix is None:
        drawn = np.flatnonzero(usable)[uniform(int(usable.sum()), config.represented, seed=config.seed)]
        matrix = _similar(config, pool.features, np.sort(drawn))
        pool.flops += 2 * pool.features.shape[1] * matrix.shape[0] * matrix.shape[1]
    matrix = _Without(matrix, ~usable)
    if config.rule in OF_TARGETS:
        rule = round_robin if config.rule == "round_robin" else bids
        if k < usable.sum() and np.ptp(values[usable]) == 0 and pool.values is not None and _alike(matrix):
            raise UserError("all samples have the same scores for every target: there is nothing to choose by")
        return rule(matrix, k).tolist(), values
    method = "lazy" if config.rule == "facility_location" else "stochastic"
    found = facility_location(matrix, k, method=method, epsilon=config.epsilon, seed=config.seed)
    if found.values[-1] == 0:
        raise UserError("no sample is similar to what is to be covered: the features may be all zero")
    return found.indices.tolist(), values


def _similar(config: SelectConfig, features: Features, rows: NDArray[np.int64]) -> ScoreMatrix:
    """Similarities of the pool to some of its own samples."""
    from pyeff.scoring import FeatureStore

    with FeatureStore(None, features.header, dim=features.shape[1], dtype="float32") as store:
        store.append(0, rows.tolist(), features.rows(rows))
        goals = store.features()
    return TargetSimilarities(features, goals, cosine=config.cosine, center=config.center, device=config.device)


def _alike(matrix: ScoreMatrix) -> bool:
    from pyeff.selection.targets import column_moments

    return bool((column_moments(matrix)[1] == 0).all())


class _Without:
    """A matrix in which some rows are undefined, so that no rule takes them."""

    def __init__(self, matrix: ScoreMatrix, without: NDArray[np.bool_]) -> None:
        self._matrix, self._without = matrix, without
        self.shape = matrix.shape

    def blocks(self) -> Any:
        """The blocks, with NaN in those rows."""
        for first, block in self._matrix.blocks():
            yield first, self._masked(block, self._without[first : first + len(block)])

    def rows(self, indices: NDArray[np.int64]) -> Any:
        """The rows, with NaN in those."""
        return self._masked(self._matrix.rows(indices), self._without[indices])

    @staticmethod
    def _masked(block: Any, without: NDArray[np.bool_]) -> Any:
        return np.where(without[:, None], np.nan, block).astype(block.dtype) if without.any() else block


def _check_out(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a directory for the subset")
    if out.is_dir() and any(out.iterdir()):
        if not (out / REPORT).is_file():
            raise UserError(f"{out} holds files but no {REPORT}, so no selection: choose another directory")
        if not force:
            raise UserError(f"{out} holds a selection already: choose another directory, or replace it with --force")


def _write(config: SelectConfig, pool: _Pool, chosen: Chosen, rows: Sequence[int], values: NDArray[np.float64]) -> None:
    pa, parquet = arrow(), arrow("parquet")
    table = pa.table(
        {
            "rank": pa.array(range(len(rows)), pa.int64()),
            "index": pa.array([int(pool.index[row]) for row in rows], pa.int64()),
            "id": pa.array(chosen.ids),
            "score": pa.array([float(values[row]) for row in rows], pa.float64()),
        }
    )
    report = {
        "settings": config.model_dump(mode="json"),
        "method": chosen.method,
        "samples": chosen.samples,
        "chosen": len(rows),
        "undefined": chosen.undefined,
        "left_out": chosen.left_out,
        "by_source": chosen.by_source,
        "flops": chosen.flops,
        "seconds": chosen.seconds,
        "pay_back": {
            unit: {**dataclasses.asdict(each), "runs": each.runs if each.full and each.saved > 0 else None}
            for unit, each in chosen.pay_back.items()
        },
    }
    try:
        config.out.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out / SUBSET, lambda file: parquet.write_table(table, file, write_page_checksum=True))
        if pool.texts is not None:
            lines = [json.dumps(dataclasses.asdict(pool.texts[row]), ensure_ascii=False) for row in rows]
            write_text_atomic(config.out / "subset.jsonl", "".join(f"{line}\n" for line in lines))
        write_text_atomic(config.out / REPORT, json.dumps(report, indent=1))
    except OSError as error:
        raise UserError(f"{config.out} cannot be written to ({error.strerror or error})") from error
