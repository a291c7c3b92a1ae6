"""`pyeff.info` and `pyeff.explain` say what would run and why, and an explicit choice is never replaced."""

from __future__ import annotations

import pytest
import torch

import pyeff
from pyeff.ops import OPERATIONS
from pyeff.ops._dispatch import environment_problem, interpreting

HIDDEN, WEIGHT, TARGETS = torch.ones(3, 8), torch.ones(16, 8), torch.zeros(3, dtype=torch.long)


def test_info_lists_every_operation_on_every_device() -> None:
    rows = {(found.operation, found.device) for found in pyeff.info().operations}
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    assert rows == {(name, device) for name in OPERATIONS for device in devices}


def test_info_as_text_names_versions_levels_and_refusals() -> None:
    text = str(pyeff.info())
    for needle in ("torch", "cpu level", "linear_cross_entropy_scores on cpu", "triton on cpu"):
        assert needle in text


def test_each_reason_stands_once_and_covers_every_refusal() -> None:
    info = pyeff.info()
    lines = info.refusals()
    assert len(lines) == len(set(lines))
    for found in info.operations:
        for name, why in found.refused.items():
            (line,) = [line for line in lines if line.startswith(f"{name} on {found.device}: {why}")]
            assert found.operation in line or not line.endswith(")") or line.endswith(why)


def test_explain_agrees_with_the_environment() -> None:
    found = pyeff.explain(pyeff.linear_cross_entropy_scores, HIDDEN, WEIGHT, TARGETS)
    assert found.impl == ("cpu" if environment_problem("cpu", "cpu") is None else "reference")
    assert "triton" in found.refused


def test_explain_takes_a_name_or_the_function() -> None:
    by_name = pyeff.explain("linear_cross_entropy_scores", HIDDEN, WEIGHT, TARGETS)
    assert by_name == pyeff.explain(pyeff.linear_cross_entropy_scores, HIDDEN, WEIGHT, TARGETS)


def test_an_implementation_that_cannot_take_the_call_is_explained_and_the_call_raises() -> None:
    found = pyeff.explain("global_norm", [HIDDEN], impl="cuda")
    assert (found.impl, found.device) == ("none", "cpu")
    assert "these are on cpu" in found.refused["cuda"]
    assert "cannot run" in str(found)
    with pytest.raises(RuntimeError, match="these are on cpu"):
        OPERATIONS["global_norm"].explain([HIDDEN], impl="cuda")
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        pyeff.explain("global_norm", [HIDDEN], impl="fortran")


def test_unknown_operation_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"op must be one of .*linear_cross_entropy_scores"):
        pyeff.explain("nonsense")


def test_unknown_implementation_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        pyeff.linear_cross_entropy_scores(HIDDEN, WEIGHT, TARGETS, impl="fortran")


@pytest.mark.skipif(torch.cuda.is_available() or not interpreting(), reason="shows what happens without a GPU")
def test_triton_on_cpu_is_interpreted_only_when_asked_for() -> None:
    assert pyeff.explain("linear_cross_entropy_scores", HIDDEN, WEIGHT, TARGETS).impl != "triton"
    assert pyeff.explain("linear_cross_entropy_scores", HIDDEN, WEIGHT, TARGETS, impl="triton").impl == "triton"


def test_an_explicit_implementation_that_cannot_run_raises_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match=r"impl='triton' cannot be used: it runs on CUDA tensors"):
        pyeff.linear_cross_entropy_scores(HIDDEN, WEIGHT, TARGETS, impl="triton")
