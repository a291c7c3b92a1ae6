from __future__ import annotations

import sys
import types

import pytest

from pyeff.governor import EnergyMeter, Ledger


class Counter:
    """A stand-in for pynvml with one device whose counter the test moves."""

    def __init__(self, monkeypatch, *, millijoules=5000, broken=False):
        self.millijoules, self.broken = millijoules, broken
        module = types.ModuleType("pynvml")
        module.NVMLError = type("NVMLError", (Exception,), {})
        module.nvmlInit = lambda: None
        module.nvmlDeviceGetHandleByIndex = lambda index: f"device {index}"
        module.nvmlDeviceGetHandleByUUID = lambda uuid: f"device {uuid}"

        def read(handle):
            if self.broken:
                raise module.NVMLError("Not Supported")
            return self.millijoules

        module.nvmlDeviceGetTotalEnergyConsumption = read
        monkeypatch.setitem(sys.modules, "pynvml", module)


def test_joules_are_counted_from_reading_to_reading(monkeypatch):
    counter = Counter(monkeypatch)
    meter, ledger = EnergyMeter([0, "GPU-1"]), Ledger()
    counter.millijoules += 1500
    ledger.charge("train", flops=10, joules=meter.joules())
    assert ledger.entry("train").joules == 3.0  # both devices
    ledger.charge("train", flops=10, joules=meter.joules())
    assert ledger.entry("train").joules == 3.0


def test_a_counter_that_fails_or_runs_backwards_makes_the_sum_unknown_and_no_error(monkeypatch):
    counter, ledger = Counter(monkeypatch), Ledger()
    meter = EnergyMeter()
    counter.millijoules -= 1
    assert meter.joules() is None
    counter.millijoules += 1000
    assert meter.joules() == 1.0
    counter.broken = True
    ledger.charge("train", flops=1, joules=meter.joules())
    assert ledger.entry("train").joules is None


def test_without_a_counter_there_is_no_meter_and_the_reason_is_given(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter.find() is None
    with pytest.raises(RuntimeError, match="pip install nvidia-ml-py"):
        EnergyMeter()
    Counter(monkeypatch, broken=True)
    assert EnergyMeter.find() is None
    with pytest.raises(RuntimeError, match=r"the energy of \[0\] cannot be read: Not Supported"):
        EnergyMeter()
    with pytest.raises(ValueError, match="at least one GPU"):
        EnergyMeter([])
