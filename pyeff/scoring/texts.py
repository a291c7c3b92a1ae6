"""Scores that need no model: BM25 from the samples' words, and random numbers."""

from __future__ import annotations

import importlib
import re
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyeff.data.samples import EncodedSample, EncodedSamples, Sample
from pyeff.errors import UserError
from pyeff.scoring.language import is_source, variant
from pyeff.scoring.method import Method, PoolScore
from pyeff.scoring.scores import SampleId, Scores
from pyeff.scoring.work import Digest, ScoredBatch, refuse_bad_ids, texts_fingerprint
from pyeff.selection import per_sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REDUCTIONS = ("max", "mean", "sum")

_WORD = re.compile(r"\w+")


def texts_of(dataset: Any) -> list[Sample] | None:
    """The samples of a data set with their texts: samples, encoded samples or sources; None where there are none."""
    if isinstance(dataset, EncodedSamples):
        return dataset.samples
    given = list(dataset) if isinstance(dataset, list | tuple) else [dataset]
    if given and is_source(given[0]):
        from pyeff.data import load_samples

        return load_samples(given)
    if given and all(isinstance(sample, Sample) for sample in given):
        return given
    return None


def check_targets_given(targets: Any, reduction: str) -> list[Sample]:
    """The target samples of a method, and a known reduction over them."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    found = texts_of(targets)
    if not found:
        raise ValueError("targets must hold at least one sample with its text: Sample, EncodedSamples or a source")
    return found


def fingerprint_of(samples: Sequence[Sample]) -> str:
    """Eight digits that tell sets of target samples apart in a method's name."""
    return Digest().any([(sample.prompt, sample.answer) for sample in samples]).hex()[:8]


class TextMethod(PoolScore):
    """A score of a whole pool at once, without a model."""

    @abstractmethod
    def scores_of(self, samples: list[Sample] | None, count: int) -> NDArray[np.float64]:
        """Scores [N] of the pool; ``samples`` is None where the data set has no texts."""

    def score(  # type: ignore[override]  # the options are named
        self,
        model: nn.Module | None,
        dataset: Any,
        *,
        path: str | Path | None = None,
        batch_size: int = 64,
        batch_tokens: int = 1024,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        checkpoint: str = "",
        resume: bool = True,
        progress: bool = True,
        workers: int = 0,
    ) -> Scores:
        """Score every sample of a data set; ``model``, batches and tokenizer are not used, and may be None.

        Other arguments and errors are those of `ScoreMethod.score`. The whole pool is one batch, so that an interrupted
        scoring begins again; it takes seconds.
        """
        work = _Pool(dataset)
        return self._score(None, work, path=path, seed=seed, checkpoint=checkpoint, resume=resume, progress=progress)


class _Pool:
    """A data set as one batch: its ids and, if it has any, its texts."""

    batches = 1

    def __init__(self, dataset: Any) -> None:
        self.texts = texts_of(dataset)
        ids: list[Any]
        if self.texts is not None:
            ids = [sample.id for sample in self.texts]
        elif isinstance(dataset, list) and dataset and isinstance(dataset[0], EncodedSample):
            ids = [sample.sample_index for sample in dataset]
        else:
            ids = _ids_of(dataset)
        if not ids:
            raise ValueError("the dataset is empty: there is nothing to score")
        self._ids: list[SampleId] = refuse_bad_ids(ids, set())
        self.samples = len(ids)

    def known(self, ids: set[SampleId]) -> None:
        """Ids are checked all at once."""

    def describe(self) -> dict[str, Any]:
        """Fingerprint of ids and texts."""
        digest = Digest().any(self._ids)
        for sample in self.texts or ():
            digest.text(sample.prompt).text(sample.answer)
        described = {"dataset": digest.hex(), "samples": self.samples, "batching": "the whole pool"}
        return described if self.texts is None else {**described, "texts": texts_fingerprint(self.texts)}

    def run(self, method: Method, batches: Sequence[int]) -> Iterator[ScoredBatch]:
        """Score the pool, unless it is."""
        assert isinstance(method, TextMethod)
        for _ in batches:
            scores = method.scores_of(self.texts, self.samples)
            yield ScoredBatch(list(range(self.samples)), self._ids, scores, 0, [1] * self.samples)


