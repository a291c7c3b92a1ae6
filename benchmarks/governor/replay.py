"""Take every decision of recorded runs again, and hold their promises against what happened.

    python -m benchmarks.governor --tier replay [DIR...]

Looks for ``decisions.jsonl`` below each directory (by default examples/results and runs/), takes each decision again
from its logged inputs alone, and prints for each run: decisions, how many came out otherwise, refreshes, judged
promises and their coverage. Ends with 1 where a decision came out otherwise; says where there is nothing to replay.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyeff.governor import Action, audit_decisions, replay

ROOT = Path(__file__).resolve().parents[2]
DEFAULT = (ROOT / "examples" / "results", ROOT / "runs")


@dataclass(frozen=True)
class Replayed:
    """One log taken again; ``coverage`` is None where no promise was calibrated, ``refused`` why it cannot be read."""

    path: Path
    decisions: int = 0
    otherwise: int = 0
    refreshes: int = 0
    judged: int = 0
    coverage: float | None = None
    refused: str | None = None


def find(directories: Iterable[Path]) -> list[Path]:
    """Every log below the directories."""
    return sorted(path for directory in directories for path in directory.rglob("decisions.jsonl"))


def replay_log(path: Path) -> Replayed:
    """Decide every check of one log again."""
    try:
        pairs = replay(path)
    except (OSError, ValueError) as error:
        return Replayed(path, refused=str(error))
    decisions = [logged for logged, _ in pairs]
    otherwise = sum(logged != again for logged, again in pairs)
    audit = audit_decisions(decisions)
    return Replayed(
        path,
        decisions=len(decisions),
        otherwise=otherwise,
        refreshes=sum(each.action is Action.REFRESH for each in decisions),
        judged=audit.judged,
        coverage=audit.coverage,
    )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.governor --tier replay")
    parser.add_argument("directories", nargs="*", type=Path, default=list(DEFAULT))
    logs = find(parser.parse_args(arguments).directories)
    if not logs:
        print("no decisions.jsonl to replay: give the directories of recorded runs")
        return 0
    found = [replay_log(path) for path in logs]
    for each in found:
        if each.refused is not None:
            print(f"{each.path}: refused: {each.refused}")
            continue
        covered = "no calibrated promise" if each.coverage is None else f"{each.coverage:.0%} of {each.judged} covered"
        print(
            f"{each.path}: {each.decisions} decisions, {each.otherwise} came out otherwise, "
            f"{each.refreshes} refreshes, {covered}"
        )
    return int(any(each.otherwise or each.refused for each in found))
