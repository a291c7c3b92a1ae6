"""`examples/influence_worth.py` keeps its sets apart, and its report charges what choosing cost."""

from __future__ import annotations

import doctest
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import influence_worth
import influence_worth_report
import numpy as np
import pytest
from influence_worth import SELECTORS, cells
from influence_worth_report import Report
from influence_worth_training import Data, Settings
from scipy import stats

STEP = 1e11
"""FLOPs of a step of the invented trainings below."""


class Bytes:
    """A tokenizer of bytes."""

    eos_token_id, bos_token_id, chat_template = 0, None, None

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return Settings(pool_of_target=5, pool_of_other=7, target=6, validation=9, holdout=12, max_tokens=200)


def test_no_question_stands_in_two_sets_and_the_holdout_is_that_of_every_seed(settings: Settings) -> None:
    draws = [Data.draw(settings, seed, Bytes()) for seed in (0, 1)]
    for data in draws:
        sets = [data.pool, data.target, data.validation, data.holdout]
        prompts = [sample.prompt for each in sets for sample in each.samples]
        assert len(prompts) == len(set(prompts)) == settings.pool + 6 + 9 + 12
    own, other = draws
    assert own.holdout.samples == other.holdout.samples
    assert not {s.prompt for s in own.target.samples} & {s.prompt for s in other.target.samples}
    families = [sample.source for sample in own.pool.samples]
    assert [families.count(name) for name in settings.target_families] == [5, 5, 5]
    assert [families.count(name) for name in settings.other_families] == [7] * 5


def test_a_choice_stands_before_the_training_that_needs_it() -> None:
    names = [cell.name for cell in cells(list(influence_worth.ARMS), [0, 1])]
    for arm in SELECTORS:
        for seed in (0, 1):
            assert names.index(f"choice-{arm}-{seed}") < names.index(f"training-{arm}-{seed}")
    assert len(names) == len(set(names)) == 2 * (len(influence_worth.ARMS) + len(SELECTORS))


def write(folder: Path, kind: str, arm: str, seed: int, **content: Any) -> None:
    about = {"families": {"chain_sum": 3, "other": 1}, "tokens": 100, "pool_tokens": 1000, "cpu_seconds": 1.0}
    cell = {"settings": asdict(Settings()), "kind": kind, "arm": arm, "seed": seed} | about | content
    (folder / f"{kind}-{arm}-{seed}.json").write_text(json.dumps(cell))


def curve(*losses: float) -> list[dict[str, Any]]:
    points = zip((0, 8, 32, 64), losses, strict=True)
    return [
        {"step": step, "flops": STEP * step, "validation": {"all": loss}, "holdout": {"all": loss}}
        for step, loss in points
    ]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three seeds: EL2N's choice costs 40 steps, LESS's 400; the whole pool reaches 1.0 at 32 steps."""
    for seed, shift in enumerate((0.0, 0.1, 0.3)):
        write(tmp_path, "training", "random", seed, curve=curve(3.0, 2.0, 1.5 + shift, 1.75))
        write(tmp_path, "training", "fresh", seed, curve=curve(3.0, 2.0, 1.0, 0.5))
        for arm, steps in (("el2n", 40), ("less", 400)):
            write(tmp_path, "choice", arm, seed, flops_warmup=0, flops_scoring=STEP * steps, rows=[], method=arm)
            write(tmp_path, "training", arm, seed, curve=curve(3.0, 1.0, 0.75, 0.25))
    return tmp_path


def test_a_choice_is_charged_where_total_flops_are_equal(results: Path) -> None:
    columns = list(Report(results).columns().values())
    equal, stopped, forward, dear = columns
    assert equal("el2n", 0) == 0.75
    assert stopped("el2n", 0) == 0.25
    # 72 steps in all: EL2N has 32 of them left, the others stop where the validation's loss is lowest.
    assert forward("el2n", 0) == 0.75
    assert forward("random", 0) == 1.5
    assert forward("random", 2) == 1.75
    assert forward("fresh", 0) == 0.5
    assert forward("less", 0) is None
    # 432 steps: LESS has 32 left.
    assert dear("less", 0) == 0.75
    assert dear("el2n", 0) == 0.25


def test_differences_are_paired_and_adjusted_for_the_methods_alone(results: Path) -> None:
    shown = Report(results)
    found = shown.compare(list(shown.columns().values())[-1])
    differences = np.array([0.75, 0.75, 0.75]) - [1.5, 1.6, 1.75]
    test = stats.ttest_1samp(differences, 0.0)
    against = found["less"].differences["random"]
    assert against is not None
    assert against.mean == pytest.approx(differences.mean())
    assert against.p == pytest.approx(test.pvalue)
    assert against.half_width == pytest.approx(differences.mean() - test.confidence_interval(0.95).low)
    # Two methods: the larger p stays or follows the smaller, the smaller is doubled.
    raw = sorted(found[arm].differences["random"].p for arm in ("el2n", "less"))  # type: ignore[union-attr]
    assert min(found[arm].p["random"] for arm in ("el2n", "less")) == pytest.approx(min(1.0, 2 * raw[0]))
    assert found["fresh"].p == {}


def test_the_runs_until_a_choice_has_paid_follow_from_what_the_whole_pool_takes(results: Path) -> None:
    lines = {line.split(" | ")[0].strip("| "): line for line in Report(results).pay_back().splitlines()}
    # EL2N reaches 0.25 after 64 steps; the whole pool never does, at 64 steps it has spent as much: nothing is saved.
    assert lines["EL2N"].endswith("| never |")
    assert "(not reached in 3 of 3)" in lines["EL2N"]


def test_the_page_names_what_is_missing(results: Path, tmp_path: Path) -> None:
    body = Report(results).markdown()
    assert "18 of 55 cells have finished" in body
    assert "BM25: seeds 0, 1, 2, 3, 4" in body
    assert "random tenth: seeds 3, 4" in body
    assert "cannot be afforded" in body


def test_a_win_needs_a_small_p_against_both_and_the_lower_loss(results: Path) -> None:
    verdict = Report(results).verdict()
    # The whole pool ends at 0.5, between EL2N and LESS.
    assert "better than the random tenth: EL2N, LESS;" in verdict
    assert "worth its cost: EL2N. Means" in verdict
    assert "provisional" in verdict


def test_cells_of_other_settings_are_refused(results: Path) -> None:
    file = results / "training-random-0.json"
    cell = json.loads(file.read_text())
    cell["settings"]["lr"] = 1.0
    file.write_text(json.dumps(cell))
    with pytest.raises(SystemExit, match="several settings"):
        Report(results)


def test_the_examples_in_its_docstrings_run() -> None:
    outcome = doctest.testmod(influence_worth_report)
    assert outcome.attempted > 0
    assert outcome.failed == 0
