"""The simulated tier: every contender in worlds whose laws are known, against an oracle that knows them.

    python -m benchmarks.governor --tier sim [--held-out] [--first 0] [--seeds 100] [--few 20] [--out DIR]

Cheap policies take ``--seeds`` runs of each family and budget, those that think (the governor, its ablations, the
mixture laws) the first ``--few`` of them: comparisons are over shared seeds. Development draws seeds from 10000 on,
``--held-out`` from ``--first`` on and from other parameters. Writes sim.json and sim.png.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pyeff.governor import GovernorConfig

from .governed import LAST_INTERVAL, Governed, placebo_rate
from .metrics import Run, Summary, best_single, compute_lost, coverage, holm, losses, summarise
from .oracle import NAME as ORACLE
from .oracle import oracle_runs
from .roster import GOVERNOR, UNIFORM, Make, is_baseline, roster
from .simulate import draw_noise, simulate
from .world import BUDGETS, CONTROLS, FAMILIES, SELECTORS, draw

OUT = Path(__file__).resolve().parent / "results"
DEVELOPMENT = 10_000
# Not in the roster that real runs share: what the overhead cap costs.
UNCAPPED = "governor-uncapped"
# "harmful" has nothing to win: it is judged as a negative control is, but is none of the four that were registered.
NOTHING_TO_WIN = (*CONTROLS, "harmful")


def contenders(rate: float) -> dict[str, Make]:
    """The roster, and the governor without its cap."""
    uncapped = partial(Governed, name=UNCAPPED, config=GovernorConfig(last_interval=LAST_INTERVAL))
    return roster(SELECTORS, placebo_rate=rate) | {UNCAPPED: uncapped}


def thinks(name: str) -> bool:
    """Whether a decision takes milliseconds."""
    return name.startswith(GOVERNOR) or name == "ado"


def run_cell(family: str, budget: float, seeds: range, few: int, *, held_out: bool) -> list[Run]:
    """Every contender in one family and budget."""
    worlds = draw(family, seeds, held_out=held_out)
    some = draw(family, seeds[:few], held_out=held_out)
    noise, less = draw_noise(worlds), draw_noise(some)
    governor = simulate(some, roster(SELECTORS, ablations=False)[GOVERNOR], budget, noise=less)
    rate = placebo_rate([sum(key.startswith("REFRESH") for _, key in run.moves) for run in governor])
    runs = oracle_runs(worlds, budget) + governor
    for name, make in contenders(rate).items():
        if name != GOVERNOR:
            runs += simulate(some if thinks(name) else worlds, make, budget, noise=less if thinks(name) else noise)
    return runs


def judge(runs: Sequence[Run]) -> dict[str, Any]:
    """The tables of the report, as plain numbers; differences and regrets are over the seeds that the governor had."""
    shared = {run.seed for run in runs if run.policy == GOVERNOR}
    runs = [run for run in runs if run.seed in shared]
    summaries = summarise(runs, uniform=UNIFORM, oracle=ORACLE)
    policies = list(dict.fromkeys(summary.policy for summary in summaries))
    regrets: dict[str, list[float]] = {name: [] for name in policies}
    for summary in summaries:
        if summary.regret is not None and summary.regret.decided and summary.task not in NOTHING_TO_WIN:
            regrets[summary.policy].append(summary.regret.value)
    baselines = {name: values for name, values in regrets.items() if is_baseline(name) and name != ORACLE}
    best, best_regret = best_single(baselines)
    lost = {name: compute_lost(runs, name, "uniform-wsd") for name in policies}
    governed = [run for run in runs if run.policy == GOVERNOR]
    share, intervals = coverage(governed)
    return {
        "best_baseline": best,
        "best_baseline_regret": best_regret,
        "policies": {
            name: {
                "regret": float(np.mean(regrets[name])) if regrets[name] else None,
                "regret_by_budget": {
                    str(budget): _mean(
                        s.regret.value
                        for s in summaries
                        if s.policy == name
                        and s.budget == budget
                        and s.regret is not None
                        and s.regret.decided
                        and s.task not in NOTHING_TO_WIN
                    )
                    for budget in BUDGETS
                },
                "lost_in_controls": {
                    task: max(value for (t, _), value in lost[name].items() if t == task)
                    for task in NOTHING_TO_WIN
                    if any(t == task for t, _ in lost[name])
                },
                "overhead": _mean(run.overhead for run in runs if run.policy == name),
                "switches": _mean(run.switches for run in runs if run.policy == name),
                "worst_seed": max(s.worst_seed for s in summaries if s.policy == name),
                "target_misses": _mean(s.target_misses for s in summaries if s.policy == name),
            }
            for name in policies
        },
        "coverage": share,
        "intervals": intervals,
        "largest_overhead": max(run.overhead for run in governed),
        "wilcoxon_against_best": _tests(runs, best),
        "cells": [_short(summary) for summary in summaries],
    }


def _short(summary: Summary) -> dict[str, Any]:
    """What a reader of the JSON needs of a cell, to four digits: all of it is a megabyte."""
    regret = summary.regret
    return {
        "task": summary.task,
        "budget": summary.budget,
        "policy": summary.policy,
        "loss": round(summary.loss.mean, 4),
        "regret": round(regret.value, 4) if regret is not None and regret.decided else None,
    }


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return float(np.mean(found)) if found else None


def _tests(runs: Sequence[Run], best: str) -> dict[str, float]:
    """Holm-adjusted p of the governor's loss against the best baseline's, one test a family over all budgets."""
    from scipy.stats import wilcoxon

    table, raw = losses(runs), {}
    for family in dict.fromkeys(run.task for run in runs):
        differences = [
            loss - table[family, budget, best][seed]
            for budget in dict.fromkeys(run.budget for run in runs)
            for seed, loss in table.get((family, budget, GOVERNOR), {}).items()
        ]
        if any(differences):
            raw[family] = float(wilcoxon(differences).pvalue)
    return holm(raw)


def verdicts(found: dict[str, Any], cap: float = 0.05) -> list[str]:
    """The targets, each with what was found."""
    governor = found["policies"][GOVERNOR]
    limit = 0.5 * found["best_baseline_regret"]
    worst = max((value, task) for task, value in governor["lost_in_controls"].items() if task in CONTROLS)

    def line(met: bool, text: str) -> str:
        return f"{'met' if met else 'MISSED'}: {text}"

    return [
        line(
            governor["regret"] <= limit,
            f"mean regret {governor['regret']:.3f}; half the best single baseline's ({found['best_baseline']}) is "
            f"{limit:.3f}",
        ),
        line(
            worst[0] <= cap,
            f"in negative controls at most {worst[0]:.1%} of uniform's training is lost ({worst[1]}); "
            f"the cap is {cap:.0%}",
        ),
        line(
            0.85 <= found["coverage"] <= 0.95,
            f"90 % intervals hold {found['coverage']:.1%} of {found['intervals']} outcomes",
        ),
    ]


def draw_figure(found: dict[str, Any], path: Path) -> None:
    """Mean regret of the main contenders, and what is lost where there is nothing to win."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    policies = {name: row for name, row in found["policies"].items() if row["regret"] is not None and name != ORACLE}
    best_interval = min(
        (n for n in policies if n.startswith("every-")), key=lambda n: policies[n]["regret"], default=GOVERNOR
    )
    shown = [
        name
        for name in sorted(policies, key=lambda n: policies[n]["regret"])
        if not name.startswith(("every-", "patience-2", "patience-8")) or name == best_interval
    ]
    figure, (left, right) = pyplot.subplots(
        1, 2, figsize=(10, 0.27 * len(shown) + 1.2), layout="constrained", sharey=True
    )
    places = range(len(shown))[::-1]
    colors = ["C1" if name == GOVERNOR else "C0" if is_baseline(name) else "0.7" for name in shown]
    left.barh(places, [policies[name]["regret"] for name in shown], color=colors)
    left.set_yticks(places, shown)
    left.axvline(1, color="0.5", linewidth=0.8)
    left.axvline(0.5 * found["best_baseline_regret"], color="C3", linewidth=0.8, linestyle="--")
    left.set_xlabel("mean regret (uniform 1, oracle 0; dashed: target)")
    lost = [max(v for t, v in policies[name]["lost_in_controls"].items() if t in CONTROLS) for name in shown]
    right.barh(places, [100 * value for value in lost], color=colors)
    right.axvline(5, color="C3", linewidth=0.8, linestyle="--")
    right.set_xlabel("% of training lost in the worst negative control")
    figure.savefig(path, dpi=100, metadata={"Software": None})
    pyplot.close(figure)


