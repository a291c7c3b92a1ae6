"""What every method shares: batches, resuming, cost, progress. A method says what a batch's scores or features are."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pyeff.errors import UserError
from pyeff.scoring.classification import Classification
from pyeff.scoring.feature_store import FeatureStore
from pyeff.scoring.features import Features
from pyeff.scoring.language import BatchWork, LanguageScoring, is_language_data
from pyeff.scoring.quantised import FeatureType
from pyeff.scoring.scores import Scores, average, shares
from pyeff.scoring.store import AVERAGE, ScoreStore, refuse_other_scores
from pyeff.scoring.work import ScoredBatch, Work, device_of, evaluating, model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class Method(ABC):
    """A way to read samples into a store that can be resumed."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The method with its variant, as it stands in the table: equal names must mean equal formulas."""

    def settings(self, model: nn.Module | None, *, stored: bool) -> dict[str, Any]:
        """What else a store's header must say for two results to be comparable; JSON. ``stored``: with fingerprints."""
        return {}

    def _header(
        self, model: nn.Module | None, work: Work, *, seed: int, checkpoint: str, stored: bool
    ) -> dict[str, Any]:
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise TypeError(f"seed must be an int, got {type(seed).__name__}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed must be in [0, 2**63), got {seed}")
        if not isinstance(checkpoint, str):
            raise TypeError(f"checkpoint must be a str, got {type(checkpoint).__name__}")
        header: dict[str, Any] = {"method": self.name, "seed": seed, "checkpoint": checkpoint}
        header |= self.settings(model, stored=stored)
        if stored:
            with _seeding(model) as reseed:
                reseed(seed, 0)
                header |= {"model": "" if model is None else model_fingerprint(model), **work.describe()}
        return header

    def _read_missing(
        self,
        model: nn.Module | None,
        work: Work,
        store: ScoreStore | FeatureStore,
        append: Callable[[int, ScoredBatch, float], None],
        *,
        seed: int,
        progress: bool,
    ) -> None:
        """Read the batches that the store has not, and hand each with its seconds to ``append``."""
        missing = [batch for batch in range(work.batches) if batch not in store.done]
        work.known(store.ids)
        mode = nullcontext() if model is None else evaluating(model)
        with mode, _seeding(model) as reseed, _bar(progress, work, len(store), self.name) as advance:
            batches = work.run(self, missing)
            for number in missing:
                reseed(seed, number)
                started = time.perf_counter()
                scored = next(batches)
                append(number, scored, time.perf_counter() - started)
                advance(len(scored.index))


class PoolScore(Method):
    """A way to say what each sample of a pool is worth."""

    @abstractmethod
    def score(self, model: Any, dataset: Any, **options: Any) -> Scores:
        """Score every sample of a data set."""

    def score_all(
        self,
        models: Mapping[str, nn.Module | Callable[[], nn.Module]],
        dataset: Any,
        *,
        path: str | Path | None = None,
        **options: Any,
    ) -> Scores:
        """Score a data set by several checkpoints or initialisations and return the `average`.

        Args:
            models: Name of each state of the model -> the model, or a function that loads it, so that one at a time
                is in memory. The names stand in the column ``checkpoint``.
            dataset: As for `score`.
            path: A directory; each state's scores are streamed to a directory of its name in it, and the average is
                written there as ``average.parquet``.
            options: As for `score`.

        Raises what `score` and `average` raise, and `ValueError` for a name that is no name of a directory.
        """
        if not isinstance(models, Mapping):
            raise TypeError(f"models must be a mapping of names to models, got {type(models).__name__}")
        if not models:
            raise ValueError("models must hold at least one model, got none")
        for name in models:
            if Path(name).name != name or name in ("", "..", AVERAGE):
                raise ValueError(f"the names of models become names of directories, and {name!r} is none")
        refuse_other_scores(None if path is None else Path(path), AVERAGE, self.name)
        parts = []
        for name, model in models.items():
            loaded = model if isinstance(model, nn.Module) else model()
            where = None if path is None else Path(path) / name
            parts.append(self.score(loaded, dataset, path=where, checkpoint=name, **options))
            del loaded
        mean = average(parts)
        if path is None:
            return mean
        mean.write(Path(path) / AVERAGE)
        return Scores(mean.table, Path(path))

    def _score(
        self,
        model: nn.Module | None,
        work: Work,
        *,
        path: str | Path | None,
        seed: int,
        checkpoint: str,
        resume: bool,
        progress: bool,
    ) -> Scores:
        header = self._header(model, work, seed=seed, checkpoint=checkpoint, stored=path is not None)
        directory = None if path is None else Path(path)
        with ScoreStore(directory, header, resume=resume) as store:

            def append(number: int, scored: ScoredBatch, seconds: float) -> None:
                store.append(number, _rows(scored, seconds))

            self._read_missing(model, work, store, append, seed=seed, progress=progress)
            return store.scores()


