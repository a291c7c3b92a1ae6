"""What a method is run on: a fixed sequence of batches, each a function of the data set and its number alone."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pyeff.data.samples import Sample
from pyeff.scoring.scores import SampleId


@dataclass(frozen=True)
class ScoredBatch:
    """Scores [S] or features [S, D] of the samples of one batch, their places and ids, and the batch's FLOPs.

    ``weights`` say in what proportion the samples share the cost: 1 each, or their tokens.
    """

    index: list[int]
    ids: list[SampleId]
    scores: NDArray[np.floating[Any]]
    flops: int
    weights: list[int]


class Work(Protocol):
    """A model and a data set, cut into batches."""

    samples: int
    batches: int

    def known(self, ids: set[SampleId]) -> None:
        """Say which ids have their scores already."""

    def describe(self) -> dict[str, Any]:
        """What a store's header says of the data set and how it is batched; JSON."""

    def run(self, method: Any, batches: Sequence[int]) -> Iterator[ScoredBatch]:
        """Score the batches of these numbers, in turn."""


def rows_of(values: Tensor, samples: int, method: str) -> NDArray[np.floating[Any]]:
    """What a method has made of a batch, as an array; raises `ValueError` unless it has a row for each sample."""
    if not isinstance(values, Tensor) or values.shape[:1] != (samples,):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{method} must make a tensor with a row for each of {samples} samples, got {got}")
    return as_array(values)


def as_array(values: Tensor) -> NDArray[np.floating[Any]]:
    """A tensor as an array of float32 or wider."""
    wide = values.detach().to("cpu", torch.promote_types(values.dtype, torch.float32))
    found: NDArray[np.floating[Any]] = wide.numpy()
    return found


class Digest:
    """A fingerprint of tensors, numbers and text, equal for equal contents."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def text(self, value: str) -> Digest:
        """Take in a string."""
        data = value.encode("utf-8", "surrogatepass")
        self._hash.update(len(data).to_bytes(8, "little") + data)
        return self

    def tensor(self, value: Tensor) -> Digest:
        """Take in dtype, shape and every byte of a tensor."""
        self.text(f"{value.dtype} {tuple(value.shape)}")
        rows = value.detach().reshape(-1)
        step = max(1, (16 << 20) // max(1, rows.element_size()))
        for begin in range(0, rows.numel(), step):
            piece = rows[begin : begin + step].cpu().contiguous()
            self._hash.update(piece.view(torch.uint8).numpy().tobytes())
        return self

    def any(self, value: Any) -> Digest:
        """Take in a sample's part: a tensor, an array, numbers, text, and lists and dictionaries of them."""
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, dict):
            for key in value:
                self.text(repr(key)).any(value[key])
            return self
        if isinstance(value, list | tuple):
            self.text(f"{len(value)} of")
            for item in value:
                self.any(item)
            return self
        if value is None or isinstance(value, str | bytes | int | float):
            return self.text(repr(value))
        if hasattr(value, "tobytes"):  # arrays, images
            data = value.tobytes()
            self.text(f"{type(value).__name__} {len(data)}")
            self._hash.update(data)
            return self
        return self.text(type(value).__qualname__)

    def hex(self) -> str:
        """The fingerprint, 32 hexadecimal digits."""
        return self._hash.hexdigest()


def texts_fingerprint(samples: Sequence[Sample]) -> str:
    """A fingerprint of samples' ids, prompts and answers, by which a selection knows the pool that was scored."""
    return Digest().any([(sample.id, sample.prompt, sample.answer) for sample in samples]).hex()


def model_fingerprint(model: nn.Module) -> str:
    """A fingerprint of every parameter and buffer: its name, type, shape, bytes and whether it is trained.

    Cost: reads the model once; about a second a gigabyte.
    """
    digest = Digest()
    for name, parameter in model.named_parameters():
        digest.text(f"{name} {parameter.requires_grad}").tensor(parameter)
    for name, buffer in model.named_buffers():
        digest.text(name).tensor(buffer)
    return digest.hex()


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first parameter or buffer lies; the CPU for a model without any."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and every module back in its own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def refuse_bad_ids(ids: Sequence[Any], known: set[SampleId], *, first: int = 0) -> list[SampleId]:
    """Ids as plain strings or integers; raises where one is missing, of another type or there twice.

    ``known`` are the ids of other samples, to which these are added. ``first`` is the place of the first in the data
    set. A `ValueError` names the sample by its place.
    """
    plain: list[SampleId] = []
    for place, value in enumerate(ids, start=first):
        if isinstance(value, Tensor):
            value = value.item() if value.numel() == 1 else value.tolist()
        if hasattr(value, "__index__") and not isinstance(value, bool | int):
            value = int(value)
        if value is None or value == "":
            raise ValueError(f"sample {place} of the dataset has no id")
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise TypeError(f"the id of sample {place} must be a string or an integer, got {type(value).__name__}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"the id {value} of sample {place} does not fit in 64 bits: make it a string")
        if isinstance(value, str) and not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            raise ValueError(f"the id {value!r} of sample {place} is not valid Unicode")
        if value in known:
            raise ValueError(f"the id {value!r} of sample {place} is there twice: ids must be unique")
        known.add(value)
        plain.append(value)
    return plain
