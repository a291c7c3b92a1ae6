"""Which rows of an activation belong to which sample."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyeff.ops import vector_grad
from pyeff.ops._packed import check_borders, host_borders, remember_borders

# In this order, the input whose first dimension counts the samples of a batch.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values", "decoder_input_ids")


class UnknownRows(ValueError):
    """The rows of an activation cannot be told apart by sample."""


@dataclass(frozen=True)
class Rows:
    """The rows [N, n] of a flattened activation, sample after sample: `borders` (int32, [S+1]) says where each begins.

    `each` is the number of rows of every sample when all have the same number; otherwise `host` holds the borders on
    the CPU.
    """

    samples: int
    total: int
    each: int | None
    borders: Tensor
    host: Tensor | None = None

    @property
    def pairs(self) -> int:
        """The pairs of rows of one sample, over all samples."""
        return int(self.host.diff().square().sum()) if self.host is not None else self.samples * (self.each or 0) ** 2

    def spans(self) -> Iterator[slice]:
        """The rows of each sample, in turn, without reading anything back from a GPU."""
        if self.host is not None:
            edges = self.host.tolist()
        else:
            edges = [sample * (self.each or 0) for sample in range(self.samples + 1)]
        return (slice(begin, end) for begin, end in itertools.pairwise(edges))

    def sum_by_sample(self, rows: Tensor) -> Tensor:
        """The sums [S, n] of each sample's rows [N, n], accumulated in fp32 or wider."""
        sums = vector_grad(rows, self.borders, norms=False, sample_grads=True).sample_grads
        assert sums is not None
        return sums

    def sample_of_row(self) -> Tensor:
        """The sample [N] of each row, int64."""
        lengths = self.borders.diff()
        samples = torch.arange(self.samples, device=self.borders.device)
        return torch.repeat_interleave(samples, lengths, output_size=self.total)


