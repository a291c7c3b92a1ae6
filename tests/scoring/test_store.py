"""Scores on disk: a killed scoring goes on and ends the same; what is damaged or another's is refused and kept."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from pyeff.errors import UserError
from pyeff.scoring import EL2N, GraNd, Scores, read_scores, store

KILLS: dict[str, list[dict[str, Any]]] = {
    "not killed": [],
    "before the header": [{"at": "header", "n": 1}],
    "in the first batch": [{"at": "batch", "n": 1}],
    "in the middle": [{"at": "batch", "n": 4}],
    "before a rename": [{"at": "rename", "n": 3}],
    "in a part": [{"at": "half", "n": 2}],
    "four times": [{"at": "batch", "n": 3}, {"at": "half", "n": 1}, {"at": "batch", "n": 1}, {"at": "rename", "n": 2}],
}


SCENARIOS = [*(("classifier", name) for name in KILLS), ("language", "not killed"), ("language", "four times")]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("killed")
    paths = {(kind, name): root / kind / name for kind, name in SCENARIOS}
    tasks = [{"path": str(path), "kind": kind, "kills": KILLS[name]} for (kind, name), path in paths.items()]
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_scoring.py")), json.dumps(tasks)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return paths


@pytest.mark.parametrize(("kind", "scenario"), [each for each in SCENARIOS if KILLS[each[1]]])
def test_a_killed_scoring_goes_on_and_ends_with_the_same_table_bit_for_bit(
    killed: dict[tuple[str, str], Path], kind: str, scenario: str
) -> None:
    path = killed[kind, scenario]
    whole, resumed = read_scores(killed[kind, "not killed"]), read_scores(path)
    assert resumed.table.drop(["seconds"]).equals(whole.table.drop(["seconds"]))
    assert not list(path.glob(".partial-*"))
    assert (whole.values == whole.values).all()


def classifier(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(3, 2)


def samples(count: int = 12) -> tuple[list[str], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [f"s{i}" for i in range(count)], torch.randn(count, 3, generator=generator), torch.arange(count) % 2


def score(path: Path | None, **changes: Any) -> Scores:
    options: dict[str, Any] = {"model": classifier(), "dataset": samples(), "batch_size": 2, **changes}
    method = options.pop("method", EL2N())
    return method.score(options.pop("model"), options.pop("dataset"), path=path, progress=False, **options)


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished scoring in six parts."""
    monkeypatch.setattr(store, "PART_SECONDS", 0.0)
    score(tmp_path / "scores")
    assert len(list((tmp_path / "scores").glob("*.parquet"))) == 6
    return tmp_path / "scores"


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def test_a_finished_scoring_is_read_and_not_made_again(parts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(parts)
    monkeypatch.setattr(EL2N, "classify", lambda *_: pytest.fail("scored again"))
    again = score(parts)
    assert again.table.equals(read_scores(parts).table)
    assert content(parts) == before


@pytest.mark.parametrize("directory", [str, Path], ids=["string", "path"])
def test_anything_that_reads_parquet_reads_the_directory(parts: Path, directory: Callable[[Path], Any]) -> None:
    table = pq.read_table(directory(parts)).sort_by("index").replace_schema_metadata(None)
    assert table.equals(read_scores(parts).table)


def test_scores_on_disk_are_those_in_memory(parts: Path) -> None:
    assert score(None).table.drop(["seconds"]).equals(read_scores(parts).table.drop(["seconds"]))
    types = {field.name: str(field.type) for field in read_scores(parts).table.schema}
    assert types == {
        "index": "int64",
        "id": "string",
        "score": "double",
        "flops": "int64",
        "seconds": "double",
        "method": "string",
        "seed": "int64",
        "checkpoint": "string",
    }


def test_any_reader_of_parquet_reads_the_parts(parts: Path) -> None:
    table = pa.concat_tables([pq.read_table(file) for file in sorted(parts.glob("*.parquet"))])
    assert sorted(table["id"].to_pylist()) == sorted(samples()[0])


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model": classifier(1)}, "another model"),
    "another method": ({"method": GraNd()}, "another method"),
    "another variant": ({"method": EL2N(reduction="sum")}, "another method"),
    "another seed": ({"seed": 1}, "another seed"),
    "another checkpoint": ({"checkpoint": "late"}, "another checkpoint"),
    "other batches": ({"batch_size": 3}, "another batching"),
    "fewer samples": ({"dataset": samples(10)}, "another dataset"),
    "other labels": ({"dataset": (*samples()[:2], 1 - samples()[2])}, "another dataset"),
    "other ids": ({"dataset": (samples()[0][::-1], *samples()[1:])}, "another dataset"),
    "not resumed": ({"resume": False}, "holds these scores already"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_directory_of_other_scores_is_refused_and_left_as_it_is(parts: Path, what: str) -> None:
    changes, words = OTHERS[what]
    before = content(parts)
    with pytest.raises(UserError, match=words):
        score(parts, **changes)
    assert content(parts) == before


def test_a_frozen_parameter_makes_another_model(parts: Path) -> None:
    model = classifier()
    model.bias.requires_grad_(False)
    with pytest.raises(UserError, match="another model"):
        score(parts, model=model)


def test_a_directory_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match="holds files but no _header"):
        score(tmp_path)
    assert content(tmp_path) == {"thesis.tex": b"precious"}
    with pytest.raises(UserError, match="cannot be made a directory"):
        score(tmp_path / "thesis.tex" / "scores")
    with pytest.raises(UserError, match="there are no scores"):
        read_scores(tmp_path)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("unpickled",)


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    # Somewhere in the first page: its checksum must tell.
    data[60] ^= 1
    file.write_bytes(bytes(data))


def foreign(file: Path) -> None:
    pq.write_table(pa.table({"a": [1]}), file)


def unmarked(file: Path) -> None:
    pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)


