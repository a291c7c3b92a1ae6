"""Influence of samples on targets along a training: LESS and TracIn, from sketched gradients at checkpoints."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyeff.data.samples import EncodedSample
from pyeff.errors import UserError
from pyeff.observation.features import Variant
from pyeff.ops import Sketch
from pyeff.scoring.feature_store import FeatureStore
from pyeff.scoring.features import Features
from pyeff.scoring.gradients import GradientSketches
from pyeff.scoring.language import Reduction, check_reduction, variant
from pyeff.scoring.method import PoolScore
from pyeff.scoring.quantised import FeatureType
from pyeff.scoring.scores import Scores
from pyeff.scoring.store import BY_TARGETS, digest_of, refuse_other_scores
from pyeff.scoring.targets import TargetSimilarities, compared_costs, score_table
from pyeff.scoring.texts import REDUCTIONS, fingerprint_of, texts_of
from pyeff.scoring.training_states import INFLUENCE, ROWS, TrainingState, WeightedSum
from pyeff.scoring.work import Digest
from pyeff.selection import per_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class InfluenceMethod(PoolScore):
    """A score by sums of products of sketched gradients over the states of a training.

    With a ``path``, these stay there: the features of pool and targets of every state (``STATE/pool``,
    ``STATE/targets``), the influence of every sample on every target (``influence``, from whose columns rules for many
    targets choose), and the table, ``scores.parquet``.
    """

    label: str
    cosine: bool

    def __init__(
        self,
        targets: Any,
        *,
        sketch: Sketch,
        variant: Variant | None,
        groups: Sequence[Any] | None,
        reduction: str,
        answers: Reduction,
        strict: bool,
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not isinstance(sketch, Sketch):
            raise TypeError(f"sketch must be a pyeff.Sketch, got {type(sketch).__name__}")
        check_reduction(answers)
        texts = texts_of(targets)
        self._targets, self._sketch, self._variant = targets, sketch, variant
        if groups is None and texts is not None:
            groups = [sample.source for sample in texts]
        self._groups = None if groups is None else list(groups)
        self._reduction, self._answers, self._strict = reduction, answers, strict
        self._fingerprint = fingerprint_of(texts) if texts else _fingerprint(targets)

    @property
    @abstractmethod
    def _formula(self) -> list[str]:
        """What sets the method apart, for its name."""

    @property
    def name(self) -> str:
        """The method with its map, sketch, reductions and a fingerprint of its targets."""
        sketch = f"{self._sketch.kind} sketch to {self._sketch.dim}, seed {self._sketch.seed}"
        more = [] if self._answers == "mean" else ["sum over answer tokens"]
        more += [] if self._strict else ["observable parameters"]
        return variant(self.label, *self._formula, sketch, *more, f"targets {self._fingerprint}")

    def score(  # type: ignore[override]  # states of a training for a model, and named options
        self,
        states: Sequence[TrainingState],
        dataset: Any,
        *,
        path: str | Path | None = None,
        batch_size: int = 64,
        batch_tokens: int = 1024,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        resume: bool = True,
        progress: bool = True,
        workers: int = 0,
        dtype: FeatureType = "float16",
    ) -> Scores:
        """Score every sample of a data set by its influence along ``states``.

        Other arguments and errors are those of `ScoreMethod.score`; ``dtype`` is how features are kept, see
        `FeatureStore`. An interrupted scoring goes on with the state and batch where it stopped.

        Raises `ValueError` for no states, two of one name, a state without the optimizer that is needed, a target whose
        gradient is not finite (a sample whose gradient is not gets NaN), or groups that are not one for each target.

        Cost: for each state, a forward and backward pass over pool and targets, and 2 N M D FLOPs of comparing them.
        Kept: N D numbers a state, and N M.
        """
        states = list(states)
        if not states or not all(isinstance(state, TrainingState) for state in states):
            raise ValueError("states must hold at least one pyeff.scoring.TrainingState")
        names = [state.name for state in states]
        if len(set(names)) < len(names):
            raise ValueError(f"states must have different names, got {', '.join(names)}")
        where = None if path is None else Path(path)
        if where is not None and where.is_dir() and not resume and any(where.iterdir()):
            raise UserError(f"{where} holds these scores already: resume, or choose another directory")
        refuse_other_scores(where, BY_TARGETS, self.name)
        options = {
            "dtype": dtype,
            "batch_size": batch_size,
            "batch_tokens": batch_tokens,
            "tokenizer": tokenizer,
            "seed": seed,
            "resume": resume,
            "progress": progress,
            "workers": workers,
        }
        pairs = [self._features(state, dataset, where, options) for state in states]
        found = self._influence(states, pairs, where)
        values = per_sample(found, reduction=self._reduction, groups=self._groups)
        columns = found.columns
        scores = score_table(
            found,
            values,
            columns["flops"].to_numpy(),
            columns["seconds"].to_numpy(),
            method=self.name,
            checkpoint=", ".join(f"{state.name} x {state.learning_rate:g}" for state in states),
        )
        if where is None:
            return scores
        scores.write(where / BY_TARGETS)
        return Scores(scores.table, where)

    def _features(
        self, state: TrainingState, dataset: Any, path: Path | None, options: dict[str, Any]
    ) -> tuple[Features, Features]:
        """Features of pool and targets at one state."""
        model, optimizer = state.load()
        own: dict[str, Any] = {"reduction": self._answers, "strict": self._strict}
        plain = GradientSketches(self._sketch, **own)
        mapped = plain
        if self._variant is not None:
            if optimizer is None:
                raise ValueError(f"{self.label} needs the optimizer of {state.name!r} with its moments, got None")
            mapped = GradientSketches(self._sketch, optimizer=optimizer, variant=self._variant, **own)

        def features(method: GradientSketches, data: Any, name: str) -> Features:
            place = None if path is None else path / state.name / name
            return method.features(model, data, path=place, checkpoint=state.name, **options)

        targets = features(plain, self._targets, "targets")
        if self._groups is not None and len(self._groups) != len(targets):
            raise ValueError(f"groups must be one for each of {len(targets)} targets, got {len(self._groups)}")
        # Before the pool is paid for: such a target would be found at the end.
        for first, rows in targets.blocks():
            bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
            if bad.size:
                raise ValueError(f"the gradient of target {targets.ids[first + int(bad[0])]!r} is not finite")
        return features(mapped, dataset, "pool"), targets

    def _influence(
        self, states: Sequence[TrainingState], pairs: Sequence[tuple[Features, Features]], path: Path | None
    ) -> Features:
        """The influence of every sample on every target, columns in the order of the targets."""
        pool, targets = pairs[0]
        places = [_places(pool, other) for other, _ in pairs]
        columns = np.argsort(targets.index, kind="stable")
        matrices = [TargetSimilarities(*pair, cosine=self.cosine) for pair in pairs]
        total = WeightedSum(matrices, [state.learning_rate for state in states], places)
        flops, seconds = np.zeros(len(pool), dtype=np.int64), np.zeros(len(pool))
        for pair, place in zip(pairs, places, strict=True):
            more, took = compared_costs(*pair)
            flops, seconds = flops + more[place], seconds + took[place]
        header = {
            "method": self.name,
            "seed": pool.header.get("seed", 0),
            "samples": len(pool),
            "targets": [targets.ids[column] for column in columns],
            "groups": self._groups,
            "states": [
                [state.name, state.learning_rate, *(digest_of(each.header) for each in pair)]
                for state, pair in zip(states, pairs, strict=True)
            ],
        }
        if "texts" in pool.header:
            header["texts"] = pool.header["texts"]
        where = None if path is None else path / INFLUENCE
        ids, index = pool.ids, pool.index
        with FeatureStore(where, header, dim=len(targets), dtype="float32") as store:
            for number, first in enumerate(range(0, len(pool), ROWS)):
                if number in store.done:
                    continue
                started = time.perf_counter()
                some = np.arange(first, min(first + ROWS, len(pool)))
                rows = total.rows(some)[:, columns]
                took_each = (time.perf_counter() - started) / len(some)
                store.append(
                    number,
                    [ids[row] for row in some],
                    rows,
                    index=index[some].tolist(),
                    flops=flops[some].tolist(),
                    seconds=(seconds[some] + took_each).tolist(),
                )
            return store.features()


class LESS(InfluenceMethod):
    """LESS: how well the Adam step that a sample asks for lines up with the gradients of target samples.

        score_i = max over subtasks k of  sum over states c of  lr_c  mean over targets j in k of
                  cos(S Gamma_c(g_c(i)), S g_c(j))

    Gamma is AdamW's step after the sample's gradient alone, from the state's moments; targets' gradients are plain, as
    Adam's momentum says nothing of them. The paper divides the mean of a subtask's gradients by its norm; the mean of
    cosines is what its published code takes. Its code puts eps inside the root and corrects no bias: not here. Xia et
    al., 2024, "LESS: Selecting Influential Data for Targeted Instruction Tuning", arXiv:2402.04333. The paper warms up
    LoRA for four epochs on 5 % of the pool and takes the state after each.

    Args:
        targets: Samples of the target task: `pyeff.data.EncodedSamples`; `Sample`s with a ``tokenizer`` given to
            `score`; for a classifier, tensors (x, y).
        sketch: 8192 numbers in the paper.
        variant: "adamw", which needs every weight to be used by one layer (adapters, or an untied head), or
            "adamw-frozen", linear in the gradient and without momentum.
        groups: The subtask of each target; without it the targets' ``source``, where they have one.
        reduction: "max", "mean" or "sum" over subtasks.
        answers: "mean" or "sum" of the losses of a sample's answer tokens.
        strict: If False, parameters that cannot be observed are left out.

    >>> import torch, pyeff
    >>> from pyeff.scoring import LESS, TrainingState
    >>> model = torch.nn.Linear(3, 2)
    >>> x, y = torch.randn(8, 3), torch.arange(8) % 2
    >>> adamw = torch.optim.AdamW(model.parameters())
    >>> torch.nn.functional.cross_entropy(model(x), y).backward()
    >>> adamw.step()
    >>> states = [TrainingState("epoch-1", 1e-3, lambda: (model, adamw))]
    >>> len(LESS((x[:2], y[:2]), sketch=pyeff.Sketch(64)).score(states, (x, y), progress=False))
    8
    """

    label = "LESS"
    cosine = True

    def __init__(
        self,
        targets: Any,
        *,
        sketch: Sketch | None = None,
        variant: Variant = "adamw",
        groups: Sequence[Any] | None = None,
        reduction: str = "max",
        answers: Reduction = "mean",
        strict: bool = True,
    ) -> None:
        if variant not in ("adamw", "adamw-frozen"):
            raise ValueError(f"variant must be 'adamw' or 'adamw-frozen', got {variant!r}")
        super().__init__(
            targets,
            sketch=Sketch(8192) if sketch is None else sketch,
            variant=variant,
            groups=groups,
            reduction=reduction,
            answers=answers,
            strict=strict,
        )

    @property
    def _formula(self) -> list[str]:
        count = 0 if self._groups is None else len(set(map(str, self._groups)))
        subtasks = [f"{count} subtask{'s' if count > 1 else ''}"] if count else []
        return [str(self._variant), "mean cosine in a subtask", *subtasks, f"{self._reduction} over them"]


class TracIn(InfluenceMethod):
    """TracIn, by checkpoints: how much steps along a sample's gradient would have lowered the loss of target samples.

        score_i = mean over targets j of  sum over states c of  lr_c <S g_c(i), S g_c(j)>

    the first order of plain gradient descent, whatever the training's optimizer. Products, not cosines: large gradients
    (short answers, wrong labels) lead. In expectation over sketches the product of the gradients themselves.
    Pruthi et al., 2020, "Estimating Training Data Influence by Tracing Gradient Descent", arXiv:2002.08484, TracInCP.

    Arguments are those of `LESS`; states need no optimizer. ``groups`` first averages within groups of targets.
    """

    label = "TracIn"
    cosine = False

    def __init__(
        self,
        targets: Any,
        *,
        sketch: Sketch | None = None,
        groups: Sequence[Any] | None = None,
        reduction: str = "mean",
        answers: Reduction = "mean",
        strict: bool = True,
    ) -> None:
        super().__init__(
            targets,
            sketch=Sketch(8192) if sketch is None else sketch,
            variant=None,
            groups=groups,
            reduction=reduction,
            answers=answers,
            strict=strict,
        )
        if groups is None:  # every target counts alike
            self._groups = None

    @property
    def _formula(self) -> list[str]:
        return ["checkpoints", f"{self._reduction} over {'targets' if self._groups is None else 'groups of targets'}"]


def _places(pool: Features, other: Features) -> NDArray[np.int64]:
    """Rows of ``other`` in the order of ``pool``."""
    at = {name: row for row, name in enumerate(other.ids)}
    if len(at) != len(pool) or any(name not in at for name in pool.ids):
        raise ValueError("states must be compared by features of the same samples")
    return np.array([at[name] for name in pool.ids], dtype=np.int64)


def _fingerprint(targets: Any) -> str:
    """Eight digits that tell targets without texts apart."""
    if isinstance(targets, list | tuple) and targets and isinstance(targets[0], EncodedSample):
        return Digest().any([(each.prompt_length, *each.ids) for each in targets]).hex()[:8]
    return Digest().any(targets).hex()[:8]
