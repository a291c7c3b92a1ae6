"""A table of scores: what each sample is worth by one method, and what finding out cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pyeff.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

SampleId = str | int

COLUMNS = ("index", "id", "score", "flops", "seconds", "method", "seed", "checkpoint")


@dataclass(frozen=True)
class Scores:
    """Scores of N samples as a pyarrow table, one row a sample, in the order of the dataset.

    ============ ======= =========================================================================
    index        int64   position in the dataset
    id           string  the sample's own id, or int64; unique
    score        double  NaN where it is undefined (no answer token, logits that are not finite)
    flops        int64   the sample's part of what its batch cost; the column adds up to the total
    seconds      double  the same of measured time
    method       string  name of the score with its variant
    seed         int64   the ``seed`` that was given; null in an average
    checkpoint   string  the ``checkpoint`` that was given
    ============ ======= =========================================================================

    ``path`` is the directory the table was streamed to, None for one that was kept in memory.
    """

    table: pa.Table
    path: Path | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def values(self) -> NDArray[np.float64]:
        """The scores, float64 [N], in the order of the dataset."""
        return np.array(self.table["score"].to_numpy(), dtype=np.float64)

    @property
    def ids(self) -> list[SampleId]:
        """The samples' ids, in the order of the dataset."""
        ids: list[SampleId] = self.table["id"].to_pylist()
        return ids

    @property
    def method(self) -> str:
        """Name of the method; empty for an empty table."""
        return str(self.table["method"][0]) if len(self) else ""

    @property
    def flops(self) -> int:
        """FLOPs of the whole scoring."""
        return sum(self.table["flops"].to_pylist())

    @property
    def seconds(self) -> float:
        """Seconds of the whole scoring, loading the samples included."""
        return float(np.sum(self.table["seconds"].to_numpy()))

    def write(self, path: str | Path) -> None:
        """Write the table to one Parquet file, in one step.

        Raises `UserError` where it cannot be written; what was there stays.
        """
        from pyeff._files import write_atomic

        parquet = arrow("parquet")
        try:
            write_atomic(Path(path), lambda file: parquet.write_table(self.table, file, write_page_checksum=True))
        except OSError as error:
            raise UserError(f"scores cannot be written to {path} ({error.strerror or error})") from error


def average(scores: Iterable[Scores]) -> Scores:
    """The mean of several scores of each sample, over checkpoints, seeds or initialisations.

        score = 1/R sum_r score_r,   flops = sum_r flops_r,   seconds = sum_r seconds_r

    The expectations in GraNd and EL2N are such means. All must be of one method and of the same samples, in any order;
    the result has the order of the first. A sample that is NaN in one is NaN in the mean.

    Raises `ValueError` for nothing to average, several methods, or different samples.

    >>> import torch
    >>> from pyeff.scoring import EL2N, average
    >>> data = (torch.randn(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    >>> models = [torch.nn.Linear(3, 2) for _ in range(3)]
    >>> mean = average(EL2N().score(model, data, seed=i, progress=False) for i, model in enumerate(models))
    >>> mean.method, len(mean)
    ('EL2N (mean of 3)', 6)
    """
    pa = arrow()
    given = list(scores)
    if not given:
        raise ValueError("scores must hold at least one table to average, got none")
    first = given[0]
    for other in given[1:]:
        if other.method != first.method:
            raise ValueError(f"scores must be of one method, got {first.method!r} and {other.method!r}")
    ids = first.ids
    positions = [_positions(ids, other.ids) for other in given]

    def column(name: str) -> NDArray[Any]:
        return np.stack([one.table[name].to_numpy()[at] for one, at in zip(given, positions, strict=True)])

    count = len(ids)
    names = dict.fromkeys(str(one.table["checkpoint"][0]) for one in given) if count else {}
    checkpoints = ", ".join(name for name in names if name)
    table = pa.table(
        {
            "index": first.table["index"],
            "id": first.table["id"],
            "score": pa.array(column("score").mean(axis=0), pa.float64()),
            "flops": pa.array(column("flops").sum(axis=0), pa.int64()),
            "seconds": pa.array(column("seconds").sum(axis=0), pa.float64()),
            "method": pa.array([f"{first.method} (mean of {len(given)})"] * count, pa.string()),
            "seed": pa.nulls(count, pa.int64()),
            "checkpoint": pa.array([checkpoints] * count, pa.string()),
        }
    )
    return Scores(table)


def _positions(wanted: Sequence[SampleId], ids: Sequence[SampleId]) -> NDArray[np.int64]:
    if ids == wanted:
        return np.arange(len(ids))
    where = {sample: position for position, sample in enumerate(ids)}
    missing = [sample for sample in wanted if sample not in where]
    if missing or len(ids) != len(wanted):
        odd = missing[0] if missing else next(sample for sample in ids if sample not in set(wanted))
        raise ValueError(f"scores must be of the same samples: {odd!r} is not in all of them")
    return np.array([where[sample] for sample in wanted], dtype=np.int64)


def schema(*, text_ids: bool) -> pa.Schema:
    """The types of the columns."""
    pa = arrow()
    types = (
        pa.int64(),
        pa.string() if text_ids else pa.int64(),
        pa.float64(),
        pa.int64(),
        pa.float64(),
        pa.string(),
        pa.int64(),
        pa.string(),
    )
    return pa.schema(list(zip(COLUMNS, types, strict=True)))


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """Part a whole number by weights into whole numbers that add up to it.

    >>> shares(10, [1, 1, 1])
    [3, 3, 4]
    """
    whole = sum(weights) or 1
    bounds = [0]
    passed = 0
    for weight in weights:
        passed += weight
        bounds.append(total * passed // whole)
    return [after - before for before, after in pairwise(bounds)]


def arrow(part: str = "") -> Any:
    """pyarrow or a module of it; scores need it, the rest of pyeff does not."""
    import importlib

    try:
        return importlib.import_module(f"pyarrow.{part}" if part else "pyarrow")
    except ImportError as error:
        raise UserError("tables of scores need the package pyarrow: pip install 'pyeff[run]'") from error
