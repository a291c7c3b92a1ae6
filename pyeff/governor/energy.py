"""Joules from NVIDIA's energy counters, where there are any."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any


class EnergyMeter:
    """Joules used by GPUs since the last reading, from NVML's total-energy counters (Volta and later).

    Needs the package ``nvidia-ml-py``. The counter moves in steps of some 20 to 100 ms, so windows should be longer,
    and it counts what the device did until now: synchronise the device before reading.

    Args:
        devices: NVML indices or UUIDs ("GPU-..."). NVML ignores CUDA_VISIBLE_DEVICES: name the ones the run uses.

    Raises ValueError for no devices and RuntimeError where NVML, the package or a device's counter is missing.
    :meth:`find` returns None instead.
    """

    def __init__(self, devices: Sequence[int | str] = (0,)) -> None:
        if not devices:
            raise ValueError("devices must name at least one GPU, got none")
        try:
            self._nvml: Any = importlib.import_module("pynvml")
        except ImportError as error:
            raise RuntimeError("joules need NVIDIA's bindings: pip install nvidia-ml-py") from error
        try:
            self._nvml.nvmlInit()
            self._handles = [
                self._nvml.nvmlDeviceGetHandleByUUID(device)
                if isinstance(device, str)
                else self._nvml.nvmlDeviceGetHandleByIndex(device)
                for device in devices
            ]
            self._last = self._total()
        except self._nvml.NVMLError as error:
            raise RuntimeError(f"the energy of {list(devices)} cannot be read: {error}") from error

    @classmethod
    def find(cls, devices: Sequence[int | str] = (0,)) -> EnergyMeter | None:
        """Return a meter, or None where energy cannot be read."""
        try:
            return cls(devices)
        except RuntimeError:
            return None

    def joules(self) -> float | None:
        """Return the joules since the last reading (or the start); None when the counter failed or ran backwards.

        Pass the result to :meth:`pyeff.governor.Ledger.charge`, which takes None for "not read".
        """
        try:
            now = self._total()
        except self._nvml.NVMLError:
            return None
        used, self._last = now - self._last, now
        # A driver reload restarts the counter.
        return used if used >= 0 else None

    def _total(self) -> float:
        millijoules = sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles)
        return float(millijoules) / 1e3
