"""Features on disk are what was put in up to the stated rounding, whole after kills, and no other store's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pyeff.errors import UserError
from pyeff.scoring import (
    EL2N,
    FeatureStore,
    TargetSimilarities,
    feature_store,
    read_features,
    read_scores,
    target_scores,
)
from pyeff.scoring.quantised import FeatureType, decode_rows, encode_rows, row_bytes
from pyeff.selection import Similarities, bids, facility_location, kmeans, per_sample, round_robin

TYPES: list[FeatureType] = list(get_args(FeatureType))
KILLED = Path(__file__).with_name("killed_features.py")

rows_of_floats = arrays(
    np.float32, st.tuples(st.integers(0, 5), st.integers(1, 19)), elements=st.floats(-(2.0**100), 2.0**100, width=32)
)


@given(rows_of_floats, st.sampled_from(TYPES))
def test_a_row_is_kept_up_to_the_rounding_of_its_type(x: np.ndarray, dtype: FeatureType) -> None:
    codes, scales = encode_rows(x, dtype)
    assert codes.shape == (len(x), row_bytes(x.shape[1], dtype))
    back = decode_rows(codes, scales, x.shape[1], dtype).astype(np.float64)
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float64)
    tiny = 2 * float(np.finfo(np.float32).smallest_subnormal)
    exact = x.astype(np.float64)
    if dtype == "float32":
        assert (back == exact).all()
    elif dtype == "float16":
        # Half a unit of the last place, or of the subnormals below the scale; products round to float32 once more.
        allowed = np.abs(exact) * 2.0**-11 + largest * 2.0**-25
        assert (np.abs(back - exact) <= allowed * (1 + 2**-10) + tiny).all()
    elif dtype == "int8":
        assert (np.abs(back - exact) <= largest / 254 * (1 + 2**-20) + 127 * tiny).all()
    else:
        mean = np.abs(exact).mean(axis=1, keepdims=True)
        assert (np.abs(np.abs(back) - mean) <= mean * 2.0**-22 + tiny).all()
        assert (np.sign(back) * exact >= 0).all()


@pytest.mark.parametrize("dtype", TYPES)
def test_what_is_not_finite_is_undefined_and_nothing_else_is(dtype: FeatureType) -> None:
    x = np.array([[1.0, -2.0, 0.5], [np.nan, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, np.inf, 1.0]], dtype=np.float32)
    back = decode_rows(*encode_rows(x, dtype), 3, dtype)
    assert np.isnan(back[[1, 3]]).all()
    assert np.isfinite(back[[0, 2]]).all()
    assert (back[2] == 0).all()


def filled(path: Path | None, x: np.ndarray, *, dtype: FeatureType = "float32", step: int = 7, **header: Any) -> Any:
    with FeatureStore(path, {"method": "noise", "samples": len(x), **header}, dim=x.shape[1], dtype=dtype) as store:
        for number, first in enumerate(range(0, len(x), step)):
            block = x[first : first + step]
            store.append(
                number, [f"s{first + i}" for i in range(len(block))], torch.from_numpy(block), flops=len(block)
            )
        return store.features()


def noise(n: int = 60, dim: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


@pytest.mark.parametrize("dtype", TYPES)
def test_features_on_disk_are_those_in_memory_by_block_and_by_row(
    tmp_path: Path, dtype: FeatureType, monkeypatch
) -> None:
    x = noise()
    x[5] = np.nan
    expected = decode_rows(*encode_rows(x, dtype), x.shape[1], dtype)
    # Parts of 14 rows, groups of 3.
    monkeypatch.setattr(feature_store, "PART_ROWS", 14)
    monkeypatch.setattr(feature_store, "GROUP_BYTES", 3 * 4 * 12)
    filled(tmp_path / "f", x, dtype=dtype)
    assert len(list((tmp_path / "f").glob("part-*.parquet"))) == 5
    for found in (read_features(tmp_path / "f"), filled(None, x, dtype=dtype)):
        assert found.shape == (60, 12)
        assert found.ids == [f"s{i}" for i in range(60)]
        assert found.index.tolist() == list(range(60))
        assert found.flops == 60
        firsts, blocks = zip(*found.blocks(), strict=True)
        assert list(firsts) == np.cumsum([0, *map(len, blocks[:-1])]).tolist()
        np.testing.assert_array_equal(np.concatenate(blocks), expected)
        some = np.array([59, 0, 5, 31, 30, 0])
        np.testing.assert_array_equal(found.rows(some), expected[some])


@pytest.mark.parametrize("dtype", TYPES)
def test_a_row_takes_the_bytes_that_are_promised(tmp_path: Path, dtype: FeatureType) -> None:
    x = noise(200, 1024)
    filled(tmp_path / "f", x, dtype=dtype, step=200)
    size = sum(path.stat().st_size for path in (tmp_path / "f").glob("*.parquet"))
    # Ids, costs, scales and the file's own description.
    assert 0 <= size - 200 * row_bytes(1024, dtype) < 200 * 64 + 8192


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("killed") / "features"
    done = subprocess.run(
        [sys.executable, str(KILLED), str(path), "0", "4", "4", "8"],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return path


def test_a_killed_store_goes_on_and_ends_with_the_same_features(killed: Path) -> None:
    spec = importlib.util.spec_from_file_location("pyeff_tests_killed_features", KILLED)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    made = [script.batch(number) for number in range(script.BATCHES)]
    x = np.concatenate([rows for _, rows in made])
    found = read_features(killed)
    assert found.ids == [name for names, _ in made for name in names]
    expected = decode_rows(*encode_rows(x, "int8"), script.DIM, "int8")
    np.testing.assert_array_equal(found.rows(np.arange(len(found))), expected)
    assert not list(killed.glob(".partial-*"))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "other"}, "features of another method"),
        ({"sketch": {"seed": 1}}, r"features of another sketch\.seed \(0 there, 1 here\)"),
        ({"dim": 13}, "features of another dim"),
        ({"dtype": "int8"}, "features of another dtype"),
        ({"resume": False}, "holds these features already"),
    ],
)
def test_a_store_of_other_features_is_refused_and_left_as_it_is(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    filled(tmp_path / "f", noise(), sketch={"seed": 0})
    before = content(tmp_path / "f")
    options = {"dim": 12, "dtype": "float32", **{k: v for k, v in changes.items() if k in ("dim", "dtype", "resume")}}
    header = {"method": "noise", "samples": 60, "sketch": {"seed": 0}}
    header |= {k: v for k, v in changes.items() if k in header}
    with pytest.raises(UserError, match=words), FeatureStore(tmp_path / "f", header, **options):
        pass
    assert content(tmp_path / "f") == before


def damage(path: Path, what: str) -> None:
    part = sorted(path.glob("part-*"))[0]
    data = part.read_bytes()
    if what == "truncated":
        part.write_bytes(data[: len(data) // 2])
    elif what == "foreign":
        part.write_bytes(b"not a table at all")
    elif what == "flipped":
        middle = data.index(np.float32(noise()[3, 4]).tobytes())
        part.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif what == "missing":
        part.unlink()
    elif what == "another table":
        pq.write_table(pq.read_table(part).select(["id", "index"]), part)
    elif what == "a part of others":
        filled(path.parent / "g", noise(seed=1), other=1)
        part.write_bytes(sorted((path.parent / "g").glob("part-*"))[0].read_bytes())
    else:
        (path / "_header.json").write_text(what)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "cannot be read"),
        ("foreign", "cannot be read"),
        ("flipped", "cannot be read"),
        ("missing", "holds 0 of 60 features"),
        ("another table", "does not hold features"),
        ("a part of others", "part of other features"),
        ("{", "_header.json cannot be read"),
        ("[]", "is not the header of features"),
        (
            json.dumps({"format": 1, "kind": "features", "method": "x", "dtype": "int4", "dim": 3}),
            "is not the header of features",
        ),
        (json.dumps({"format": 1, "method": "EL2N"}), "holds scores, not features"),
    ],
)
def test_a_damaged_or_foreign_store_is_named_and_left_as_it_is(tmp_path: Path, what: str, words: str) -> None:
    filled(tmp_path / "f", noise())
    damage(tmp_path / "f", what)
    before = content(tmp_path / "f")
    with pytest.raises(UserError, match=words):
        read_features(tmp_path / "f").rows(np.arange(60))
    assert content(tmp_path / "f") == before


def test_scores_are_no_features_and_features_no_scores(tmp_path: Path) -> None:
    filled(tmp_path / "f", noise())
    with pytest.raises(UserError, match="holds features, not scores"):
        read_scores(tmp_path / "f")
    EL2N().score(
        torch.nn.Linear(2, 2), (torch.zeros(3, 2), torch.tensor([0, 1, 0])), path=tmp_path / "s", progress=False
    )
    with pytest.raises(UserError, match="holds scores, not features"):
        read_features(tmp_path / "s")
    with pytest.raises(UserError, match="there are no features"):
        read_features(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, ["a", "b", "c"], np.ones((3, 2))), "batch 0 has its features already"),
        ((1, ["a"], np.ones((1, 2))), "'a' has its features already"),
        ((1, ["c", "c"], np.ones((2, 2))), "is there twice"),
        ((1, ["c", None], np.ones((2, 2))), "sample 1 of the dataset has no id"),
        ((1, ["c", ""], np.ones((2, 2))), "has no id"),
        ((1, ["c", "d"], np.ones((2, 3))), r"features must be \[2, 2\]"),
        ((1, ["c"], np.ones((2, 2))), r"features must be \[1, 2\]"),
        ((1, [7], np.ones((1, 2))), "all strings or all integers"),
        ((-1, ["c"], np.ones((1, 2))), "batch must be an int of at least 0"),
        ((1.0, ["c"], np.ones((1, 2))), "batch must be an int of at least 0"),
        ((1, ["c", "d"], np.ones((2, 2)), {"flops": [1]}), "flops must be one for each of the 2 ids, got 1"),
        ((1, ["c", "d"], np.ones((2, 2)), {"seconds": [1.0]}), "seconds must be one for each of the 2 ids, got 1"),
        ((1, ["c"], np.ones((1, 2)), {"index": ["first"]}), "invalid literal"),
    ],
)
def test_a_batch_that_cannot_be_added_is_refused_and_what_is_there_is_kept(tmp_path, arguments, words) -> None:
    with FeatureStore(tmp_path / "f", {"method": "m"}, dim=2) as store:
        store.append(0, ["a", "b"], np.ones((2, 2)))
        with pytest.raises(ValueError, match=words):
            store.append(*arguments[:3], **dict(*arguments[3:]))
        # NumPy's numbers are numbers.
        store.append(1, ["c"], np.ones((1, 2)), index=np.arange(2, 3), flops=np.int64(8), seconds=np.float32(0.5))
    found = read_features(tmp_path / "f")
    assert (found.ids, found.index.tolist(), found.flops, found.seconds) == (["a", "b", "c"], [0, 1, 2], 8, 0.5)
    with pytest.raises(ValueError, match="is not open"):
        store.append(2, ["d"], np.ones((1, 2)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 0}, "dim must be"),
        ({"dtype": "int4"}, "dtype must be one of"),
        ({"header": {}}, "must hold a method"),
        ({"header": {"method": "m", "rate": float("nan")}}, "must be JSON"),
    ],
)
def test_a_store_that_cannot_be_made_is_refused(changes: dict[str, Any], words: str) -> None:
    options = {"header": {"method": "m"}, "dim": 2, **changes}
    with pytest.raises(ValueError, match=words):
        FeatureStore(None, options.pop("header"), **options)


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_similarities_of_stores_are_those_of_arrays(tmp_path: Path, cosine: bool, center: bool) -> None:
    x, y = noise(), noise(5, seed=1)
    x[9], x[11] = np.nan, 0.0
    pool, targets = filled(tmp_path / "x", x), filled(None, y)
    found = TargetSimilarities(pool, targets, cosine=cosine, center=center)
    mean = np.nanmean(x.astype(np.float64), axis=0) if center else np.zeros(12)
    exact = Similarities(x - mean, y - mean, cosine=cosine).rows(np.arange(60))
    peer = np.array([[np.dot(a, b) for b in (y - mean).astype(np.float32)] for a in (x - mean).astype(np.float32)])
    whole = np.concatenate([block for _, block in found.blocks()])
    # 12 products and sums, two norms and the means, each rounded to float32.
    allowed = 32 * np.finfo(np.float32).eps * np.nanmax(np.abs(peer))
    np.testing.assert_allclose(whole, exact, rtol=0, atol=allowed)
    np.testing.assert_array_equal(np.isnan(found.rows(np.array([9, 3]))).all(axis=1), [True, False])


def test_every_rule_takes_a_store_and_chooses_as_from_an_array(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(feature_store, "GROUP_BYTES", 96)
    x, y = noise(), noise(4, seed=1)
    pool = filled(tmp_path / "x", x)
    similar = TargetSimilarities(pool, filled(None, y))
    array = np.concatenate([block for _, block in similar.blocks()])
    for rule in (round_robin, bids, lambda s, k: facility_location(s, k).indices):
        assert rule(similar, 12).tolist() == rule(array, 12).tolist()
    assert kmeans(pool, 4, seed=2).tolist() == kmeans(x, 4, seed=2).tolist()


def test_scores_by_targets_stand_in_the_order_of_the_data_set_with_what_they_cost() -> None:
    x, y = noise(6), noise(2, seed=1)
    with FeatureStore(None, {"method": "noise"}, dim=12, dtype="float32") as store:
        store.append(0, ["d", "a", "f"], x[[3, 0, 5]], index=[3, 0, 5], flops=[30, 0, 50], seconds=3.0)
        store.append(1, ["b", "c", "e"], x[[1, 2, 4]], index=[1, 2, 4], flops=[10, 20, 40], seconds=3.0)
        pool = store.features()
    targets = filled(None, y)
    scores = target_scores(TargetSimilarities(pool, targets), pool, targets, method="noise, largest cosine")
    assert scores.ids == list("abcdef")
    np.testing.assert_allclose(scores.values, per_sample(Similarities(x, y)), atol=16 * np.finfo(np.float32).eps)
    assert scores.flops == 150 + targets.flops + 6 * 2 * 2 * 12
    assert scores.seconds >= 6.0


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (filled(None, noise(3, 11)), "agree in their dim, got 12 and 11"),
        (filled(None, noise(3), method="others"), "agree in their method"),
        (filled(None, noise(3), sketch={"seed": 1, "variant": "gradient"}), "agree in their sketch"),
        (filled(None, noise(3) * np.nan), "targets must be finite, but 's0' is not"),
        (filled(None, noise(0)), "at least one row"),
    ],
)
def test_targets_of_another_kind_are_refused(targets: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TargetSimilarities(filled(None, noise()), targets)


def test_sketches_of_updates_are_compared_with_those_of_gradients() -> None:
    pool = filled(None, noise(), sketch={"seed": 1, "variant": "adamw"})
    targets = filled(None, noise(3, seed=1), sketch={"seed": 1, "variant": "gradient"})
    assert TargetSimilarities(pool, targets).shape == (60, 3)


def test_scores_are_formed_without_holding_the_features(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(feature_store, "GROUP_BYTES", 1 << 18)
    n, dim = 2000, 1024
    filled(tmp_path / "x", noise(n, dim), dtype="float16", step=500)
    similar = TargetSimilarities(read_features(tmp_path / "x"), filled(None, noise(3, dim)))
    arrow_memory, most = pa.default_memory_pool(), 0
    before = arrow_memory.bytes_allocated()
    tracemalloc.start()
    try:
        for _ in similar.blocks():
            most = max(most, arrow_memory.bytes_allocated() - before)
        round_robin(similar, 100)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Some copies of a group of 64 rows, of 2000.
    assert peak + most < 4 * n * dim / 4


@pytest.mark.gpu
@pytest.mark.parametrize("center", [True, False])
def test_similarities_formed_on_a_gpu_are_those_of_a_cpu(center: bool) -> None:
    pool, targets = filled(None, noise(300, 64), dtype="int8"), filled(None, noise(5, 64, seed=1))
    here, there = (TargetSimilarities(pool, targets, center=center, device=d) for d in ("cpu", "cuda"))
    rows = np.arange(300)
    # Cosines: 64 products and sums, rounded to float32 in any order.
    np.testing.assert_allclose(there.rows(rows), here.rows(rows), rtol=0, atol=64 * np.finfo(np.float32).eps)
