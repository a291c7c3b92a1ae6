"""The seven claims against the cells that are there: a verdict and one sentence with the numbers for each."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyeff.governor import GovernorConfig, pay_back

from .metrics import Run, best_single, coverage, holm, losses, paired, regret
from .roster import GOVERNOR, UNIFORM, is_baseline
from .t1_cells import BRANCH, P1_AT, P1_COSTS, P2_COST, P2_FACTORS, P2_INTERVALS, PERIOD, SEEDS, TASKS, groups
from .t1_results import ORACLE, runs_of, with_oracle, with_uniform

Rows = Sequence[Mapping[str, Any]]
# Below this many seeds a cell of task and budget says nothing yet.
FEWEST = 5
RANKS = ("cheap", "middle", "dear")
ORDER = {"code": ("bytes", "loss", "align"), "images": ("centroid", "el2n", "grand")}


@dataclass(frozen=True)
class Verdict:
    """What became of a claim: "holds", "refuted" or "open" where cells are missing."""

    claim: str
    verdict: str
    text: str


def _complete(table: Mapping[tuple[str, float, str], Mapping[int, float]], *keys: tuple[str, float, str]) -> bool:
    return all(len(table.get(key, {})) >= FEWEST for key in keys)


def _seeds(rows: Rows) -> str:
    counts: dict[tuple[str, int], set[int]] = defaultdict(set)
    for row in rows:
        counts[row["task"], row["index"]].add(row["seed"])
    sizes = sorted({len(seeds) for seeds in counts.values()})
    return f"{sizes[0]} to {sizes[-1]} seeds" if len(sizes) > 1 else f"{sizes[0]} seeds" if sizes else "no cells"


def p1(rows: Rows) -> Verdict:
    """Sign of (refresh - no refresh) at a quarter of the budget."""
    table = losses(runs_of(rows, "main", BRANCH))
    config = GovernorConfig()
    right = decided = cells = 0
    wrong = []
    for task, budget in sorted({(t, b) for t, b, _ in table}):
        for cost in P1_COSTS:
            keys = (task, budget, f"{BRANCH}-{cost:g}"), (task, budget, "uniform-wsd")
            if not _complete(table, *keys):
                continue
            cells += 1
            difference = [table[keys[0]][s] - table[keys[1]][s] for s in table[keys[0]].keys() & table[keys[1]].keys()]
            mean, error = float(np.mean(difference)), float(np.std(difference, ddof=1)) / math.sqrt(len(difference))
            if abs(mean) <= error:
                continue
            decided += 1
            # Before its first selection a run has its prior and nothing else.
            predicted = pay_back(
                gain_ratio=config.prior_gain_ratio,
                decay=config.prior_decay,
                refresh_cost=cost,
                remaining=1 - P1_AT - 0.2,
                stale_for=None,
            ).pays()
            if predicted == (mean < 0):
                right += 1
            else:
                wrong.append(f"{task} at {cost:g}")
    if not cells:
        return Verdict("P1", "open", "no cells yet")
    share = right / decided if decided else math.nan
    holds = decided >= cells / 2 and share >= 0.8
    whole = cells == len(TASKS) * len(P1_COSTS) * 4
    text = f"right in {right} of {decided} decided cells ({share:.0%}), {cells - decided} undecided"
    text += f"; wrong: {', '.join(sorted(set(wrong)))}" if wrong else ""
    return Verdict("P1", ("holds" if holds else "refuted") if whole else "open", f"{text} ({_progress(whole, rows)})")


def _progress(whole: bool, rows: Rows) -> str:
    return _seeds(rows) if whole else f"so far, {_seeds(rows)}"


def p2(rows: Rows) -> Verdict:
    """The best interval against the cost."""
    table = losses(runs_of(rows, PERIOD))
    found = []
    for task in TASKS:
        best = []
        for factor in P2_FACTORS:
            by_interval = {}
            for every in P2_INTERVALS:
                name = f"{PERIOD}-{every:g}-{P2_COST * factor:g}"
                cells = [v for (t, _, p), v in table.items() if t == task and p == name and len(v) >= FEWEST]
                if cells:
                    by_interval[every] = float(np.mean(list(cells[0].values())))
            if len(by_interval) == len(P2_INTERVALS):
                best.append(_lowest(by_interval))
        if len(best) == len(P2_FACTORS):
            slope = float(np.polyfit(np.log(P2_FACTORS), np.log(best), 1)[0])
            shown = ", ".join(f"{x:.2f}" for x in best)
            found.append((slope, f"{task}: best intervals {shown} of the budget, exponent {slope:.2f}"))
    if not found:
        return Verdict("P2", "open", "no cells yet")
    outside = [slope for slope, _ in found if abs(slope - 0.5) > 0.15]
    text = "; ".join(text for _, text in found) + "; the constant is not tested, tau was not measured"
    if outside:
        return Verdict("P2", "refuted", text)
    return Verdict("P2", "open", text)


def _lowest(by_interval: Mapping[float, float]) -> float:
    """Where a quadratic through log interval is lowest, within the grid."""
    x, y = np.log(list(by_interval)), np.array(list(by_interval.values()))
    a, b, _ = np.polyfit(x, y, 2)
    place = -b / (2 * a) if a > 0 else x[int(y.argmin())]
    return float(np.exp(np.clip(place, x.min(), x.max())))


def p3(rows: Rows) -> Verdict:
    """The best selector at the smallest budget, free and charged."""
    table = losses(runs_of([row for row in rows if row["index"] == 0], "main"))
    flipped, said = [], []
    for task in TASKS:
        budgets = {b for t, b, _ in table if t == task}
        if not budgets:
            continue
        budget = budgets.pop()
        names = ORDER[task]
        keys = [(task, budget, f"static-{name}{end}") for name in names for end in ("", "-free")]
        if not _complete(table, *keys):
            continue
        best = {}
        shared = set.intersection(*(set(table[key]) for key in (*keys, (task, budget, UNIFORM))))
        base = [table[task, budget, UNIFORM][seed] for seed in shared]
        for end in ("", "-free"):
            own = {n: [table[task, budget, f"static-{n}{end}"][seed] for seed in shared] for n in names}
            best[end] = min(names, key=lambda n: float(np.mean(own[n])))
            # What cannot be paid is not run: the policy is uniform then, to the bit.
            if own[best[end]] == base:
                best[end] = "none"
        flipped.append(best[""] != best["-free"])
        said.append(f"{task}: {best['-free']} free, {best['']} charged")
    if not said:
        return Verdict("P3", "open", "no cells yet")
    whole = len(said) == len(TASKS)
    holds = sum(flipped) >= len(flipped) / 2
    return Verdict("P3", ("holds" if holds else "refuted") if whole else "open", "; ".join(said) + f" ({_seeds(rows)})")


def ranked_name(task: str, policy: str) -> str:
    """A policy's name with the selector's rank in place of its name, so that tasks can be averaged."""
    for name, rank in zip(ORDER[task.split("-")[0]], RANKS, strict=True):
        policy = policy.replace(name, rank)
    return policy


def regrets(rows: Rows) -> tuple[dict[str, list[float]], dict[tuple[str, float], bool]]:
    """Normalised regret of every policy in every decided cell, and which cells are decided."""
    table = losses(with_oracle(runs_of(rows, "main")))
    found: dict[str, list[float]] = defaultdict(list)
    decided = {}
    for task, budget in sorted({(t, b) for t, b, _ in table}):
        if not _complete(table, (task, budget, UNIFORM), (task, budget, GOVERNOR)):
            continue
        base, best = table[task, budget, UNIFORM], table[task, budget, ORACLE]
        for (t, b, policy), own in table.items():
            if (t, b) == (task, budget) and policy != ORACLE:
                result = regret(own, base, best)
                decided[task, budget] = result.decided
                if result.decided:
                    found[ranked_name(task, policy)].append(result.value)
    return dict(found), decided


def p4(rows: Rows) -> Verdict:
    """Regret against the best single baseline, and the loss against uniform everywhere."""
    found, decided = regrets(rows)
    if not decided:
        return Verdict("P4", "open", "no cells yet")
    cells = sum(decided.values())
    excess, p_values = {}, {}
    table = losses(runs_of(rows, "main") + with_uniform(rows))
    for task, budget, policy in sorted(table):
        if policy == GOVERNOR and _complete(table, (task, budget, policy), (task, budget, UNIFORM)):
            own, base = table[task, budget, GOVERNOR], table[task, budget, UNIFORM]
            shared = own.keys() & base.keys()
            share = np.mean([own[s] for s in shared]) / np.mean([base[s] for s in shared]) - 1
            excess[task] = max(excess.get(task, -math.inf), float(share))
            p_values[f"{task} {budget:.3g}"] = paired(own, base).p
    worst = max(excess, key=excess.__getitem__)
    text = f"worst against uniform {excess[worst]:+.1%} ({worst})"
    holds = excess[worst] <= 0.01
    if cells:
        baselines = {name: values for name, values in found.items() if is_baseline(name) and len(values) == cells}
        name, mean = best_single(baselines)
        own = float(np.mean(found[GOVERNOR]))
        text = f"mean regret {own:.2f}, best single baseline {name} {mean:.2f}, over {cells} cells; {text}"
        holds = holds and own <= 0.5 * mean
    adjusted = holm(p_values)
    differs = sum(p < 0.05 for p in adjusted.values())
    text += f"; differs from uniform (Wilcoxon, Holm) in {differs} of {len(adjusted)} cells"
    whole = len(decided) == len(TASKS) * 4
    return Verdict("P4", ("holds" if holds else "refuted") if whole else "open", f"{text} ({_progress(whole, rows)})")


def p5(rows: Rows) -> Verdict:
    """Coverage of forecasts' intervals."""
    runs = [run for run in runs_of(rows, "main", "control") if run.policy == GOVERNOR]
    share, count = coverage(runs)
    without = sum(p.low is None for run in runs for p in run.promises)
    if not count:
        return Verdict("P5", "open", "no cells yet")
    low, high = _coverage_spread(runs)
    own, _ = coverage([run for run in runs if "-" not in run.task])
    text = (
        f"{share:.1%} of {count} intervals ({low:.1%} to {high:.1%}, resampling runs; {own:.1%} without the negative "
    )
    text += f"controls), {without} without one"
    whole = len({(run.task, run.budget) for run in runs if "-" not in run.task}) == len(TASKS) * 4
    verdict = ("holds" if 0.85 <= share <= 0.95 else "refuted") if whole else "open"
    return Verdict("P5", verdict, f"{text} ({_progress(whole, rows)})")