def table(found: dict[str, Any]) -> str:
    """Markdown: one row a policy, best first."""
    lines = [
        "| policy | mean regret | by budget (1, 2.5, 6.3, 16) | most lost in a negative control | overhead | changes |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(n, row) for n, row in found["policies"].items() if row["regret"] is not None and n != ORACLE]
    for name, row in sorted(rows, key=lambda item: item[1]["regret"]):
        budgets = ", ".join("-" if v is None else f"{v:.2f}" for v in row["regret_by_budget"].values())
        lost, task = max((value, task) for task, value in row["lost_in_controls"].items() if task in CONTROLS)
        lines.append(
            f"| {name} | {row['regret']:.3f} | {budgets} | {lost:.1%} ({task}) | {row['overhead']:.1%} | "
            f"{row['switches']:.1f} |"
        )
    return "\n".join(lines)


def _one(arguments: tuple[str, float, range, int, bool]) -> list[Run]:
    family, budget, seeds, few, held_out = arguments
    return run_cell(family, budget, seeds, few, held_out=held_out)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.governor --tier sim")
    parser.add_argument("--held-out", action="store_true", help="report: other seeds and other parameters")
    parser.add_argument("--first", type=int, default=0, help="first seed of --held-out")
    parser.add_argument("--seeds", type=int, default=100, help="runs of each family and budget")
    parser.add_argument("--few", type=int, default=20, help="of these for policies that take milliseconds to decide")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    start = options.first if options.held_out else DEVELOPMENT
    seeds = range(start, start + options.seeds)
    began = time.monotonic()
    cells = [(family, b, seeds, options.few, options.held_out) for family in FAMILIES + CONTROLS for b in BUDGETS]
    with ProcessPoolExecutor(options.workers) as pool:
        runs = [run for found in pool.map(_one, cells) for run in found]
    found = judge(runs) | {"held_out": options.held_out, "first": start, "seeds": options.seeds, "few": options.few}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("sim.json" if options.held_out else "sim_development.json")
    partial_path = path.with_suffix(".partial")
    partial_path.write_text(json.dumps(found, default=float) + "\n")
    partial_path.replace(path)
    draw_figure(found, path.with_suffix(".png"))  # docs/images/governor_sim.png is the reported one's copy
    print(table(found))
    print("\n".join(verdicts(found)))
    print(f"{len(runs)} runs in {time.monotonic() - began:.0f} s; {path}")
    return 0
