"""States of parameters cut into pieces and laid out in buckets, so that they can travel.

A piece is some rows of a parameter with their states, or whole blocks of a vector: as with a split among processes, a
step of the pieces is a step of the whole. Small parameters travel many at a time in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyeff.ops._optimizer_states import scale_shape

# Of `OptimizerStates.lists`, what is large; counts of steps and powers of beta stay where the kernels write them.
OFFLOADED = 5
_ALIGNED = 16  # bytes, as the kernels' vectors are
# Rows of a piece, where there are so many: every piece of 1, 2 or 4 byte elements then starts aligned.
_ROWS = 16


def aligned(nbytes: int) -> int:
    """Bytes that a state takes in a bucket."""
    return -(-nbytes // _ALIGNED) * _ALIGNED


def row_pieces(shape: Sequence[int], nbytes: int, *, block_size: int, limit: int) -> list[tuple[int, int]]:
    """Where to cut dimension 0 so that no block is cut and a piece has at most `limit` of the `nbytes` of all states.

    A row, or a block of a vector, is never cut, whatever its size.

    >>> row_pieces((100, 256), 100 * 512, block_size=256, limit=32 * 512)
    [(0, 32), (32, 64), (64, 96), (96, 100)]
    """
    if len(shape) == 0 or nbytes <= limit:
        return [(0, shape[0] if shape else 1)]
    unit = block_size if len(shape) == 1 else 1
    count = max(unit, limit * shape[0] // nbytes // unit * unit)
    if count >= _ROWS:
        count = count // _ROWS * _ROWS
    return [(start, min(start + count, shape[0])) for start in range(0, shape[0], count)]


@dataclass
class Span:
    """Bytes that travel in one copy."""

    host: Tensor
    at: int  # in the slot

    @property
    def stop(self) -> int:
        """Where it ends in the slot."""
        return self.at + self.host.numel()


@dataclass
class Piece:
    """Rows of a parameter, stepped at once."""

    place: int
    start: int
    stop: int
    whole: bool
    host: list[Tensor] = field(default_factory=list)  # one for each list that there is
    nbytes: int = 0

    def of(self, x: Tensor) -> Tensor:
        """These rows of the parameter or of its gradient."""
        return x if self.whole else x[self.start : self.stop]


def pieces_of(place: int, p: Tensor, states: Sequence[Tensor | None], block_size: int, limit: int) -> list[Piece]:
    """The pieces of a parameter; `states` are its own in the order of `OptimizerStates.lists`, on any device."""
    large = states[:OFFLOADED]
    nbytes = sum(aligned(t.nbytes) for t in large if t is not None)
    cuts = row_pieces(p.shape, nbytes, block_size=block_size, limit=limit)
    found = []
    for start, stop in cuts:
        piece = Piece(place, start, stop, whole=len(cuts) == 1)
        for i, t in enumerate(large):
            if t is None:
                continue
            if piece.whole or t.numel() == 0:
                part = t
            elif p.ndim == 1 and i in (1, 3):  # a vector's scales
                part = t[start // block_size : -(-stop // block_size)]
            else:
                part = t[start:stop]
            piece.host.append(part)
            piece.nbytes += aligned(part.nbytes)
        found.append(piece)
    return found


def filled(pieces: Sequence[Piece], limit: int) -> list[list[Piece]]:
    """The pieces in order, as many in a bucket as fit."""
    found: list[list[Piece]] = []
    size = 0
    for piece in pieces:
        if not found or size + piece.nbytes > limit:
            found.append([])
            size = 0
        found[-1].append(piece)
        size += piece.nbytes
    return found


def laid_out(pieces: Sequence[Piece], memory: Tensor) -> tuple[list[Span], list[list[Tensor]]]:
    """What to copy where, and the states in the slot's memory, a list for each kind."""
    spans: list[Span] = []
    kinds: list[list[Tensor]] = [[] for _ in pieces[0].host]
    at = 0
    for piece in pieces:
        for kind, t in zip(kinds, piece.host, strict=True):
            kind.append(memory[at : at + t.nbytes].view(t.dtype).view(t.shape))
            if t.nbytes:
                _add(spans, t, at)
            at += aligned(t.nbytes)
    return spans, kinds


def _add(spans: list[Span], t: Tensor, at: int) -> None:
    """Copy `t` too; together with what was added last where it lies behind it on both sides."""
    storage = t.untyped_storage()
    start, stop = t.data_ptr() - storage.data_ptr(), t.data_ptr() - storage.data_ptr() + t.nbytes
    if spans:
        last = spans[-1]
        before = int(last.host.storage_offset())
        if last.host.untyped_storage().data_ptr() == storage.data_ptr() and start - before == at - last.at:
            start, at = before, last.at
            spans.pop()
    host = torch.empty(0, dtype=torch.uint8, device=storage.device)
    spans.append(Span(host.set_(storage, start, (stop - start,), (1,)), at))


def blocks_before(shape: Sequence[int], start: int, block_size: int) -> int:
    """The blocks of a parameter before row `start`, or before element `start` of a vector."""
    if len(shape) < 2:
        return start // block_size
    return start * scale_shape(shape, block_size)[1]
