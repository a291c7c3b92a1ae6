"""Classifiers: a module that maps a batch of inputs to logits [B, C], and a data set of inputs and classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from pyeff.scoring.flops import flop_counter
from pyeff.scoring.scores import SampleId
from pyeff.scoring.work import Digest, ScoredBatch, device_of, refuse_bad_ids, rows_of

if TYPE_CHECKING:
    from pyeff.scoring.method import BatchMethod

# A data set that is no tensor is known by so many of its samples, spread over it.
_PROBED = 16
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Rows = tuple[Sequence[Any] | None, Any, Any]


def logits_of(model: nn.Module, inputs: Any) -> Tensor:
    """Logits [B, C] of a batch: the module's output or its ``logits``; a mapping is passed as keyword arguments."""
    output = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must map a batch to logits [batch, classes], got {got}")
    return logits


class Classification:
    """A classifier and its data set, cut into batches of ``batch_size`` samples in the data set's order.

    ``dataset``: tensors ``(x, y)`` or ``(ids, x, y)``, or anything with a length whose items are ``(x, y)`` or
    ``(id, x, y)``; without ids, a sample's id is its place. ``y`` are class numbers.
    """

    def __init__(self, model: nn.Module, dataset: Any, *, batch_size: int, workers: int = 0) -> None:
        self.model, self.device = model, device_of(model)
        self._tensors = _as_tensors(dataset)
        self._dataset = dataset
        self._known: set[SampleId] = set()
        self._workers = workers
        self._batch_size = batch_size
        self._flops: dict[Any, int] = {}
        if self._tensors is not None:
            ids, x, y = self._tensors
            self.samples = len(y)
            if ids is not None:
                self._tensors = (refuse_bad_ids(list(ids), set()), x, y)
        else:
            try:
                self.samples = len(dataset)
                if isinstance(dataset, Mapping):
                    raise TypeError
            except TypeError as error:
                raise TypeError(
                    f"dataset must have a length and items by number, got {type(dataset).__name__}: an iterable "
                    "data set cannot be resumed; make it a list"
                ) from error
        if self.samples == 0:
            raise ValueError("the dataset is empty: there is nothing to score")
        self.batches = -(-self.samples // batch_size)

    def known(self, ids: set[SampleId]) -> None:
        """Say which ids have their scores already."""
        self._known = ids

    def describe(self) -> dict[str, Any]:
        """Fingerprint of the data set and how it is batched."""
        digest = Digest().text(f"{self.samples}")
        if self._tensors is not None:
            digest.any(self._tensors)
        else:
            step = max(1, self.samples // _PROBED)
            for place in range(0, self.samples, step):
                digest.any(tuple(self._dataset[place]))
        return {"dataset": digest.hex(), "samples": self.samples, "batching": f"{self._batch_size} samples"}

    def run(self, method: BatchMethod, batches: Sequence[int]) -> Iterator[ScoredBatch]:
        """Score the batches of these numbers, in turn."""
        spans = [range(n * self._batch_size, min((n + 1) * self._batch_size, self.samples)) for n in batches]
        for span, (raw_ids, x, y) in zip(spans, self._rows(spans), strict=True):
            ids: list[SampleId]
            if raw_ids is None:
                ids = list(span)
            elif self._tensors is not None:
                ids = list(raw_ids)
            else:
                ids = refuse_bad_ids(raw_ids, self._known, first=span.start)
            targets = self._targets(y, len(span), span.start)
            inputs = _to(x, self.device)
            key = _shapes(inputs)
            if key in self._flops:
                scores = method.classify(self.model, inputs, targets)
            else:
                with flop_counter() as counter:
                    scores = method.classify(self.model, inputs, targets)
                self._flops[key] = int(counter.get_total_flops())
            yield ScoredBatch(
                list(span), ids, rows_of(scores, len(span), method.name), self._flops[key], [1] * len(span)
            )

    def _targets(self, y: Any, count: int, first: int) -> Tensor:
        try:
            targets = torch.as_tensor(y)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"the targets of samples {first} to {first + count - 1} must be class numbers, got {y!r:.60}"
            ) from error
        if targets.shape != (count,) or targets.dtype not in _INTEGERS:
            raise ValueError(
                f"the targets of samples {first} to {first + count - 1} must be class numbers [{count}], got "
                f"{targets.dtype} {tuple(targets.shape)}"
            )
        return targets.to(self.device, torch.int64)

    def _rows(self, spans: Sequence[range]) -> Iterator[Rows]:
        if self._tensors is not None:
            ids, x, y = self._tensors
            for span in spans:
                rows = slice(span.start, span.stop)
                yield None if ids is None else ids[rows], x[rows], y[rows]
            return
        from torch.utils.data import DataLoader

        # A generator of its own: the loader draws from it, and the samples' own draws stay as they were seeded.
        yield from DataLoader(
            self._dataset,
            batch_sampler=[list(span) for span in spans],
            collate_fn=_collate,
            num_workers=self._workers,
            generator=torch.Generator(),
        )


def error_vectors(logits: Tensor, targets: Tensor) -> Tensor:
    """softmax(logits) - onehot(targets) [B, C], in float32 or wider.

    The target's entry is minus the sum of the others, which keeps its digits where the target is near certain.
    """
    errors = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=1)
    errors.scatter_(1, targets[:, None], 0.0)
    return errors.scatter_(1, targets[:, None], -errors.sum(dim=1, keepdim=True))


