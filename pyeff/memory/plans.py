"""What a plan of a training step is asked, and what it answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from pyeff.memory.rates import Rates
from pyeff.memory.states import MASTERS, OPTIMIZERS, WITHOUT_OFFLOAD, Master, Optimizer
from pyeff.memory.transformer import Checkpointing, Head

DType = Literal["float32", "bfloat16"]
Release = Literal["none", "one-pass", "two-pass"]
Compress = Literal["fp8", "int8"]

# Nothing is trained in so few bytes: a smaller number was meant in another unit.
_LEAST_BARE = 2**20
_ITEMSIZE = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Settings:
    """How a step is taken; everything an option may change."""

    seq_len: int
    batch: int = 1
    accumulation: int = 1
    dtype: DType = "bfloat16"
    optimizer: Optimizer = "adamw"
    master: Master = "none"
    offload: bool = False
    release: Release = "none"
    checkpointing: Checkpointing = "none"
    compress: Compress | None = None
    offload_activations: bool = False
    head: Head = "logits"
    packed: bool = False
    lora_rank: int = 0
    lora_targets: tuple[str, ...] = ()
    lora_dropout: float = 0.0
    head_tokens: int | None = None
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "accumulation"):
            _positive(name, getattr(self, name))
        if isinstance(self.lora_rank, bool) or not isinstance(self.lora_rank, int) or self.lora_rank < 0:
            raise ValueError(f"lora_rank must be a whole number and not negative, got {self.lora_rank!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.head_tokens is not None and not 0 <= self.head_tokens <= self.batch * self.seq_len:
            raise ValueError(f"head_tokens must be between 0 and batch * seq_len, got {self.head_tokens!r}")
        choices: tuple[tuple[str, Sequence[str]], ...] = (
            ("dtype", get_args(DType)),
            ("optimizer", OPTIMIZERS),
            ("master", MASTERS),
            ("release", get_args(Release)),
            ("checkpointing", get_args(Checkpointing)),
            ("head", get_args(Head)),
            ("device", ("cuda", "cpu")),
        )
        for name, known in choices:
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name, without in (("offload", WITHOUT_OFFLOAD), ("release", ("adamw",))):
            if getattr(self, name) not in (False, "none") and self.optimizer in without:
                raise ValueError(f"{name} needs one of pyeff's optimizers, such as adamw8bit, got {self.optimizer}")
        if self.release != "none" and self.accumulation > 1:
            raise ValueError(
                f"release must be none where gradients are accumulated, which keeps them all, got {self.release!r} "
                f"with accumulation {self.accumulation}"
            )
        if self.compress not in (None, *get_args(Compress)):
            raise ValueError(f"compress must be None, fp8 or int8, got {self.compress!r}")
        if self.checkpointing == "none" and (self.compress is not None or self.offload_activations):
            raise ValueError(
                "compress and offload_activations say how checkpoints hold what they keep: take checkpointing layer or "
                "attention"
            )
        if self.packed and self.batch != 1:
            raise ValueError(f"batch must be 1 for packed samples (seq_len counts their tokens), got {self.batch}")

    @property
    def itemsize(self) -> int:
        """Bytes of a weight and of an activation."""
        return _ITEMSIZE[self.dtype]


@dataclass(frozen=True)
class Phase:
    """The fullest moment of one phase, in bytes."""

    name: str
    parameters: int
    states: int
    gradients: int
    activations: int
    working: int
    other: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.states + self.gradients + self.activations + self.working + self.other


@dataclass(frozen=True)
class Layer:
    """What belongs to one layer, in bytes; `activations` are those kept for the backward."""

    name: str
    parameters: int
    states: int
    gradients: int
    activations: int


@dataclass(frozen=True)
class Option:
    """The step with some settings changed: its peak, FLOPs and predicted time for the same tokens, whether it fits."""

    changes: Mapping[str, Any]
    peak: int
    flops: int
    seconds: float | None
    fits: bool | None

    @property
    def name(self) -> str:
        """The changes in words."""
        # A smaller batch takes the same step in more parts.
        more = {"batch": " accumulated"}
        return ", ".join(_in_words(key, value) + more.get(key, "") for key, value in self.changes.items()) or "as asked"


@dataclass(frozen=True)
class Plan:
    """A step's memory; see `plan`.

    `phases` are in the order of a step and `peak` is the fullest; `saved` are all tensors kept for the backward (layer,
    name, bytes), empty where the step was traced (`method`: "account" or "trace"); `options` are ranked: what fits
    first, by predicted time. `seconds` and times of options are estimates unless `rates` were measured or given.
    """

    model: str
    method: Literal["account", "trace"]
    settings: Settings
    layers: tuple[Layer, ...]
    phases: tuple[Phase, ...]
    saved: tuple[tuple[str, str, int], ...]
    device_memory: int | None
    rates: Rates | None
    flops: int
    seconds: float | None
    largest_batch: int | None
    largest_seq_len: int | None
    options: tuple[Option, ...]

    @property
    def peak(self) -> Phase:
        """The fullest moment."""
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None where no size was given."""
        return None if self.device_memory is None else self.peak.total <= self.device_memory

    @cached_property
    def best_change(self) -> Option | None:
        """The single change that buys most: the fastest that makes the step fit, or else what frees most memory."""
        single = [option for option in self.options if len(option.changes) == 1 and option.peak < self.peak.total]
        if not single:
            return None
        fitting = [option for option in single if option.fits]
        if self.fits is False and fitting:
            return min(fitting, key=lambda option: (option.seconds or option.flops, option.peak))
        return min(single, key=lambda option: option.peak)

    @property
    def sentence(self) -> str:
        """What to know first, in one or two sentences."""
        peak = self.peak
        text = f"The step needs {size_text(peak.total)} at its fullest, in the {peak.name}"
        if self.device_memory is not None:
            relation = "which fits" if self.fits else "which does not fit"
            text += f", {relation} into {size_text(self.device_memory)}"
        change = self.best_change
        if change is not None:
            cost = ""
            if self.seconds and change.seconds:
                cost = f" at {change.seconds / self.seconds:.2f} x the predicted time"
            if "batch" in change.changes:
                cost += ", by gradient accumulation"
            text += f". The single change that buys most: {change.name} ({size_text(change.peak)}{cost})"
        fitting = [option for option in self.options if option.fits]
        if self.fits is False and not (change and change.fits):
            text += (
                f". Nothing alone makes it fit; the fastest that does: {fitting[0].name}"
                if fitting
                else (
                    f". Nothing the planner knows makes it fit; the nearest needs "
                    f"{size_text(min(self.options, key=lambda option: option.peak).peak)}"
                )
            )
        return text + "."

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "model": self.model,
            "method": self.method,
            "settings": dataclasses.asdict(self.settings),
            "peak": {**dataclasses.asdict(self.peak), "total": self.peak.total},
            "fits": self.fits,
            "device_memory": self.device_memory,
            "phases": [{**dataclasses.asdict(phase), "total": phase.total} for phase in self.phases],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "saved": [{"layer": layer, "name": name, "bytes": nbytes} for layer, name, nbytes in self.saved],
            "rates": None if self.rates is None else dataclasses.asdict(self.rates),
            "flops": self.flops,
            "seconds": self.seconds,
            "largest_batch": self.largest_batch,
            "largest_seq_len": self.largest_seq_len,
            "options": [
                {"changes": dict(o.changes), "peak": o.peak, "flops": o.flops, "seconds": o.seconds, "fits": o.fits}
                for o in self.options
            ],
            "best_change": None if self.best_change is None else dict(self.best_change.changes),
            "sentence": self.sentence,
        }