class BatchMethod(Method):
    """A way to read samples batch by batch with a model: what scores and features of batches have in common."""

    def prepare(self, model: nn.Module) -> None:
        """Raise `UserError` for a language model that this method cannot use; called once, before any score."""

    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """What is read of a batch of a classifier, [B] or [B, D]; ``targets`` [B] are class numbers on its device.

        A method of language models alone leaves it as it is.
        """
        raise UserError(f"{self.name} reads language models, and this data set is a classifier's")

    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """What is read of a packed batch of a language model, [S] or [S, D], answers at ``where``; NaN if undefined.

        A method of classifiers alone leaves it as it is.
        """
        raise UserError(f"{self.name} reads classifiers, and this data set is a language model's")

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int | None:
        """FLOPs of `read` by formula, for a dense model; None to have every batch counted by torch."""
        return None

    def _work(
        self,
        model: Any,
        dataset: Any,
        *,
        batch_size: int,
        batch_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None,
        workers: int,
    ) -> Work:
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if is_language_data(dataset):
            return LanguageScoring(model, dataset, self, batch_tokens=batch_tokens, tokenizer=tokenizer)
        return Classification(model, dataset, batch_size=batch_size, workers=workers)


class ScoreMethod(BatchMethod, PoolScore):
    """A way to say what samples are worth, batch by batch. Subclasses say what the scores of one batch are.

    To add a method, give it a `name`, `classify` and, for language models, `read`; everything else (batches, Parquet,
    resuming, cost, progress) is here.
    """

    @abstractmethod
    def classify(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Scores [B] of a batch of a classifier; ``targets`` [B] are class numbers on the model's device."""

    def score(  # type: ignore[override]  # the options are named
        self,
        model: nn.Module,
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
        """Score every sample of a data set.

        Args:
            model: A classifier: a module that maps inputs to logits [B, C], or to something with these as ``logits``;
                or a causal language model of transformers, where the data set is one of `pyeff.data`. It is scored in
                evaluation mode and left in its own, with its parameters and their ``.grad`` untouched.
            dataset: Tensors ``(x, y)`` or ``(ids, x, y)``, or any map-style data set of ``(x, y)`` or ``(id, x, y)``.
                ``y`` are class numbers; ids are unique strings or integers, without them the places in the data set.
                Or, for a language model, `pyeff.data.EncodedSamples`; samples or sources, with a ``tokenizer``.
            path: A directory to stream the table to, as Parquet parts that a kill leaves whole. Called again with the
                same arguments, scoring goes on where it stopped and ends with the same scores, bit for bit on the
                same machine with as many threads (the seconds are those that each part took). None keeps the
                table in memory.
            batch_size: Samples of a batch of a classifier.
            batch_tokens: Tokens of a packed batch of a language model; the longest sample must fit. A packed batch
                multiplies all pairs of its tokens in attention.
            tokenizer: What samples are encoded by that are not yet.
            seed: Stands in the table; and torch's generator is seeded with it and the batch's number before each
                batch, so that a data set or model that draws random numbers draws them again. The generator is left as
                it was.
            checkpoint: Stands in the table: which state of the model was scored.
            resume: Go on with the scores at ``path``; if False, a ``path`` that holds scores is refused.
            progress: Show a bar where standard error is a terminal.
            workers: Processes that load samples, as in torch's `DataLoader`; random numbers that they draw are their
                own and not repeated.

        Returns:
            The scores in the order of the data set. NaN where the logits are not finite, or for a sample without answer
            tokens.

        Raises:
            ValueError: the data set is empty, an id is missing or there twice, a target is no class of the model.
                With a ``path``, what was scored before it is kept.
            UserError: ``path`` holds something else, scores of another model, data set or method, or a damaged part; it
                is left as it was.

        Cost: see the method. In the table, FLOPs of matrix products and convolutions: by formula for a dense
        transformer that is trained in full, else as torch counts them, for a classifier at the first batch of each
        shape; and measured seconds. Samples share their batch's cost equally, packed ones by their tokens. A ``path``
        costs reading the model's parameters once, for a fingerprint.
        """
        work = self._work(
            model,
            dataset,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            tokenizer=tokenizer,
            workers=workers,
        )
        return self._score(model, work, path=path, seed=seed, checkpoint=checkpoint, resume=resume, progress=progress)


class FeatureMethod(BatchMethod):
    """A way to describe samples by D numbers each, to be compared with those of targets or with each other.

    To add one, give it a `name`, `dim` and `read`, and `classify` where it reads classifiers.
    """

    @abstractmethod
    def dim(self, model: nn.Module) -> int:
        """D, the numbers of a row."""

    def features(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        path: str | Path | None = None,
        dtype: FeatureType = "float16",
        batch_size: int = 64,
        batch_tokens: int = 1024,
        tokenizer: PreTrainedTokenizerBase | None = None,
        seed: int = 0,
        checkpoint: str = "",
        resume: bool = True,
        progress: bool = True,
        workers: int = 0,
    ) -> Features:
        """Read the features of every sample of a data set.

        Arguments, errors and cost are those of `ScoreMethod.score`; ``dtype`` is how rows are kept, see `FeatureStore`.
        """
        work = self._work(
            model,
            dataset,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            tokenizer=tokenizer,
            workers=workers,
        )
        header = self._header(model, work, seed=seed, checkpoint=checkpoint, stored=path is not None)
        store = FeatureStore(path, header, dim=self.dim(model), dtype=dtype, resume=resume)
        with store:

            def append(number: int, scored: ScoredBatch, seconds: float) -> None:
                costs = shares(scored.flops, scored.weights)
                whole = sum(scored.weights) or 1
                times = [seconds * weight / whole for weight in scored.weights]
                store.append(number, scored.ids, scored.scores, index=scored.index, flops=costs, seconds=times)

            self._read_missing(model, work, store, append, seed=seed, progress=progress)
            return store.features()


def _rows(scored: ScoredBatch, seconds: float) -> dict[str, Sequence[Any]]:
    whole = sum(scored.weights) or 1
    return {
        "index": scored.index,
        "id": scored.ids,
        "score": [float(value) for value in scored.scores],
        "flops": shares(scored.flops, scored.weights),
        "seconds": [seconds * weight / whole for weight in scored.weights],
    }


@contextmanager
def _seeding(model: nn.Module | None) -> Iterator[Callable[[int, int], None]]:
    """Seed the generators of the CPU and of the model's GPU, and put them back; other GPUs are left alone."""
    device = torch.device("cpu") if model is None else device_of(model)
    gpus = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []

    def reseed(seed: int, batch: int) -> None:
        # One odd constant apart, so that the batches of neighbouring seeds share no state.
        state = (seed * 0x9E3779B97F4A7C15 + batch) % 2**63
        torch.default_generator.manual_seed(state)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(state)

    with torch.random.fork_rng(devices=gpus):
        yield reseed


@contextmanager
def _bar(show: bool, work: Work, done: int, name: str) -> Iterator[Any]:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        yield lambda count: None
        return
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("samples", markup=False),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bars:
        task = bars.add_task(name, total=work.samples, completed=done)
        yield lambda count: bars.advance(task, count)
