"""What happens in a run, as one JSON line per event: the single source of every display and report.

An event is a dictionary with ``kind`` (start, step, evaluate, score, select, decision, exact_match,
checkpoint, warning, resume, end), ``time`` (unix seconds), ``spent`` (in the budget's unit) and the
fields of its kind. Nothing in a run reads an event back to decide anything.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pyeff.errors import UserError

Event = dict[str, Any]
Observer = Callable[[Event], None]


def jsonable(value: Any) -> Any:
    """Return ``value`` with tuples as lists and non-finite floats as ``None``, which JSON has no words for.

    >>> jsonable({"a": (1.0, float("nan"))})
    {'a': [1.0, None]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class EventLog:
    """Appends events to a file, whole lines only, and hands each to the observers.

    Raises `UserError` when a line cannot be written, for example on a full disk.
    """

    def __init__(self, path: Path, observers: Iterable[Observer] = ()) -> None:
        self.path = Path(path)
        self._observers = tuple(observers)
        self._file = self.path.open("ab", buffering=0)

    @property
    def offset(self) -> int:
        """Length of the file in bytes: what a checkpoint remembers."""
        return os.fstat(self._file.fileno()).st_size

    def truncate_to(self, offset: int) -> None:
        """Forget everything after ``offset`` bytes: events of work that will be done again.

        Raises `UserError` when the file is shorter: what a checkpoint counted on is lost.
        """
        if not 0 <= offset <= self.offset:
            raise UserError(
                f"{self.path} holds {self.offset} bytes, and the checkpoint was made after {offset}: it was cut"
            )
        self._file.truncate(offset)

    def sync(self) -> None:
        """Force the lines to disk, so that a checkpoint never points past the end of the file."""
        os.fsync(self._file.fileno())

    def emit(self, kind: str, *, spent: float, **fields: Any) -> Event:
        """Append one event and tell the observers; returns the event."""
        event: Event = {"kind": kind, "time": time.time(), "spent": spent, **fields}
        event = jsonable(event)
        line = json.dumps(event, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror}") from error
        for observer in self._observers:
            observer(event)
        return event

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: str | Path) -> Iterator[Event]:
    """Yield the events of a file; a last line torn by a kill is left out.

    Raises `UserError` naming the line when any other line is not JSON, or when the file cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines[:-1], start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: not a JSON event") from error
