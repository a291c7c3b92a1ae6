"""Features on disk while they are made: a `PartStore` of quantised rows, appended batch by batch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from pyeff.scoring.features import GROUP_BYTES, Features, features_at, features_schema, read_columns
from pyeff.scoring.quantised import FeatureType, encode_rows, row_bytes
from pyeff.scoring.scores import SampleId, arrow, shares
from pyeff.scoring.store import PART_ROWS, PartStore, has_text_ids, read_parts
from pyeff.scoring.work import refuse_bad_ids

if TYPE_CHECKING:
    import pyarrow as pa

# A part that is lost to a kill is made again.
_PART_BYTES = 64 << 20


class FeatureStore(PartStore):
    """Writes features batch by batch into a directory (or, without a ``path``, into memory).

    A kill loses at most what was added since the last part; opened again with the same header, `done` says which
    batches are there. ``header`` is JSON and must hold ``method``, which names what the features are; what else must
    agree for two sets of features to be comparable, such as a sketch's header, belongs in it too.

    Args:
        path: The directory, or None.
        header: What the features are and of what. ``samples``, if it is there, is how many make the store complete.
        dim: Numbers of a row.
        dtype: How they are kept; see `pyeff.scoring.quantised`.
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
        try:
            # As it will be read again: tuples become lists. A NaN would be unequal to itself, and never resumed.
            kept = json.loads(json.dumps(whole, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise type(error)(f"header must be JSON: {error}") from error
        super().__init__(None if path is None else Path(path), kept, resume=resume)
        self._dim, self._dtype = dim, dtype
        self._parts: list[pa.Table] = []
        self._waiting: list[tuple[list[int], list[SampleId], Any, Any, list[int], list[float]]] = []
        self._known: set[SampleId] = set()
        self._count = 0

    def _take_in(self) -> None:
        assert self.path is not None

        def read(file: Path) -> tuple[pa.Table, dict[str, Any]]:
            return read_columns(file, ["id"], self._dim, self._dtype)

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
        if batch in self.done:
            raise ValueError(f"batch {batch} has its features already")
        rows = _as_rows(features)
        if rows.shape != (len(ids), self._dim):
            raise ValueError(f"features must be [{len(ids)}, {self._dim}], a row for each id, got {rows.shape}")
        count = len(ids)
        places = _numbers("index", range(len(self._known), len(self._known) + count) if index is None else index, count)
        spent = _numbers("flops", flops, count) if isinstance(flops, Sized) else shares(int(flops), [1] * count)
        if isinstance(seconds, Sized):
            took = _numbers("seconds", seconds, count, float)
        else:
            took = [float(seconds) / max(1, count)] * count
        # Checked apart: a batch that is refused leaves no ids behind.
        own: set[SampleId] = set()
        plain = refuse_bad_ids(ids, own)
        twice = own & self._known
        if twice:
            raise ValueError(f"the id {min(twice, key=str)!r} has its features already: ids must be unique")
        self._begin(batch, plain)
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
        types = features_schema(self._dim, self._dtype, text_ids=bool(self._text_ids))
        return pa.table(
            [pa.array(a, t) if a is not column else a for a, t in zip(arrays, types.types, strict=True)], types
        )

    def _write(self, table: pa.Table, file: Any) -> None:
        rows = max(1, GROUP_BYTES // (4 * self._dim))
        arrow("parquet").write_table(
            table,
            file,
            row_group_size=rows,
            data_page_size=GROUP_BYTES,
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
            return features_at(self.path, self._header)
        pa = arrow()
        empty = features_schema(self._dim, self._dtype, text_ids=bool(self._text_ids)).empty_table()
        return Features(self._header, pa.concat_tables([empty, *self._parts]).combine_chunks(), [], None)


def _as_rows(features: ArrayLike | Tensor) -> NDArray[np.float32]:
    if isinstance(features, Tensor):
        features = features.detach().cpu()
        features = (features if features.is_complex() else features.to(torch.float32)).numpy()
    if np.iscomplexobj(features):
        raise TypeError("features must be real numbers, got complex ones")
    return np.asarray(features, dtype=np.float32)


def _numbers(name: str, values: Any, count: int, kind: type = int) -> list[Any]:
    """One plain number for each id, which otherwise would be found to be missing when the part is written."""
    if len(values) != count:
        raise ValueError(f"{name} must be one for each of the {count} ids, got {len(values)}")
    return [kind(value) for value in values]
