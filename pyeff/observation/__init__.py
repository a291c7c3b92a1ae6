"""Watching a model's backward passes for what they say about single samples."""

from __future__ import annotations

from pyeff.observation.features import optimizer_directions
from pyeff.observation.noise_scale import NoiseScale, NoiseScaleEstimate, estimate_noise_scale
from pyeff.observation.observer import GradientObservation, UnobservableError, observe

__all__ = [
    "GradientObservation",
    "NoiseScale",
    "NoiseScaleEstimate",
    "UnobservableError",
    "estimate_noise_scale",
    "observe",
    "optimizer_directions",
]