def of_other_scores(file: Path) -> None:
    score(file.parent.parent / "other", model=classifier(1))
    file.write_bytes((file.parent.parent / "other" / file.name).read_bytes())


def there_twice(file: Path) -> None:
    file.with_name("part-000099.parquet").write_bytes(file.read_bytes())


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncated, "part-000002.parquet cannot be read"),
    "empty": (lambda file: file.write_bytes(b""), "part-000002.parquet cannot be read"),
    "a flipped bit": (flipped, "part-000002.parquet cannot be read"),
    "a pickle": (lambda file: file.write_bytes(pickle.dumps(Evil())), "part-000002.parquet cannot be read"),
    "another table": (foreign, "part-000002.parquet is not a table of scores"),
    "without its mark": (unmarked, "part-000002.parquet is not a part"),
    "a part of other scores": (of_other_scores, "part-000002.parquet is a part of other scores"),
    "a part that is there twice": (there_twice, "part-000099.parquet is a part of other scores"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_or_foreign_part_is_refused_in_a_sentence_and_nothing_is_lost(parts: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(parts / "part-000002.parquet")
    before = content(parts)
    for use in (score, read_scores):
        with pytest.raises(UserError, match=words) as error:
            use(parts)
        assert "\n" not in str(error.value)
    assert content(parts) == before


def test_a_part_that_is_taken_away_is_made_again_and_no_other(parts: Path) -> None:
    expected = read_scores(parts).table.drop(["seconds"])
    (parts / "part-000002.parquet").unlink()
    before = content(parts)
    with pytest.raises(UserError, match=r"holds 10 of 12 scores"):
        read_scores(parts)
    assert score(parts).table.drop(["seconds"]).equals(expected)
    after = content(parts)
    assert set(after) - set(before) == {"part-000002.parquet"}
    assert all(after[name] == before[name] for name in before)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": 1}', "[" * 100_000])
def test_a_header_of_nonsense_is_refused_in_a_sentence(parts: Path, text: str) -> None:
    (parts / "_header.json").write_text(text)
    for use in (score, read_scores):
        with pytest.raises(UserError, match=r"_header\.json"):
            use(parts)


def test_an_error_loses_nothing_that_was_scored_before_it(tmp_path: Path) -> None:
    ids, x, y = samples()
    bad = [*zip(ids, x, y, strict=True)]
    bad[9] = (None, *bad[9][1:])
    with pytest.raises(ValueError, match="sample 9 of the dataset has no id"):
        score(tmp_path / "s", dataset=bad)
    kept = pq.read_table(next((tmp_path / "s").glob("*.parquet")))
    assert kept["id"].to_pylist() == ids[:8]
    twice = [(ids[0] if i == 9 else ids[i], x[i], y[i]) for i in range(12)]
    with pytest.raises(ValueError, match="'s0' of sample 9 is there twice"):
        score(tmp_path / "t", dataset=twice)
    with pytest.raises(ValueError, match="'s0' of sample 9 is there twice"):
        score(tmp_path / "t", dataset=twice)  # the first was scored by the attempt before


def test_two_processes_do_not_write_one_directory(parts: Path) -> None:
    with (
        store.ScoreStore(parts, json.loads((parts / "_header.json").read_text()), resume=True),
        pytest.raises(UserError, match="another process"),
    ):
        score(parts)


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, write: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write_atomic", full)
    with pytest.raises(UserError, match="make room"):
        score(tmp_path / "s")


def test_a_table_that_cannot_be_written_is_said_in_a_sentence(parts: Path) -> None:
    with pytest.raises(UserError, match="scores cannot be written to"):
        read_scores(parts).write(parts / "nowhere" / "all.parquet")


def test_a_table_is_written_to_one_file_and_read_again(parts: Path, tmp_path: Path) -> None:
    scores = read_scores(parts)
    scores.write(tmp_path / "all.parquet")
    assert read_scores(tmp_path / "all.parquet").table.equals(scores.table)


def test_integer_ids_stay_integers(tmp_path: Path) -> None:
    _, x, y = samples()
    assert score(tmp_path / "s", dataset=(torch.arange(12) * 7, x, y)).ids == [7 * i for i in range(12)]
    assert read_scores(tmp_path / "s").ids == [7 * i for i in range(12)]


def test_a_header_of_another_version_is_named(tmp_path: Path) -> None:
    path, data = tmp_path / "scores", (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    model = nn.Linear(4, 3)
    EL2N().score(model, data, path=path, progress=False)
    header = json.loads((path / "_header.json").read_text())
    (path / "_header.json").write_text(json.dumps({**header, "format": 2}))
    for use in (lambda: read_scores(path), lambda: EL2N().score(model, data, path=path, progress=False)):
        with pytest.raises(UserError, match="is of format 2, and this version of pyeff knows format 1"):
            use()


def test_a_process_that_came_and_went_before_the_lock_keeps_its_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, data = tmp_path / "scores", (torch.randn(4, 4), torch.tensor([0, 1, 2, 0]))
    first, second = nn.Linear(4, 3), nn.Linear(4, 3)
    module = importlib.import_module("pyeff.scoring.store")

    class After(module.OnlyProcess):
        def __enter__(self) -> None:
            monkeypatch.undo()
            EL2N().score(first, data, path=path, progress=False)
            super().__enter__()

    monkeypatch.setattr(module, "OnlyProcess", After)
    with pytest.raises(UserError, match="holds scores of another model"):
        EL2N().score(second, data, path=path, progress=False)
    assert len(read_scores(path)) == 4


def test_a_directory_that_cannot_be_locked_or_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, model = (torch.randn(4, 4), torch.tensor([0, 1, 2, 0])), nn.Linear(4, 3)
    (tmp_path / "locked" / "_lock").mkdir(parents=True)
    with pytest.raises(UserError, match="locked cannot be written to: Is a directory"):
        EL2N().score(model, data, path=tmp_path / "locked", progress=False)
    module = importlib.import_module("pyeff.scoring.store")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_text_atomic", full)
    with pytest.raises(UserError, match="full cannot be written to: No space left on device"):
        EL2N().score(model, data, path=tmp_path / "full", progress=False)
