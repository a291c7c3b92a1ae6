"""Scores on disk while they are made: a directory of Parquet parts that a kill leaves complete or absent.

``_header.json`` says whose scores they are. A part ``part-000012.parquet`` holds the rows of whole batches, the first
of them batch 12, and names in its metadata the header it belongs to and its batches; it is written under another name,
forced to disk and renamed. Which batches are done is read from the parts, so what is missing, at the end or in a gap,
is made again and nothing else. Pages carry checksums. Nothing is ever unpickled.

The directory is a data set to whatever reads Parquet: it skips names that begin with an underscore or a dot.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pyeff._files import PARTIAL, OnlyProcess, write_atomic, write_text_atomic
from pyeff.errors import UserError
from pyeff.scoring.scores import SampleId, Scores, arrow, schema

if TYPE_CHECKING:
    import pyarrow as pa

# A kill costs what was scored since the last part: at most so long, or so many rows.
PART_SECONDS = 15.0
PART_ROWS = 1 << 16

AVERAGE = "average.parquet"
BY_TARGETS = "scores.parquet"
"""Tables beside the directories of what they were computed from."""

HEADER = "_header.json"
_LOCK = "_lock"
_FORMAT = 1
_PART = re.compile(r"part-(\d{6,})\.parquet")
_KEY = b"pyeff.scores"

Store = TypeVar("Store", bound="PartStore")


class PartStore(ABC):
    """Rows by batch in a directory of Parquet parts, or in memory without a ``path``.

    ``header`` is JSON and says what was made by what and how; a directory with another one is refused. Use it as a
    context manager, which holds the directory's lock and writes the rows not yet written when it ends, also by an
    error.

    Raises `UserError` for a directory of something else, of another header, or with a damaged part, and leaves it as it
    was.
    """

    what = "scores"
    """What messages call the rows."""

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume: bool) -> None:
        self.path = path
        self._header = {"format": _FORMAT, **header}
        self._digest = digest_of(self._header)
        self._resume = resume
        self._batches: list[int] = []
        self.done: set[int] = set()
        """Numbers of the batches that have their rows."""
        self._text_ids: bool | None = None
        self._lock: OnlyProcess | None = None
        self._written_at = time.monotonic()

    @abstractmethod
    def _take_in(self) -> None:
        """Read what is there of the directory into ``done`` and whatever else is kept."""

    @abstractmethod
    def _table(self) -> pa.Table:
        """The rows not yet written."""

    @abstractmethod
    def _keep(self, table: pa.Table) -> None:
        """Take note of rows that are written, or stay in memory."""

    def _write(self, table: pa.Table, file: Any) -> None:
        arrow("parquet").write_table(table, file, write_page_checksum=True)

    def __enter__(self: Store) -> Store:
        if self.path is None:
            return self
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path} cannot be made a directory for {self.what}: {error.strerror}") from error
        found = header_of(self.path, self.what)
        if found is not None:
            self._refuse_another(found)
        elif any(entry.name != _LOCK and not entry.name.startswith(PARTIAL) for entry in self.path.iterdir()):
            raise UserError(f"{self.path} holds files but no {HEADER}, so no {self.what}: choose another directory")
        self._lock = OnlyProcess(self.path, _LOCK)
        self._lock.__enter__()
        try:
            if found is None:
                found = header_of(self.path, self.what)  # of a process that came and went meanwhile
                if found is not None:
                    self._refuse_another(found)
            for leftover in self.path.glob(f"{PARTIAL}*"):
                leftover.unlink()
            if found is None:
                try:
                    write_text_atomic(self.path / HEADER, json.dumps(self._header, indent=1))
                except OSError as error:
                    raise UserError(f"{self.path} cannot be written to: {error.strerror}") from error
            self._take_in()
        except BaseException:
            self._lock.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._flush()
        finally:
            if self._lock is not None:
                self._lock.__exit__()
                self._lock = None

    def _refuse_another(self, found: dict[str, Any]) -> None:
        for key, own in self._header.items():
            if found.get(key) != own:
                where, there, here = _first_difference(key, found.get(key), own)
                raise UserError(
                    f"{self.path} holds {self.what} of another {where} ({there} there, {here} here): "
                    "choose another directory"
                )
        if not self._resume:
            raise UserError(f"{self.path} holds these {self.what} already: resume, or choose another directory")

    def _begin(self, batch: int, ids: Sequence[SampleId]) -> None:
        """Refuse what the store cannot keep, and begin another part where a batch does not follow the one before."""
        if self.path is not None and self._lock is None:
            raise ValueError(
                f"{self.path} is not open: add {self.what} within `with`, which locks it and writes the rest"
            )
        if isinstance(batch, bool) or not isinstance(batch, int) or batch < 0:
            raise ValueError(f"batch must be an int of at least 0, got {batch!r}")
        if ids and self._text_ids is None:
            self._text_ids = isinstance(ids[0], str)
        odd = next((sample for sample in ids if isinstance(sample, str) != self._text_ids), None)
        if odd is not None:
            raise ValueError(f"ids must be all strings or all integers, got both, such as {odd!r}")
        if self._batches and batch != self._batches[-1] + 1:
            self._flush()

    def _end(self, batch: int, *, full: bool) -> None:
        """Take note of a batch whose rows are taken in; write a part where it is ``full`` or time."""
        self._batches.append(batch)
        self.done.add(batch)
        if full or time.monotonic() - self._written_at >= PART_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if not self._batches:
            return
        table = self._table()
        if self.path is not None:
            mark = {"header": self._digest, "batches": self._batches}
            marked = table.replace_schema_metadata({_KEY: json.dumps(mark).encode()})
            try:
                write_atomic(self.path / part_name(self._batches[0]), lambda file: self._write(marked, file))
            except OSError as error:
                raise UserError(
                    f"{self.what} cannot be written to {self.path} ({error}): make room, then go on; what is there "
                    "is kept"
                ) from error
        self._keep(table)
        self._batches = []
        self._written_at = time.monotonic()


class ScoreStore(PartStore):
    """Rows of a scoring, by batch: in memory and, with a ``path``, in the directory of that name."""

    def __init__(self, path: Path | None, header: Mapping[str, Any], *, resume: bool) -> None:
        super().__init__(path, header, resume=resume)
        self._parts: list[pa.Table] = []
        self._rows: dict[str, list[Any]] = {}

    def _take_in(self) -> None:
        assert self.path is not None
        for table, batches in read_parts(self.path, self._digest, _read_table):
            self._parts.append(table)
            self.done.update(batches)
            self._text_ids = has_text_ids(table)

    def __len__(self) -> int:
        return sum(part.num_rows for part in self._parts) + len(self._rows.get("id", ()))

    @property
    def ids(self) -> set[SampleId]:
        """The ids that have their scores."""
        return {sample for part in self._parts for sample in part["id"].to_pylist()} | set(self._rows.get("id", ()))

    def append(self, batch: int, rows: Mapping[str, Sequence[Any]]) -> None:
        """Add the rows of one batch: a list for each column but those of the header."""
        self._begin(batch, rows["id"])
        for name, values in rows.items():
            self._rows.setdefault(name, []).extend(values)
        self._end(batch, full=len(self._rows["id"]) >= PART_ROWS)

    def _table(self) -> pa.Table:
        count = len(self._rows["id"])
        constant = {key: [self._header[key]] * count for key in ("method", "seed", "checkpoint")}
        return arrow().table({**self._rows, **constant}, schema=schema(text_ids=bool(self._text_ids)))

    def _keep(self, table: pa.Table) -> None:
        self._parts.append(table)
        self._rows = {}

    def scores(self) -> Scores:
        """All rows, in the order of the dataset."""
        self._flush()
        return _joined(self._parts, self.path)


def read_scores(path: str | Path) -> Scores:
    """Read what `score` streamed to a directory, or what `Scores.write` wrote to a file.

    A directory whose scoring has not ended is refused: scoring again with the same arguments goes on with it.

    Raises `UserError` when there are no scores at ``path``, or they are incomplete or damaged.
    """
    path = Path(path)
    if path.is_file():
        return Scores(_read_table(path)[0])
    header = header_of(path, "scores") if path.is_dir() else None
    if header is None:
        for name in (AVERAGE, BY_TARGETS):
            if (path / name).is_file():
                return Scores(_read_table(path / name)[0], path)
        raise UserError(f"there are no scores at {path}")
    parts = read_parts(path, digest_of(header), _read_table)
    scores = _joined([table for table, _ in parts], path)
    if len(scores) != header.get("samples"):
        raise UserError(
            f"{path} holds {len(scores)} of {header.get('samples')} scores: score with the same arguments to go on"
        )
    return scores


def _joined(parts: Sequence[pa.Table], path: Path | None) -> Scores:
    pa = arrow()
    if not parts:
        return Scores(schema(text_ids=False).empty_table(), path)
    return Scores(pa.concat_tables(parts).sort_by("index").combine_chunks(), path)


def refuse_other_scores(path: Path | None, table: str, method: str) -> None:
    """Raise `UserError` where a ``table`` beside directories would replace or be hidden by other scores."""
    if path is None:
        return
    if (path / HEADER).exists():
        raise UserError(f"{path} holds scores or features already: choose another directory")
    found = Scores(_read_table(path / table)[0]).method if (path / table).is_file() else method
    if found != method and not found.startswith(f"{method} (mean of "):
        raise UserError(
            f"{path} holds scores of another method ({found!r} there, {method!r} here): choose another directory"
        )


def _first_difference(name: str, there: Any, here: Any) -> tuple[str, str, str]:
    """Where two parts of headers first differ, as `name.part`, and what stands there in few words."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*here, *there]:
            if there.get(key) != here.get(key):
                return _first_difference(f"{name}.{key}", there.get(key), here.get(key))
    first, second = ("nothing" if value is None else reprlib.repr(value) for value in (there, here))
    return name, first, second


