"""Files that a kill leaves whole: written under another name, forced to disk and renamed; one process a directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from pyeff.errors import UserError

PARTIAL = ".partial-"
"""How the names of files begin that are not complete yet."""


def fsync_directory(directory: Path) -> None:
    """Force the names in ``directory`` to disk, so that a rename survives a power cut."""
    if os.name == "nt":  # it cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, write: Callable[[IO[bytes]], object], *, sync: bool = True) -> None:
    """Replace ``path`` by what ``write(file)`` writes in one step: a reader sees the old content or the new."""
    partial = path.with_name(f"{PARTIAL}{path.name}")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if sync:
        fsync_directory(path.parent)


def write_text_atomic(path: Path, text: str, *, sync: bool = True) -> None:
    """Replace ``path`` by ``text`` in one step: a reader sees the old content or the new, never a part."""
    write_atomic(path, lambda file: file.write(text.encode()), sync=sync)


class OnlyProcess:
    """Hold the directory's lock: two processes writing into one would tear it. The kernel frees it on a kill."""

    def __init__(self, directory: Path, name: str = "lock") -> None:
        self._path = directory / name
        self._file: IO[str] | None = None

    def __enter__(self) -> None:
        with suppress(ImportError):  # Windows has no fcntl; there the lock is left out
            import fcntl

            try:
                self._file = self._path.open("w")
            except OSError as error:
                raise UserError(f"{self._path.parent} cannot be written to: {error.strerror} ({self._path})") from error
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                self._file.close()
                raise UserError(f"another process is running in {self._path.parent}") from error

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
