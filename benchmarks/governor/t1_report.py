"""Tables of the real runs into docs/governor_results.md, verdicts into docs/governor_claims.md, and the figure."""

from __future__ import annotations

from pathlib import Path

from . import t1_results


def write(work: Path) -> None:
    """Collect what the working directory has and write everything that is shown of it."""
    t1_results.collect(work)