def _coverage_spread(runs: Sequence[Run], *, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of the pooled share, whole runs resampled."""
    counts = np.array([(share * n, n) for run in runs for share, n in [coverage([run])] if n])
    picks = np.random.default_rng(0).integers(0, len(counts), size=(draws, len(counts)))
    held, total = counts[picks].sum(axis=1).T
    low, high = np.quantile(held / total, [0.025, 0.975])
    return float(low), float(high)


def p6(rows: Rows) -> Verdict:
    """Switches and loss with and without damping."""
    runs = runs_of(rows, "main")
    table = losses(runs)
    bare = "governor-no-damping"
    cells = [(t, b) for t, b, p in table if p == bare and _complete(table, (t, b, p), (t, b, GOVERNOR))]
    if not cells:
        return Verdict("P6", "open", "no cells yet")
    switches = {
        p: np.mean([r.switches for r in runs if r.policy == p and (r.task, r.budget) in cells])
        for p in (bare, GOVERNOR)
    }
    ratio = switches[bare] / switches[GOVERNOR] if switches[GOVERNOR] else math.inf
    relative = []
    for cell in cells:
        own, other = table[(*cell, GOVERNOR)], table[(*cell, bare)]
        relative += [own[s] / other[s] - 1 for s in own.keys() & other.keys()]
    mean, error = float(np.mean(relative)), float(np.std(relative, ddof=1)) / math.sqrt(len(relative))
    whole = len(cells) == len(TASKS) * 4
    text = f"{switches[GOVERNOR]:.1f} changes against {switches[bare]:.1f} ({ratio:.1f} x fewer), "
    text += f"J {mean:+.2%} +- {error:.2%}"
    holds = ratio >= 3 and mean <= error
    return Verdict("P6", ("holds" if holds else "refuted") if whole else "open", f"{text} ({_progress(whole, rows)})")


def p7(rows: Rows) -> Verdict:
    """Ranking of the selectors in two memory modes."""
    table = losses(runs_of(rows, "main", "mode"))
    said, differs, seen = [], [], 0
    full = sorted({b for t, b, _ in table if t == "code"})
    lora = sorted({b for t, b, _ in table if t == "code-lora"})
    for index, pair in enumerate(zip(full, lora, strict=False)):
        order = []
        for task, budget in zip(("code", "code-lora"), pair, strict=True):
            keys = [(task, budget, f"static-{name}") for name in ORDER["code"]]
            if _complete(table, *keys):
                order.append(
                    sorted(
                        ORDER["code"], key=lambda n: float(np.mean(list(table[task, budget, f"static-{n}"].values())))
                    )
                )
        if len(order) == 2:
            seen += 1
            differs.append(order[0] != order[1])
            said.append(f"budget {index + 1}: full {' < '.join(order[0])}, LoRA {' < '.join(order[1])}")
    if not said:
        return Verdict("P7", "open", "no cells yet")
    verdict = "holds" if any(differs) else "refuted" if seen == 4 else "open"
    return Verdict("P7", verdict, "; ".join(said))


# The kinds of cells that each claim rests on.
KINDS = ({"main", BRANCH}, {PERIOD}, {"main"}, {"main", "control"}, {"main", "control"}, {"main"}, {"main", "mode"})
CLAIMS: tuple[Callable[[Rows], Verdict], ...] = (p1, p2, p3, p4, p5, p6, p7)


def judge(rows: Rows) -> list[Verdict]:
    """All seven, from the cells that there are; none is settled before all of its cells have run."""
    wanted: dict[str, int] = defaultdict(int)
    for group in groups():
        wanted[group.kind] += len(group.makes(ORDER[group.cell.task], lambda: 0))
    missing = {kind for kind, count in wanted.items() if sum(row["kind"] == kind for row in rows) < count}
    found = []
    for claim, kinds in zip(CLAIMS, KINDS, strict=True):
        verdict = claim(rows)
        unsettled = verdict.verdict != "open" and bool(kinds & missing)
        found.append(Verdict(verdict.claim, "open", f"so far {verdict.text}") if unsettled else verdict)
    return found


__all__ = ["CLAIMS", "SEEDS", "Verdict", "judge", "regrets"]
