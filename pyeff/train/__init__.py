"""The main job: train a model under a budget and let the governor decide where the budget goes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeff.train.config import RunConfig, load_config
    from pyeff.train.run import RunResult, train_run
    from pyeff.train.score import score_samples
    from pyeff.train.score_config import ScoreConfig
    from pyeff.train.states import training_states

__all__ = ["RunConfig", "RunResult", "ScoreConfig", "load_config", "score_samples", "train_run", "training_states"]

_HOME = {
    "RunConfig": "pyeff.train.config",
    "ScoreConfig": "pyeff.train.score_config",
    "load_config": "pyeff.train.config",
    "score_samples": "pyeff.train.score",
    "training_states": "pyeff.train.states",
    "RunResult": "pyeff.train.run",
    "train_run": "pyeff.train.run",
}


def __getattr__(name: str) -> Any:
    # Reading a configuration must not wait for torch.
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
