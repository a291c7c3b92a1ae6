"""The gradient noise scale: how many samples a batch needs before its gradient is more signal than noise."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class NoiseScaleEstimate:
    """Unbiased estimates from one batch: `trace` of the covariance of samples' gradients, `signal` = |true gradient|^2.

    Either may be negative, as unbiased estimates of small positive numbers are. `value` = trace / signal, in samples,
    is B_simple; it is NaN where `signal` is not positive.
    """

    trace: float
    signal: float
    samples: int

    @property
    def value(self) -> float:
        """B_simple = trace / signal, in samples."""
        return self.trace / self.signal if self.signal > 0 else math.nan


def estimate_noise_scale(norms_sq: float, batch_norm_sq: float, samples: int) -> NoiseScaleEstimate:
    """B_simple from the summed squared norms of B samples' shares of a gradient, and the squared norm of the gradient.

    With shares s_i = g_i / B, G = sum of s_i, `norms_sq` = sum of |s_i|^2 and `batch_norm_sq` = |G|^2:

        trace = B / (B - 1) * (B * norms_sq - |G|^2),   signal = B / (B - 1) * (|G|^2 - norms_sq)

    which are unbiased when the g_i are independent draws. Raises `ValueError` for fewer than two samples.
    McCandlish et al., An Empirical Model of Large-Batch Training, 2018 (appendix A).

    >>> estimate_noise_scale(norms_sq=0.5, batch_norm_sq=0.5, samples=2)  # two orthogonal shares of norm 0.5 ** 0.5
    NoiseScaleEstimate(trace=1.0, signal=0.0, samples=2)
    """
    if samples < 2:
        raise ValueError(f"the noise scale needs at least 2 samples in a batch, got {samples}")
    correction = samples / (samples - 1)
    return NoiseScaleEstimate(
        trace=correction * (samples * norms_sq - batch_norm_sq),
        signal=correction * (batch_norm_sq - norms_sq),
        samples=samples,
    )


@dataclass
class NoiseScale:
    """Smooths the noise scale over batches: exponential means of trace and of signal, and then their ratio.

    The ratio of means is what converges; the mean of ratios does not exist. `half_life` is in batches. The state is
    four numbers: `state_dict()` and `load_state_dict()` carry it through a checkpoint.

    >>> scale = NoiseScale(half_life=10)
    >>> for norms_sq, batch_norm_sq in [(0.6, 0.4), (0.5, 0.6)]:
    ...     scale.update(estimate_noise_scale(norms_sq, batch_norm_sq, samples=8))
    >>> scale.batches
    2
    """

    half_life: float = 100.0
    trace: float = 0.0
    signal: float = 0.0
    weight: float = 0.0
    batches: int = 0

    def __post_init__(self) -> None:
        if not self.half_life > 0:
            raise ValueError(f"half_life must be a positive number of batches, got {self.half_life}")

    def update(self, estimate: NoiseScaleEstimate) -> None:
        """Take one batch into the means; one that is not finite is left out."""
        if not (math.isfinite(estimate.trace) and math.isfinite(estimate.signal)):
            return
        decay = 0.5 ** (1.0 / self.half_life)
        self.trace = decay * self.trace + (1.0 - decay) * estimate.trace
        self.signal = decay * self.signal + (1.0 - decay) * estimate.signal
        self.weight = decay * self.weight + (1.0 - decay)
        self.batches += 1

    @property
    def value(self) -> float:
        """The smoothed B_simple, in samples; NaN before the first batch or while the mean signal is not positive."""
        return self.trace / self.signal if self.signal > 0 else math.nan

    def state_dict(self) -> dict[str, float]:
        """The state, as numbers."""
        return asdict(self)

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from a state; raises `ValueError` when it is not one."""
        if set(state) != set(asdict(self)):
            raise ValueError(f"expected a state with {sorted(asdict(self))}, got {sorted(state)}")
        for name, value in state.items():
            setattr(self, name, value)
        self.batches = int(self.batches)
