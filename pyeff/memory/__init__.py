"""The memory axis: what a training step keeps in memory, when, and what would make it fit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyeff.memory.attention_interface import UnsupportedMaskError
    from pyeff.memory.checkpointing import AttentionRerunError, AttentionRuns, Checkpoints, checkpoint
    from pyeff.memory.planner import plan
    from pyeff.memory.plans import Option, Phase, Plan, parse_size
    from pyeff.memory.rates import Rates, estimated_rates, measured_rates
    from pyeff.memory.trace import Traced, measure_step, trace_step

__all__ = [
    "AttentionRerunError",
    "AttentionRuns",
    "Checkpoints",
    "Option",
    "Phase",
    "Plan",
    "Rates",
    "Traced",
    "UnsupportedMaskError",
    "checkpoint",
    "estimated_rates",
    "measure_step",
    "measured_rates",
    "parse_size",
    "plan",
    "trace_step",
]

_HOME = {
    "AttentionRerunError": "checkpointing",
    "AttentionRuns": "checkpointing",
    "Checkpoints": "checkpointing",
    "Option": "plans",
    "Phase": "plans",
    "Plan": "plans",
    "Rates": "rates",
    "Traced": "trace",
    "UnsupportedMaskError": "attention_interface",
    "checkpoint": "checkpointing",
    "estimated_rates": "rates",
    "measure_step": "trace",
    "measured_rates": "rates",
    "parse_size": "plans",
    "plan": "planner",
    "trace_step": "trace",
}


def __getattr__(name: str) -> Any:
    # Planning from a configuration must not wait for more than it needs.
    if name in _HOME:
        return getattr(importlib.import_module(f"pyeff.memory.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
