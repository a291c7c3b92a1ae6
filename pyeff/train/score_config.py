"""What `pyeff score` is asked to do, checked before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pyeff.data.sources import Source
from pyeff.train.config import _Strict


class ScoreDataConfig(_Strict):
    """The samples to score, of which only answers are; ``target`` holds those that some methods compare them with."""

    pool: list[Source] = Field(min_length=1)
    target: list[Source] = Field(default_factory=list)
    max_tokens: int = Field(default=1024, ge=2)
    chat_template: bool | Literal["auto"] = "auto"
    drop_long: bool = False

    @field_validator("pool", "target", mode="before")
    @classmethod
    def _one_source_is_a_list_of_one(cls, value: Any) -> Any:
        return [value] if isinstance(value, dict) else value


class ScoreConfig(_Strict):
    """What `pyeff score` is asked to do: which samples, by what method, with which states of a model.

    ``checkpoints`` are models like ``model`` or checkpoints of a run of `model` (their averaged weights); with several
    the score is the mean over them. Without any, ``model`` itself is scored with. ``less`` and ``tracin`` need
    checkpoints of runs, whose weights they take as they were trained, with the optimizer's moments; ``learning_rates``
    weigh these.
    """

    model: str
    dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoints: list[str] = Field(default_factory=list)
    data: ScoreDataConfig
    method: Literal[
        "el2n", "grand", "last_layer_grand", "perplexity", "rds_plus", "bm25", "random", "less", "tracin"
    ] = "el2n"
    reduction: Literal["mean", "sum", "max"] = "mean"
    # Of less and tracin: the rate of each checkpoint if not its last step's, and the sketch of the gradients.
    learning_rates: list[float] = Field(default_factory=list)
    sketch_dim: int = Field(default=8192, ge=1)
    sketch_seed: int = Field(default=0, ge=0)
    variant: Literal["adamw", "adamw-frozen"] = "adamw"
    # A packed batch multiplies all pairs of its tokens in attention.
    batch_tokens: int = Field(default=1024, ge=2)
    seed: int = Field(default=0, ge=0, lt=2**31)
    threads: int | None = Field(default=None, ge=1, le=1024)
    out: Path = Path("scores/latest")

    @model_validator(mode="after")
    def _options_fit(self) -> ScoreConfig:
        if self.data.max_tokens > self.batch_tokens:
            raise ValueError(
                f"batch_tokens ({self.batch_tokens}) must hold a sample of data.max_tokens ({self.data.max_tokens})"
            )
        along_training = self.method in ("less", "tracin")
        if self.reduction == "max" and (along_training or self.method in ("grand", "last_layer_grand")):
            raise ValueError(f"reduction must be mean or sum with method {self.method}, got max")
        if along_training and not self.checkpoints:
            raise ValueError(f"method {self.method} needs checkpoints of a run: RUN/checkpoints/step-000100")
        if self.learning_rates and not along_training:
            raise ValueError(f"learning_rates have no meaning for method {self.method}")
        if (along_training or self.method in ("rds_plus", "bm25")) and not self.data.target:
            raise ValueError(f"method {self.method} needs data.target: the samples that the pool is compared with")
        if self.method in ("perplexity", "rds_plus", "bm25", "random"):
            if self.reduction != "mean":
                raise ValueError(f"reduction has no meaning for method {self.method}")
            if self.method in ("bm25", "random") and self.checkpoints:
                raise ValueError(f"method {self.method} reads no model: leave checkpoints out")
        return self