def header_of(directory: Path, what: str) -> dict[str, Any] | None:
    """The header of a directory of scores, or of features; None where there is none."""
    file = directory / HEADER
    if not file.exists():
        return None
    try:
        header = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read ({error}): choose another directory") from error
    if not isinstance(header, dict) or "method" not in header:
        raise UserError(f"{file} is not the header of {what}: choose another directory")
    if header.get("format") != _FORMAT:
        raise UserError(
            f"{file} is of format {header.get('format')!r}, and this version of pyeff knows format {_FORMAT}: read it "
            "with the version that wrote it, or choose another directory"
        )
    if header.get("kind", "scores") != what:
        raise UserError(f"{directory} holds {header.get('kind', 'scores')}, not {what}")
    return header


def texts_at(path: Path) -> str | None:
    """The fingerprint of the texts that the scores or features at ``path`` are of; None where it is not known.

    It stands in their header, or for a table beside the directories of what it was computed from, in the pool's.
    """
    below = sorted(each for each in path.iterdir() if each.name != "targets") if path.is_dir() else []
    for directory in (path, *below):
        try:
            found = json.loads((directory / HEADER).read_text(encoding="utf-8")).get("texts")
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
        return found if isinstance(found, str) else None
    return None


def part_name(batch: int) -> str:
    """Name of the part that begins with this batch."""
    return f"part-{batch:06d}.parquet"


