"""The cells of the real runs as one JSON Lines file for each task, and read again as `metrics.Run`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .metrics import Run
from .roster import GOVERNOR, UNIFORM, is_baseline
from .t1_cells import BRANCH, PERIOD

FOLDER = Path(__file__).parent / "results"
ORACLE = "oracle"


def collect(work: Path, folder: Path = FOLDER) -> None:
    """Write what is in the working directory into the compact files; cells that only the files have are kept."""
    lines: dict[str, dict[tuple[str, int, int, str], str]] = defaultdict(dict)
    for path in sorted(folder.glob("t1_*.jsonl")):
        for text in path.read_text().splitlines():
            row = json.loads(text)
            lines[path.name][_key(row)] = text
    for path in sorted((work / "cells").glob("*/*.json")):
        cell = json.loads(path.read_text())
        row = _compact(cell)
        lines[f"t1_{cell['cell']['task']}.jsonl"][_key(row)] = json.dumps(row, separators=(",", ":"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in lines.items():
        partial = folder / f".{name}"
        partial.write_text("".join(rows[key] + "\n" for key in sorted(rows)))
        partial.replace(folder / name)


def _key(row: Mapping[str, Any]) -> tuple[str, int, int, str]:
    return row["task"], row["index"], row["seed"], row["policy"]


def _compact(cell: Mapping[str, Any]) -> dict[str, Any]:
    run, budget = cell["run"], cell["run"]["budget"]
    kept = {name: run[name] for name in ("task", "policy", "budget", "seed")}
    kept |= {"index": cell["cell"]["budget"], "kind": cell["kind"], "loss": round(run["loss"], 6)}
    kept["flops"] = {name: int(value) for name, value in run["flops"].items() if value}
    kept["moves"] = [[round(spent / budget, 4), key] for spent, key in run["moves"]]
    # Claim P5 judges the governor's forecasts; in nats for the whole budget.
    names = ("rate", "low", "high", "realised")
    promises = run["promises"] if run["policy"] == GOVERNOR else []
    kept["promises"] = [[None if p[n] is None else float(f"{p[n] * budget:.5g}") for n in names] for p in promises]
    kept |= {"code": cell["code"], "decide_ms": round(1e3 * run["decide_seconds"], 1), "cpu": cell["cpu_seconds"]}
    return kept


def read(folder: Path = FOLDER) -> list[dict[str, Any]]:
    """All cells: ``row`` fields as written, and ``run``."""
    found = []
    for path in sorted(folder.glob("t1_*.jsonl")):
        for text in path.read_text().splitlines():
            row = json.loads(text)
            budget = row["budget"]
            row["run"] = Run.from_dict(
                {
                    **{name: row[name] for name in ("task", "policy", "budget", "seed", "loss", "flops")},
                    "curve": [],
                    "moves": [(share * budget, key) for share, key in row["moves"]],
                    "promises": [
                        dict(zip(("rate", "low", "high", "realised"), values, strict=True))
                        for values in row["promises"]
                    ],
                    "decide_seconds": row["decide_ms"] / 1e3,
                }
            )
            found.append(row)
    return found


def runs_of(rows: Iterable[Mapping[str, Any]], *kinds: str) -> list[Run]:
    return [row["run"] for row in rows if row["kind"] in kinds]


def with_oracle(runs: Sequence[Run]) -> list[Run]:
    """Add the best charged run of a cell and seed in hindsight, whatever policy made it, the governor's excepted."""
    best: dict[tuple[str, float, int], Run] = {}
    for run in runs:
        key = run.task, run.budget, run.seed
        if is_baseline(run.policy) and (key not in best or run.loss < best[key].loss):
            best[key] = run
    return [*runs, *(replace(run, policy=ORACLE) for run in best.values())]


def with_uniform(rows: Sequence[Mapping[str, Any]]) -> list[Run]:
    """The negative controls, with the uniform runs of the task itself where the pool is the same."""
    controls = runs_of(rows, "control")
    uniform = {(r.task, r.budget, r.seed): r for r in runs_of(rows, "main") if r.policy == UNIFORM}
    present = {(r.task, r.budget, r.seed) for r in controls if r.policy == UNIFORM}
    added = []
    for run in controls:
        key = run.task, run.budget, run.seed
        base = uniform.get((run.task.split("-")[0], run.budget, run.seed))
        if run.policy == GOVERNOR and key not in present and not run.task.endswith("one-kind") and base is not None:
            added.append(replace(base, task=run.task))
    return controls + added


__all__ = ["BRANCH", "ORACLE", "PERIOD", "collect", "read", "runs_of", "with_oracle", "with_uniform"]
