"""What a user's file may hold that nobody expects: one sentence, never a traceback and never a dead process."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pyeff.data import JsonlSource
from pyeff.errors import UserError
from pyeff.train.checkpoint import fingerprint
from pyeff.train.config import load_config, parse_config
from pyeff.train.model import load_model
from pyeff.train.run import train_run


def interrupted(task_config: dict[str, Any], out: Path, states: str) -> Path:
    """A run that was stopped after its second checkpoint."""
    checkpoints = 0

    def stop(event: dict[str, Any]) -> None:
        nonlocal checkpoints
        checkpoints += event["kind"] == "checkpoint"
        if checkpoints == 2:
            raise KeyboardInterrupt

    optimizer = {**task_config["optimizer"], "states": states}
    config = parse_config({**task_config, "optimizer": optimizer, "budget": "6e8F", "out": str(out)})
    with pytest.raises(KeyboardInterrupt):
        train_run(config, observers=[stop])
    return out


@pytest.fixture(scope="module", params=["8bit", "32bit"])
def stopped(request: pytest.FixtureRequest, task_config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory):
    return interrupted(task_config, tmp_path_factory.mktemp("stopped") / "run", request.param)


def change_json(file: Path, change: Callable[[Any], Any]) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def shorten_moments(checkpoint: Path) -> None:
    file = checkpoint / "optimizer.safetensors"
    save_file({key: value.flatten()[:1].clone() for key, value in load_file(file).items()}, file)
    sign(checkpoint, file)


def sign(checkpoint: Path, file: Path) -> None:
    """Make a changed file pass for the one that was written."""
    change_json(checkpoint / "state.json", lambda state: state["files"].update({file.name: fingerprint(file)}))


def scramble_header(checkpoint: Path) -> None:
    file = checkpoint / "weights.safetensors"
    file.write_bytes(b"\xff" * 64 + file.read_bytes()[64:])


def signed_noise(checkpoint: Path) -> None:
    scramble_header(checkpoint)
    sign(checkpoint, checkpoint / "weights.safetensors")


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "moments of another shape": lambda run, newest: shorten_moments(newest),
    "a header of noise": lambda run, newest: signed_noise(newest),
    "no state": lambda run, newest: change_json(newest / "state.json", lambda state: state.pop("state")),
    "order of another pool": lambda run, newest: change_json(
        newest / "state.json", lambda state: state["order"].update(indices=[10**9])
    ),
    "events lost": lambda run, newest: (run / "events.jsonl").write_bytes(b""),
    "decisions lost": lambda run, newest: (run / "decisions.jsonl").unlink(),
    "a directory for a log": lambda run, newest: [
        (run / "events.jsonl").unlink(),
        (run / "events.jsonl").mkdir(),
    ],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_run_is_refused_in_a_sentence_that_names_it(stopped: Path, tmp_path: Path, damage: str):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    DAMAGE[damage](run, max((run / "checkpoints").iterdir()))
    with pytest.raises(UserError, match=str(run)):
        train_run(resume=run)
    if damage == "events lost":
        assert (run / "events.jsonl").read_bytes() == b"", "a log was filled up with zeros"


def flip_one_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda newest: scramble_header(newest),
        lambda newest: flip_one_bit(newest / "weights.safetensors"),
        lambda newest: flip_one_bit(newest / "optimizer.safetensors"),
        lambda newest: (newest / "ema.safetensors").unlink(),
    ],
    ids=["header", "bit of the weights", "bit of the moments", "file lost"],
)
def test_a_damaged_checkpoint_costs_only_the_way_from_the_one_before(
    stopped: Path, tmp_path: Path, damage: Callable[[Path], Any]
):
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(stopped, whole)
    shutil.copytree(stopped, run)
    damage(max((run / "checkpoints").iterdir()))
    assert train_run(resume=run).end["holdout"] == train_run(resume=whole).end["holdout"]
    assert (
        load_file(run / "model" / "model.safetensors").keys() == load_file(whole / "model" / "model.safetensors").keys()
    )
    for name, tensor in load_file(run / "model" / "model.safetensors").items():
        assert torch.equal(tensor, load_file(whole / "model" / "model.safetensors")[name]), name


def test_a_model_that_cannot_be_written_leaves_a_run_that_can_go_on(
    stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(UserError, match=r"--resume|disk"):
            train_run(resume=run)
    assert not (run / "result.json").exists()
    assert train_run(resume=run).end["holdout"]["after"] > 0
    assert (run / "model" / "model.safetensors").exists()


def test_answers_longer_than_the_positions_of_the_model_are_refused(task_config: dict[str, Any], tmp_path: Path):
    data = {**task_config["data"], "max_new_tokens": 100_000}
    with pytest.raises(UserError, match="max_new_tokens"):
        train_run(parse_config({**task_config, "data": data, "out": str(tmp_path / "run")}))


@pytest.mark.parametrize(
    "beat", ['{"flops": 1e999, "seconds": 1, "tokens": 1}', '{"flops": 1, "seconds": NaN, "tokens": 1}']
)
def test_a_heartbeat_of_nonsense_does_not_stop_a_resume(stopped: Path, tmp_path: Path, beat: str):
    run = tmp_path / "run"
    shutil.copytree(stopped, run)
    (run / "heartbeat.json").write_text(beat)
    assert train_run(resume=run).steps > 0


@pytest.mark.parametrize(
    "text",
    ["seed: 2024-13-45", "seed: " + "9" * 6000, "[" * 5000, "seed: !!bool abc", "seed: !!timestamp abc"],
    ids=["no such month", "6000 digits", "5000 brackets", "bool", "timestamp"],
)
def test_a_value_that_yaml_cannot_make_is_refused_with_the_file(tmp_path: Path, text: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"config\.yaml"):
        load_config(file)


@pytest.mark.parametrize(
    "answer", ["9" * 6000, "[" * 100_000, '"half \\ud800"'], ids=["6000 digits", "100000 brackets", "half a pair"]
)
def test_a_line_that_no_reader_survives_is_refused_by_its_number(tmp_path: Path, answer: str):
    file = tmp_path / "pool.jsonl"
    file.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ' + answer + "}\n")
    with pytest.raises(UserError, match="line 2"):
        JsonlSource(path=file).read()


@pytest.mark.parametrize("out", ["file", "file/below", "null\0byte"])
def test_an_out_that_cannot_be_a_directory_is_refused(task_config: dict[str, Any], tmp_path: Path, out: str):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        train_run(parse_config({**task_config, "out": str(tmp_path / out)}))


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("unpickled", "w")


def test_an_index_that_leads_to_a_pickle_is_refused_before_anything_is_read(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    names = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    (model / "weights.bin").write_bytes(pickle.dumps(Evil()))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "weights.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"weights\.bin, which is no safetensors file"):
        load_model(str(model))


def test_adapters_on_nothing_that_is_linear_are_refused(task_config: dict[str, Any], tmp_path: Path):
    lora = {"target_modules": ["embed_tokens"]}
    with pytest.raises(UserError, match="linear layers"):
        train_run(parse_config({**task_config, "lora": lora, "out": str(tmp_path / "out")}))
