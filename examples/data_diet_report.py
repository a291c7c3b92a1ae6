"""Tables, statistics and the figure of `data_diet.py`, from the one file it leaves.

Accuracies are means over seeds with 95 % intervals of Student's t. Differences to a random choice are paired: the same
seed gives both arms the same initial network. Their p-values are of two-sided paired t-tests, adjusted for all
comparisons by Holm's method.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from pyeff.errors import UserError

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

REGIMES = {
    "epochs": "equal epochs",
    "whole": "equal total FLOPs, whole budget",
    "half": "equal total FLOPs, half the budget",
}


def write_atomically(path: Path, text: str) -> None:
    """Replace a file in one step: a kill leaves the old one or the new one."""
    partial = path.with_name(f".partial-{path.name}")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


@dataclass(frozen=True)
class Estimate:
    """Mean over seeds, 95 % interval of Student's t, and ``p`` of the two-sided t-test that the mean is zero."""

    mean: float
    half_width: float
    p: float
    seeds: int


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of one value a seed, of at least two seeds.

    >>> result = estimate([1.0, 2.0, 3.0])
    >>> result.mean, round(result.half_width, 3)
    (2.0, 2.484)
    """
    array = np.asarray(values, dtype=np.float64)
    error = float(array.std(ddof=1)) / math.sqrt(len(array))
    p = float(stats.ttest_1samp(array, 0.0).pvalue) if error else float(not array.any())
    return Estimate(float(array.mean()), float(stats.t.ppf(0.975, len(array) - 1)) * error, p, len(array))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjustment of p-values for their number.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted = [1.0] * len(p)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        largest = max(largest, min(1.0, p[index] * (len(p) - rank)))
        adjusted[index] = largest
    return adjusted


class Report:
    """The results of a file, ready to be shown."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self.titles: dict[str, str] = results["arms"]
        self.seeds = sorted({run["seed"] for run in results["runs"]})
        self.noise = max(run["label_noise"] for run in results["runs"])
        self._runs: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
        for run in sorted(results["runs"], key=lambda run: run["seed"]):
            self._runs.setdefault((run["arm"], run["regime"], run["label_noise"]), []).append(run)
        compared = [
            key
            for key in self._runs
            if key[0] != "random" and self.accuracies(*key) and self.accuracies("random", *key[1:])
        ]
        adjusted = holm([self.against("random", *key).p for key in compared])
        self.adjusted = dict(zip(compared, adjusted, strict=True))

    def runs(self, arm: str, regime: str, noise: float = 0.0) -> list[dict[str, Any]]:
        """Results by seed."""
        return self._runs.get((arm, regime, noise), [])

    def accuracies(self, arm: str, regime: str, noise: float = 0.0) -> list[float]:
        """Test accuracy in per cent by seed; empty where scoring left nothing to train with."""
        found = [run["accuracy"] for run in self.runs(arm, regime, noise)]
        return [] if None in found else [100 * value for value in found]

    def against(self, other: str, arm: str, regime: str, noise: float = 0.0) -> Estimate:
        """Accuracy of an arm minus that of another in the same regime, paired by seed."""
        pairs = zip(self.accuracies(arm, regime, noise), self.accuracies(other, regime, noise), strict=True)
        return estimate([own - others for own, others in pairs])

    def flops(self, arm: str, regime: str, noise: float = 0.0) -> dict[str, float]:
        """Mean FLOPs by purpose."""
        names = ("flops_scoring_training", "flops_scoring_passes", "flops_training")
        runs = self.runs(arm, regime, noise)
        return {name: sum(run[name] for run in runs) / len(runs) for name in names}

    def comparison(self, regime: str, noise: float = 0.0) -> str:
        """A row an arm: accuracy, difference to random, epochs, FLOPs."""
        head = ["trained on", "test accuracy, %", "minus random", "p", "minus all images", "epochs"]
        head += ["scoring TFLOPs", "total TFLOPs"] + (["wrong labels kept"] if noise else [])
        lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for arm, title in self.titles.items():
            runs = self.runs(arm, regime, noise)
            if not runs:
                continue
            flops = self.flops(arm, regime, noise)
            scoring = flops["flops_scoring_training"] + flops["flops_scoring_passes"]
            if self.accuracies(arm, regime, noise):
                own = estimate(self.accuracies(arm, regime, noise))
                cells = [_interval(own), "", "", ""]
                if arm != "random":
                    p = self.adjusted[arm, regime, noise]
                    cells[1:3] = [_interval(self.against("random", arm, regime, noise), sign="+"), _p(p)]
                if arm != "full":
                    cells[3] = _interval(self.against("full", arm, regime, noise), sign="+")
                cells += [f"{np.mean([run['epochs'] for run in runs]):.1f}"]
                total = tera(scoring + flops["flops_training"])
            else:
                cells, total = ["scoring leaves no budget", "", "", "", "0"], tera(scoring)
            row = [title, *cells, tera(scoring), total]
            if noise:
                row.append(f"{np.mean([run['kept_wrong_labels'] / sum(run['kept_by_class']) for run in runs]):.1%}")
            lines.append(f"| {' | '.join(row)} |")
        return "\n".join(lines)

    def breakdown(self) -> str:
        """Where the FLOPs of equal epochs went."""
        lines = [
            "| TFLOPs | training what scores | passes that score | final training | total | of all images' |",
            "|---|---|---|---|---|---|",
        ]
        for arm, title in self.titles.items():
            flops = self.flops(arm, "epochs")
            total = sum(flops.values())
            share = total / self.results["budget_flops"]
            lines.append(f"| {title} | {' | '.join(map(tera, flops.values()))} | {tera(total)} | {share:.0%} |")
        return "\n".join(lines)

    def kept(self) -> str:
        """What the scores chose, of each method and number of networks."""
        lines = [
            "| kept by | rank correlation of score and input norm | images kept of a class, least and most |",
            "|---|---|---|",
        ]
        for arm, title in self.titles.items():
            runs = self.runs(arm, "epochs")
            if "correlation_with_input_norm" not in runs[0]:
                continue
            by_class = np.mean([run["kept_by_class"] for run in runs], axis=0)
            norm = np.mean([run["correlation_with_input_norm"] for run in runs])
            lines.append(f"| {title} | {norm:+.2f} | {by_class.min():.0f} to {by_class.max():.0f} |")
        return "\n".join(lines)

    def markdown(self) -> str:
        """Everything between the markers of the page."""
        s, t, made_with = (self.results[name] for name in ("settings", "training", "made_with"))
        epochs = f"{s['epochs']} epoch{'' if s['epochs'] == 1 else 's'}"
        parts = [
            f"{s['train_images']} training and {s['test_images']} test images, {epochs} in batches of "
            f"{s['batch_size']}, {s['keep']:.0%} kept, {len(self.seeds)} seeds. Whole budget: "
            f"{tera(self.results['budget_flops'])} TFLOPs, what {epochs} on all images take"
            f"{'s' if s['epochs'] == 1 else ''}. "
            f"Nesterov SGD with learning rate {t['learning_rate']}, momentum {t['momentum']}, weight decay "
            f"{t['weight_decay']}, warm-up over {t['warmup']:.0%} of the steps, then a cosine to zero. torch "
            f"{made_with['torch']}, {made_with['device']}.",
            "### Equal epochs",
            self.comparison("epochs"),
            "### Equal total FLOPs: the whole budget",
            self.comparison("whole"),
            "### Equal total FLOPs: half the budget",
            self.comparison("half"),
            "### Where the FLOPs of equal epochs go",
            self.breakdown(),
            "### What is kept",
            self.kept(),
        ]
        if self.noise:
            parts += [f"### Equal epochs with {self.noise:.0%} wrong labels", self.comparison("epochs", self.noise)]
        return "\n\n".join(parts)

    def figure(self, path: Path) -> None:
        """Accuracy against total FLOPs, and differences to a random choice with their intervals."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        colors = dict(
            zip(self.titles, ("black", "tab:gray", "tab:blue", "tab:cyan", "tab:red", "tab:orange"), strict=False)
        )
        markers = {"epochs": "o", "whole": "s", "half": "D"}
        figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.9), width_ratios=(1.1, 1), layout="constrained")
        budget = self.results["budget_flops"] / 1e12
        for position, (arm, color) in enumerate(colors.items()):
            for regime, marker in markers.items():
                values = self.accuracies(arm, regime)
                if not values or (arm in ("full", "random") and regime == "epochs"):
                    continue  # what these two reach in equal epochs stands at a budget
                own, total = estimate(values), sum(self.flops(arm, regime).values()) / 1e12
                if regime != "epochs":  # all have spent the same: side by side, so that they can be told apart
                    total += (position - (len(colors) - 1) / 2) * 0.02 * budget
                left.errorbar(total, own.mean, own.half_width, fmt=marker, color=color, capsize=3, markersize=7)
        for share, name in ((0.5, "half the budget"), (1, "whole budget")):
            left.axvspan((share - 0.055) * budget, (share + 0.055) * budget, color="0.93", zorder=0, lw=0)
            place = {"transform": left.get_xaxis_transform(), "ha": "center", "va": "bottom", "color": "0.4"}
            left.text(share * budget, 1.0, name, **place)
        left.set_xlabel("total TFLOPs, scoring included")
        # Errors on a logarithmic axis: arms that differ by a tenth of a point stand beside one that loses ten.
        left.set_ylabel("test accuracy (%), log scale of the error")
        left.set_yscale("function", functions=(_negative_log_error, _of_negative_log_error))
        lowest, highest = left.get_ylim()
        left.set_yticks([tick for tick in (50, 60, 70, 75, 80, 82, 84, 86, *range(87, 100)) if lowest < tick < highest])
        left.yaxis.set_major_formatter("{x:.0f}")
        handles = [plt.Line2D([], [], color=color, lw=4, label=self.titles[arm]) for arm, color in colors.items()]
        handles += [plt.Line2D([], [], color="0.3", marker=m, ls="", label=REGIMES[r]) for r, m in markers.items()]
        figure.legend(handles=handles, fontsize=9, loc="outside lower center", ncols=4)
        left.grid(alpha=0.25)

        rows: list[tuple[str, str, Estimate]] = []
        labels = []
        for regime in REGIMES:
            for arm in self.titles:
                if arm != "random" and self.accuracies(arm, regime):
                    rows.append((arm, regime, self.against("random", arm, regime)))
                    labels.append(self.titles[arm])
        place, before, places, heads = 0.0, "", [], []
        for _, regime, _ in rows:
            if regime != before:
                place += 1.3 if before else 0.6
                heads.append((place - 0.75, REGIMES[regime]))
                before = regime
            places.append(place)
            place += 1
        for at, (arm, _, versus) in zip(places, rows, strict=True):
            right.errorbar(versus.mean, at, xerr=versus.half_width, fmt="o", color=colors[arm], capsize=3)
        for at, title in heads:
            right.text(0.01, at, title, transform=right.get_yaxis_transform(), fontsize=9, weight="bold", va="center")
        right.axvline(0, color="0.4", lw=1)
        right.set_yticks(places, labels, fontsize=9)
        right.set_ylim(place - 0.3, -0.7)
        right.set_xscale("symlog", linthresh=2, linscale=1.3)
        right.set_xticks([tick for tick in (-50, -20, -10, -5, -2, -1, 0, 1, 2, 5, 10, 20, 50) if _within(tick, right)])
        right.xaxis.set_major_formatter(lambda x, _: f"{x:+g}" if x else "0")
        right.xaxis.set_minor_locator(plt.NullLocator())
        right.set_xlabel("test accuracy minus that of a random choice, points (log beyond 2)")
        right.grid(axis="x", alpha=0.25)
        keep = self.results["settings"]["keep"]
        figure.suptitle(f"{keep:.0%} of the images by score: mean and 95 % interval of {len(self.seeds)} seeds")
        figure.savefig(path, dpi=110, metadata={"Software": None})
        plt.close(figure)


def _negative_log_error(accuracy: Any) -> Any:
    return -np.log10(np.maximum(100 - np.asarray(accuracy, dtype=np.float64), 1e-3))


def _of_negative_log_error(value: Any) -> Any:
    return 100 - 10 ** -np.asarray(value, dtype=np.float64)


def _within(tick: float, axes: Any) -> bool:
    lowest, highest = axes.get_xlim()
    return bool(lowest <= tick <= highest)


def tera(flops: float) -> str:
    """FLOPs in units of 10^12, as text."""
    return f"{flops / 1e12:.2f}"


def _interval(result: Estimate, sign: str = "") -> str:
    return f"{result.mean:{sign}.2f} ± {result.half_width:.2f}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def rendered(page: str, body: str) -> str:
    """The page with this between its markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{body}\n\n{END}{after}"


def report(results: Path, page: Path, figure: Path, *, check: bool) -> int:
    """Write the page and the figure, or check the page."""
    try:
        shown = Report(json.loads(results.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{results} holds no results that can be shown ({error}): give the file with --results"
        ) from error
    text = page.read_text()
    current = rendered(text, shown.markdown())
    if check:
        if current != text:
            print(f"{page} is not current: run python examples/data_diet.py --report", file=sys.stderr)
        return int(current != text)
    write_atomically(page, current)
    shown.figure(figure)
    return 0
