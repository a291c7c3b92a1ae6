"""`examples/data_diet.py` keeps its accounts, goes on where it stopped, and its page shows what its results hold."""

from __future__ import annotations

import doctest
import gzip
import json
import math
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import data_diet
import data_diet_report
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pyeff.errors import UserError
from pyeff.scoring import GraNd, read_scores

ROOT = Path(__file__).resolve().parents[2]
TRAIN, TEST, BATCH = 192, 50, 16
TINY = ["--epochs", "5", "--seeds", "2", "--replicates", "3", "--batch-size", str(BATCH), "--workers", "0"]


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_images(folder: Path) -> None:
    """Ten kinds of noisy stripes; some files gzipped, some not."""
    random = np.random.default_rng(0)
    for part, count in (("train", TRAIN), ("t10k", TEST)):
        labels = random.integers(0, 10, count)
        stripes = 100 * (np.arange(28) % 10 == labels[:, None])[:, :, None]
        pixels = stripes + random.integers(0, 100, (count, 28, 28))
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels), 1))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished tiny experiment: (folder of the images, folder of the results)."""
    folder, out = tmp_path_factory.mktemp("images"), tmp_path_factory.mktemp("results")
    write_images(folder)
    assert data_diet.main(["--data", str(folder), "--out", str(out), "--label-noise", "0.25", *TINY]) == 0
    return folder, out


@pytest.fixture
def results(experiment: tuple[Path, Path]) -> dict[str, Any]:
    return json.loads((experiment[1] / "results.json").read_text())


def of(results: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    return [run for run in results["runs"] if all(run[key] == value for key, value in wanted.items())]


def spent(run: dict[str, Any]) -> int:
    return run["flops_scoring_training"] + run["flops_scoring_passes"] + run["flops_training"]


def test_equal_total_flops_are_equal_to_one_step(results: dict[str, Any]) -> None:
    for regime, share in (("whole", 1), ("half", 2)):
        budget = results["budget_flops"] // share
        trained = [run for run in of(results, regime=regime) if run["accuracy"] is not None]
        assert {run["arm"] for run in trained} >= {"full", "random", "el2n-1"} | (
            {"el2n-3", "grand-3"} if share == 1 else set()
        )
        assert all(budget - results["step_flops"] < spent(run) <= budget for run in trained)


def test_an_arm_whose_scoring_costs_more_than_the_budget_has_no_accuracy(results: dict[str, Any]) -> None:
    runs = of(results, arm="el2n-3", regime="half")
    assert len(runs) == 2
    for run in runs:
        assert run["accuracy"] is None
        assert run["flops_training"] == 0
        assert run["flops_scoring_training"] + run["flops_scoring_passes"] > results["budget_flops"] // 2
    assert "scoring leaves no budget" in data_diet_report.Report(results).comparison("half")


def test_every_scoring_network_is_charged(experiment: tuple[Path, Path], results: dict[str, Any]) -> None:
    out = experiment[1]
    for arm, networks in (("el2n-1", 1), ("el2n-3", 3), ("grand-3", 3)):
        method = arm.split("-")[0]
        tables = [read_scores(out / f"scores-{method}-noise0-seed1-network{i}.parquet") for i in range(networks)]
        (run,) = of(results, arm=arm, regime="epochs", seed=1, label_noise=0.0)
        assert run["flops_scoring_passes"] == sum(table.flops for table in tables)
        early_steps = TRAIN // BATCH if method == "el2n" else 0
        assert run["flops_scoring_training"] == networks * early_steps * results["step_flops"]
    # A forward pass is less than half of a forward and backward pass, of which norms need no more than a step does.
    (grand,), (el2n,) = (
        of(results, arm=arm, regime="epochs", seed=0, label_noise=0.0) for arm in ("grand-3", "el2n-3")
    )
    steps = 3 * TRAIN // BATCH * results["step_flops"]
    assert 2 * el2n["flops_scoring_passes"] < grand["flops_scoring_passes"] <= steps < 3 * el2n["flops_scoring_passes"]


def test_an_arm_keeps_the_largest_mean_scores(experiment: tuple[Path, Path], results: dict[str, Any]) -> None:
    folder, out = experiment
    tables = [read_scores(out / f"scores-el2n-noise0-seed0-network{i}.parquet") for i in range(3)]
    mean = np.mean([table.values for table in tables], axis=0)
    kept = np.argsort(-mean, kind="stable")[: TRAIN // 2]
    labels = data_diet.read_images(folder, "train").labels[kept]
    (run,) = of(results, arm="el2n-3", regime="epochs", seed=0, label_noise=0.0)
    assert run["kept_by_class"] == torch.bincount(labels, minlength=10).tolist()


def test_a_second_call_trains_nothing_and_a_lost_result_comes_back_the_same(
    experiment: tuple[Path, Path], results: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = experiment
    again = tmp_path / "again"
    shutil.copytree(out, again)
    lost = {"el2n-1-whole-noise0-seed1", "scores-grand-noise0-seed0-network2", "random-epochs-noise0.25-seed0"}
    for name in lost:
        (again / f"{name}.json").unlink()
    done, execute = [], data_diet.execute
    monkeypatch.setattr(data_diet, "execute", lambda task, job: (done.append(task.name), execute(task, job)))
    assert data_diet.main(["--data", str(folder), "--out", str(again), "--label-noise", "0.25", *TINY]) == 0
    assert set(done) == lost
    repeated = json.loads((again / "results.json").read_text())
    for run in (*results["runs"], *repeated["runs"]):
        del run["seconds"]
    assert repeated == results
    old, new = (read_scores(where / "scores-grand-noise0-seed0-network2.parquet").values for where in (out, again))
    assert np.array_equal(old, new)


def test_two_processes_go_on_where_one_stopped(experiment: tuple[Path, Path], tmp_path: Path) -> None:
    folder, out = experiment
    missing = ("random-whole-noise0-seed0", "full-half-noise0-seed1")
    for path in out.glob("*noise0-*"):
        if path.stem not in missing:
            shutil.copy(path, tmp_path)
    assert data_diet.main(["--data", str(folder), "--out", str(tmp_path), *TINY, "--workers", "2"]) == 0
    for name in missing:
        one, two = (json.loads((where / f"{name}.json").read_text()) for where in (out, tmp_path))
        del one["seconds"], two["seconds"]
        # Another number of threads rounds another way: an image or two may stand on the border between classes.
        assert abs(one.pop("accuracy") - two.pop("accuracy")) <= 2 / TEST
        assert one == two


def test_results_of_other_settings_and_damaged_ones_are_refused(
    experiment: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = experiment
    own = ["--data", str(folder), "--out"]
    assert data_diet.main([*own, str(out), *TINY, "--epochs", "6"]) == 2
    assert "other settings" in capsys.readouterr().err
    broken = tmp_path / "broken"
    shutil.copytree(out, broken)
    (broken / "full-half-noise0-seed0.json").write_text('{"settings"')
    assert data_diet.main([*own, str(broken), *TINY]) == 2
    assert "full-half-noise0-seed0.json is damaged" in capsys.readouterr().err


def test_missing_images_are_answered_with_how_to_get_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_diet.main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "apt-get install dataset-fashion-mnist" in message
    assert "--data" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "must begin with"),
        (b"PK\x03\x04 and more", "must begin with"),
        (idx(np.zeros((3, 4)))[:-1], "should hold 3 x 4 bytes, but holds 11"),
        (struct.pack(">4BI", 0, 0, 8, 3, 7), "ends before its 3 sizes"),
        (struct.pack(">4BIH", 0, 0, 8, 3, 7, 1), "ends before its 3 sizes"),
        (gzip.compress(idx(np.zeros((3, 4))))[:-9], "cannot be read"),
        (gzip.compress(idx(np.zeros((3, 4))))[:12] + bytes(20), "cannot be read"),
    ],
)
def test_a_damaged_idx_file_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    name = "images.gz" if content[:2] == b"\x1f\x8b" else "images"
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        data_diet.read_idx(tmp_path, "images")
    assert name in str(caught.value)


@given(st.floats(0, 1), st.integers(0, 5))
def test_wrong_labels_are_as_many_as_said_and_all_wrong(fraction: float, seed: int) -> None:
    labels = torch.arange(100) % 10
    wrong = data_diet.with_wrong_labels(labels, fraction, seed)
    assert int((wrong != labels).sum()) == round(100 * fraction)
    assert 0 <= int(wrong.min()) <= int(wrong.max()) < 10


def test_every_parameter_of_the_network_is_observed_exactly() -> None:
    model = data_diet.network(1)
    torch.manual_seed(0)
    pixels, labels = torch.randn(6, 1, 28, 28), torch.arange(6)
    scores = GraNd().score(model, (pixels, labels), progress=False).values

    def one_at_a_time(network: torch.nn.Module, x: torch.Tensor) -> np.ndarray:
        norms = []
        for i in range(len(labels)):
            loss = torch.nn.functional.cross_entropy(network(x[i : i + 1]), labels[i : i + 1])
            gradient = torch.autograd.grad(loss, list(network.parameters()))
            norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in gradient)))
        return np.array(norms)

    single, exact = one_at_a_time(model, pixels), one_at_a_time(model.double(), pixels.double())
    unit = np.finfo(np.float32).eps * exact
    assert np.all(np.abs(scores - exact) <= 4 * np.abs(single - exact).max() + 4 * unit)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9).filter(lambda x: np.std(x) > 1e-3))
def test_an_interval_is_that_of_the_paired_t_test(differences: list[float]) -> None:
    ours = data_diet_report.estimate(differences)
    test = stats.ttest_rel(differences, np.zeros(len(differences)))
    interval = test.confidence_interval(0.95)
    assert ours.p == pytest.approx(test.pvalue)
    assert (ours.mean - ours.half_width, ours.mean + ours.half_width) == pytest.approx((interval.low, interval.high))


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_its_steps_reject(p: list[float]) -> None:
    for level in (0.01, 0.05, 0.2):
        rejected = set()
        for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
            if p[index] * (len(p) - rank) > level:
                break
            rejected.add(index)
        assert {i for i, adjusted in enumerate(data_diet_report.holm(p)) if adjusted <= level} == rejected


def test_documented_examples_run() -> None:
    outcome = doctest.testmod(data_diet_report)
    assert outcome.attempted > 0
    assert outcome.failed == 0


def test_the_page_shows_what_the_results_hold() -> None:
    assert data_diet.main(["--report", "--check"]) == 0


def test_every_number_with_decimals_in_the_text_of_the_page_stands_in_its_tables() -> None:
    page = data_diet.PAGE.read_text()
    before, rest = page.split(data_diet_report.BEGIN)
    tables, after = rest.split(data_diet_report.END)
    numbers = re.findall(r"(?<![\w./:])\d+\.\d\d?(?![\w./]*\d)", before + after)
    assert numbers
    assert [number for number in numbers if number not in tables] == []


def test_a_changed_result_makes_the_page_stale(tmp_path: Path) -> None:
    changed = json.loads(data_diet.RESULTS.read_text())
    changed["runs"][0]["accuracy"] += 0.01
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    assert data_diet.main(["--report", "--check", "--results", str(tmp_path / "changed.json")]) == 1