def digest_of(header: Mapping[str, Any]) -> str:
    """A fingerprint of a header, which stands in each of its parts."""
    return hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_parts(
    directory: Path,
    digest: str,
    read: Callable[[Path], tuple[pa.Table, dict[str, Any]]],
    *,
    what: str = "scores",
) -> list[tuple[pa.Table, list[int]]]:
    """What ``read`` finds in every part of a directory, by their names, and the numbers of its batches."""
    parts: list[tuple[pa.Table, list[int]]] = []
    seen: set[int] = set()
    for file in part_files(directory):
        table, mark = read(file)
        try:
            batches = [int(batch) for batch in mark["batches"]]
            known = mark["header"] == digest
        except (LookupError, TypeError, ValueError) as error:
            raise UserError(f"{file} is not a part of these {what}: move it away") from error
        if not known or seen & set(batches) or (parts and has_text_ids(table) != has_text_ids(parts[0][0])):
            raise UserError(f"{file} is a part of other {what}: move it away")
        seen.update(batches)
        parts.append((table, batches))
    return parts


def part_files(directory: Path) -> list[Path]:
    """The parts of a directory, in the order of their batches."""
    found = [(_PART.fullmatch(path.name), path) for path in directory.iterdir()]
    numbered = [(int(match[1]), path) for match, path in found if match is not None]
    return [path for _, path in sorted(numbered)]


def open_part(file: Path, *, what: str = "scores") -> tuple[Any, dict[str, Any]]:
    """A part opened by pyarrow, and what its metadata say of it."""
    pa, parquet = arrow(), arrow("parquet")
    try:
        # Not as part of a data set: pyarrow would read columns out of the names of directories.
        opened = parquet.ParquetFile(file, page_checksum_verification=True)
        mark = json.loads((opened.schema_arrow.metadata or {}).get(_KEY, b"{}"))
    except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
        raise damaged(file, error, what) from error
    return opened, mark if isinstance(mark, dict) else {}


def damaged(file: Path, error: Exception, what: str = "scores") -> UserError:
    """The error for a part that cannot be read."""
    reason = " ".join(str(error).split())[:200]
    again = "score again" if what == "scores" else "go on with the same arguments"
    return UserError(f"{file} cannot be read ({reason}): delete it and {again} to make it anew")


def _read_table(file: Path) -> tuple[pa.Table, dict[str, Any]]:
    pa = arrow()
    opened, mark = open_part(file)
    try:
        with opened:
            table = opened.read()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(file, error) from error
    if not any(table.schema.equals(schema(text_ids=text)) for text in (True, False)):
        raise UserError(f"{file} is not a table of scores: move it away")
    if table["id"].null_count:
        raise UserError(f"{file} holds a row without an id: move it away")
    return table.replace_schema_metadata(None), mark


def has_text_ids(table: pa.Table) -> bool:
    """Whether the ids of a table are strings."""
    return bool(arrow().types.is_string(table.schema.field("id").type))
