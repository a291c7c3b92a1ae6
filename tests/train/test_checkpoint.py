from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyeff.errors import UserError
from pyeff.train import checkpoint
from pyeff.train.checkpoint import (
    NoSpaceError,
    complete_checkpoints,
    join_tensors,
    load_into,
    load_tensors,
    newest_checkpoint,
    save_checkpoint,
    split_tensors,
)


def groups(value: float = 1.0) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"a": torch.full((3, 2), value), "b": torch.full((5,), value, dtype=torch.bfloat16)},
        "optimizer": {"0.codes": torch.arange(7, dtype=torch.uint8), "0.step": torch.tensor(3.0)},
    }


def test_what_is_saved_is_loaded_bit_for_bit(tmp_path: Path):
    saved = groups(0.1)
    saved["weights"]["a"][0, 0] = float("nan")
    save_checkpoint(tmp_path, 7, saved, {"loss": 0.1 + 0.2})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    path, state = found
    assert state["loss"] == 0.1 + 0.2
    for name, tensors in saved.items():
        loaded = load_tensors(path / f"{name}.safetensors")
        blank = {key: torch.zeros_like(value) for key, value in tensors.items()}
        load_into(path / f"{name}.safetensors", blank)
        for key, value in tensors.items():
            for other in (loaded[key], blank[key]):
                assert other.dtype == value.dtype
                assert torch.equal(other.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_only_the_newest_two_are_kept(tmp_path: Path):
    for step in (5, 40, 300):
        save_checkpoint(tmp_path, step, groups(), {})
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-000040", "step-000300"]
    # A step that is done again replaces its checkpoint.
    save_checkpoint(tmp_path, 300, groups(2.0), {})
    assert load_tensors(tmp_path / "step-000300" / "weights.safetensors")["a"][0, 0] == 2.0


def test_steps_are_ordered_as_numbers(tmp_path: Path):
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, step, groups(), {})
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]


def test_a_disk_without_room_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, 1, groups(), {})
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(NoSpaceError, match="GB free"):
        save_checkpoint(tmp_path, 2, groups(), {})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_disk_that_fills_up_while_writing_leaves_the_older_checkpoint_and_nothing_torn(tmp_path: Path, monkeypatch):
    save_checkpoint(tmp_path, 1, groups(), {})
    before = sorted(tmp_path.rglob("*"))

    def full(tensors: dict, file: Path) -> None:
        Path(file).write_bytes(b"part of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(NoSpaceError, match="No space left"):
        save_checkpoint(tmp_path, 2, groups(), {})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path: Path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, groups(), {})
    file = tmp_path / "step-000002" / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found[0].name == "step-000001"
    (tmp_path / "step-000001" / "state.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path):
    assert newest_checkpoint(tmp_path / "nowhere") is None
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.parametrize(
    "tensors",
    [{"a": torch.zeros(3, 2)}, {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16)}],
)
def test_tensors_of_another_model_are_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    save_checkpoint(tmp_path, 1, groups(), {})
    with pytest.raises(UserError):
        load_into(tmp_path / "step-000001" / "weights.safetensors", tensors)


def test_an_optimizer_state_survives_json_and_safetensors():
    weight = torch.nn.Parameter(torch.randn(4, 3))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        optimizer.step()
    tree, tensors = split_tensors(optimizer.state_dict())
    again = torch.optim.AdamW([weight], lr=1.0)
    again.load_state_dict(join_tensors(json.loads(json.dumps(tree)), tensors))
    assert again.param_groups[0]["lr"] == 0.1
    for key, value in optimizer.state[weight].items():
        assert torch.equal(again.state[weight][key], value)


def test_checkpoints_are_written_without_a_second_copy_of_the_tensors(tmp_path: Path):
    import subprocess
    import sys

    # In a process of its own, since a peak is never taken back.
    script = f"""
import resource, torch
from pathlib import Path
import safetensors.torch
from pyeff.train.checkpoint import save_checkpoint
save_checkpoint(Path({str(tmp_path)!r}) / "warm", 1, {{"w": {{"a": torch.zeros(8)}}}}, {{}})
tensor = torch.ones(1 << 26)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_checkpoint(Path({str(tmp_path)!r}) / "cold", 1, {{"w": {{"a": tensor}}}}, {{}})
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 << 26))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    # A copy would be 1; the page cache is not the process's.
    assert float(done.stdout) < 0.5
