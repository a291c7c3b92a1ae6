"""Optimizers whose states are small."""

from __future__ import annotations

from pyeff.optim.adafactor import Adafactor8bit
from pyeff.optim.engine import Optimizer8bit
from pyeff.optim.muon import Muon8bit, newton_schulz
from pyeff.optim.optimizers import Adam8bit, AdamW8bit, Lion8bit, SGD8bit
from pyeff.optim.release import GradientRelease

__all__ = [
    "Adafactor8bit",
    "Adam8bit",
    "AdamW8bit",
    "GradientRelease",
    "Lion8bit",
    "Muon8bit",
    "Optimizer8bit",
    "SGD8bit",
    "newton_schulz",
]
