"""Checkpoints of runs as states of a training: weights and the optimizer's moments as they were."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pyeff.errors import UserError
from pyeff.scoring import TrainingState
from pyeff.train import checkpoint as checkpoints
from pyeff.train.build import make_optimizer, own_memory, with_lora
from pyeff.train.directory import stored_config
from pyeff.train.model import load_model


def training_states(
    directories: Sequence[str | Path],
    *,
    model: str | None = None,
    learning_rates: Sequence[float] = (),
    notify: Callable[[str], None] | None = None,
) -> list[TrainingState]:
    """Checkpoints ``RUN/checkpoints/step-000123`` of `pyeff run`, for `pyeff.scoring.LESS` and `TracIn`.

    Weights are those that were trained, not their average, and with them the optimizer's moments; base model, adapters
    and optimizer are those of the run's own configuration. ``learning_rates``: one for each, or none: then each has the
    rate of the step before it was written. ``model``: refuse runs of another one.

    Raises `UserError` for what is no checkpoint of a run, is damaged, or holds no moments.
    """
    if learning_rates and len(learning_rates) != len(directories):
        raise UserError(f"learning_rates must be one for each of {len(directories)} checkpoints")
    found = []
    for place, directory in enumerate(map(Path, directories)):
        path = directory.resolve()
        if not (path / "state.json").is_file():
            raise UserError(
                f"{directory} is no checkpoint of a run: give directories such as RUN/checkpoints/step-000100"
            )
        content = checkpoints.read_state(path)
        run = path.parent.parent
        config = stored_config(run)
        if model is not None and config.model != model:
            raise UserError(f"{directory} is of a run of {config.model}, but the model is {model}")
        try:
            rate = float(learning_rates[place] if learning_rates else content["optimizer"]["param_groups"][0]["lr"])
            name = f"{run.name}-{path.name}"
            found.append(TrainingState(name, rate, partial(_load, path, run, notify)))
        except (LookupError, TypeError) as error:
            raise UserError(f"{directory} holds no optimizer: {error!r}") from error
        except ValueError as error:
            raise UserError(f"{directory}: {error}") from error
    return found


def _load(path: Path, run: Path, notify: Callable[[str], None] | None) -> tuple[nn.Module, torch.optim.Optimizer]:
    config, content = stored_config(run), checkpoints.read_state(path)
    model = own_memory(load_model(config.model, dtype=config.dtype, notify=notify).model)
    if config.lora is not None:
        model = with_lora(model, config.lora, seed=config.seed)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    checkpoints.load_into(path / "weights.safetensors", {name: p.data for name, p in trained.items()})
    optimizer = make_optimizer(config.optimizer, list(trained.values()))
    try:
        checkpoints.load_optimizer(optimizer, path, content)
    except (ValueError, LookupError) as error:
        raise UserError(f"{path}: the optimizer cannot be restored: {error}") from error
    return model, optimizer
