"""The real runs: make what is missing, two at a time, and write every cell as a small file of its own.

    python -m benchmarks.governor --tier t1              # all of it, then the tables
    python -m benchmarks.governor.t1 --work DIR --seeds 0 1

Killed at any moment it goes on with the cells that are not there yet.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import inspect
import json
import os
import textwrap
import time
import traceback
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from .baselines import Mixed, Placebo
from .governed import Governed
from .roster import GOVERNOR
from .t1_cells import SEEDS, TASKS, Group, Make, groups
from .t1_engine import Engine
from .tasks.task import SPANS

# Seconds of CPU that a group took at the smallest budget; larger ones take in proportion, less what is shared.
SECONDS = {
    "code": {"main": 45.0, "branch": 6.0, "mode": 8.0, "control": 2.0, "period": 60.0},
    "images": {"main": 6.0, "branch": 0.7, "control": 0.3, "period": 2.6},
}
WORK = Path(os.environ.get("PYEFF_T1_WORK", "build/governor-t1"))
VERSION = 1


def task_of(name: str, mode: str, work: Path) -> Any:
    """The task by its name."""
    from .tasks.images import Images
    from .tasks.language import Language

    return {"code": Language, "images": Images}[name](mode, work / "cache")


def path_of(work: Path, group: Group, policy: str) -> Path:
    """Where a cell is kept."""
    cell = group.cell
    return work / "cells" / cell.label / f"{cell.budget}-{cell.seed}-{policy}.json"


def write_atomically(path: Path, text: str) -> None:
    """Replace a file so that a reader sees the old or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _code(source: str) -> bytes:
    """What a source does, without its comments and docstrings."""
    tree = ast.parse(textwrap.dedent(source))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return ast.dump(tree).encode()


@functools.lru_cache(maxsize=1)
def governor_digest() -> str:
    """Of the governor's code."""
    import pyeff.governor

    folder = Path(str(pyeff.governor.__file__)).parent
    sources = [*sorted(folder.glob("*.py")), Path(__file__).with_name("governed.py")]
    return hashlib.blake2b(b"".join(_code(path.read_text()) for path in sources), digest_size=6).hexdigest()


@functools.lru_cache(maxsize=64)
def _class_code(kind: type) -> bytes:
    bases = [each for each in kind.__mro__ if each.__module__.startswith(str(__package__))]
    return b"".join(_code(inspect.getsource(each)) for each in bases)


def digest_of(make: Make) -> str:
    """Of a policy's code: cells of a policy that has changed since are made again, the others stay."""
    kind = getattr(make, "func", make)
    kind = kind if isinstance(kind, type) else Placebo
    mine = [_class_code(kind)]
    # The placebo scores as often as the governor does, and mixtures are the package's own rules.
    if issubclass(kind, Governed | Placebo | Mixed):
        mine.append(governor_digest().encode())
    return hashlib.blake2b(b"".join(mine), digest_size=6).hexdigest()


def _is_made(path: Path, digest: str) -> bool:
    return path.exists() and json.loads(path.read_text())["code"] == digest


def run_group(group: Group, work: Path) -> tuple[int, float]:
    """Make the missing cells of a group; returns how many, and the seconds of CPU they took."""
    import torch

    torch.set_num_threads(1)
    task = task_of(group.cell.task, group.cell.mode, work)

    def refreshes() -> int:
        governed = json.loads(path_of(work, group, GOVERNOR).read_text())
        return sum(key.startswith("REFRESH") for _, key in governed["run"]["moves"])

    makes = group.makes(task.selectors, refreshes)
    missing = [name for name, make in makes.items() if not _is_made(path_of(work, group, name), digest_of(make))]
    if not missing:
        return 0, 0.0
    began = time.process_time()
    engine = Engine(task, group.cell)
    for name in missing:
        start, steps = time.process_time(), engine.trained_steps
        run, records = engine.run(makes[name])
        content = {
            "version": VERSION,
            "kind": group.kind,
            "code": digest_of(makes[name]),
            "cell": vars(group.cell),
            "run": run.to_dict() | {"policy": name},
            "decisions": records if name == GOVERNOR else [],
            "cpu_seconds": round(time.process_time() - start, 3),
            "trained_steps": engine.trained_steps - steps,
        }
        write_atomically(path_of(work, group, name), json.dumps(content, separators=(",", ":")))
    return len(missing), time.process_time() - began


def expected_seconds(group: Group) -> float:
    """About how much CPU a whole group takes."""
    return SECONDS[group.cell.task][group.kind] * SPANS[group.cell.budget]


def _job(arguments: tuple[Group, Path]) -> tuple[Group, int, float, str]:
    try:
        return (arguments[0], *run_group(*arguments), "")
    except Exception:  # one group's fault must not cost the others their hours
        return arguments[0], 0, 0.0, traceback.format_exc()


def make_missing(work: Path, *, seeds: Sequence[int] = SEEDS, workers: int = 2, budgets: Sequence[int] = ()) -> None:
    """Run every group that has a cell missing."""
    wanted = [group for group in groups(tuple(seeds)) if not budgets or group.cell.budget in budgets]
    began, cells, seconds, expected = time.monotonic(), 0, 0.0, 0.0
    left, faults = sum(map(expected_seconds, wanted)), list[str]()
    print(f"{len(wanted)} groups of about {left / 3600:.1f} hours of CPU in all, cells below {work}", flush=True)
    # Spawned: a forked torch keeps its parent's threads' locks.
    with get_context("spawn").Pool(workers) as pool:
        for done, (group, count, cpu, fault) in enumerate(
            pool.imap_unordered(_job, [(group, work) for group in wanted], chunksize=1), start=1
        ):
            cells, seconds, left = cells + count, seconds + cpu, left - expected_seconds(group)
            if fault:
                faults.append(f"{group}:\n{fault}")
                print(faults[-1], flush=True)
            if count:
                expected += expected_seconds(group)
                cell = group.cell
                print(
                    f"{done}/{len(wanted)} {cell.label} {group.kind} budget {cell.budget} seed {cell.seed}: "
                    f"{count} cells in {cpu:.0f} s of CPU; {cells} cells, {seconds:.0f} s of CPU, "
                    f"{time.monotonic() - began:.0f} s; about {left * seconds / expected / 3600:.1f} hours of CPU left",
                    flush=True,
                )
    if faults:
        raise RuntimeError(f"{len(faults)} groups failed, the first: {faults[0]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of this tier alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--budgets", type=int, nargs="*", default=[])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="write the tables from what is there, and run nothing")
    parser.add_argument("--only-run", action="store_true", help="leave the tables as they are")
    options = parser.parse_args(arguments)
    if not options.report:
        make_missing(options.work, seeds=options.seeds, workers=options.workers, budgets=options.budgets)
    if tuple(options.seeds) == SEEDS and not options.only_run:
        from . import t1_report

        t1_report.write(options.work)


__all__ = ["TASKS", "make_missing", "run_group", "task_of"]

if __name__ == "__main__":
    main()
