"""Similarity to target samples: RDS+ from a language model's hidden states, and embeddings of an encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pyeff.data.samples import Sample
from pyeff.errors import UserError
from pyeff.scoring.features import Features
from pyeff.scoring.flops import flop_counter
from pyeff.scoring.language import BatchWork, variant
from pyeff.scoring.language_model import last_hidden_state, without_adapters
from pyeff.scoring.method import FeatureMethod, Method, PoolScore
from pyeff.scoring.pool import answer_embeddings
from pyeff.scoring.quantised import FeatureType
from pyeff.scoring.scores import SampleId, Scores
from pyeff.scoring.store import BY_TARGETS, refuse_other_scores
from pyeff.scoring.targets import TargetSimilarities, target_scores
from pyeff.scoring.texts import check_targets_given, fingerprint_of, texts_of
from pyeff.scoring.work import Digest, ScoredBatch, Work, as_array, device_of, refuse_bad_ids, texts_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyeff.data import LabelPositions, PackedBatch
    from pyeff.scoring.model_costs import ModelCosts


class HiddenStates(FeatureMethod):
    """Position-weighted mean of a sample's last hidden states: the representation of RDS+.

        e = sum_t w_t h_t / sum_t w_t,      w_t = 1, 2, 3, ...

    over all tokens of prompt and answer, or with ``tokens="answer"`` over the states that predict the answer. Under
    causal attention later states have seen more of the sample, hence the weights. Ivison et al., 2025,
    "Large-Scale Data Selection for Instruction Tuning", arXiv:2503.01807.

    Cost: a forward pass without the head; 2 to 4 bytes a number.
    """

    def __init__(self, *, tokens: Literal["all", "answer"] = "all") -> None:
        if tokens not in ("all", "answer"):
            raise ValueError(f"tokens must be 'all' or 'answer', got {tokens!r}")
        self._tokens = tokens

    @property
    def name(self) -> str:
        """Position-weighted hidden states, and of which tokens if not of all."""
        return variant("position-weighted hidden states", *([] if self._tokens == "all" else ["answer tokens"]))

    def dim(self, model: nn.Module) -> int:
        """The model's hidden size."""
        return int(without_adapters(model).config.get_text_config().hidden_size)

    @torch.no_grad()
    def read(self, model: nn.Module, batch: PackedBatch, where: LabelPositions) -> Tensor:
        """Embeddings [S, D], float32."""
        hidden = last_hidden_state(model, batch)
        if self._tokens == "all":
            return answer_embeddings(hidden, batch.cu_seqlens)
        return answer_embeddings(hidden[where.positions], where.cu_seqlens)

    def read_flops(self, model: nn.Module, costs: ModelCosts, work: BatchWork) -> int:
        """FLOPs of the forward pass without the head."""
        return costs.forward(work.tokens, work.tokens**2, 0)


class TextEmbeddings(FeatureMethod):
    """Embeddings of samples' texts by an encoder: the mean of the last hidden states over a text's tokens.

    The model is an encoder of transformers, with its ``tokenizer``, or a module that has `encode(texts)`, as models of
    sentence-transformers do. A text is a sample's prompt, a line break and its answer; longer ones are cut to what the
    encoder takes. Reimers and Gurevych, 2019, "Sentence-BERT", arXiv:1908.10084.

    Cost: a forward pass of the encoder over padded batches of ``batch_size`` texts.
    """

    @property
    def name(self) -> str:
        """Text embeddings."""
        return "text embeddings"

    def dim(self, model: nn.Module) -> int:
        """Width of the encoder's output."""
        size = getattr(model, "get_sentence_embedding_dimension", None)
        if size is not None:
            return int(size())
        if hasattr(model, "encode"):
            return len(model.encode(["one text"])[0])  # type: ignore[operator]
        return int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def _work(self, model: Any, dataset: Any, **options: Any) -> Work:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        return _Texts(model, dataset, tokenizer=options["tokenizer"], batch_size=options["batch_size"])


class _Texts:
    """Texts in padded batches of an encoder."""

    def __init__(
        self, model: nn.Module, dataset: Any, *, tokenizer: PreTrainedTokenizerBase | None, batch_size: int
    ) -> None:
        found = texts_of(dataset)
        if not found:
            raise ValueError("dataset must hold at least one sample with its text: Sample, EncodedSamples or a source")
        if tokenizer is None and not hasattr(model, "encode"):
            raise ValueError("tokenizer must be given with an encoder that has no encode(texts), got None")
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._ids = refuse_bad_ids([sample.id for sample in found], set())
        self._fingerprint = texts_fingerprint(found)
        self._texts = [f"{sample.prompt}\n{sample.answer}" for sample in found]
        self.samples = len(found)
        self.batches = -(-self.samples // batch_size)

    def known(self, ids: set[SampleId]) -> None:
        """Ids are checked all at once."""

    def describe(self) -> dict[str, Any]:
        """Fingerprint of ids and texts, and how they are batched."""
        digest = Digest().any(self._ids).any(self._texts)
        described = {"dataset": digest.hex(), "samples": self.samples, "batching": f"{self._batch_size} samples"}
        return {**described, "texts": self._fingerprint}

    def run(self, method: Method, batches: Sequence[int]) -> Iterator[ScoredBatch]:
        """Embed the batches of these numbers, in turn."""
        for number in batches:
            span = range(number * self._batch_size, min((number + 1) * self._batch_size, self.samples))
            with torch.no_grad(), flop_counter() as counter:
                rows, weights = self._embed([self._texts[place] for place in span])
            flops = int(counter.get_total_flops())
            yield ScoredBatch(list(span), [self._ids[place] for place in span], as_array(rows), flops, weights)

    def _embed(self, texts: list[str]) -> tuple[Tensor, list[int]]:
        if self._tokenizer is None:
            encoded = self._model.encode(texts)  # type: ignore[operator]
            return torch.as_tensor(encoded), [1] * len(texts)
        longest = _longest_text(self._model, self._tokenizer)
        inputs = self._tokenizer(
            texts, padding=True, truncation=longest is not None, max_length=longest, return_tensors="pt"
        ).to(device_of(self._model))
        hidden = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].to(torch.float32)
        total = torch.einsum("bt,btd->bd", mask, hidden.to(torch.float32))
        # A text without a token is undefined.
        return total / mask.sum(dim=1, keepdim=True), mask.sum(dim=1).long().tolist()


