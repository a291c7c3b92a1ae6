"""Features of samples, such as embeddings or sketched gradients: quantised rows on disk that are read block by block.

A row x of D numbers is kept as codes q and one float32 scale, x ~ scale q, in a column of bytes:

========= ======================== =========================================== ==================
dtype     scale                    codes                                       bytes a row
========= ======================== =========================================== ==================
float32   1                        x                                           4 D
float16   2^e, 2^e <= max|x|       x / scale: no overflow, no early underflow  2 D
int8      max|x| / 127             rounded to the nearest, -127 to 127         D
1bit      mean|x|                  the sign, first coordinate in the high bit  D / 8
========= ======================== =========================================== ==================

The scale is a sample's own, so that the cosine of a row does not depend on it. int8 and 1bit are the absmax and sign
quantisers of QLESS (Ananta et al., 2025, arXiv:2502.01703), applied here to the features before they are normalised. A
row that is not finite has the scale NaN and reads as NaN, so that no rule of selection takes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyeff.errors import UserError
from pyeff.scoring.scores import SampleId, Scores, arrow, schema, shares
from pyeff.scoring.store import (
    HEADER,
    PART_ROWS,
    PartStore,
    damaged,
    digest_of,
    has_text_ids,
    header_of,
    open_part,
    part_files,
    read_parts,
)
from pyeff.selection import ScoreMatrix, per_sample

if TYPE_CHECKING:
    import pyarrow as pa

FeatureType = Literal["float32", "float16", "int8", "1bit"]

# A part that is lost to a kill is made again. One is read by groups of rows, of so many bytes as float32.
_PART_BYTES = 64 << 20
_GROUP_BYTES = 16 << 20


def encode_rows(rows: NDArray[np.floating[Any]], dtype: FeatureType) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes [n, bytes] and scales [n] of rows [n, D]."""
    x = np.ascontiguousarray(rows, dtype=np.float32)
    finite = np.asarray(np.isfinite(x).all(axis=1))
    if not finite.all():
        x = np.where(finite[:, None], x, np.float32(0))
    largest = np.abs(x).max(axis=1, initial=0.0).astype(np.float64)
    scale: NDArray[np.float64]
    codes: NDArray[np.uint8]
    if dtype == "float32":
        scale, codes = np.ones(len(x)), x.view(np.uint8)
    elif dtype == "float16":
        scale = np.where(largest > 0, np.ldexp(1.0, np.frexp(largest)[1] - 1), 0.0)
        codes = _divided(x, scale).astype(np.float16).view(np.uint8)
    elif dtype == "int8":
        # Rounded up where it would vanish; a code is never beyond 127 then either.
        scale = np.where(largest > 0, np.maximum(largest / 127, np.finfo(np.float32).smallest_subnormal), 0.0)
        scale = scale.astype(np.float32).astype(np.float64)
        codes = np.clip(np.rint(_divided(x, scale)), -127, 127).astype(np.int8).view(np.uint8)
    else:
        scale = np.abs(x).mean(axis=1, dtype=np.float64) if x.shape[1] else np.zeros(len(x))
        codes = np.packbits(x >= 0, axis=1)
    scales = scale.astype(np.float32)
    scales[~finite] = np.nan
    return codes.reshape(len(x), row_bytes(x.shape[1], dtype)), scales


def decode_rows(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], dim: int, dtype: FeatureType
) -> NDArray[np.float32]:
    """Rows [n, D], float32, of codes [n, bytes] and scales [n]."""
    if dtype == "1bit":
        signs = np.unpackbits(codes, axis=1, count=dim).astype(np.float32)
        rows = 2 * signs - 1
    else:
        rows = codes.view({"float32": np.float32, "float16": np.float16, "int8": np.int8}[dtype]).astype(np.float32)
    rows *= scales[:, None]
    return rows


