"""The log of decisions: one JSON line each, enough to take every one of them again."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import IO

from pyeff.governor.policy import Decision, recompute


class DecisionLog:
    """Append decisions to a file, one JSON object a line, each on disk before the next step runs.

    Opening a log makes its directory where there is none, and cuts off a last line without its newline: the trace of a
    process killed while writing it.

    >>> import tempfile, os
    >>> from pyeff.governor import DecisionLog, GovernorPolicy, Observation
    >>> path = os.path.join(tempfile.mkdtemp(), "decisions.jsonl")
    >>> check = Observation(step=0, spent=0, budget=100, unit="tokens", anchors_before=(), anchors_now=(2.0, 3.0),
    ...                     spent_before=0, refresh_cost=10, cooldown_cost=20)
    >>> log = DecisionLog(path)
    >>> log.append(GovernorPolicy().decide(check))
    >>> [decision.action.value for decision in read(path)], len(log)
    (['CONTINUE'], 1)
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            whole, self._lines = _whole_lines(self.path)
            if whole < self.path.stat().st_size:
                self._cut(whole)

    def __len__(self) -> int:
        """Return how many decisions the log holds."""
        return self._lines

    def append(self, decision: Decision) -> None:
        """Write one decision and wait until it is on disk; one that does not fit there leaves no part of it."""
        line = json.dumps(decision.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        created = not self.path.exists()
        size = 0 if created else self.path.stat().st_size
        try:
            with self.path.open("ab") as file:
                file.write(line.encode() + b"\n")
                _sync(file)
        except OSError:  # part of a line would spoil the next
            with suppress(OSError):
                self._cut(size)
            raise
        if created:
            _sync_directory(self.path.parent)
        self._lines += 1

    def truncate_to(self, n_lines: int) -> None:
        """Keep the first ``n_lines`` decisions, as a resume from an earlier checkpoint needs.

        Raises ValueError when the log holds fewer.
        """
        if not 0 <= n_lines <= self._lines:
            raise ValueError(
                f"n_lines must lie between 0 and the {self._lines} decisions in {self.path}, got {n_lines}"
            )
        if n_lines == self._lines:
            return
        size = 0
        with self.path.open("rb") as file:
            for _ in range(n_lines):
                size += len(file.readline())
        self._cut(size)
        self._lines = n_lines

    def _cut(self, size: int) -> None:
        with self.path.open("r+b") as file:
            file.truncate(size)
            _sync(file)


def read(path: str | Path) -> list[Decision]:
    """Read a log's decisions in order; a last line without its newline is left out.

    Raises ValueError naming the line when one is not a decision, and OSError when the file cannot be read.
    """
    decisions = []
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            decisions.append(Decision.from_dict(json.loads(line)))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}, is not a decision: {error}") from error
    return decisions


def replay(path: str | Path) -> list[tuple[Decision, Decision]]:
    """Take every logged decision again from its own inputs; returns (logged, recomputed) in order.

    The two are equal, reason and values included, unless the log was changed, or the mathematics library or the
    policy is another than the one that wrote it.

    Raises ValueError naming the line when a decision's inputs cannot be used.
    """
    pairs = []
    for number, logged in enumerate(read(path), start=1):
        try:
            pairs.append((logged, recompute(logged.inputs)))
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path}, line {number}, cannot be replayed: {error}") from error
    return pairs


def _whole_lines(path: Path) -> tuple[int, int]:
    """Return the bytes up to the last newline, and how many lines they hold."""
    data = path.read_bytes()
    return data.rfind(b"\n") + 1, data.count(b"\n")


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_directory(directory: Path) -> None:
    # The name of a new file is on disk only once its directory is; Windows cannot open directories.
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
