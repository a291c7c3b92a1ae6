"""The compute axis: what was spent, what it returned, and what to spend next. No torch."""

from __future__ import annotations

from pyeff.governor.belief import Belief, Interval
from pyeff.governor.budget import UNITS, Budget, Unit, format_amount
from pyeff.governor.flops import Cost, TransformerShape, attention_pairs
from pyeff.governor.ledger import FIELDS, Ledger, LedgerEntry
from pyeff.governor.log import DecisionLog, replay
from pyeff.governor.log import read as read_decisions
from pyeff.governor.payback import PayBack, pay_back, worth_of_training
from pyeff.governor.policy import (
    Action,
    Decision,
    Governor,
    GovernorConfig,
    Observation,
    Policy,
    UniformPolicy,
    recompute,
)
from pyeff.governor.signals import PairedGain, paired_gain

__all__ = [
    "FIELDS",
    "UNITS",
    "Action",
    "Belief",
    "Budget",
    "Cost",
    "Decision",
    "DecisionLog",
    "Governor",
    "GovernorConfig",
    "Interval",
    "Ledger",
    "LedgerEntry",
    "Observation",
    "PairedGain",
    "PayBack",
    "Policy",
    "TransformerShape",
    "UniformPolicy",
    "Unit",
    "attention_pairs",
    "format_amount",
    "paired_gain",
    "pay_back",
    "read_decisions",
    "recompute",
    "replay",
    "worth_of_training",
]
