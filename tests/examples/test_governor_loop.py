from __future__ import annotations

import runpy
from pathlib import Path

import pytest

pytest.importorskip("torch")

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "governor_loop.py"


def test_the_loop_spends_its_budget_buys_a_selection_and_draws_what_was_decided(tmp_path):
    pytest.importorskip("matplotlib")
    example = runpy.run_path(str(EXAMPLE))
    governor, decisions = example["train"]("300 MF")
    assert 0.99 * 3e8 < governor.spent <= 3e8
    assert governor.ledger.overhead() <= 0.25
    assert len(decisions) >= 12
    example["draw"](decisions, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 0
