"""A checkpoint survives kill -9 before every single line of the code that writes it."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pyeff import _files
from pyeff.train import checkpoint
from pyeff.train.checkpoint import load_tensors, newest_checkpoint, remove_partial, save_checkpoint


def groups(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "weights": {"a": torch.full((3, 2), value)},
        "optimizer": {"codes": torch.arange(7, dtype=torch.uint8), "step": torch.tensor(value)},
    }


def killed_at_line(number: int, action: Callable[[], None]) -> bool:
    """Do `action` in a child that is killed before its `number`-th line of our code; whether it was."""
    child = os.fork()
    if child == 0:
        left = number
        files = {checkpoint.__file__, _files.__file__}

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        status = 1
        try:
            sys.settrace(trace)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    assert killed or os.WEXITSTATUS(status) == 0
    return killed


@pytest.mark.parametrize("step", [20, 10], ids=["a new step", "a step done again"])
def test_a_kill_before_any_line_of_a_write_loses_nothing(tmp_path: Path, step: int) -> None:
    """What is found afterwards is the old checkpoint or the new one, whole; and the next write succeeds."""
    found, number = [], 0
    killed = True
    while killed:
        number += 1
        root = tmp_path / str(number)
        save_checkpoint(root, 5, groups(0.0), {"value": 0.0})
        save_checkpoint(root, 10, groups(1.0), {"value": 1.0})
        killed = killed_at_line(number, lambda root=root: save_checkpoint(root, step, groups(2.0), {"value": 2.0}))
        newest = newest_checkpoint(root)
        assert newest is not None
        value = newest[1]["value"]
        assert torch.equal(load_tensors(newest[0] / "weights.safetensors")["a"], groups(value)["weights"]["a"])
        found.append(value)
        remove_partial(root)
        save_checkpoint(root, 30, groups(3.0), {"value": 3.0})
        assert newest_checkpoint(root)[1]["value"] == 3.0
        shutil.rmtree(root)
    assert found[0] == 1.0
    assert found[-1] == 2.0
    # Between the deletion of a checkpoint and the renaming of its successor the one before both is the newest.
    assert set(found) <= ({1.0, 2.0} if step == 20 else {0.0, 1.0, 2.0})