def row_bytes(dim: int, dtype: FeatureType) -> int:
    """Bytes of a row's codes."""
    return {"float32": 4 * dim, "float16": 2 * dim, "int8": dim, "1bit": -(-dim // 8)}[dtype]


def _divided(x: NDArray[np.float32], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(x, scale[:, None], out=np.zeros(x.shape), where=scale[:, None] > 0)


class FeatureStore(PartStore):
    """Writes features batch by batch into a directory (or, without a ``path``, into memory).

    A kill loses at most what was added since the last part; opened again with the same header, `done` says which
    batches are there. ``header`` is JSON and must hold ``method``, which names what the features are; what else must
    agree for two sets of features to be comparable, such as a sketch's header, belongs in it too.

    Args:
        path: The directory, or None.
        header: What the features are and of what. ``samples``, if it is there, is how many make the store complete.
        dim: Numbers of a row.
        dtype: How they are kept; see the module.
        resume: Go on with the features at ``path``; if False, a ``path`` that holds features is refused.

    Raises `UserError` for a directory of something else, of another header, or with a damaged part, and leaves it as it
    was; `ValueError` for another dtype, a ``dim`` that is not positive or a header without a method.

    >>> with FeatureStore(None, {"method": "ones"}, dim=3, dtype="int8") as store:
    ...     store.append(0, ["a", "b"], np.ones((2, 3)))
    ...     features = store.features()
    >>> features.shape, features.ids
    ((2, 3), ['a', 'b'])
    """

    what = "features"

    def __init__(
        self,
        path: str | Path | None,
        header: Mapping[str, Any],
        *,
        dim: int,
        dtype: FeatureType = "float16",
        resume: bool = True,
    ) -> None:
        if dtype not in get_args(FeatureType):
            raise ValueError(f"dtype must be one of {', '.join(get_args(FeatureType))}, got {dtype!r}")
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim must be an int of at least 1, got {dim!r}")
        if not header.get("method"):
            raise ValueError("header must hold a method: what the features are")
        whole = {"kind": "features", **header, "dim": dim, "dtype": dtype}
        # As it will be read again: tuples become lists.
        super().__init__(None if path is None else Path(path), json.loads(json.dumps(whole)), resume=resume)
        self._dim, self._dtype = dim, dtype
        self._parts: list[pa.Table] = []
        self._waiting: list[tuple[list[int], list[SampleId], Any, Any, list[int], list[float]]] = []
        self._known: set[SampleId] = set()
        self._count = 0

    def _take_in(self) -> None:
        assert self.path is not None

        def read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
            return _read_columns(file, ["id"], self._dim, self._dtype)

        for table, batches in read_parts(self.path, self._digest, read, what=self.what):
            self.done.update(batches)
            self._text_ids = has_text_ids(table)
            self._known.update(table["id"].to_pylist())

    def __len__(self) -> int:
        return len(self._known)

    @property
    def ids(self) -> set[SampleId]:
        """The ids that have their features."""
        return set(self._known)

    def append(
        self,
        batch: int,
        ids: Sequence[SampleId],
        features: ArrayLike | Tensor,
        *,
        index: Sequence[int] | None = None,
        flops: Sequence[int] | int = 0,
        seconds: Sequence[float] | float = 0.0,
    ) -> None:
        """Add the features [n, D] of one batch.

        Args:
            batch: Its number; each once, in any order.
            ids: Unique strings or integers.
            features: A tensor or array; values that are not finite make a row undefined.
            index: Places of the samples in their data set; without it, as many rows as were added before, and on.
            flops: What each sample cost, or what all of them cost together.
            seconds: The same of time.

        Raises `ValueError` where sizes do not fit, a batch or an id is there already, or an id is missing.
        """
        from pyeff.scoring.work import refuse_bad_ids

        if batch in self.done:
            raise ValueError(f"batch {batch} has its features already")
        rows = _as_rows(features)
        if rows.shape != (len(ids), self._dim):
            raise ValueError(f"features must be [{len(ids)}, {self._dim}], a row for each id, got {rows.shape}")
        places = list(range(len(self._known), len(self._known) + len(ids))) if index is None else list(index)
        if len(places) != len(ids):
            raise ValueError(f"index must be one for each of the {len(ids)} ids, got {len(places)}")
        # Checked apart: a batch that is refused leaves no ids behind.
        own: set[SampleId] = set()
        plain = refuse_bad_ids(ids, own)
        twice = own & self._known
        if twice:
            raise ValueError(f"the id {min(twice, key=str)!r} has its features already: ids must be unique")
        self._begin(batch, plain)
        weights = [1] * len(plain)
        spent = shares(flops, weights) if isinstance(flops, int) else list(flops)
        took = [seconds / max(1, len(plain))] * len(plain) if isinstance(seconds, int | float) else list(seconds)
        codes, scales = encode_rows(rows, self._dtype)
        self._known |= own
        self._waiting.append((places, plain, codes, scales, spent, took))
        self._count += len(plain)
        full = self._count >= PART_ROWS or self._count * row_bytes(self._dim, self._dtype) >= _PART_BYTES
        self._end(batch, full=full)

    def _table(self) -> pa.Table:
        pa = arrow()
        codes = np.concatenate([each[2] for each in self._waiting])
        width = row_bytes(self._dim, self._dtype)
        column = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(width), len(codes), [None, pa.py_buffer(codes.tobytes())]
        )
        joined: list[list[Any]] = [[value for each in self._waiting for value in each[i]] for i in (0, 1, 4, 5)]
        arrays = [
            joined[0],
            joined[1],
            column,
            np.concatenate([each[3] for each in self._waiting]),
            joined[2],
            joined[3],
        ]
        types = _schema(self._dim, self._dtype, text_ids=bool(self._text_ids))
        return pa.table(
            [pa.array(a, t) if a is not column else a for a, t in zip(arrays, types.types, strict=True)], types
        )

    def _write(self, table: pa.Table, file: Any) -> None:
        rows = max(1, _GROUP_BYTES // (4 * self._dim))
        arrow("parquet").write_table(
            table,
            file,
            row_group_size=rows,
            data_page_size=_GROUP_BYTES,
            # Codes are noise to a compressor, and what is not compressed is read at the speed of a copy.
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
        )

    def _keep(self, table: pa.Table) -> None:
        if self.path is None:
            self._parts.append(table)
        self._waiting, self._count = [], 0

    def features(self) -> Features:
        """What has been added, for reading."""
        self._flush()
        if self.path is not None:
            return _features(self.path, self._header)
        pa = arrow()
        empty = _schema(self._dim, self._dtype, text_ids=bool(self._text_ids)).empty_table()
        return Features(self._header, pa.concat_tables([empty, *self._parts]).combine_chunks(), [], None)


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
            step = max(1, _GROUP_BYTES // (4 * self._dim))
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
    found = _features(path, header)
    if "samples" in header and len(found) != header["samples"]:
        raise UserError(
            f"{path} holds {len(found)} of {header['samples']} features: go on with the same arguments to complete it"
        )
    return found


def _features(path: Path, header: dict[str, Any]) -> Features:
    dim, dtype = int(header["dim"]), header["dtype"]

    def read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
        return _read_columns(file, ["index", "id", "flops", "seconds"], dim, dtype)

    tables = [table for table, _ in read_parts(path, digest_of(header), read, what="features")]
    empty = _schema(dim, dtype, text_ids=False).empty_table().select(["index", "id", "flops", "seconds"])
    table = arrow().concat_tables(tables).combine_chunks() if tables else empty
    return Features(header, table, list(zip(part_files(path), map(len, tables), strict=True)), path)


def _read_columns(file: Path, columns: list[str], dim: int, dtype: FeatureType) -> tuple[pa.Table, dict[str, Any]]:
    """Some columns of a part: what is light. The pages of the codes are not read."""
    pa = arrow()
    opened, mark = open_part(file, what="features")
    try:
        with opened:
            types = opened.schema_arrow.remove_metadata()
            if not any(types.equals(_schema(dim, dtype, text_ids=text)) for text in (True, False)):
                raise UserError(f"{file} does not hold features of {dim} numbers as {dtype}: move it away")
            table = opened.read(columns=columns)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(file, error, "features") from error
    if table["id"].null_count:
        raise UserError(f"{file} holds a row without an id: move it away")
    return table.replace_schema_metadata(None), mark


def _schema(dim: int, dtype: FeatureType, *, text_ids: bool) -> pa.Schema:
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


def _as_rows(features: ArrayLike | Tensor) -> NDArray[np.float32]:
    if isinstance(features, Tensor):
        return features.detach().to("cpu", torch.float32).numpy()
    return np.asarray(features, dtype=np.float32)


class TargetSimilarities:
    """Similarity of every sample to every target as a `pyeff.selection.ScoreMatrix`: formed from features when read.

        s_ij = <x_i - c, y_j - c>,   or that over |x_i - c| |y_j - c| with `cosine`

    c is 0, or with ``center`` the mean of the pool's features: hidden states share a large common direction, beside
    which every cosine is nearly one. A vector of norm zero is similar to nothing (0); a sample that is not finite gives
    NaN, and no rule takes it.

    Args:
        features: The pool's, [N, D].
        targets: Those of the targets, [M, D], of the same method and, if they are sketches, with the same sketch; its
            variant may differ, as in LESS, which compares updates with gradients.
        cosine: Divide by the norms.
        center: Subtract the pool's mean; one more reading of the pool.
        device: Where products are formed, float32 ("cuda" where there is one and many targets).

    Raises `ValueError` where widths or methods differ, or a target is not finite.

    Cost: reading the pool, and 2 N M D FLOPs, each time it is gone through; memory for one block.
    """

    def __init__(
        self,
        features: Features,
        targets: Features,
        *,
        cosine: bool = True,
        center: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        for key in ("method", "dim", "sketch"):
            own, other = (_comparable(each.header.get(key)) for each in (features, targets))
            if own != other:
                raise ValueError(f"features and targets must agree in their {key}, got {own!r} and {other!r}")
        models = [each.header.get("model") for each in (features, targets)]
        if all(models) and models[0] != models[1]:
            raise ValueError("features and targets must be of one model, but their headers name two")
        if len(targets) == 0:
            raise ValueError("targets must hold at least one row, got none")
        self._features, self._cosine, self._device = features, cosine, torch.device(device)
        goals = targets.rows(np.arange(len(targets)))
        if not np.isfinite(goals).all():
            bad = int(np.flatnonzero(~np.isfinite(goals).all(axis=1))[0])
            raise ValueError(f"targets must be finite, but {targets.ids[bad]!r} is not")
        self._mean: Tensor | None = None
        if center:
            self._mean = torch.from_numpy(_mean(features)).to(self._device, torch.float32)
        self._targets = self._ready(torch.from_numpy(goals).to(self._device))

    @property
    def shape(self) -> tuple[int, int]:
        """N samples and M targets."""
        return len(self._features), len(self._targets)

    def blocks(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Products of the features' blocks with the targets."""
        for first, rows in self._features.blocks():
            yield first, self._product(rows)

    def rows(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """Products of these rows with the targets."""
        return self._product(self._features.rows(indices))

    def _ready(self, rows: Tensor) -> Tensor:
        if self._mean is not None:
            rows = rows - self._mean
        if not self._cosine:
            return rows
        # By the largest entry first: squares of small gradients leave the range of floats.
        rows = rows / rows.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        return torch.nn.functional.normalize(rows, dim=1)

    def _product(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        # A row that is not finite is NaN throughout, and a product with NaN is NaN.
        product = self._ready(torch.from_numpy(rows).to(self._device)) @ self._targets.T
        found: NDArray[np.float32] = product.cpu().numpy()
        return found


def _comparable(value: Any) -> Any:
    """A header's entry without the variant of a sketch: LESS compares AdamW's updates with gradients."""
    return {k: v for k, v in value.items() if k != "variant"} if isinstance(value, dict) else value


def _mean(features: Features) -> NDArray[np.float64]:
    total, count = np.zeros(features.shape[1]), 0
    for _, rows in features.blocks():
        good = rows[np.isfinite(rows).all(axis=1)]
        total += good.sum(axis=0, dtype=np.float64)
        count += len(good)
    return total / max(1, count)


def target_scores(
    similarities: ScoreMatrix,
    pool: Features,
    targets: Features,
    *,
    method: str,
    reduction: str = "max",
    groups: Sequence[Any] | None = None,
) -> Scores:
    """One score a sample from its similarity to many targets, with everything it cost, in the order of the data set.

    ``reduction`` and ``groups`` are those of `pyeff.selection.per_sample`. FLOPs and seconds are those of the pool's
    and the targets' features, the latter parted among the samples, and of comparing them.
    """
    pa = arrow()
    started = time.perf_counter()
    values = per_sample(similarities, reduction=reduction, groups=groups)
    seconds = (time.perf_counter() - started + targets.seconds) / max(1, len(pool))
    more = shares(targets.flops, [1] * len(pool))
    products = 2 * len(targets) * pool.shape[1]
    columns = pool.columns
    count = len(pool)
    table = pa.table(
        {
            "index": columns["index"],
            "id": columns["id"],
            "score": pa.array(values, pa.float64()),
            "flops": pa.array(
                [own + part + products for own, part in zip(columns["flops"].to_pylist(), more, strict=True)],
                pa.int64(),
            ),
            "seconds": pa.array(columns["seconds"].to_numpy() + seconds, pa.float64()),
            "method": pa.array([method] * count, pa.string()),
            "seed": pa.array([int(pool.header.get("seed", 0))] * count, pa.int64()),
            "checkpoint": pa.array([str(pool.header.get("checkpoint", ""))] * count, pa.string()),
        },
        schema=schema(text_ids=has_text_ids(columns)),
    )
    return Scores(table.sort_by("index").combine_chunks())
