"""Tables of the real runs into docs/governor_results.md, verdicts into docs/governor_claims.md, and the figure.

What stands between the markers is written by ``python -m benchmarks.governor --tier t1`` and by nobody else.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import t1_results
from .metrics import Run, Summary, losses, summarise
from .roster import GOVERNOR, UNIFORM
from .t1_cells import TASKS, groups
from .t1_claims import ORDER, Verdict, judge, regrets
from .t1_results import ORACLE, runs_of, with_oracle, with_uniform
from .tasks.task import SPANS

ROOT = Path(__file__).resolve().parents[2]
CLAIMS, RESULTS = ROOT / "docs" / "governor_claims.md", ROOT / "docs" / "governor_results.md"
FIGURE = ROOT / "docs" / "images" / "governor_t1.png"
BEGIN, END = "<!-- t1: begin -->", "<!-- t1: end -->"
_BUDGETS = ("1", "2.5", "6.3", "16")


def write(work: Path) -> None:
    """Collect what the working directory has and write everything that is shown of it."""
    t1_results.collect(work)
    rows = t1_results.read()
    if not rows:
        print("no cells yet: nothing to show")
        return
    verdicts = judge(rows)
    _replace_claims(verdicts)
    _replace_results("\n".join(_lines(rows, verdicts)))
    draw(rows, FIGURE)
    for verdict in verdicts:
        print(f"{verdict.claim} {verdict.verdict}: {verdict.text}")


def _replace_claims(verdicts: Sequence[Verdict]) -> None:
    text = CLAIMS.read_text()
    for verdict in verdicts:
        result = f"**{verdict.verdict}**: {verdict.text}".replace("|", "/")
        pattern = rf"^(\| {verdict.claim} \|[^|]*\|[^|]*\|)[^|]*\|$"
        text, count = re.subn(pattern, lambda match, r=result: f"{match[1]} {r} |", text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{CLAIMS} must have one row for {verdict.claim}, found {count}")
    CLAIMS.write_text(text)


def _replace_results(section: str) -> None:
    text = RESULTS.read_text() if RESULTS.exists() else "# What the governor achieved\n"
    if BEGIN not in text:
        text = f"{text.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    RESULTS.write_text(f"{before}{BEGIN}\n{section}\n{END}{after}")


def _lines(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> Iterator[str]:
    yield "## Real runs on two small tasks\n"
    yield from _progress(rows)
    yield "\n### Claims\n"
    for verdict in verdicts:
        yield f"- **{verdict.claim} {verdict.verdict}**: {verdict.text}."
    yield "\n![J against uniform by budget, and both memory modes](images/governor_t1.png)"
    main = with_oracle(runs_of(rows, "main"))
    summaries = summarise(main, uniform=UNIFORM, oracle=ORACLE)
    for task in TASKS:
        mine = [s for s in summaries if s.task == task]
        if mine:
            yield from _task_table(task, mine)
    yield from _regret_table(rows)
    yield from _target_table(main)
    yield from _control_table(rows)
    yield from _mode_table(rows)


def _progress(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    from .t1 import digest_of

    selectors = {task: ORDER[task] for task in TASKS}
    wanted: dict[tuple[str, int], int] = defaultdict(int)
    current = {}
    for group in groups():
        makes = group.makes(selectors[group.cell.task], lambda: 0)
        wanted[group.cell.task, group.cell.budget] += len(makes)
        for name, make in makes.items():
            current[group.cell.label, group.cell.budget, name] = digest_of(make)
    made: dict[tuple[str, int], int] = defaultdict(int)
    for row in rows:
        made[row["task"].split("-")[0], row["index"]] += 1
    total, whole = sum(made.values()), sum(wanted.values())
    seconds = sum(row["cpu"] for row in rows)
    yield (
        f"{total} of {whole} cells have run, in {seconds / 3600:.2f} hours of CPU. A cell is a task, a policy, a "
        "budget and a seed; budgets are in units of the smallest. Numbers below are of the cells that are there."
    )
    if old := sum(current.get((row["task"], row["index"], row["policy"]), row["code"]) != row["code"] for row in rows):
        yield (
            f"\n{old} of them were made by an earlier version of their policy's code and would be made again; see what "
            "has changed since under *how they are made*."
        )
    yield "\n| task | " + " | ".join(f"budget {b}" for b in _BUDGETS) + " |"
    yield "|---" * 5 + "|"
    for task in TASKS:
        yield f"| {task} | " + " | ".join(f"{made[task, i]} of {wanted[task, i]}" for i in range(4)) + " |"


def _task_table(task: str, summaries: Sequence[Summary]) -> Iterator[str]:
    budgets = sorted({s.budget for s in summaries})
    cells = {(s.policy, s.budget): s for s in summaries}
    yield f"\n### {task}: J against tuned uniform, linear to zero\n"
    yield "Mean difference of J in per cent, with its 95 % bootstrap interval over seeds, and the worst seed of all"
    yield "budgets; below zero is better.\n"
    shares = " | ".join(f"budget {_BUDGETS[i]}" for i in range(len(budgets)))
    yield f"| policy | {shares} | worst seed | overhead | changes |"
    yield "|---" * (len(budgets) + 4) + "|"
    uniform = [cells.get((UNIFORM, b)) for b in budgets]
    means = ["" if s is None else f"{s.loss.mean:.4f}" for s in uniform]
    yield f"| J of {UNIFORM} | {' | '.join(means)} | | | |"
    order = list(
        dict.fromkeys(s.policy for s in summaries if not s.policy.startswith("every-") and s.policy != UNIFORM)
    )
    for policy in ["every-", *order]:
        shown, worst, overheads, switches = [], [], [], []
        for budget, base in zip(budgets, uniform, strict=True):
            s = _best_interval(summaries, budget) if policy == "every-" else cells.get((policy, budget))
            if s is None or base is None:
                shown.append("")
                continue
            d, level = s.against_uniform.difference, base.loss.mean / 100
            note = f" ({s.policy[6:]})" if policy == "every-" else ""
            shown.append(f"{d.mean / level:+.1f} ({d.low / level:+.1f} to {d.high / level:+.1f}){note}")
            worst.append(s.worst_seed)
            overheads.append(s.overhead)
            switches.append(s.switches)
        label = "best fixed interval, in hindsight" if policy == "every-" else policy
        yield (
            f"| {label} | {' | '.join(shown)} | {100 * max(worst):+.1f} | {np.mean(overheads):.1%} | "
            f"{np.mean(switches):.1f} |"
        )


def _best_interval(summaries: Sequence[Summary], budget: float) -> Summary | None:
    """The fixed interval and selector with the lowest J of those that have run on every seed there is."""
    family = [s for s in summaries if s.budget == budget and s.policy.startswith("every-")]
    whole = max((s.loss.n for s in family), default=0)
    return min((s for s in family if s.loss.n == whole), key=lambda s: s.against_uniform.difference.mean, default=None)


def _regret_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found, decided = regrets(rows)
    cells = sum(decided.values())
    if not cells:
        return
    yield "\n### Normalised regret\n"
    yield (
        f"(J - J_oracle) / (J_uniform - J_oracle), mean over the {cells} decided cells: 0 is the best charged fixed "
        "policy of each seed in hindsight (the luck of the best of thirty included), 1 is tuned uniform. Selectors by "
        "rank of cost.\n"
    )
    yield "| policy | mean | worst cell |"
    yield "|---|---|---|"
    for name, values in sorted(found.items(), key=lambda item: float(np.mean(item[1]))):
        if len(values) == cells:
            yield f"| {name} | {np.mean(values):.2f} | {max(values):.2f} |"


def flops_to_target(by_budget: Mapping[float, float], target: float) -> float:
    """FLOPs at which J, log-linear between the budgets that were run, first reaches a target; infinite if never."""
    points = sorted(by_budget.items())
    for (low, before), (high, after) in zip([points[0], *points], points, strict=False):
        if after <= target:
            if before <= target:
                return low
            share = (before - target) / (before - after)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return math.inf


def _target_table(runs: Sequence[Run]) -> Iterator[str]:
    table = losses(runs)
    lines = []
    for task in TASKS:
        budgets = sorted({b for t, b, p in table if t == task and p == UNIFORM})
        if len(budgets) < 3:
            continue
        target = float(np.median(list(table[task, budgets[2], UNIFORM].values())))
        medians = {}
        for policy in dict.fromkeys(p for t, _, p in table if t == task and p != ORACLE):
            seeds = set.intersection(*(set(table.get((task, b, policy), {})) for b in budgets))
            reached = [flops_to_target({b: table[task, b, policy][s] for b in budgets}, target) for s in seeds]
            if reached:
                medians[policy] = sorted(reached)[(len(reached) - 1) // 2]
        best = sorted(medians, key=medians.__getitem__)[:8]
        for policy in dict.fromkeys((*best, GOVERNOR, UNIFORM)):
            value = medians.get(policy, math.inf)
            # Nothing smaller than the smallest budget was run.
            atmost = "at most " if value <= budgets[0] else ""
            shown = f"{atmost}{value / budgets[2]:.2f}" if value < math.inf else "never"
            lines.append(f"| {task} | {policy} | {shown} |")
    if lines:
        yield "\n### FLOPs to uniform's J at the third budget\n"
        yield "Everything included, over the third budget; lower median over seeds. Best eight, governor and uniform.\n"
        yield "| task | policy | FLOPs |"
        yield "|---|---|---|"
        yield from dict.fromkeys(lines)


def _control_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    runs = with_uniform(rows)
    found = [s for s in summarise(runs, uniform=UNIFORM) if s.policy == GOVERNOR]
    if not found:
        return
    yield "\n### Negative controls\n"
    yield "The governor against tuned uniform, in per cent of J; it should lose at most its overhead.\n"
    yield "| control | budget | difference | overhead | changes | seeds |"
    yield "|---|---|---|---|---|---|"
    index = {(row["task"], row["budget"]): row["index"] for row in rows}
    uniform = losses(runs)
    for s in sorted(found, key=lambda s: (s.task, s.budget)):
        level = float(np.mean(list(uniform[s.task, s.budget, UNIFORM].values()))) / 100
        d = s.against_uniform.difference
        yield (
            f"| {s.task} | {_BUDGETS[index[s.task, s.budget]]} | {d.mean / level:+.1f} ({d.low / level:+.1f} to "
            f"{d.high / level:+.1f}) | {s.overhead:.1%} | {s.switches:.1f} | {d.n} |"
        )


def _mode_table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    table = losses(runs_of(rows, "main", "mode"))
    index = {(row["task"], row["budget"]): row["index"] for row in rows}
    names = [UNIFORM, *(f"static-{name}" for name in ORDER["code"])]
    lines = []
    for task, label in (("code", "full"), ("code-lora", "LoRA, rank 8")):
        for budget in sorted({b for t, b, p in table if t == task and p == UNIFORM}):
            own = [table.get((task, budget, name)) for name in names]
            means = [math.nan if each is None else float(np.mean(list(each.values()))) for each in own]
            if any(map(math.isnan, means)):
                continue
            marked = [f"**{m:.4f}**" if m == min(means) else f"{m:.4f}" for m in means]
            lines.append(f"| {label} | {_BUDGETS[index[task, budget]]} | {budget:.3g} | " + " | ".join(marked) + " |")
    if lines:
        yield "\n### Data, memory mode and compute together\n"
        yield (
            "J of the same model and pool by memory mode, selector and budget (in FLOPs, selection included). A LoRA "
            "step costs fewer FLOPs, so the same scoring is dearer beside it.\n"
        )
        yield "| mode | budget | FLOPs | uniform | " + " | ".join(names[1:]) + " |"
        yield "|---" * 7 + "|"
        yield from lines


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """J over uniform's by budget for each task, and J by FLOPs for both memory modes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    smallest = {row["task"]: row["budget"] / SPANS[row["index"]] for row in rows}
    scaled = {
        (task, budget / smallest[task], policy): own
        for (task, budget, policy), own in losses(with_oracle(runs_of(rows, "main", "mode"))).items()
    }
    table = dict(sorted(scaled.items()))
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.8), layout="constrained")
    for axis, task in zip(axes, TASKS, strict=False):
        names = [f"static-{name}" for name in ORDER[task]]
        for policy in (*names, "ado", "cads-s", ORACLE, GOVERNOR):
            points = []
            for budget in sorted({b for t, b, _ in table if t == task}):
                own, base = table.get((task, budget, policy), {}), table.get((task, budget, UNIFORM), {})
                if shared := own.keys() & base.keys():
                    points.append((budget, np.mean([own[s] / base[s] - 1 for s in shared]) * 100))
            if points:
                strong = {"color": "black", "linewidth": 2.2} if policy == GOVERNOR else {"linewidth": 1.2}
                style = "--" if policy == ORACLE else "-"
                axis.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=policy, **strong)
        axis.axhline(0, color="0.8", linewidth=0.8, zorder=0)
        axis.set(title=task, ylabel="J against uniform, %")
        axis.legend(frameon=False, fontsize=8)
    for mode, style in (("code", "-"), ("code-lora", "--")):
        for i, policy in enumerate([UNIFORM, *(f"static-{name}" for name in ORDER["code"])]):
            points = sorted(
                (b, float(np.mean(list(v.values())))) for (t, b, p), v in table.items() if (t, p) == (mode, policy)
            )
            if points:
                label = f"{policy}, {'LoRA' if mode.endswith('lora') else 'full'}"
                axes[2].plot(*zip(*points, strict=True), style, color=f"C{i}", marker="o", markersize=3, label=label)
    axes[2].set(title="code in two memory modes", ylabel="J, nats")
    if axes[2].lines:
        axes[2].legend(frameon=False, fontsize=7)
    for axis in axes:
        axis.set(xscale="log", xlabel="budget, in units of the smallest", xlim=(0.8, 20))
        axis.set_xticks([float(each) for each in _BUDGETS], _BUDGETS)
        axis.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
