"""The benchmarks of linear_grad run, also those that only a GPU times."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import backends
import pytest
import torch
import tune_linear_grad

from pyeff.ops._dispatch import interpreting

ROOT = Path(__file__).resolve().parents[2]


def test_every_benchmark_runs_at_toy_sizes() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_linear_grad.py", "--benchmark-only", "--tiny", "-q"]
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    for contender in ("pyeff, gradient and norms", "vmap(grad)", "torch.mm, ghost norms in torch"):
        assert contender in done.stdout
    assert "target: <= 1.12 x plain step" in done.stdout


@backends.quiet_interpreter
@pytest.mark.skipif(not interpreting(), reason="a GPU tunes at sizes that matter")
def test_tuning_prefers_a_choice_that_ran_at_every_length(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune_linear_grad, "LAYERS", [(8, 16), (16, 24)])
    monkeypatch.setattr(tune_linear_grad, "LENGTHS", [8, 16])
    monkeypatch.setattr(tune_linear_grad, "TOKENS", 16)
    # The second is no tile at all.
    monkeypatch.setattr(tune_linear_grad, "TILES", [(16, 16, 16, 4, 2), (24, 16, 16, 4, 2)])
    ladder, records = tune_linear_grad.tune(dots=False, device="cpu", pairs=1)
    printed = capsys.readouterr().out
    assert "not Config(bm=24" in printed
    assert [record["length"] for record in records] == [8, 16, 8, 16]
    assert all({"torch.mm", "panels", "gram"} <= record["seconds"].keys() for record in records)
    assert ladder[-1][0] == 0
    assert {config.bm for _, config in ladder} == {16}


def test_a_ladder_keeps_a_rung_only_where_the_choice_changes() -> None:
    assert tune_linear_grad.shortened([(10, "a"), (20, "a"), (40, "b"), (30, "b")]) == [(30, "b"), (0, "a")]
    assert tune_linear_grad.shortened([(10, "a")]) == [(0, "a")]


def test_a_wrong_answer_is_not_timed() -> None:
    total, norms_sq = torch.ones(4, 3), torch.ones(2)
    assert tune_linear_grad.runs(lambda: (total, norms_sq, norms_sq), total, norms_sq) is None
    assert tune_linear_grad.runs(lambda: (total + 1, norms_sq, norms_sq), total, norms_sq) == "wrong gradient"
    assert tune_linear_grad.runs(lambda: (total, norms_sq * 2, norms_sq), total, norms_sq) == "wrong norms"
    assert tune_linear_grad.runs(lambda: (total * float("nan"), norms_sq, norms_sq), total, norms_sq)
