"""`pyeff score`: a configuration becomes a table, and what cannot be used one sentence."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pyeff.cli.app import run_app
from pyeff.scoring import read_scores
from pyeff.train import ScoreConfig, load_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "score.yaml"


@pytest.fixture(scope="module")
def tiny() -> ModuleType:
    path = Path(__file__).parents[1] / "train" / "tiny.py"
    spec = importlib.util.spec_from_file_location("pyeff_tests_tiny_for_cli", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(tiny: ModuleType, tmp_path: Path) -> Path:
    for seed in (0, 1):
        tiny.write_tiny_model(tmp_path / f"model-{seed}", initializer_range=0.2 + seed / 10)
    rows = [json.dumps({"prompt": f"{a}+{b}=", "answer": str(a + b)}) for a in range(4) for b in range(5)]
    (tmp_path / "pool.jsonl").write_text("\n".join(rows))
    path = tmp_path / "score.yaml"
    path.write_text(
        f"""
model: {tmp_path / "model-0"}
method: el2n
batch_tokens: 64
data:
  max_tokens: 32
  pool: {{kind: jsonl, path: {tmp_path / "pool.jsonl"}}}
threads: {torch.get_num_threads()}
out: {tmp_path / "out"}
"""
    )
    return path


def test_a_pool_is_scored_shown_and_not_scored_twice(config: Path, tmp_path: Path, capsys) -> None:
    assert run_app(["score", str(config)]) == 0
    shown = capsys.readouterr().out
    scores = read_scores(tmp_path / "out")
    assert len(scores) == 20
    for words in ("EL2N", "20", "median", f"Scores: {tmp_path / 'out'}"):
        assert words in shown
    assert run_app(["score", str(config)]) == 2
    assert "holds these scores already" in capsys.readouterr().err
    assert run_app(["score", str(config), "--resume"]) == 0
    assert read_scores(tmp_path / "out").table.equals(scores.table)


@pytest.mark.parametrize("method", ["grand", "last_layer_grand"])
def test_options_replace_the_settings_of_the_file(config: Path, tmp_path: Path, method: str) -> None:
    assert run_app(["score", str(config), "--method", method, "--out", str(tmp_path / "o"), "--seed", "3"]) == 0
    table = read_scores(tmp_path / "o").table
    assert table["seed"][0].as_py() == 3
    assert "GraNd" in table["method"][0].as_py()


@pytest.mark.parametrize(("method", "name"), [("perplexity", "perplexity"), ("rds_plus", "RDS+"), ("bm25", "BM25")])
def test_the_baselines_are_scored_by(config: Path, tmp_path: Path, method: str, name: str) -> None:
    target = f"  target: {{kind: jsonl, path: {tmp_path / 'target.jsonl'}}}\n"
    (tmp_path / "target.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}')
    config.write_text(config.read_text().replace("  max_tokens: 32\n", f"  max_tokens: 32\n{target}"))
    assert run_app(["score", str(config), "--method", method]) == 0
    scores = read_scores(tmp_path / "out")
    assert len(scores) == 20
    assert scores.method.startswith(name)
    assert len(set(scores.values.tolist())) > 1
    assert run_app(["score", str(config), "--method", method]) == 2
    assert run_app(["score", str(config), "--method", method, "--resume"]) == 0
    assert read_scores(tmp_path / "out").values.tolist() == scores.values.tolist()


@pytest.mark.parametrize(
    ("method", "more", "words"),
    [
        ("bm25", "", "needs data.target"),
        ("rds_plus", "", "needs data.target"),
        ("random", "reduction: sum\n", "reduction has no meaning"),
        ("random", "checkpoints: [x]\n", "leave checkpoints out"),
    ],
)
def test_what_a_baseline_lacks_is_said(config: Path, capsys, method: str, more: str, words: str) -> None:
    config.write_text(config.read_text() + more)
    assert run_app(["score", str(config), "--method", method]) == 2
    assert words in capsys.readouterr().err


def test_checkpoints_are_averaged(config: Path, tmp_path: Path, capsys) -> None:
    names = [str(tmp_path / f"model-{seed}") for seed in (0, 1)]
    config.write_text(config.read_text() + f"checkpoints: {json.dumps(names)}\n")
    assert run_app(["score", str(config)]) == 0
    mean = read_scores(tmp_path / "out")
    parts = [read_scores(path) for path in sorted((tmp_path / "out").iterdir()) if path.is_dir()]
    assert len(parts) == 2
    assert mean.values.tolist() == ((parts[0].values + parts[1].values) / 2).tolist()
    assert "mean of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("method: el2n", "method: loss"),
        ("method: el2n", "methode: el2n"),
        ("batch_tokens: 64", "batch_tokens: 8"),
        ("kind: jsonl", "kind: csv"),
        ("model-0", "model-9"),
        ("pool.jsonl", "nowhere.jsonl"),
        ("max_tokens: 32", "max_tokens: 4"),
    ],
)
def test_a_bad_configuration_ends_in_one_sentence(config: Path, capsys, changed: str, words: str) -> None:
    config.write_text(config.read_text().replace(changed, words))
    assert run_app(["score", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1


def test_a_maximum_has_no_gradient(config: Path, capsys) -> None:
    config.write_text(config.read_text() + "reduction: max\n")
    assert run_app(["score", str(config), "--method", "grand"]) == 2
    assert "reduction must be mean or sum" in capsys.readouterr().err


def test_the_example_scores_the_pool_of_the_demo() -> None:
    settings = load_config(EXAMPLE, kind=ScoreConfig)
    demo = load_config(EXAMPLE.with_name("smollm2.yaml"))
    assert settings.data.pool == demo.data.pool
    assert settings.model == demo.model


def test_an_interrupted_scoring_exits_with_130_and_says_how_to_go_on(config: Path, monkeypatch, capsys) -> None:
    import pyeff.train.score

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pyeff.train.score, "score_samples", stop)
    assert run_app(["score", str(config)]) == 130
    assert "--resume goes on" in capsys.readouterr().err
