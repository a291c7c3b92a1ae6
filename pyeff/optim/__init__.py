"""Optimizers whose states are small."""

from __future__ import annotations

from pyeff.optim.adamw8bit import AdamW8bit

__all__ = ["AdamW8bit"]