def _ids_of(dataset: Any) -> list[Any]:
    """Ids of a data set for classifiers: tensors (x, y) or (ids, x, y), or items that begin with an id."""
    if isinstance(dataset, tuple) and dataset and isinstance(dataset[-1], Tensor):
        return list(dataset[0]) if len(dataset) == 3 else list(range(len(dataset[-1])))
    try:
        count = len(dataset)
    except TypeError as error:
        raise TypeError(f"dataset must have a length, got {type(dataset).__name__}") from error
    first = dataset[0] if count else None
    if isinstance(first, tuple | list) and len(first) == 3:
        return [dataset[place][0] for place in range(count)]
    return list(range(count))


class RandomScore(TextMethod):
    """Independent uniform numbers from the seed: the baseline that costs nothing and that every method must beat.

    Ranking by it is a uniform draw of the pool; several seeds say how much a result varies by chance.

    >>> from pyeff.scoring import RandomScore
    >>> import torch
    >>> data = (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))
    >>> a, b, c = (RandomScore().score(None, data, seed=seed, progress=False) for seed in (0, 0, 1))
    >>> a.values.tolist() == b.values.tolist() != c.values.tolist()
    True
    """

    @property
    def name(self) -> str:
        """Random."""
        return "random"

    def scores_of(self, samples: list[Sample] | None, count: int) -> NDArray[np.float64]:
        """Numbers in [0, 1) from torch's generator, which was seeded for this."""
        return torch.rand(count, dtype=torch.float64).numpy()


class BM25(TextMethod):
    """How much a sample shares the words of target samples: BM25, each target a query over the pool.

        s_ij = sum over words w of target j of idf(w) f_wi (k1 + 1) / (f_wi + k1 (1 - b + b |i| / mean |i|))

    and the ``reduction`` of that over the targets. f_wi is how often word w stands in sample i. A text is a sample's
    prompt and answer; its words are runs of letters and digits in lower case, single ones too, without stemming and
    without a list of stop words, whatever the language. Robertson and Zaragoza, 2009, "The Probabilistic Relevance
    Framework"; Lucene's idf, as the package bm25s computes it (Lù, 2024, arXiv:2407.03618); up to the constant factor
    k1 + 1, which Lucene leaves out.

    Args:
        targets: Samples of the target task, with their texts.
        reduction: "max", "mean" or "sum" over the targets.
        k1: How fast a repeated word stops counting.
        b: How much a long text is marked down.

    Cost: counting words; no FLOPs. Needs bm25s: ``pip install 'pyeff[run]'``.

    >>> from pyeff.data import Sample
    >>> pool = [Sample("a", "one plus one", "two", "sums"), Sample("b", "capital of France", "Paris", "facts")]
    >>> scores = BM25([Sample("t", "plus two", "four", "sums")]).score(None, pool, progress=False)
    >>> bool(scores.values[0] > scores.values[1] == 0)
    True
    """

    def __init__(self, targets: Any, *, reduction: str = "max", k1: float = 1.5, b: float = 0.75) -> None:
        self._targets = check_targets_given(targets, reduction)
        self._reduction, self._k1, self._b = reduction, k1, b

    @property
    def name(self) -> str:
        """BM25 with its parameters, and which targets."""
        what = f"{self._reduction} over targets {fingerprint_of(self._targets)}"
        return variant("BM25", f"Lucene, k1={self._k1:g}, b={self._b:g}", what)

    def scores_of(self, samples: list[Sample] | None, count: int) -> NDArray[np.float64]:
        """Scores [N]."""
        return per_sample(self.matrix(samples), reduction=self._reduction)

    def matrix(self, samples: Any) -> NDArray[np.float32]:
        """Scores float32 [N, M] of samples for each target: what rules for many targets take."""
        pool = texts_of(samples)
        if pool is None:
            raise TypeError("dataset must hold samples with their texts for BM25: Sample, EncodedSamples or sources")
        try:
            bm25s = importlib.import_module("bm25s")
        except ImportError as error:
            raise UserError("BM25 needs the package bm25s: pip install 'pyeff[run]'") from error
        words = [_words(sample) for sample in pool]
        found = np.zeros((len(pool), len(self._targets)), dtype=np.float32)
        if not any(words):
            return found
        index = bm25s.BM25(method="lucene", k1=self._k1, b=self._b)
        index.index(words, show_progress=False)
        known = {word for text in words for word in text}
        for column, target in enumerate(self._targets):
            # bm25s cannot take a query without a word that it knows.
            query = [word for word in _words(target) if word in known]
            if query:
                found[:, column] = index.get_scores(query)
        return found


def _words(sample: Sample) -> list[str]:
    return _WORD.findall(f"{sample.prompt}\n{sample.answer}".lower())
