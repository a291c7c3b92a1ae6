"""The compute axis: what was spent, what it returned, and what to spend next. No torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyeff.governor.audit import Audit, Outcome, audit_decisions
from pyeff.governor.belief import Belief, Interval
from pyeff.governor.budget import UNITS, Budget, Unit, format_amount, parse_price
from pyeff.governor.calibration import Conformal
from pyeff.governor.config import GovernorConfig
from pyeff.governor.control import Advantage, Fading, advantage, estimate_fading, is_control_batch
from pyeff.governor.drift import (
    Cusum,
    DriftReading,
    alarmed,
    gradient_drift,
    next_detector,
    overlap_drift,
    rank_drift,
    utility_drift,
)
from pyeff.governor.energy import EnergyMeter
from pyeff.governor.experts import ExpertRows, expert_rows
from pyeff.governor.flops import Cost, TransformerShape, attention_pairs
from pyeff.governor.ledger import FIELDS, Ledger, LedgerEntry
from pyeff.governor.log import DecisionLog, replay
from pyeff.governor.log import read as read_decisions
from pyeff.governor.loop import Governor
from pyeff.governor.mixture import AdoMixture, CadsMixture
from pyeff.governor.observation import (
    Action,
    Arm,
    BatchSize,
    Decision,
    MemoryMode,
    Observation,
    Policy,
    Selector,
)
from pyeff.governor.payback import PayBack, pay_back, refresh_period, square_root_period, worth_of_training
from pyeff.governor.policy import GovernorPolicy, UniformPolicy, recompute
from pyeff.governor.signals import LocalLevel, PairedGain, clustered_gain, paired_gain
from pyeff.governor.speculative import Speculation, best_speculation, speculation, tokens_per_pass

if TYPE_CHECKING:
    from pyeff.governor.laws import (
        EPOCH,
        HOFFMANN,
        HOFFMANN_ROUNDED,
        MUENNIGHOFF,
        AnnealShape,
        Chinchilla,
        DataConstrained,
        OffsetPowerLaw,
        RectifiedLaw,
        ScheduleLaw,
        fit_offset_power_law,
        fit_rectified_law,
        fit_schedule_law,
        mean_gain,
    )

# Their module loads NumPy: at first use, not at import.
_LAWS = frozenset(
    {
        "EPOCH",
        "HOFFMANN",
        "HOFFMANN_ROUNDED",
        "MUENNIGHOFF",
        "AnnealShape",
        "Chinchilla",
        "DataConstrained",
        "OffsetPowerLaw",
        "RectifiedLaw",
        "ScheduleLaw",
        "fit_offset_power_law",
        "fit_rectified_law",
        "fit_schedule_law",
        "mean_gain",
    }
)

__all__ = [
    "EPOCH",
    "FIELDS",
    "HOFFMANN",
    "HOFFMANN_ROUNDED",
    "MUENNIGHOFF",
    "UNITS",
    "Action",
    "AdoMixture",
    "Advantage",
    "AnnealShape",
    "Arm",
    "Audit",
    "BatchSize",
    "Belief",
    "Budget",
    "CadsMixture",
    "Chinchilla",
    "Conformal",
    "Cost",
    "Cusum",
    "DataConstrained",
    "Decision",
    "DecisionLog",
    "DriftReading",
    "EnergyMeter",
    "ExpertRows",
    "Fading",
    "Governor",
    "GovernorConfig",
    "GovernorPolicy",
    "Interval",
    "Ledger",
    "LedgerEntry",
    "LocalLevel",
    "MemoryMode",
    "Observation",
    "OffsetPowerLaw",
    "Outcome",
    "PairedGain",
    "PayBack",
    "Policy",
    "RectifiedLaw",
    "ScheduleLaw",
    "Selector",
    "Speculation",
    "TransformerShape",
    "UniformPolicy",
    "Unit",
    "advantage",
    "alarmed",
    "attention_pairs",
    "audit_decisions",
    "best_speculation",
    "clustered_gain",
    "estimate_fading",
    "expert_rows",
    "fit_offset_power_law",
    "fit_rectified_law",
    "fit_schedule_law",
    "format_amount",
    "gradient_drift",
    "is_control_batch",
    "mean_gain",
    "next_detector",
    "overlap_drift",
    "paired_gain",
    "parse_price",
    "pay_back",
    "rank_drift",
    "read_decisions",
    "recompute",
    "refresh_period",
    "replay",
    "speculation",
    "square_root_period",
    "tokens_per_pass",
    "utility_drift",
    "worth_of_training",
]


def __getattr__(name: str) -> Any:
    if name in _LAWS:
        return getattr(importlib.import_module("pyeff.governor.laws"), name)
    raise AttributeError(f"module 'pyeff.governor' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAWS})
