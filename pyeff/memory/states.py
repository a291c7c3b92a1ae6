"""Bytes that an optimizer keeps for each parameter, and bytes that its step moves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

from pyeff.memory.architecture import Parameter

Optimizer = Literal["adamw", "adamw8bit", "adam8bit", "lion8bit", "sgd8bit", "muon8bit", "adafactor8bit"]
Master = Literal["none", "stochastic", "ecc8", "fp32"]

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
MASTERS: tuple[str, ...] = get_args(Master)

BLOCK = 256
# Their states stay on the device.
WITHOUT_OFFLOAD = ("adamw", "muon8bit", "adafactor8bit")
_MOMENTS = {"adamw": 2, "adamw8bit": 2, "adam8bit": 2, "lion8bit": 1, "sgd8bit": 1, "muon8bit": 1}
_NS_STEPS = 5
_FP32 = 4
# What a 16-bit weight has beside it; a weight in fp32 needs none.
_MASTER_BYTES = {"none": 0, "stochastic": 0, "ecc8": 1, "fp32": 4}


def state_bytes(parameter: Parameter, optimizer: Optimizer, master: Master = "none") -> int:
    """Optimizer states of one parameter of n elements.

    "adamw" is `torch.optim.AdamW`: two moments in the parameter's type, in fp32 with `master="fp32"`, and a step count
    of 4 bytes. The 8-bit ones hold one byte an element and moment, and a 4-byte scale for each 256 elements of a row
    that are begun: 2 + 8 / 256 bytes an element for two moments, half of it for one. "muon8bit" is `Muon8bit` for the
    layers' matrices and `AdamW8bit` for the rest; "adafactor8bit", without a first moment, holds 4 bytes a row and a
    column, or an element of a vector. `master` adds 1 ("ecc8") or 4 ("fp32") bytes an element of a 16-bit parameter.

    >>> weight = Parameter("w", "layer 0", (1024, 1024), 2, True)
    >>> state_bytes(weight, "adamw8bit") / weight.elements, state_bytes(weight, "lion8bit", "ecc8") / weight.elements
    (2.03125, 2.015625)
    """
    if not parameter.trained:
        return 0
    extra = _MASTER_BYTES[master] * parameter.elements if parameter.itemsize < _FP32 else 0
    if optimizer == "adafactor8bit":
        *outer, columns = parameter.shape or (1,)
        factored = math.prod(outer) + math.prod(outer[:-1]) * columns if outer else columns
        return _FP32 * factored + extra
    moments = _MOMENTS[optimizer]
    if optimizer == "muon8bit" and not _by_muon(parameter):
        moments = 2
    if optimizer == "adamw":
        size = _FP32 if master == "fp32" else parameter.itemsize
        return moments * size * parameter.elements + _FP32 + extra
    rows = parameter.shape[0] if len(parameter.shape) > 1 else 1
    blocks = rows * -(-parameter.elements // max(rows, 1) // BLOCK)
    return moments * (parameter.elements + _FP32 * blocks) + extra


def _by_muon(parameter: Parameter) -> bool:
    return parameter.trained and len(parameter.shape) == 2 and parameter.layer not in ("embedding", "head")


def step_working(parameters: Iterable[Parameter], optimizer: Optimizer, device: str = "cuda") -> int:
    """Bytes beside states that a step takes for a while: of the parameter with the largest direction.

    Muon in fp32 (CPU): momentum, matrix, the next one, and two products of its shorter side; on a GPU all but the
    momentum in 16 bits (counted, not measured yet). Adafactor: the gradient in fp32 and the direction. The others
    compute in registers.
    """

    def working(p: Parameter) -> int:
        if optimizer == "adafactor8bit":
            return p.elements * (_FP32 + (_FP32 if p.itemsize < _FP32 else 0))
        square = min(p.shape) ** 2
        if device == "cpu":
            return 12 * p.elements + 8 * square
        return max(10 * p.elements + 2 * square, 8 * p.elements + 4 * square)

    if optimizer == "muon8bit":
        return max((working(p) for p in parameters if _by_muon(p)), default=0)
    return max((working(p) for p in parameters if p.trained), default=0) if optimizer == "adafactor8bit" else 0


def step_flops(parameters: Iterable[Parameter], optimizer: Optimizer) -> int:
    """FLOPs of a step's matrix products: those of Muon's Newton-Schulz iteration."""
    if optimizer != "muon8bit":
        return 0
    sides = [sorted(p.shape) for p in parameters if _by_muon(p)]
    return sum(_NS_STEPS * (4 * short**2 * long + 2 * short**3) for short, long in sides)


def slot_bytes(parameters: Iterable[Parameter], optimizer: Optimizer, master: Master = "none") -> int:
    """What an 8-bit optimizer with its states in host memory has on the device: two slots of a bucket or a row."""
    from pyeff.optim.offload import bucket_bytes

    sizes = [(state_bytes(p, optimizer, master), p) for p in parameters if p.trained]
    total = sum(size for size, _ in sizes)
    # A vector is cut between blocks, everything else between rows.
    rows = (size // (p.shape[0] if len(p.shape) > 1 else -(-p.elements // BLOCK)) for size, p in sizes if size)
    return 2 * max(min(bucket_bytes(total), total), max(rows, default=0))


def step_traffic(parameters: Iterable[Parameter], optimizer: Optimizer, master: Master = "none") -> int:
    """Bytes that one step reads and writes: weights and states both ways, gradients once."""
    return sum(2 * (p.nbytes + state_bytes(p, optimizer, master)) + p.nbytes for p in parameters if p.trained)