@dataclass
class Batch:
    """The samples of one forward pass.

    `leading` are the dimensions that an activation shares with the batch: (rows, width) of token ids or embeddings,
    (rows,) of anything else. `packed` holds the borders (int64, on the CPU) when samples share a row, and is None when
    every index of dimension 0 is a sample. `kept` are the borders among those tokens alone that the model keeps at
    some layer, which all other activations have more of.
    """

    samples: int
    leading: tuple[int, ...]
    packed: Tensor | None = None
    kept: Tensor | None = None
    _known: dict[tuple[Any, ...], Rows] = field(default_factory=dict, repr=False)

    def rows(self, leading: tuple[int, ...], device: torch.device) -> Rows:
        """The samples of the rows of an activation whose dimensions before the features are `leading`.

        Raises `UnknownRows` when these dimensions do not begin with the samples or the tokens of the batch.
        """
        total = math.prod(leading)
        tokens = math.prod(self.leading)
        if self.packed is not None:
            if leading[: len(self.leading)] != self.leading and leading[:1] != (tokens,):
                if self.kept is not None and total == int(self.kept[-1]):
                    return self._packed_rows(self.kept, 1, total, device)
                raise UnknownRows(f"expected {self.leading} or {(tokens,)} tokens first, got {leading}")
            return self._packed_rows(self.packed, total // max(tokens, 1), total, device)
        if self.samples == 1:
            return self._equal_rows(total, total, device)
        if leading[:1] == (self.samples,) or (len(leading) == 1 and leading[0] == tokens):
            return self._equal_rows(total // max(self.samples, 1), total, device)
        raise UnknownRows(
            f"expected {self.samples} samples in dimension 0 or {tokens} rows of tokens, got dimensions {leading}"
        )

    def _equal_rows(self, each: int, total: int, device: torch.device) -> Rows:
        return _equal_rows(self.samples, each, total, device)

    def _packed_rows(self, cuts: Tensor, per_token: int, total: int, device: torch.device) -> Rows:
        key = (per_token, device, "kept" if cuts is self.kept else "packed")
        if key not in self._known:
            host = cuts * per_token
            borders = host.to(device=device, dtype=torch.int32)
            remember_borders(borders, host)
            self._known[key] = Rows(self.samples, total, None, borders, host)
        return self._known[key]


@functools.lru_cache(maxsize=256)
def _equal_rows(samples: int, each: int, total: int, device: torch.device) -> Rows:
    host = torch.arange(samples + 1) * each
    borders = host.to(device=device, dtype=torch.int32)
    remember_borders(borders, host)
    return Rows(samples, total, each, borders)


def batch_of_call(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    cu_seqlens: Tensor | None,
    kept: Tensor | None = None,
) -> Batch:
    """The samples of the call `module(*args, **kwargs)`.

    They are, in this order: `cu_seqlens` when given; the batch's own `cu_seq_lens_q`; `position_ids` that restart
    where no attention mask is passed, as transformers reads them; the indices of dimension 0. `kept` are borders among
    the tokens that the model keeps at some layer, for as many samples.
    """
    named = _named_arguments(module, args, kwargs)
    name, first = _first_input(named)
    leading = tuple(first.shape[:2]) if _has_tokens(name, first) else tuple(first.shape[:1])
    if cu_seqlens is None and isinstance(named.get("cu_seq_lens_q"), Tensor):
        cu_seqlens = named["cu_seq_lens_q"]
    if cu_seqlens is None and len(leading) == 2:
        cu_seqlens = _restarts(named, leading)
    if cu_seqlens is None:
        return Batch(leading[0], leading)
    borders = host_borders(cu_seqlens, math.prod(leading))
    if kept is not None:
        check_borders(kept, "kept")
        if kept.shape != borders.shape:
            raise ValueError(f"kept must be borders of {borders.numel() - 1} samples, got shape {tuple(kept.shape)}")
        kept = host_borders(kept, int(kept[-1]), "kept")
    return Batch(borders.numel() - 1, leading, borders, kept)


def _restarts(named: Mapping[str, Any], leading: tuple[int, ...]) -> Tensor | None:
    positions = named.get("position_ids")
    if not isinstance(positions, Tensor) or positions.ndim != 2 or positions.shape[1] != leading[1]:
        return None
    if named.get("attention_mask") is not None or named.get("past_key_values") is not None:
        return None
    positions = positions.expand(leading).to("cpu")
    starts = torch.ones(leading, dtype=torch.bool)
    starts[:, 1:] = positions.diff(dim=1) != 1
    if not starts[:, 1:].any():
        return None
    begins = starts.flatten().nonzero().flatten()
    return torch.cat([begins, begins.new_tensor([starts.numel()])])


def _named_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    while isinstance(module, nn.parallel.DistributedDataParallel):
        module = module.module
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except TypeError:  # the call itself will say what is wrong with its arguments
        return {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    named: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            named.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            named.update({f"{name}{i}": item for i, item in enumerate(value)})
        else:
            named[name] = value
    return named


def _first_input(named: Mapping[str, Any]) -> tuple[str, Tensor]:
    for name in (*_INPUTS, *named):
        value = named.get(name)
        if isinstance(value, Tensor) and value.ndim >= 1:
            return name, value
    for value in named.values():  # a batch in one argument
        if isinstance(value, Mapping) and value:
            return _first_input(value)
        if isinstance(value, list | tuple) and value:
            return _first_input({str(place): item for place, item in enumerate(value)})
    raise ValueError(
        "the observed model was called without a tensor whose dimension 0 counts the samples: hand it the batch as an "
        "argument, or in a dictionary or tuple"
    )


def _has_tokens(name: str, value: Tensor) -> bool:
    if name == "inputs_embeds" or (name == "input_features" and value.ndim == 3):
        return value.ndim >= 2
    if value.is_floating_point():
        return value.ndim == 3 and name not in _INPUTS
    return value.ndim == 2