def parse_size(value: int | str, *, name: str = "memory") -> int:
    """Bytes of a number or of text like "24GB" (10^9) or "24GiB" (2^30).

    ``name`` is what errors call the value. Raises ValueError for what is no positive size, and for a number without a
    unit below 2^20: its unit was forgotten.

    >>> parse_size("20GB"), parse_size("1.5 GiB"), parse_size(2**24)
    (20000000000, 1610612736, 16777216)
    """
    from pydantic import ByteSize, TypeAdapter, ValidationError

    try:
        size = int(TypeAdapter(ByteSize).validate_python(value))
    except ValidationError:
        size = 0
    if size <= 0 or isinstance(value, bool):
        raise ValueError(f'{name} must be a positive size such as "24GB" or "80GiB", got {value!r}')
    if size < _LEAST_BARE and (not isinstance(value, str) or value.strip()[-1:].isdigit()):
        raise ValueError(f'{name} must be a size with its unit, such as "24GB", got {value!r}, which is {size} bytes')
    return size


def size_text(nbytes: float) -> str:
    """Bytes in the unit that reads best.

    >>> size_text(1_234_000_000), size_text(512)
    ('1.23 GB', '512 B')
    """
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(nbytes) >= factor:
            return f"{nbytes / factor:.3g} {unit}" if abs(nbytes) < 999.5 * factor else f"{nbytes / factor:.0f} {unit}"
    return f"{nbytes:.0f} B"


def _in_words(key: str, value: Any) -> str:
    return {True: key, False: f"no {key}"}[value] if isinstance(value, bool) else f"{key} {value}"


def _positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
