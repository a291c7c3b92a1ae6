"""Every contender by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from .baselines import (
    Asha,
    CostGate,
    FixedInterval,
    FullData,
    Mixed,
    Patience,
    Placebo,
    RandomSubset,
    Static,
    UniformLinear,
    UniformWsd,
)
from .governed import ABLATIONS, Governed
from .policies import Policy, Setup

INTERVALS = (0.05, 0.1, 0.2, 0.4)
PATIENCE = (2, 4, 8)
GOVERNOR = "governor"
UNIFORM = "uniform-linear"

Make = Callable[[Setup], Policy]


def roster(
    selectors: Sequence[str], *, sources: bool = True, placebo_rate: float = 1.0, ablations: bool = True
) -> dict[str, Make]:
    """Return a maker of every contender by its name, in the order of the tables.

    Args:
        selectors: names of the task's selectors.
        sources: whether the pool has sources to mix.
        placebo_rate: the governor's mean number of scorings in a run (`governed.placebo_rate`).
        ablations: whether the governor's ablations take part.
    """
    makes: dict[str, Make] = {
        UNIFORM: UniformLinear,
        "uniform-wsd": UniformWsd,
        "full-data": FullData,
        "random-subset": RandomSubset,
    }
    for name in selectors:
        makes[f"static-{name}"] = partial(Static, selector=name)
        makes[f"static-{name}-free"] = partial(Static, selector=name, free=True)
    for name in selectors:
        for every in INTERVALS:
            makes[f"every-{every:g}-{name}"] = partial(FixedInterval, selector=name, every=every)
    for patience in PATIENCE:
        makes[f"patience-{patience}"] = partial(Patience, patience=patience)
    makes["asha-2"] = Asha
    if sources:
        makes |= {rule: partial(Mixed, rule=rule) for rule in ("ado", "cads-s")}
    makes |= {"cost-gate": CostGate, "placebo": partial(Placebo, rate=placebo_rate), GOVERNOR: Governed}
    if ablations:
        makes |= {name: partial(Governed, name=name, ablation=each) for name, each in ABLATIONS.items()}
    return makes


def is_baseline(name: str) -> bool:
    """Whether a contender counts as a single fixed baseline of claim P4: charged, and no governor."""
    return not name.startswith(GOVERNOR) and not name.endswith("-free") and not name.startswith("oracle")
