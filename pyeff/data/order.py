"""The order in which samples are shown: endless, shuffled, and exactly resumable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class DataOrder:
    """Endless shuffled epochs over a set of sample indices.

    The order of an epoch is a function of (seed, epoch) alone: sample i gets the i-th 64-bit word of a Philox
    stream keyed by the seed with the epoch as its counter, and samples are sorted by it. The order of a
    subset is therefore the order of the whole set restricted to it, no generator is carried from step to step,
    and a checkpoint is a few numbers. (Only the raw stream is used: NumPy guarantees that from version to version,
    but not its shuffles.)

    Args:
        indices: the sample indices, or a number n for 0 .. n - 1.
        seed: a whole number >= 0.
        lengths: tokens of every sample that may ever be shown, addressed by sample index; needed by
            :meth:`next_batch` alone.

    Raises:
        ValueError: no index, a repeated or negative one, one without a length, or a negative seed.

    Example:
        >>> from pyeff.data import DataOrder
        >>> order = DataOrder(4, seed=1, lengths=[3, 3, 3, 3])
        >>> first = [order.next_batch(6), order.next_batch(6)]
        >>> sorted(first[0] + first[1])
        [0, 1, 2, 3]
    """

    def __init__(
        self, indices: int | Sequence[int], seed: int, *, lengths: Sequence[int] | np.ndarray | None = None
    ) -> None:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be a whole number from 0 to 2^64 - 1, got {seed}")
        self._seed = int(seed)
        self._lengths = None if lengths is None else np.asarray(lengths, dtype=np.int64)
        self._epoch = 0
        self._position = 0
        self._indices = self._checked(range(indices) if isinstance(indices, int) else indices)
        self._order = self._permutation()

    @property
    def epoch(self) -> int:
        """Number of the current pass over the set."""
        return self._epoch

    @property
    def position(self) -> int:
        """Samples of the current epoch already shown."""
        return self._position

    @property
    def indices(self) -> list[int]:
        """The sample indices that are being shown, ascending."""
        return [int(i) for i in self._indices]

    def set_indices(self, indices: Sequence[int]) -> None:
        """Show another set from the next sample on, beginning a new epoch."""
        self._indices = self._checked(indices)
        self._epoch += 1
        self._position = 0
        self._order = self._permutation()

    def next_index(self) -> int:
        """The next sample's index."""
        index = self._peek()
        self._position += 1
        return index

    def next_batch(self, max_tokens: int) -> list[int]:
        """The next sample indices whose tokens fit in `max_tokens`, in order; at least one.

        Runs on into the next epoch, but a batch never holds the same sample twice.

        Raises:
            ValueError: the next sample alone is longer than `max_tokens`, or no lengths were given.
        """
        if self._lengths is None:
            raise ValueError("next_batch needs the lengths of the samples: DataOrder(..., lengths=...)")
        batch: list[int] = []
        room = max_tokens
        while True:
            index = self._peek()
            length = int(self._lengths[index])
            if not batch and length > max_tokens:
                raise ValueError(f"max_tokens is {max_tokens}, but sample {index} has {length} tokens")
            if length > room or index in batch:
                return batch
            batch.append(index)
            room -= length
            self._position += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next; JSON-able."""
        return {
            "seed": self._seed,
            "epoch": self._epoch,
            "position": self._position,
            "indices": self.indices,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state_dict` was taken.

        Raises:
            ValueError: a field is missing or impossible.
        """
        missing = {"seed", "epoch", "position", "indices"} - set(state)
        if missing:
            raise ValueError(f"state lacks {', '.join(sorted(missing))}")
        indices = self._checked(state["indices"])
        if not 0 <= int(state["position"]) <= len(indices) or int(state["epoch"]) < 0:
            raise ValueError(
                f"state has epoch {state['epoch']} and position {state['position']} "
                f"for a set of {len(indices)}: it does not fit"
            )
        self._indices = indices
        self._seed = int(state["seed"])
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._permutation()

    def _peek(self) -> int:
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._permutation()
        return int(self._order[self._position])

    def _permutation(self) -> np.ndarray:
        # The key has two words of which the seed fills one; the counter's highest word is the epoch, so the
        # streams of two epochs lie 2^192 blocks apart.
        generator = np.random.Philox(key=self._seed, counter=[0, 0, 0, self._epoch])
        keys = generator.random_raw(int(self._indices[-1]) + 1)[self._indices]
        return self._indices[np.argsort(keys, kind="stable")]

    def _checked(self, indices: Sequence[int]) -> np.ndarray:
        array = np.asarray(list(indices), dtype=np.int64)
        if array.size == 0:
            raise ValueError("indices must hold at least one sample, got none")
        array = np.sort(array)
        if array[0] < 0:
            raise ValueError(f"indices must not be negative, got {array[0]}")
        if (array[1:] == array[:-1]).any():
            raise ValueError("indices must not repeat a sample")
        if self._lengths is not None and array[-1] >= self._lengths.size:
            raise ValueError(f"indices go up to {array[-1]}, but there are {self._lengths.size} lengths")
        return array
