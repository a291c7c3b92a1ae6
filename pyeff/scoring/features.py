"""Features of samples, such as embeddings or sketched gradients: quantised rows on disk, read block by block."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from pyeff.errors import UserError
from pyeff.scoring.quantised import FeatureType, decode_rows, row_bytes
from pyeff.scoring.scores import SampleId, arrow
from pyeff.scoring.store import HEADER, damaged, digest_of, header_of, open_part, part_files, read_parts

if TYPE_CHECKING:
    import pyarrow as pa

# A part is read by groups of rows, of so many bytes as float32.
GROUP_BYTES = 16 << 20


class Features:
    """Features [N, D] as a `pyeff.selection.ScoreMatrix`: read block by block, never whole.

    Rows are in the order in which they were written: `index` and `ids` say whose they are. Every rule of
    `pyeff.selection` takes it; `similarities` compares it with the features of targets.
    """

    def __init__(
        self, header: dict[str, Any], table: pa.Table, files: list[tuple[Path, int]], path: Path | None
    ) -> None:
        self.header = header
        self.path = path
        self._table = table
        self._files = files
        self._dim, self._dtype = int(header["dim"]), header["dtype"]

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and D numbers of each."""
        return len(self), self._dim

    @property
    def method(self) -> str:
        """What the features are."""
        return str(self.header["method"])

    @property
    def index(self) -> NDArray[np.int64]:
        """Place of each row's sample in the data set, int64 [N]."""
        return np.array(self._table["index"].to_numpy(), dtype=np.int64)

    @property
    def ids(self) -> list[SampleId]:
        """The sample's own id of each row."""
        ids: list[SampleId] = self._table["id"].to_pylist()
        return ids

    @property
    def flops(self) -> int:
        """FLOPs of making the features."""
        return sum(self._table["flops"].to_pylist())

    @property
    def seconds(self) -> float:
        """Seconds of making the features."""
        return float(np.sum(self._table["seconds"].to_numpy()))

    @property
    def columns(self) -> pa.Table:
        """index, id, flops and seconds of each row."""
        return self._table.select(["index", "id", "flops", "seconds"])

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Number of the first row and the rows [b, D], float32, in order."""
        if self.path is None:
            step = max(1, GROUP_BYTES // (4 * self._dim))
            for first in range(0, len(self), step):
                yield first, self._decoded(self._table.slice(first, step))
            return
        first = 0
        for file, _ in self._files:
            opened, _ = open_part(file, what="features")
            with opened:
                for group in range(opened.num_row_groups):
                    rows = self._group(opened, group, file)
                    yield first, rows
                    first += len(rows)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """The rows [r, D] of these numbers, float32; reads the groups of rows they lie in."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"indices must be in [0, {len(self)}), got {int(wanted.min())} to {int(wanted.max())}")
        if self.path is None:
            return self._decoded(self._table.take(wanted))
        found = np.empty((len(wanted), self._dim), dtype=np.float32)
        starts, places = self._groups
        home = np.searchsorted(starts, wanted, side="right") - 1
        for group in np.unique(home).tolist():
            number, inside = places[group]
            file = self._files[number][0]
            opened, _ = open_part(file, what="features")
            with opened:
                rows = self._group(opened, inside, file)
            here = home == group
            found[here] = rows[wanted[here] - starts[group]]
        return found

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
        """First row of every group of rows, and its file and number in it."""
        starts, places, first = [], [], 0
        for number, (file, _) in enumerate(self._files):
            opened, _ = open_part(file, what="features")
            with opened:
                for group in range(opened.num_row_groups):
                    starts.append(first)
                    places.append((number, group))
                    first += opened.metadata.row_group(group).num_rows
        return np.asarray(starts, dtype=np.int64), places

    def _group(self, opened: Any, group: int, file: Path) -> NDArray[np.float32]:
        pa = arrow()
        try:
            table = opened.read_row_group(group, columns=["features", "scale"], use_threads=False)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise damaged(file, error, "features") from error
        return self._decoded(table)

    def _decoded(self, table: pa.Table) -> NDArray[np.float32]:
        width = row_bytes(self._dim, self._dtype)
        pieces = [np.zeros((0, width), dtype=np.uint8)]
        for chunk in table["features"].chunks:
            data = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)
            pieces.append(data[chunk.offset * width : (chunk.offset + len(chunk)) * width].reshape(-1, width))
        codes = pieces[1] if len(pieces) == 2 else np.concatenate(pieces)
        return decode_rows(codes, table["scale"].to_numpy(), self._dim, self._dtype)


def read_features(path: str | Path) -> Features:
    """Open what a `FeatureStore` wrote; only ids and costs are read until rows are asked for.

    Raises `UserError` when there are no features at ``path``, fewer than its header says, or a part is damaged or of
    another store. Bytes within a part are checked when they are read.
    """
    path = Path(path)
    header = header_of(path, "features") if path.is_dir() else None
    if header is None:
        raise UserError(f"there are no features at {path}")
    try:
        known = header["dtype"] in get_args(FeatureType) and int(header["dim"]) > 0
    except (LookupError, TypeError, ValueError):
        known = False
    if not known:
        raise UserError(f"{path / HEADER} is not the header of features: choose another directory")
    found = features_at(path, header)
    if "samples" in header and len(found) != header["samples"]:
        raise UserError(
            f"{path} holds {len(found)} of {header['samples']} features: go on with the same arguments to complete it"
        )
    return found


def features_at(path: Path, header: dict[str, Any]) -> Features:
    """The features in a directory with this header, complete or not."""
    dim, dtype = int(header["dim"]), header["dtype"]

    def read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
        return read_columns(file, ["index", "id", "flops", "seconds"], dim, dtype)

    tables = [table for table, _ in read_parts(path, digest_of(header), read, what="features")]
    empty = features_schema(dim, dtype, text_ids=False).empty_table().select(["index", "id", "flops", "seconds"])
    table = arrow().concat_tables(tables).combine_chunks() if tables else empty
    return Features(header, table, list(zip(part_files(path), map(len, tables), strict=True)), path)


def read_columns(file: Path, columns: list[str], dim: int, dtype: FeatureType) -> tuple[pa.Table, dict[str, Any]]:
    """Some columns of a part: what is light. The pages of the codes are not read."""
    pa = arrow()
    opened, mark = open_part(file, what="features")
    try:
        with opened:
            types = opened.schema_arrow.remove_metadata()
            if not any(types.equals(features_schema(dim, dtype, text_ids=text)) for text in (True, False)):
                raise UserError(f"{file} does not hold features of {dim} numbers as {dtype}: move it away")
            table = opened.read(columns=columns)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(file, error, "features") from error
    if table["id"].null_count:
        raise UserError(f"{file} holds a row without an id: move it away")
    return table.replace_schema_metadata(None), mark


def features_schema(dim: int, dtype: FeatureType, *, text_ids: bool) -> pa.Schema:
    """The types of the columns."""
    pa = arrow()
    return pa.schema(
        [
            ("index", pa.int64()),
            ("id", pa.string() if text_ids else pa.int64()),
            ("features", pa.binary(row_bytes(dim, dtype))),
            ("scale", pa.float32()),
            ("flops", pa.int64()),
            ("seconds", pa.float64()),
        ]
    )