def _longest_text(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """How many tokens an encoder takes; None where there is no end. RoBERTa counts positions from behind padding."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None:
        return None
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding) and table.padding_idx is not None:
            positions = table.num_embeddings - table.padding_idx - 1
    return min(int(positions), tokenizer.model_max_length)


class SimilarityMethod(PoolScore):
    """Score by the similarity of a sample's features to those of target samples, reduced over the targets.

    With a ``path``, the features of pool and targets stay there as `FeatureStore`s, ``pool`` and ``targets``, from
    which rules for many targets choose (`pyeff.scoring.TargetSimilarities`), and the table is ``scores.parquet``.
    """

    label: str
    """What a method's name begins with."""

    def __init__(self, features: FeatureMethod, targets: Any, *, reduction: str, center: bool) -> None:
        self._features = features
        self._targets = check_targets_given(targets, reduction)
        self._encoded = targets
        self._reduction, self._center = reduction, center

    @property
    def name(self) -> str:
        """The method, its features if they are not the usual ones, and which targets."""
        own = type(self._features)().name
        more = [self._features.name.removeprefix(own).strip(" ()")] if self._features.name != own else []
        more += ["centred"] if self._center else []
        return variant(self.label, *more, f"{self._reduction} cosine over targets {fingerprint_of(self._targets)}")

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
        dtype: FeatureType = "float16",
    ) -> Scores:
        """Score every sample of a data set; arguments and errors are those of `ScoreMethod.score`.

        ``dtype`` is how features are kept, see `FeatureStore`. The cost is that of the features of pool and targets,
        and of comparing them.
        """

        def features(name: str, data: Any) -> Features:
            return self._features.features(
                model,
                data,
                path=None if path is None else Path(path) / name,
                dtype=dtype,
                batch_size=batch_size,
                batch_tokens=batch_tokens,
                tokenizer=tokenizer,
                seed=seed,
                checkpoint=checkpoint,
                resume=resume,
                progress=progress,
                workers=workers,
            )

        if path is not None and Path(path).is_dir() and not resume and any(Path(path).iterdir()):
            raise UserError(f"{path} holds these scores already: resume, or choose another directory")
        refuse_other_scores(None if path is None else Path(path), BY_TARGETS, self.name)
        targets, pool = features("targets", self._encoded), features("pool", dataset)
        similar = TargetSimilarities(pool, targets, center=self._center)
        scores = target_scores(similar, pool, targets, method=self.name, reduction=self._reduction)
        if path is None:
            return scores
        scores.write(Path(path) / BY_TARGETS)
        return Scores(scores.table, Path(path))


class RDSPlus(SimilarityMethod):
    """RDS+: cosine between position-weighted hidden states of a sample and of target samples.

        score_i = max over targets j of cos(e_i, e_j),   e = sum_t t h_t / sum_t t over the sample's tokens

    see `HiddenStates`. The paper then lets target samples choose in turn: `pyeff.selection.round_robin` on the features
    that `score` leaves at its ``path``. Ivison et al., 2025, arXiv:2503.01807.

    Args:
        targets: Samples of the target task: `Sample`s with a ``tokenizer`` given to `score`, or encoded ones.
        tokens: "all" tokens of a sample, or the "answer"'s.
        reduction: "max", "mean" or "sum" over the targets.
        center: Subtract the pool's mean embedding first, without which every cosine is nearly one; not in the paper.

    Cost: a forward pass without the head over pool and targets.
    """

    label = "RDS+"

    def __init__(
        self,
        targets: Any,
        *,
        tokens: Literal["all", "answer"] = "all",
        reduction: str = "max",
        center: bool = False,
    ) -> None:
        super().__init__(HiddenStates(tokens=tokens), targets, reduction=reduction, center=center)


class EmbeddingSimilarity(SimilarityMethod):
    """Cosine between an encoder's embeddings of a sample's text and of target samples' texts; see `TextEmbeddings`.

        score_i = max over targets j of cos(e_i, e_j)

    The baseline that costs a small encoder's forward pass.

    Args:
        targets: Samples of the target task.
        reduction: "max", "mean" or "sum" over the targets.
        center: Subtract the pool's mean embedding first.
    """

    label = "embedding similarity"

    def __init__(self, targets: Sequence[Sample] | Any, *, reduction: str = "max", center: bool = False) -> None:
        super().__init__(TextEmbeddings(), targets, reduction=reduction, center=center)
