"""How fast a device multiplies and moves bytes: given, measured by a short probe, or estimated from a data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

# From the makers' data sheets: dense FLOP/s of matrix products in bf16 and in fp32 (without TF32), bytes/s of memory,
# bytes of memory, bytes/s of the bus to the host in each direction (PCIe 4 and 5, 16 lanes).
_DATA_SHEETS = {
    "a100": (312e12, 19.5e12, 2.04e12, 80e9, 32e9),
    "h100": (989e12, 67e12, 3.35e12, 80e9, 64e9),
    "h200": (989e12, 67e12, 4.8e12, 141e9, 64e9),
    "b200": (2250e12, 75e12, 8.0e12, 180e9, 64e9),
    "l40s": (362e12, 91.6e12, 0.864e12, 48e9, 32e9),
    "rtx4090": (165e12, 82.6e12, 1.008e12, 24e9, 32e9),
}
GPUS = tuple(_DATA_SHEETS)
# Training reaches about this share of the sheet's products; an assumption that cancels when options are compared.
_REACHED = 0.45
_MOVED = 0.8


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrix products, bytes/s of memory, where the numbers come from, and bytes/s of the bus to the host in
    each direction, which nothing measures: 80 % of PCIe 4 unless a data sheet says more."""

    flops: float
    bandwidth: float
    source: Literal["given", "measured", "estimate"]
    name: str = ""
    memory: int | None = None
    bus: float = _MOVED * 32e9

    def __post_init__(self) -> None:
        for name, value in (("flops", self.flops), ("bandwidth", self.bandwidth), ("bus", self.bus)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, got {value!r}")


def estimated_rates(gpu: str, *, itemsize: int = 2) -> Rates:
    """45 % of a data sheet's FLOP/s and 80 % of its bandwidth: an estimate, never a measurement.

    Raises ValueError for a name that is not in `GPUS`.
    """
    key = gpu.lower().replace(" ", "").replace("-", "")
    if key not in _DATA_SHEETS:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, got {gpu!r}")
    half, single, bandwidth, memory, bus = _DATA_SHEETS[key]
    flops = _REACHED * (half if itemsize < 4 else single)
    return Rates(flops, _MOVED * bandwidth, "estimate", key, int(memory), _MOVED * bus)


def measured_rates(device: str = "cpu", *, itemsize: int = 4, size: int = 1024, seconds: float = 0.3) -> Rates:
    """Time square matrix products and copies on a device for about `seconds` each; the best of them counts."""
    import torch

    dtype = torch.float32 if itemsize == 4 else torch.bfloat16
    a = torch.ones(size, size, dtype=dtype, device=device)
    source = torch.ones(size * size * 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)

    def best(run: object, wait: object) -> float:
        fastest, until = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < until:
            start = time.perf_counter()
            run()  # type: ignore[operator]
            wait()  # type: ignore[operator]
            fastest = min(fastest, time.perf_counter() - start)
        return fastest

    wait = torch.cuda.synchronize if a.is_cuda else (lambda: None)
    out = torch.empty_like(a)
    product = best(lambda: torch.mm(a, a, out=out), wait)
    copy = best(lambda: target.copy_(source), wait)
    return Rates(2 * size**3 / product, 2 * source.nbytes / copy, "measured", device)
