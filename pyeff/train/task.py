"""The samples of a run: a pool to learn from and three disjoint sets of the target task."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyeff.data import EncodedSamples, Sample, encode, load_samples, split_disjoint, without_prompts_of
from pyeff.errors import UserError
from pyeff.train.config import DataConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class RawTask:
    """Samples before encoding. ``removed`` counts pool samples that asked what a judging set asks."""

    pool: list[Sample]
    anchors: list[Sample]
    holdout: list[Sample]
    target: list[Sample]
    removed: int


@dataclass(frozen=True)
class Task:
    """Encoded samples. ``target`` is what selection compares the pool with."""

    pool: EncodedSamples
    anchors: EncodedSamples
    holdout: EncodedSamples
    target: EncodedSamples
    removed: int

    @property
    def dropped(self) -> int:
        """Samples left out for their length."""
        return sum(len(part.dropped) for part in (self.pool, self.anchors, self.holdout, self.target))


def read_task(data: DataConfig, *, seed: int) -> RawTask:
    """Read the sources and split the target; the pool loses every prompt of anchors and holdout.

    Raises `UserError` when a source cannot be read, is too small, or nothing is left of the pool.
    """
    anchors, holdout, target = split_disjoint(
        load_samples(data.target), (data.anchors, data.holdout, data.target_samples), seed=seed
    )
    everything = load_samples(data.pool)
    pool = without_prompts_of(everything, [*anchors, *holdout])
    if not pool:
        raise UserError("data.pool is empty once the prompts of the anchor and holdout sets are removed")
    return RawTask(pool, anchors, holdout, target, removed=len(everything) - len(pool))


def encode_task(raw: RawTask, data: DataConfig, tokenizer: PreTrainedTokenizerBase, *, max_tokens: int) -> Task:
    """Turn every set into token ids of at most ``max_tokens`` a sample.

    Raises `UserError` when a sample is too long (unless ``data.drop_long``) or a set loses all its samples.
    """

    def encoded(samples: list[Sample]) -> EncodedSamples:
        return encode(
            samples,
            tokenizer,
            max_tokens=max_tokens,
            chat_template=data.chat_template,
            drop_long=data.drop_long,
        )

    return Task(encoded(raw.pool), encoded(raw.anchors), encoded(raw.holdout), encoded(raw.target), raw.removed)
