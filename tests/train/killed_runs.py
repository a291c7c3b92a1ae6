"""Run a configuration, kill it with SIGKILL at a chosen moment, resume it; each run is a forked process.

Called as a script with one JSON argument: {"config": {...}, "runs": [{"out": ..., "kills": [kill, ...]}]}.
A kill is {"at": name, "n": k}: the k-th call of that function ends the process, without a word.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(at: str, n: int) -> None:
    """Replace a function by one that kills the process in its n-th call."""
    import safetensors.torch

    from pyeff.train import checkpoint, run
    from pyeff.train.events import EventLog
    from pyeff.train.meter import Meter

    def killing(owner: Any, name: str, last_words: Callable[..., None] | None = None) -> None:
        original, calls = getattr(owner, name), 0

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == n:
                if last_words is not None:
                    last_words(*args)
                die()
            return original(*args, **kwargs)

        setattr(owner, name, wrapped)

    def half_a_file(tensors: Any, file: Path) -> None:
        Path(file).write_bytes(b"\0" * 1000)

    def half_a_line(log: EventLog, kind: str) -> None:
        with log.path.open("ab") as file:
            file.write(b'{"kind": "st')

    match at:
        case "charge":  # after the n-th forward or forward and backward of anything
            killing(Meter, "charge")
        case "event":
            killing(EventLog, "emit", half_a_line)
        case "tensors":  # four files a checkpoint
            killing(safetensors.torch, "save_file", half_a_file)
        case "state":  # config.yaml is written this way too
            original = checkpoint.write_text_atomic

            def half_a_state(path: Path, text: str, *, sync: bool = True) -> None:
                if path.name == "state.json":
                    path.write_text(text[: len(text) // 2])
                    die()
                original(path, text, sync=sync)

            checkpoint.write_text_atomic = half_a_state
        case "delete":  # an old checkpoint is being deleted
            killing(checkpoint.shutil, "rmtree", lambda path, **_: next(Path(path).iterdir()).unlink())
        case "result":
            killing(run, "save_model")
        case _:
            raise ValueError(at)


def forked(action: Callable[[], None]) -> int:
    """Do something in a process of its own; its exit status as `os.wait` gives it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def attempt(config: Any, kill: dict[str, Any] | None, *, resume: bool) -> None:
    """One process's part of a run."""
    from pyeff.train.run import train_run

    if kill is not None:
        arm(**kill)
    train_run(None if resume else config, resume=config.out if resume else None)


def main() -> None:
    task = json.loads(sys.argv[1])
    import torch

    from pyeff.train.config import parse_config
    from pyeff.train.model import load_model

    # No thread may exist before a fork; the runs are single-threaded.
    torch.set_num_threads(1)
    # Once for all: the children inherit what transformers imports on first use.
    load_model(task["config"]["model"])
    for run in task["runs"]:
        config = parse_config({**task["config"], "out": run["out"], "threads": 1})
        started = False
        for kill in [*run["kills"], None]:
            status = forked(partial(attempt, config, kill, resume=started))
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            if killed != (kill is not None):
                sys.exit(f"{run['out']}: expected {kill or 'a normal end'}, got status {status}")
            started = (Path(run["out"]) / "config.yaml").exists()


if __name__ == "__main__":
    main()
