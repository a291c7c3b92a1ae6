"""Tables and figure of `influence_worth.py`, from the cells that are finished.

A training is read at a budget as one who stops early would: of its points that the budget reaches, the one of lowest
validation loss, and there the loss of the holdout. Losses are means over seeds with 95 % intervals of Student's t;
differences are paired by seed, p is that of the two-sided paired t-test, adjusted by Holm's method for the methods that
are compared in one column.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data_diet_report import Estimate, estimate, holm, tera
from influence_worth import ARMS, SEEDS, SELECTORS, cells
from influence_worth_training import Settings

from pyeff._files import write_text_atomic
from pyeff.selection import SelectionPayBack

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "influence_worth.md"
FIGURE = ROOT / "docs" / "images" / "influence_worth.png"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
Reading = Callable[[str, int], float | None]
"""The holdout's loss of an arm and a seed; None where that is not there, or cannot be afforded."""


def point_within(curve: Sequence[dict[str, Any]], flops: float) -> dict[str, Any] | None:
    """Of the points that cost no more, the one of lowest validation loss; None where nothing can be afforded.

    >>> def point(step, loss):
    ...     return {"step": step, "flops": 10 * step, "validation": {"all": loss}}
    >>> curve = [point(0, 3.0), point(1, 1.0), point(2, 2.0), point(3, 0.5)]
    >>> point_within(curve, 29)["step"], point_within(curve, 30)["step"], point_within(curve, -1)
    (1, 3, None)
    """
    reached = [point for point in curve if point["flops"] <= flops]
    return min(reached, key=lambda point: float(point["validation"]["all"])) if reached else None


def flops_to_reach(curve: Sequence[dict[str, Any]], loss: float) -> float | None:
    """FLOPs of training after which the holdout's loss is first this low, between points on a line; None if never.

    >>> curve = [{"flops": f, "holdout": {"all": l}} for f, l in ((0, 3.0), (10, 2.0), (20, 1.0))]
    >>> flops_to_reach(curve, 1.5), flops_to_reach(curve, 0.9)
    (15.0, None)
    """
    before = None
    for point in curve:
        if point["holdout"] is None:  # the validation's loss was not lower: not where one would stop
            continue
        if point["holdout"]["all"] <= loss:
            if before is None:
                return float(point["flops"])
            drop = before["holdout"]["all"] - point["holdout"]["all"]
            part = (before["holdout"]["all"] - loss) / drop
            return float(before["flops"] + part * (point["flops"] - before["flops"]))
        before = point
    return None


@dataclass(frozen=True)
class Compared:
    """An arm in one column: its losses by seed, and how it differs from two others, with adjusted p."""

    losses: list[float]
    differences: dict[str, Estimate | None]
    p: dict[str, float]

    @property
    def loss(self) -> str:
        """The mean, with its interval where there are two seeds or more."""
        if len(self.losses) > 1:
            return _interval(estimate(self.losses))
        return f"{self.losses[0]:.3f}" if self.losses else "cannot be afforded"


