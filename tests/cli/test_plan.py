"""`pyeff plan`: tables, JSON, a picture, and errors in one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from planned_models import config_of

from pyeff.cli.app import run_app


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    config_of("llama").save_pretrained(tmp_path)
    return tmp_path


def test_the_plan_is_shown_and_drawn(directory: Path, capsys: pytest.CaptureFixture[str]):
    plot = directory / "plan.png"
    arguments = ["--seq-len", "64", "--batch", "4", "--device-memory", "3MB", "--rates", "400,2600", "--device", "cpu"]
    assert run_app(["plan", str(directory), *arguments, "--plot", str(plot)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("at its fullest", "optimizer step", "Options: what buys most", "as given", "Largest that fits"):
        assert words in shown
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("limit", ["3MB", "6MB"])
def test_the_single_change_that_buys_most_stands_first(directory: Path, capsys: pytest.CaptureFixture[str], limit: str):
    arguments = ["plan", str(directory), "--seq-len", "64", "--batch", "4", "--device-memory", limit]
    assert run_app([*arguments, "--json"]) == 0
    change = json.loads(capsys.readouterr().out)["best_change"]
    assert run_app(arguments) == 0
    shown = capsys.readouterr().out
    rows = shown[shown.index("Options") :].split("─ \n")[1].splitlines()
    assert len(change) == 1
    ((key, value),) = change.items()
    assert rows[0].strip().startswith(key if value is True else f"{key} {value}")


def test_json_is_the_whole_plan(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert run_app(["plan", str(directory / "config.json"), "--seq-len", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["method"] == "account"
    assert found["peak"]["total"] == max(phase["total"] for phase in found["phases"])


def test_states_in_host_memory_and_released_gradients_are_planned(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seq-len", "64", "--optimizer", "adamw8bit", "--gpu", "h100"]
    found = []
    for more in ([], ["--offload", "--release", "two-pass"]):
        assert run_app(["plan", str(directory), *arguments, *more, "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    kept, away = found
    assert away["flops"] == 2 * kept["flops"]
    assert away["phases"][-1]["gradients"] == 0 < kept["phases"][-1]["gradients"]
    assert all(layer["states"] == 0 for layer in away["layers"])
    assert run_app(["plan", str(directory), *arguments, "--offload"]) == 0
    assert "no offload" in " ".join(capsys.readouterr().out.split())


def test_the_model_of_the_demo_is_planned_by_its_name(capsys: pytest.CaptureFixture[str]):
    assert run_app(["plan", "smollm2", "--seq-len", "64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(layer["name"].startswith("layer ") for layer in found["layers"]) == 30
    assert run_app(["plan", "smollm2", "--seq-len", "64", "--batch", "2"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("head, tied", "batch 1 accumulated", "by gradient accumulation"):
        assert words in shown


def test_what_fits_nothing_says_so(directory: Path, capsys: pytest.CaptureFixture[str]):
    assert run_app(["plan", str(directory), "--seq-len", "64", "--device-memory", "1KB"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no batch and no sequence length fits" in shown
    assert "batch 0" not in shown


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--seq-len", "0"], "seq_len must be at least 1"),
        (["--seq-len", "8", "--device-memory", "-1GB"], "memory must be a positive size"),
        (["--seq-len", "8", "--device-memory", "24"], 'device_memory must be a size with its unit, such as "24GB"'),
        (["--seq-len", "8", "--rates", "fast"], "--rates takes TFLOP/s and GB/s"),
        (["--seq-len", "8", "--gpu", "abacus"], "gpu must be one of"),
        (["--seq-len", "8", "--offload"], "offload needs one of pyeff's optimizers"),
        (["--seq-len", "8", "--optimizer", "adamw8bit", "--release", "later"], "release must be one of"),
        (["--seq-len", "8", "--plot", "/nowhere/plan.png"], "the plot cannot be written"),
    ],
)
def test_bad_options_end_in_one_sentence(
    directory: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    assert run_app(["plan", str(directory), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
