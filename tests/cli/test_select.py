"""`pyeff select`: scores in, subset out, with what it cost; and what cannot be used is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from pyeff.cli.app import run_app
from pyeff.data import JsonlSource, load_samples
from pyeff.scoring import BM25, FeatureStore, RandomScore, TargetSimilarities, read_features
from pyeff.selection import SelectionPayBack, bids, round_robin, top_k

N, DIM = 24, 6


def write_jsonl(path: Path, prompts: list[str]) -> dict[str, Any]:
    rows = [{"prompt": p, "answer": f"answer {i}", "source": "ab"[i % 3 == 0]} for i, p in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"kind": "jsonl", "path": str(path), "source_column": "source"}


def write_features(path: Path, rows: np.ndarray, ids: list[Any], **header: Any) -> None:
    with FeatureStore(path, {"method": "noise", **header}, dim=rows.shape[1], dtype="float32") as store:
        store.append(0, ids, rows, flops=1000, seconds=2.0)


@pytest.fixture
def world(tmp_path: Path) -> dict[str, Any]:
    """A pool with random scores, features and those of targets; returns the settings of a selection."""
    pool = write_jsonl(tmp_path / "pool.jsonl", [f"question {i}" for i in range(N)])
    samples = load_samples(JsonlSource(**pool))
    RandomScore().score(None, samples, path=tmp_path / "scores", progress=False)
    rng = np.random.default_rng(0)
    write_features(tmp_path / "features", rng.normal(size=(N, DIM)), [s.id for s in samples])
    write_features(tmp_path / "targets", rng.normal(size=(3, DIM)), ["t0", "t1", "t2"])
    return {"scores": str(tmp_path / "scores"), "k": 6, "data": {"pool": pool}, "out": str(tmp_path / "out")}


def select(tmp_path: Path, settings: dict[str, Any], *options: str) -> int:
    (tmp_path / "select.yaml").write_text(yaml.safe_dump(settings))
    return run_app(["select", str(tmp_path / "select.yaml"), *options])


def of_features(tmp_path: Path, world: dict[str, Any], **changes: Any) -> dict[str, Any]:
    where = {"features": str(tmp_path / "features"), "targets": str(tmp_path / "targets")}
    return {**{k: v for k, v in world.items() if k != "scores"}, **where, **changes}


def chosen(tmp_path: Path) -> list[Any]:
    return pq.read_table(tmp_path / "out" / "subset.parquet")["id"].to_pylist()


def error_of(capsys: Any) -> str:
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    return said


def test_the_best_are_written_with_their_texts_and_the_selection_is_not_made_twice(tmp_path, world, capsys) -> None:
    assert select(tmp_path, world) == 0
    shown = capsys.readouterr().out
    for words in ("6 of 24 samples by top_k", "random", "not given", "Subset:"):
        assert words in shown
    table = pq.read_table(tmp_path / "out" / "subset.parquet")
    samples = load_samples(JsonlSource(**world["data"]["pool"]))
    values = RandomScore().score(None, samples, progress=False).values
    best = top_k(values, 6)
    assert table["index"].to_pylist() == best.tolist()
    assert table["score"].to_pylist() == values[best].tolist()
    again = load_samples(JsonlSource(path=tmp_path / "out" / "subset.jsonl", source_column="source"))
    assert [(s.prompt, s.answer, s.source) for s in again] == [
        (samples[i].prompt, samples[i].answer, samples[i].source) for i in best
    ]
    before = (tmp_path / "out" / "subset.parquet").read_bytes()
    assert select(tmp_path, world, "--keep", "0.5") == 2
    assert "holds a selection already" in error_of(capsys)
    assert (tmp_path / "out" / "subset.parquet").read_bytes() == before
    assert select(tmp_path, world, "--keep", "0.5", "--force") == 0
    assert len(chosen(tmp_path)) == 12


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("round_robin", {}),
        ("bids", {}),
        ("top_k", {}),
        ("boltzmann", {"temperature": 0.5}),
        ("random", {}),
        ("facility_location", {}),
        ("facility_location", {"targets": None}),
        ("stochastic_greedy", {"targets": None, "represented": 10}),
        ("kmeans_balanced", {"targets": None, "clusters": 3}),
        ("kmeans_balanced", {"targets": None}),
        ("round_robin", {"targets": None}),
    ],
)
def test_every_rule_chooses_from_features_and_repeats_itself(tmp_path, world, rule, more) -> None:
    settings = {k: v for k, v in of_features(tmp_path, world, rule=rule, **more).items() if v is not None}
    assert select(tmp_path, settings) == 0
    first = chosen(tmp_path)
    assert len(set(first)) == 6
    assert select(tmp_path, settings, "--force") == 0
    assert chosen(tmp_path) == first
    features = read_features(tmp_path / "features")
    similar = TargetSimilarities(features, read_features(tmp_path / "targets"))
    if rule in ("round_robin", "bids"):
        library = (round_robin if rule == "round_robin" else bids)(similar if not more else features, 6)
        assert first == [features.ids[row] for row in library]


def test_costs_are_those_of_the_features_and_the_comparison_and_the_table_says_when_they_are_back(
    tmp_path, world, capsys
) -> None:
    training = {"flops": 10_000.0, "seconds": 2.0, "random_fraction": 0.5}
    assert select(tmp_path, of_features(tmp_path, world, rule="round_robin", training=training)) == 0
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "selection.json").read_text())
    cost = 2000 + 2 * N * 3 * DIM
    assert report["flops"] == cost
    expected = SelectionPayBack(float(cost), 10_000.0, 6 / N, 0.5)
    assert report["pay_back"]["flops"]["runs"] == expected.runs == -(-cost // 2500)
    assert report["pay_back"]["seconds"]["cost"] >= 4.0
    assert f"{expected.runs} run" in shown
    assert "50 % of the pool drawn at random" in shown


@pytest.mark.parametrize(
    ("more", "products"),
    [
        ({"rule": "facility_location", "represented": 10}, 2 * N * 10 * DIM),
        ({"rule": "kmeans_balanced", "clusters": 3}, 2 * N * 3 * DIM * 21),
        ({"rule": "random"}, 0),
    ],
)
def test_what_a_rule_multiplies_is_charged(tmp_path, world, more, products) -> None:
    settings = of_features(tmp_path, world, **more)
    settings.pop("targets")
    assert select(tmp_path, settings) == 0
    assert json.loads((tmp_path / "out" / "selection.json").read_text())["flops"] == 1000 + products


def test_sources_give_their_quotas(tmp_path, world) -> None:
    for quotas, counts in (("balanced", {"a": 3, "b": 3}), ({"a": 5, "b": 1}, {"a": 5, "b": 1})):
        assert select(tmp_path, {**world, "quotas": quotas}, "--force") == 0
        report = json.loads((tmp_path / "out" / "selection.json").read_text())
        assert {name: kept for name, (kept, _) in report["by_source"].items()} == counts


def test_sources_with_equal_scores_are_not_drawn_alike(tmp_path, world) -> None:
    pool = world["data"]["pool"]
    rows = [json.loads(line) for line in (tmp_path / "pool.jsonl").read_text().splitlines()]
    texts = "".join(json.dumps({**row, "source": "ab"[i < N // 2]}) + "\n" for i, row in enumerate(rows))
    (tmp_path / "pool.jsonl").write_text(texts)
    # The sources are the halves of the pool, which are scored alike.
    halves = np.tile(np.linspace(0.0, 1.0, N // 2), 2)[:, None]
    write_features(tmp_path / "values", halves, [s.id for s in load_samples(JsonlSource(**pool))])
    write_features(tmp_path / "one", np.ones((1, 1)), ["t"])
    changes = {
        "features": str(tmp_path / "values"),
        "targets": str(tmp_path / "one"),
        "cosine": False,
        "data": {"pool": pool},
    }
    settings = of_features(tmp_path, world, **changes, rule="boltzmann", quotas="balanced", k=2, temperature=10.0)
    alike = 0
    for seed in range(8):
        assert select(tmp_path, {**settings, "seed": seed}, "--force") == 0
        first, second = (int(name.rpartition(":")[2]) for name in chosen(tmp_path))
        alike += abs(first - second) == N // 2
    # Independent draws are alike once in about twelve: all eight, once in 12^8.
    assert alike < 8


def test_what_the_holdout_asks_is_left_out_and_a_target_in_the_holdout_refused(tmp_path, world, capsys) -> None:
    holdout = write_jsonl(tmp_path / "holdout.jsonl", [f"question {i}" for i in range(20)])
    data = {**world["data"], "holdout": holdout}
    assert select(tmp_path, {**world, "data": data, "k": 4}) == 0
    assert sorted(pq.read_table(tmp_path / "out" / "subset.parquet")["index"].to_pylist()) == [20, 21, 22, 23]
    capsys.readouterr()
    assert select(tmp_path, {**world, "data": data, "k": 5}, "--force") == 2
    assert "only 4 of 24 can be chosen: 0 have no finite score and 20 share a prompt" in error_of(capsys)
    target = write_jsonl(tmp_path / "target.jsonl", ["new", "question 3"])
    assert select(tmp_path, {**world, "data": {**data, "target": target}}, "--force") == 2
    assert "has the prompt of holdout sample" in error_of(capsys)


@pytest.mark.parametrize("what", ["another order", "another answer"])
def test_a_pool_that_has_changed_since_it_was_scored_is_refused(tmp_path, world, capsys, what) -> None:
    file = tmp_path / "pool.jsonl"
    lines = file.read_text().splitlines()
    changed = lines[::-1] if what == "another order" else [lines[0].replace("answer 0", "another"), *lines[1:]]
    file.write_text("\n".join(changed))
    assert select(tmp_path, world) == 2
    assert "data.pool holds other texts than" in error_of(capsys)
    assert not (tmp_path / "out").exists()


def test_bm25_scores_for_each_target_are_chosen_from_in_turn(tmp_path, world) -> None:
    samples = load_samples(JsonlSource(**world["data"]["pool"]))
    matrix = BM25(samples[:2]).matrix(samples)
    write_features(tmp_path / "bm25", matrix, [s.id for s in samples])
    settings = {**of_features(tmp_path, world, rule="round_robin", features=str(tmp_path / "bm25"))}
    settings.pop("targets")
    assert select(tmp_path, settings) == 0
    assert chosen(tmp_path) == [samples[i].id for i in round_robin(matrix, 6)]


def test_samples_without_a_finite_score_are_never_chosen(tmp_path, world, capsys) -> None:
    rows = np.random.default_rng(1).normal(size=(N, DIM))
    rows[::2] = np.nan
    ids = read_features(tmp_path / "features").ids
    write_features(tmp_path / "half", rows, ids)
    settings = of_features(tmp_path, world, features=str(tmp_path / "half"), k=12)
    assert select(tmp_path, settings) == 0
    assert set(chosen(tmp_path)) == set(ids[1::2])
    assert "without a finite score" in capsys.readouterr().out
    assert select(tmp_path, {**settings, "k": 13}, "--force") == 2
    assert "12 have no finite score" in error_of(capsys)


def test_scores_that_are_all_alike_are_refused(tmp_path, world, capsys) -> None:
    ids = read_features(tmp_path / "features").ids
    write_features(tmp_path / "zero", np.zeros((N, DIM)), ids)
    for rule in ("top_k", "bids", "facility_location"):
        assert select(tmp_path, of_features(tmp_path, world, features=str(tmp_path / "zero"), rule=rule)) == 2
        words = "may be all zero" if rule == "facility_location" else "nothing to choose by"
        assert words in error_of(capsys)


def other_pool(tmp_path: Path, world: dict[str, Any]) -> None:
    world["data"] = {"pool": write_jsonl(tmp_path / "others.jsonl", ["something"])}


def truncated(tmp_path: Path, world: dict[str, Any]) -> None:
    part = next((tmp_path / "scores").glob("part-*"))
    part.write_bytes(part.read_bytes()[:100])


def full_of_files(tmp_path: Path, world: dict[str, Any]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 25}, "k is 25, but the pool has 24 samples"),
        ({"k": None}, "either keep"),
        ({"keep": 0.5}, "either keep"),
        ({"scores": "nowhere"}, "there are no scores at nowhere"),
        ({"scores": None}, "scores or features must be given"),
        ({"rule": "best"}, "rule: Input should be"),
        ({"rule": "bids"}, "rule bids needs features"),
        ({"ruel": "top_k"}, "did you mean 'rule'"),
        ({"data": None, "quotas": "balanced"}, "quotas need data.pool"),
        ({"quotas": {"a": 6, "z": 0}}, "'z', which is no group"),
        ({"quotas": {"a": 1}}, "add up to 1"),
        (other_pool, "name the pool that was scored"),
        (truncated, "cannot be read"),
        (full_of_files, "holds files but no selection.json"),
    ],
)
def test_what_cannot_be_used_ends_in_one_sentence_and_nothing_is_written(
    tmp_path, world, capsys, change, words
) -> None:
    if callable(change):
        change(tmp_path, world)
    else:
        world = {k: v for k, v in {**world, **change}.items() if v is not None}
    assert select(tmp_path, world) == 2
    assert words in error_of(capsys)
    assert not (tmp_path / "out" / "selection.json").exists()


def test_a_selection_pays_back_when_runs_have_saved_its_cost() -> None:
    for cost, full, fraction, reference in ((10.0, 3.0, 0.2, 1.0), (0.0, 5.0, 0.5, 1.0), (7.0, 7.0, 0.0, 1.0)):
        back = SelectionPayBack(cost, full, fraction, reference)
        assert back.runs * back.saved >= back.cost
        assert back.runs == 1 or (back.runs - 1) * back.saved < back.cost
        assert SelectionPayBack(cost, max(back.pays_from, 1e-9) * (1 + 1e-12), fraction, reference).runs == 1
    assert SelectionPayBack(1.0, 1.0, 0.5, 0.5).runs == float("inf")
    with pytest.raises(ValueError, match="fraction must be"):
        SelectionPayBack(1.0, 1.0, 1.5)
    with pytest.raises(ValueError, match="cost must be"):
        SelectionPayBack(float("nan"), 1.0, 0.5)


def test_the_torch_generator_is_left_alone(tmp_path, world) -> None:
    state = torch.random.get_rng_state()
    assert select(tmp_path, {**world, "rule": "random"}) == 0
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_example_chooses_from_what_the_example_of_scoring_writes() -> None:
    from pyeff.train import ScoreConfig, load_config
    from pyeff.train.select_config import SelectConfig

    examples = Path(__file__).parents[2] / "examples"
    settings = load_config(examples / "select.yaml", kind=SelectConfig)
    scoring = load_config(examples / "score.yaml", kind=ScoreConfig)
    assert settings.scores == scoring.out
    assert settings.data is not None
    assert settings.data.pool == scoring.data.pool
