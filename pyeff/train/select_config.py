"""What `pyeff select` is asked to do, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pyeff.data.sources import Source
from pyeff.train.config import _Strict

Rule = Literal[
    "top_k", "boltzmann", "random", "round_robin", "bids", "facility_location", "stochastic_greedy", "kmeans_balanced"
]

OF_TARGETS = ("round_robin", "bids")
_OF_FEATURES = ("facility_location", "stochastic_greedy", "kmeans_balanced")


class SelectDataConfig(_Strict):
    """The pool's samples, to be written out; ``target`` and ``holdout`` are only checked against each other and it."""

    pool: list[Source] = Field(min_length=1)
    target: list[Source] = Field(default_factory=list)
    holdout: list[Source] = Field(default_factory=list)

    @field_validator("pool", "target", "holdout", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


class TrainingCost(_Strict):
    """What training on the whole pool costs, and the part of it that would do if it were drawn at random."""

    flops: float | None = Field(default=None, gt=0)
    seconds: float | None = Field(default=None, gt=0)
    random_fraction: float = Field(default=1.0, gt=0, le=1)


class SelectConfig(_Strict):
    """What `pyeff select` is asked to do: from which scores or features, by which rule, how many, and where to.

    ``scores`` is a table of `pyeff score`. ``features`` and ``targets`` are directories of features; without
    ``targets``, the rules for many targets take the columns of ``features`` as scores for targets.
    """

    scores: Path | None = None
    features: Path | None = None
    targets: Path | None = None
    cosine: bool = True
    center: bool = False
    rule: Rule = "top_k"
    keep: float | None = Field(default=None, gt=0, le=1)
    k: int | None = Field(default=None, ge=1)
    order: Literal["largest", "smallest"] = "largest"
    reduction: Literal["max", "mean", "sum"] = "max"
    quotas: Literal["balanced", "proportional"] | dict[str, int] | None = None
    temperature: float = Field(default=1.0, gt=0)
    # S2L's hundred where not given, or as many as samples are chosen if these are fewer.
    clusters: int | None = Field(default=None, ge=1)
    # Of the pool, that a subset is to cover where there are no targets; all pairs of a large pool are too many.
    represented: int = Field(default=4096, ge=1)
    epsilon: float = Field(default=0.01, gt=0, lt=1)
    data: SelectDataConfig | None = None
    training: TrainingCost | None = None
    seed: int = Field(default=0, ge=0, lt=2**31)
    device: str = "cpu"
    out: Path = Path("subsets/latest")

    @model_validator(mode="after")
    def _options_fit(self) -> SelectConfig:
        if (self.keep is None) == (self.k is None):
            raise ValueError("give either keep, a fraction of the pool, or k, a number of samples")
        if self.scores is None and self.features is None:
            raise ValueError("scores or features must be given: what to choose by")
        if self.targets is not None and self.features is None:
            raise ValueError("targets are compared with features, which are not given")
        if self.rule in (*OF_TARGETS, *_OF_FEATURES) and self.features is None:
            raise ValueError(f"rule {self.rule} needs features")
        if self.rule in ("top_k", "boltzmann") and self.scores is None and self.targets is None:
            raise ValueError(f"rule {self.rule} needs scores, or features and targets")
        if self.order == "smallest" and self.rule not in ("top_k", "boltzmann", "kmeans_balanced"):
            raise ValueError(f"order has no meaning for rule {self.rule}")
        if self.quotas is not None:
            if self.rule not in ("top_k", "boltzmann", "random"):
                raise ValueError(f"quotas go with the rules top_k, boltzmann and random, not with {self.rule}")
            if self.data is None:
                raise ValueError("quotas need data.pool, which says where each sample comes from")
        return self
