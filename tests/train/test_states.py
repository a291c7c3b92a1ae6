"""A run's checkpoints are states of its training, along which influence is measured and chosen by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pyeff.errors import UserError
from pyeff.scoring import LESS, read_features, read_scores
from pyeff.train import ScoreConfig, load_config, score_samples, train_run, training_states
from pyeff.train.checkpoint import complete_checkpoints, load_tensors, read_state
from pyeff.train.config import RunConfig, parse_config
from pyeff.train.select import select_samples
from pyeff.train.select_config import SelectConfig


@pytest.fixture(scope="module")
def run(task_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with adapters, which left checkpoints."""
    out: Path = tmp_path_factory.mktemp("influence") / "run"
    adapters = {"lora": {"rank": 2}, "policy": "uniform", "budget": "3e8F"}
    train_run(parse_config({**task_config, **adapters, "out": str(out)}, kind=RunConfig))
    return out


def settings(run: Path, tmp_path: Path, **more: Any) -> ScoreConfig:
    config = load_config(run / "config.yaml")
    values = {
        "model": config.model,
        "checkpoints": [str(path) for path in complete_checkpoints(run / "checkpoints")],
        "data": {
            "pool": [each.model_dump(mode="json") for each in config.data.pool],
            "target": [each.model_dump(mode="json") for each in config.data.target],
            "max_tokens": 32,
        },
        "batch_tokens": 256,
        "sketch_dim": 256,
        "out": str(tmp_path / "scores"),
    }
    return parse_config({**values, **more}, kind=ScoreConfig)


def test_a_state_is_the_checkpoint_with_its_weights_moments_and_rate(run: Path) -> None:
    paths = complete_checkpoints(run / "checkpoints")
    for path, state in zip(paths, training_states(paths), strict=True):
        model, optimizer = state.load()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        weights = load_tensors(path / "weights.safetensors")
        assert weights.keys() == trained.keys()
        assert all(torch.equal(weights[name], p) for name, p in trained.items())
        assert optimizer is not None
        assert len(optimizer.state) == len(trained)
        assert state.learning_rate == read_state(path)["optimizer"]["param_groups"][0]["lr"]
        assert state.name == f"run-{path.name}"


def test_less_is_scored_along_a_run_and_chosen_from(run: Path, tmp_path: Path) -> None:
    config = settings(run, tmp_path, method="less")
    scores = score_samples(config, progress=False)
    count = len(scores)
    assert scores.method.startswith(LESS.label)
    assert len(set(scores.values.tolist())) > count / 2
    assert score_samples(config, resume=True, progress=False).values.tolist() == scores.values.tolist()
    with pytest.raises(UserError, match="holds these scores already"):
        score_samples(config, progress=False)
    assert read_scores(config.out).flops == scores.flops > 0
    matrix = read_features(config.out / "influence")
    best = {"scores": str(config.out), "keep": 0.1, "out": str(tmp_path / "best")}
    chosen = select_samples(parse_config(best, kind=SelectConfig))
    assert chosen.flops == scores.flops
    in_turn = {"features": str(config.out / "influence"), "rule": "round_robin", "k": 5, "out": str(tmp_path / "turn")}
    taken = select_samples(parse_config(in_turn, kind=SelectConfig))
    assert taken.flops == matrix.flops == scores.flops
    assert len(set(taken.ids)) == 5


def test_given_rates_weigh_the_checkpoints(run: Path, tmp_path: Path) -> None:
    paths = complete_checkpoints(run / "checkpoints")
    rates = [2.0**-place for place in range(len(paths))]
    config = settings(run, tmp_path, method="tracin", learning_rates=rates)
    scores = score_samples(config, progress=False)
    assert [f" x {rate:g}" in scores.table["checkpoint"][0].as_py() for rate in rates] == [True] * len(rates)
    with pytest.raises(UserError, match="one for each of"):
        training_states(paths, learning_rates=[*rates, 1.0])


def test_what_is_no_checkpoint_of_this_run_is_refused(run: Path, tmp_path: Path) -> None:
    path = complete_checkpoints(run / "checkpoints")[-1]
    with pytest.raises(UserError, match="no checkpoint of a run"):
        training_states([tmp_path])
    with pytest.raises(UserError, match="but the model is other"):
        training_states([path], model="other")
    copy = tmp_path / "run" / "checkpoints" / path.name
    copy.mkdir(parents=True)
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "optimizer.safetensors").write_bytes((path / "optimizer.safetensors").read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged"):
        training_states([copy])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"method": "less", "checkpoints": []}, "needs checkpoints of a run"),
        ({"method": "tracin", "reduction": "max"}, "reduction must be mean or sum"),
        ({"method": "el2n", "learning_rates": [1.0]}, "learning_rates have no meaning"),
        ({"method": "less", "variant": "sgd"}, "variant"),
    ],
)
def test_settings_that_do_not_fit_are_named(run: Path, tmp_path: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        settings(run, tmp_path, **more)