class Report:
    """The finished cells, ready to be shown."""

    def __init__(self, results: Path) -> None:
        found = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(results.glob("*.json"))]
        if len({json.dumps(cell["settings"], sort_keys=True) for cell in found}) != 1:
            raise SystemExit(f"{results} holds no cells, or cells of several settings: run influence_worth.py first")
        self.settings = Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in found[0]["settings"].items()})
        self.choices = {(c["arm"], c["seed"]): c for c in found if c["kind"] == "choice"}
        self.trainings = {(c["arm"], c["seed"]): c for c in found if c["kind"] == "training"}
        self.seeds = sorted({seed for _, seed in self.trainings})
        planned = list(cells(list(ARMS), SEEDS))
        names = {f"{c['kind']}-{c['arm']}-{c['seed']}" for c in found}
        self.missing = [cell.name for cell in planned if cell.name not in names]
        self.planned = len(planned)

    def curve(self, arm: str, seed: int) -> list[dict[str, Any]] | None:
        """Points of a training."""
        cell = self.trainings.get((arm, seed))
        return None if cell is None else list(cell["curve"])

    def cost(self, arm: str, seed: int) -> float:
        """FLOPs of choosing; where this seed is not done, the mean of those that are."""
        if arm not in SELECTORS:
            return 0.0
        own = self.choices.get((arm, seed))
        known = [own] if own else [c for (name, _), c in self.choices.items() if name == arm]
        return float(np.mean([c["flops_warmup"] + c["flops_scoring"] for c in known])) if known else float("nan")

    def training_flops(self, steps: int, seed: int) -> float:
        """FLOPs of so many steps on a random tenth."""
        curve = self.curve("random", seed)
        assert curve is not None
        return float(next(point["flops"] for point in curve if point["step"] == steps))

    # ------------------------------------------------------------------------------------------------------- readings

    def after_steps(self, steps: int) -> Reading:
        """Every arm after so many steps, choosing not charged."""

        def read(arm: str, seed: int) -> float | None:
            points = [p for p in self.curve(arm, seed) or [] if p["step"] == steps]
            return float(points[0]["holdout"]["all"]) if points else None

        return read

    def stopped(self, arm: str, seed: int) -> float | None:
        """Where the validation loss is lowest, choosing not charged."""
        point = point_within(self.curve(arm, seed) or [], float("inf"))
        return None if point is None else float(point["holdout"]["all"])

    def budget(self, arms: Sequence[str], seed: int) -> float:
        """What the dearest of these methods takes for choosing and ``equal_steps`` steps."""
        known = [self.cost(arm, seed) for arm in arms if any(name == arm for name, _ in self.choices)]
        return max(known) + self.training_flops(self.settings.equal_steps, seed)

    def within(self, arms: Sequence[str]) -> Reading:
        """At the budget that the dearest of these methods sets, choosing charged."""

        def read(arm: str, seed: int) -> float | None:
            curve = self.curve(arm, seed)
            if curve is None or self.curve("random", seed) is None:  # which says what a step costs
                return None
            # A few samples more or less in a step must not cost a method its last point.
            left = 1.02 * self.budget(arms, seed) - self.cost(arm, seed)
            point = point_within(curve, left)
            return None if point is None else float(point["holdout"]["all"])

        return read

    def columns(self) -> dict[str, Reading]:
        """What is read, by title."""
        found: dict[str, Reading] = {
            f"equal epochs ({self.settings.equal_steps} steps), choosing free": self.after_steps(
                self.settings.equal_steps
            ),
            "stopped early, choosing free": self.stopped,
        }
        for title, arms in (("RDS+ and EL2N", ["rds_plus", "el2n"]), ("LESS", ["less"])):
            if any(arm in arms for arm, _ in self.choices):
                found[f"equal total FLOPs: what {title} take{'s' * (len(arms) == 1)}"] = self.within(arms)
        return found

    def compare(self, read: Reading) -> dict[str, Compared]:
        """All arms in one column; p is adjusted over the methods, against each of the two baselines for itself."""
        losses = {arm: {seed: read(arm, seed) for seed in self.seeds} for arm in ARMS}

        def minus(arm: str, other: str) -> Estimate | None:
            pairs = [(losses[arm][seed], losses[other][seed]) for seed in self.seeds]
            differences = [own - base for own, base in pairs if own is not None and base is not None]
            return estimate(differences) if len(differences) > 1 and arm != other else None

        differences = {arm: {other: minus(arm, other) for other in ("random", "fresh")} for arm in ARMS}
        p: dict[str, dict[str, float]] = {arm: {} for arm in ARMS}
        for other in ("random", "fresh"):
            tested = {arm: found for arm in SELECTORS if (found := differences[arm][other]) is not None}
            for arm, adjusted in zip(tested, holm([each.p for each in tested.values()]), strict=True):
                p[arm][other] = adjusted
        result = {}
        for arm in ARMS:
            values = [value for value in losses[arm].values() if value is not None]
            result[arm] = Compared(values, differences[arm], p[arm])
        return result

    def verdict(self) -> str:
        """What won by the measure of the plan, at the last of the columns: the total that the dearest method sets."""
        title, read = list(self.columns().items())[-1]
        compared = self.compare(read)
        seeds = min(len(compared[arm].losses) for arm in (*SELECTORS, "random", "fresh"))

        def beating(other: str) -> list[str]:
            found = []
            for arm in SELECTORS:
                difference = compared[arm].differences[other]
                if difference is not None and difference.mean < 0 and compared[arm].p[other] < 0.05:
                    found.append(arm)
            return found

        better = beating("random")
        worth = [arm for arm in better if arm in beating("fresh")]

        def names(arms: list[str]) -> str:
            return ", ".join(SELECTORS[arm] for arm in arms) or "none"

        means = {arm: float(np.mean(one.losses)) for arm, one in compared.items() if one.losses and arm != "target"}
        order = ", ".join(f"{ARMS[arm]} {means[arm]:.3f}" for arm in sorted(means, key=means.__getitem__))
        state = "" if seeds == len(SEEDS) else f" This is provisional: some arms have {seeds} of {len(SEEDS)} seeds."
        return (
            f"**By the plan's measure** ({title}): better than the random tenth: {names(better)}; better than the "
            f"whole pool too, and so worth its cost: {names(worth)}. Means, lowest first: {order}.{state}"
        )

    # --------------------------------------------------------------------------------------------------------- tables

    def table(self, read: Reading) -> str:
        """A row an arm."""
        lines = [
            "| trained on | holdout loss | minus random tenth | p | minus whole pool | p | seeds |",
            "|---|---|---|---|---|---|---|",
        ]
        for arm, one in self.compare(read).items():
            if not any(name == arm for name, _ in self.trainings):
                continue
            row = [ARMS[arm], one.loss]
            for other in ("random", "fresh"):
                found = one.differences[other]
                row += ["" if found is None else _interval(found, "+"), _p(one.p.get(other))]
            lines.append(f"| {' | '.join([*row, str(len(one.losses))])} |")
        return "\n".join(lines)

    def costs(self) -> str:
        """What choosing costs, and what it chose."""
        lines = [
            "| chosen by | warm-up, TFLOP | scoring, TFLOP | CPU seconds | of the target's families | tokens |",
            "|---|---|---|---|---|---|",
        ]
        wanted = self.settings.target_families
        for arm in ("random", *SELECTORS):
            made = [c for (name, _), c in (self.choices if arm in SELECTORS else self.trainings).items() if name == arm]
            if not made:
                continue
            share = np.mean([sum(c["families"].get(f, 0) for f in wanted) / sum(c["families"].values()) for c in made])
            tokens = f"{np.mean([c['tokens'] for c in made]):.0f}"
            flops = ["0", "0", "0"]
            if arm in SELECTORS:
                flops = [tera(np.mean([c[key] for c in made])) for key in ("flops_warmup", "flops_scoring")]
                seconds = float(np.mean([c["cpu_seconds"] for c in made]))
                flops.append("< 1" if seconds < 1 else f"{seconds:.0f}")
            lines.append(f"| {' | '.join([ARMS[arm], *flops, f'{share:.0%}', tokens])} |")
        return "\n".join(lines)

    def pay_back(self) -> str:
        """After how many trainings on one choice it has paid, against the whole pool in random order."""
        lines = [
            "| chosen by | choosing, TFLOP | a training | whole pool to the same loss | runs until paid |",
            "|---|---|---|---|---|",
        ]
        for arm in SELECTORS:
            own, others, beyond = [], [], 0
            for seed in self.seeds:
                curve, fresh = self.curve(arm, seed), self.curve("fresh", seed)
                if curve is None or fresh is None:
                    continue
                point = point_within(curve, float("inf"))
                assert point is not None
                reached = flops_to_reach(fresh, point["holdout"]["all"])
                beyond += reached is None
                own.append(point["flops"])
                others.append(float(fresh[-1]["flops"]) if reached is None else reached)
            if not own:
                continue
            cost, mine, full = np.mean([self.cost(arm, seed) for seed in self.seeds]), np.mean(own), np.mean(others)
            runs = "never"
            if mine < full:
                paid = SelectionPayBack(float(cost), float(full), float(mine / full)).runs
                runs = f"{'at most ' if beyond else ''}{paid:.0f}"
            note = f" (not reached in {beyond} of {len(own)})" if beyond else ""
            lines.append(f"| {ARMS[arm]} | {tera(cost)} | {tera(mine)} | {tera(full)}{note} | {runs} |")
        return "\n".join(lines)

    def absent(self) -> str:
        """The missing trainings by arm, with their seeds."""
        seeds: dict[str, list[int]] = {}
        for cell in cells(list(ARMS), SEEDS):
            if cell.kind == "training" and cell.name in self.missing:
                seeds.setdefault(cell.arm, []).append(cell.seed)
        return "; ".join(f"{ARMS[arm]}: seeds {', '.join(map(str, own))}" for arm, own in seeds.items())

    def markdown(self) -> str:
        """Everything between the markers of the page."""
        done = self.planned - len(self.missing)
        first = f"{done} of {self.planned} cells have finished."
        if self.missing:
            first += f" Missing are {self.absent()}; the command below goes on with them."
        base = [float(curve[0]["holdout"]["all"]) for seed in self.seeds if (curve := self.curve("random", seed))]
        pool = np.mean([c["pool_tokens"] for c in self.trainings.values()])
        first += f" Before training the holdout's loss is {np.mean(base):.3f}. The pool has {pool:.0f} tokens."
        parts = [self.verdict(), first, "### What choosing costs, and what is chosen", self.costs()]
        for title, read in self.columns().items():
            parts += [f"### {title[0].upper()}{title[1:]}", self.table(read)]
            if "FLOPs" in title:
                arms = ["less"] if "LESS" in title else ["rds_plus", "el2n"]
                budget = np.mean([self.budget(arms, seed) for seed in self.seeds if self.curve("random", seed)])
                parts[-2] += f", {tera(budget)} TFLOP"
        return "\n\n".join([*parts, "### Runs until a choice has paid", self.pay_back()])


def _interval(one: Estimate, sign: str = "") -> str:
    return f"{one.mean:{sign}.3f} ± {one.half_width:.3f}"


def _p(p: float | None) -> str:
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def report(results: Path, page: Path = PAGE, image: Path = FIGURE) -> None:
    """Write the tables between the page's markers, and the figure; print the tables."""
    from influence_worth_figure import figure

    shown = Report(results)
    body = shown.markdown()
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    write_text_atomic(page, f"{before}{BEGIN}\n\n{body}\n\n{END}{rest.split(END)[1]}")
    figure(shown, image)
    print(body)
