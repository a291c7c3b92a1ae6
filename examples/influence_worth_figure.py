"""The figure of `influence_worth.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from influence_worth import ARMS
from influence_worth_report import Report, point_within

from pyeff._files import write_atomic

COLORS = {
    "random": "0.45",
    "bm25": "tab:green",
    "rds_plus": "tab:blue",
    "el2n": "tab:red",
    "less": "tab:purple",
    "fresh": "black",
    "target": "tab:orange",
}


def figure(report: Report, path: Path) -> None:
    """The loss that each total of FLOPs buys on the left; differences from the random tenth on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), width_ratios=(1.15, 1), layout="constrained")
    for arm in ARMS:
        seeds = [seed for seed in report.seeds if report.curve(arm, seed)]
        if not seeds:
            continue
        curves = [report.curve(arm, seed) or [] for seed in seeds]
        costs = [report.cost(arm, seed) for seed in seeds]
        first = max(c + curve[1]["flops"] for c, curve in zip(costs, curves, strict=True))
        last = report.budget(["less"], seeds[0]) if any(a == "less" for a, _ in report.choices) else first * 8
        budgets = np.geomspace(first, max(1.02 * last, 1.1 * first), 120)
        values = []
        for budget in budgets:
            points = [point_within(c, budget - cost) for c, cost in zip(curves, costs, strict=True)]
            values.append(np.mean([p["holdout"]["all"] for p in points if p is not None]))
        style = "--" if arm == "target" else "-"
        left.plot(budgets / 1e12, values, style, color=COLORS[arm], label=ARMS[arm], lw=1.6)
        left.plot(budgets[0] / 1e12, values[0], "o", color=COLORS[arm], ms=5)
    left.set(xlabel="total TFLOP, choosing included", ylabel="holdout loss, nats a token", xscale="log")
    left.legend(frameon=False, fontsize=9)
    place, ticks, labels = 0.0, [], []
    for title, read in report.columns().items():
        right.text(0.01, place, title, transform=right.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
        place += 0.9
        for arm, one in report.compare(read).items():
            difference = one.differences["random"]
            if difference is None:
                continue
            bar = {"xerr": difference.half_width, "fmt": "o", "color": COLORS[arm], "capsize": 3, "ms": 5}
            right.errorbar(difference.mean, place, **bar)
            ticks.append(place)
            labels.append(ARMS[arm])
            place += 0.8
        place += 0.5
    right.axvline(0, color="0.4", lw=1)
    right.set_yticks(ticks, labels, fontsize=8)
    right.set_ylim(place, -0.8)
    right.set_xlabel("holdout loss minus that of the random tenth (mean, 95 % interval)")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, lambda file: fig.savefig(file, format="png", dpi=110, metadata={"Software": None}))
    plt.close(fig)
