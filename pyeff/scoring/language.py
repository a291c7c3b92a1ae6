"""Causal language models: samples of a prompt and an answer, packed; only answers are scored."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from pyeff.data.samples import EncodedSample, EncodedSamples, Sample, encode
from pyeff.errors import UserError
from pyeff.governor.flops import Cost
from pyeff.scoring.flops import flop_counter
from pyeff.scoring.language_model import check_head, check_packing, without_adapters
from pyeff.scoring.model_costs import costs_of
from pyeff.scoring.scores import SampleId
from pyeff.scoring.work import Digest, ScoredBatch, device_of, refuse_bad_ids, rows_of, texts_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from pyeff.scoring.method import BatchMethod

Reduction = Literal["mean", "sum"]

# First fit over this many open batches; the samples of a pass may be packed in any order.
PACKING_WINDOW = 16


@dataclass(frozen=True)
class BatchWork:
    """How much work a packed batch is, in the numbers that price it.

    ``lengths`` and ``answers`` are the tokens and the answer tokens of each sample.
    """

    lengths: list[int]
    answers: list[int]

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return sum(self.lengths)

    def of(self, cost: Cost) -> int:
        """FLOPs of a pass of this cost; packed tokens are multiplied pair by pair, masked or not."""
        return cost(self.tokens, self.tokens**2, sum(self.answers))


def is_language_data(dataset: Any) -> bool:
    """Whether a data set is one of `pyeff.data`: encoded samples, samples, a source or a list of these."""
    if isinstance(dataset, EncodedSamples):
        return True
    first = dataset[0] if isinstance(dataset, list | tuple) and dataset else dataset
    return isinstance(first, EncodedSample | Sample) or is_source(first)


def is_source(value: Any) -> bool:
    """Whether a value describes where samples come from."""
    return type(value).__module__ == "pyeff.data.sources"


class LanguageScoring:
    """A causal language model of transformers and its samples, packed into batches of ``batch_tokens`` tokens.

    Raises `UserError` for a model that does not keep packed samples apart.
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        method: BatchMethod,
        *,
        batch_tokens: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        from pyeff.data.packing import pack

        if not hasattr(without_adapters(model), "get_output_embeddings"):
            raise TypeError(
                f"model must be a causal language model of transformers to score {type(dataset).__name__}, got "
                f"{type(model).__name__}"
            )
        self.model, self.device = model, device_of(model)
        encoded = _encoded(dataset, tokenizer)
        if not encoded:
            raise ValueError("the dataset is empty: there is nothing to score")
        self._texts = encoded.samples if isinstance(encoded, EncodedSamples) else None
        names = None if self._texts is None else [sample.id for sample in self._texts]
        self._ids = refuse_bad_ids(names or [sample.sample_index for sample in encoded], set())
        for name, sample in zip(self._ids, encoded, strict=True):
            if len(sample.ids) > batch_tokens:
                raise UserError(
                    f"sample {name!r} is {len(sample.ids)} tokens long, more than batch_tokens ({batch_tokens}): raise "
                    "batch_tokens, or leave it out; a sample is never split"
                )
        # A batch names samples by their place in the data set.
        self._samples = [dataclasses.replace(sample, sample_index=place) for place, sample in enumerate(encoded)]
        self._packed = pack(self._samples, range(len(self._samples)), max_tokens=batch_tokens, window=PACKING_WINDOW)
        self._batch_tokens = batch_tokens
        self.samples, self.batches = len(self._samples), len(self._packed)
        self._costs = costs_of(model)
        check_packing(model)
        method.prepare(model)

    def known(self, ids: set[SampleId]) -> None:
        """Ids are checked all at once, when the work is made."""

    def describe(self) -> dict[str, Any]:
        """Fingerprint of the data set and how it is batched."""
        digest = Digest().any(self._ids)
        for sample in self._samples:
            digest.tensor(torch.tensor([sample.prompt_length, *sample.ids]))
        described = {"dataset": digest.hex(), "samples": self.samples, "batching": f"{self._batch_tokens} tokens"}
        return described if self._texts is None else {**described, "texts": texts_fingerprint(self._texts)}

    def run(self, method: BatchMethod, batches: Sequence[int]) -> Iterator[ScoredBatch]:
        """Score the batches of these numbers, in turn."""
        from pyeff.data.packing import label_positions

        for number in batches:
            batch = self._packed[number].to(self.device)
            where = label_positions(batch)
            work = BatchWork(self._packed[number].cu_seqlens.diff().tolist(), where.cu_seqlens.diff().tolist())
            flops = None if self._costs is None else method.read_flops(self.model, self._costs, work)
            if flops is None:
                with flop_counter() as counter:
                    scores = method.read(self.model, batch, where)
                flops = int(counter.get_total_flops())
            else:
                scores = method.read(self.model, batch, where)
            index = list(batch.sample_indices)
            rows = rows_of(scores, len(index), method.name)
            yield ScoredBatch(index, [self._ids[i] for i in index], rows, flops, work.lengths)


def token_weights(cu_seqlens: Tensor, tokens: int, reduction: Reduction) -> Tensor:
    """What each token counts in the loss of its sample, float32 [tokens]: 1, or one over the sample's tokens."""
    if reduction == "sum":
        return torch.ones(tokens, device=cu_seqlens.device)
    counts = cu_seqlens.diff().to(torch.int64)
    return torch.repeat_interleave(1.0 / counts, counts, output_size=tokens)


def undefined_if_empty(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Scores [S], NaN where a sample has no token."""
    return torch.where(cu_seqlens.diff() > 0, values, torch.nan)


def check_reduction(reduction: str, allowed: tuple[str, ...] = ("mean", "sum")) -> None:
    """Raise `ValueError` for a reduction that is not known."""
    if reduction not in allowed:
        raise ValueError(f"reduction must be {' or '.join(map(repr, allowed))}, got {reduction!r}")


def variant(name: str, *what: str) -> str:
    """A method's name with what sets it apart from its default.

    >>> variant("GraNd"), variant("GraNd", "sum over answer tokens")
    ('GraNd', 'GraNd (sum over answer tokens)')
    """
    return f"{name} ({', '.join(what)})" if what else name


def require_plain_head(model: nn.Module) -> None:
    """Raise `UserError` unless logits are the head applied to the last hidden state, up to a softcap."""
    if not check_head(model):
        raise UserError(
            f"{type(model).__name__} changes its logits after the output head in a way that scoring does not know: "
            "score by GraNd, which uses the model's own logits"
        )


def _encoded(dataset: Any, tokenizer: PreTrainedTokenizerBase | None) -> EncodedSamples | list[EncodedSample]:
    if isinstance(dataset, EncodedSamples):
        return dataset
    given = list(dataset) if isinstance(dataset, list | tuple) else [dataset]
    if all(isinstance(sample, EncodedSample) for sample in given):
        return given
    if is_source(given[0]):
        from pyeff.data import load_samples

        given = load_samples(given)
    if tokenizer is None:
        raise ValueError("tokenizer must be given with samples that are not encoded, got None")
    if not all(isinstance(sample, Sample) for sample in given):
        raise TypeError("dataset must hold samples of one kind: Sample, EncodedSample or sources")
    return encode(given, tokenizer, max_tokens=sys.maxsize)
