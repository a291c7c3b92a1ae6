"""Score the samples of a configuration: what `pyeff score` does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pyeff.data import EncodedSamples, Sample, encode, load_samples
from pyeff.errors import UserError
from pyeff.ops import Sketch
from pyeff.scoring import (
    BM25,
    EL2N,
    LESS,
    GraNd,
    LastLayerGraNd,
    Perplexity,
    RandomScore,
    RDSPlus,
    Scores,
    TracIn,
)
from pyeff.scoring.method import PoolScore
from pyeff.train import checkpoint as checkpoints
from pyeff.train.build import own_memory
from pyeff.train.model import LoadedModel, load_model
from pyeff.train.score_config import ScoreConfig
from pyeff.train.states import training_states

_METHODS: dict[str, Callable[..., PoolScore]] = {"el2n": EL2N, "grand": GraNd, "last_layer_grand": LastLayerGraNd}


def score_samples(
    config: ScoreConfig,
    *,
    resume: bool = False,
    progress: bool = True,
    notify: Callable[[str], None] | None = None,
) -> Scores:
    """Score the samples of a configuration into its ``out`` directory.

    Args:
        config: What to score, by what, and where the table goes.
        resume: Go on with the scores at ``out``; if False, such a directory is refused.
        progress: Show a bar where standard error is a terminal.
        notify: Called with one sentence before anything that takes long.

    Raises `UserError` for whatever cannot be used: a model, a source, a checkpoint, a directory. What was scored before
    is kept.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    raw = load_samples(config.data.pool)
    target = load_samples(config.data.target) if config.data.target else []
    options: dict[str, Any] = {"seed": config.seed, "resume": resume, "progress": progress}
    try:
        if config.method in ("bm25", "random"):
            unread = BM25(target) if config.method == "bm25" else RandomScore()
            return unread.score(None, raw, path=config.out, **options)
        loaded = load_model(config.model, dtype=config.dtype, notify=notify)
        data, goals = (_encoded(samples, loaded, config) if samples else None for samples in (raw, target))
        options["batch_tokens"] = config.batch_tokens
        if config.method in ("less", "tracin"):
            own: dict[str, Any] = {"sketch": Sketch(config.sketch_dim, seed=config.sketch_seed)}
            own |= {"answers": config.reduction}
            along = LESS(goals, variant=config.variant, **own) if config.method == "less" else TracIn(goals, **own)
            states = training_states(
                config.checkpoints, model=config.model, learning_rates=config.learning_rates, notify=notify
            )
            return along.score(states, data, path=config.out, **options)
        method = _method(config, goals)
        base = own_memory(loaded.model)
        if not config.checkpoints:
            return method.score(base, data, path=config.out, **options)
        models = {_name(each): partial(_checkpoint, each, base, config, notify) for each in config.checkpoints}
        if len(models) < len(config.checkpoints):
            raise UserError("checkpoints: one of them is there twice")
        return method.score_all(models, data, path=config.out, **options)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from error


def _encoded(samples: list[Sample], loaded: LoadedModel, config: ScoreConfig) -> EncodedSamples:
    return encode(
        samples,
        loaded.tokenizer,
        max_tokens=min(config.data.max_tokens, loaded.max_positions),
        chat_template=config.data.chat_template,
        drop_long=config.data.drop_long,
    )


def _method(config: ScoreConfig, target: EncodedSamples | None) -> PoolScore:
    if config.method == "rds_plus":
        return RDSPlus(target)
    return Perplexity() if config.method == "perplexity" else _METHODS[config.method](reduction=config.reduction)


def _name(checkpoint: str) -> str:
    """A short name for a directory of scores, different for different checkpoints."""
    digest = hashlib.blake2b(checkpoint.encode(), digest_size=3).hexdigest()
    return f"{Path(checkpoint).name or 'model'}-{digest}"


def _checkpoint(name: str, base: nn.Module, config: ScoreConfig, notify: Callable[[str], None] | None) -> nn.Module:
    """A model of its own, or the averaged weights of a run's checkpoint put into the base model."""
    weights = Path(name) / "ema.safetensors"
    if not weights.is_file():
        return own_memory(load_model(name, dtype=config.dtype, notify=notify).model)
    checkpoints.read_state(Path(name))  # refuses a damaged one
    checkpoints.load_into(weights, {key: p.data for key, p in base.named_parameters()})
    return base