def check_targets(targets: Tensor, logits: Tensor) -> None:
    """Raise `ValueError` unless every target is a class of ``logits`` [B, C], and there are two classes."""
    if logits.shape[1] < 2:
        raise ValueError(
            f"the model must have at least 2 classes, got logits {list(logits.shape)}: the softmax of one logit is 1 "
            "whatever it is; give it a logit for each class"
        )
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < logits.shape[1]:
        raise ValueError(
            f"targets must be in [0, {logits.shape[1]}), the model's classes, got {int(targets.min())} to "
            f"{int(targets.max())}"
        )


def _as_tensors(dataset: Any) -> Rows | None:
    from torch.utils.data import DataLoader, TensorDataset

    if isinstance(dataset, DataLoader):
        raise TypeError("dataset must hold samples, got a DataLoader: give its dataset (loader.dataset) and batch_size")
    parts = dataset.tensors if isinstance(dataset, TensorDataset) else dataset
    if not isinstance(parts, tuple) or len(parts) not in (2, 3):
        return None
    if isinstance(parts[-1], np.ndarray):
        raise TypeError(
            "dataset must hold tensors (x, y), got arrays: give torch.from_numpy(x) and torch.from_numpy(y)"
        )
    if not isinstance(parts[-1], Tensor):
        return None
    ids, x, y = parts if len(parts) == 3 else (None, *parts)
    lengths = [len(part) for part in (ids, x, y) if part is not None]
    if len(set(lengths)) != 1:
        raise ValueError(f"the dataset's tensors must have one length, got {lengths}")
    rows: Rows = (ids, x, y)
    return rows


def _collate(rows: list[Any]) -> Rows:
    from torch.utils.data import default_collate

    lengths = {len(row) if isinstance(row, tuple | list) else 0 for row in rows}
    if lengths not in ({2}, {3}):
        raise ValueError("every item of the dataset must be (x, y), or every one (id, x, y)")
    ids = [row[0] for row in rows] if lengths == {3} else None
    try:
        x, y = default_collate([(row[-2], row[-1]) for row in rows])
    except (TypeError, RuntimeError) as error:
        raise ValueError(f"the dataset's items cannot be made a batch: {str(error).splitlines()[0]}") from error
    return ids, x, y


def _to(x: Any, device: torch.device) -> Any:
    if isinstance(x, Mapping):
        return {key: _to(value, device) for key, value in x.items()}
    return x.to(device) if isinstance(x, Tensor) else x


def _shapes(x: Any) -> Any:
    if isinstance(x, Mapping):
        return tuple((key, _shapes(value)) for key, value in x.items())
    return tuple(x.shape) if isinstance(x, Tensor) else None
